"""split_tensors(): tensor parallelism. Each rank of a group keeps its part of every layer.

The model class's own `shard` of mlx-lm says which layer is cut along its outputs and which along
its inputs. Rotated layers pass through it as the quantized layers that they are without their
rotations. A rotation mixes channels inside a group only: whoever has all inputs needs it whole, and
of a layer cut along its inputs each rank takes the groups that its weights read.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers import distributed
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

from ..errors import ParoquantStreamError, SplitError
from ..rotation.layers import RotatedLayer, RotateQuantizedLinear, RotateSwitchGLU
from .slices import Slice, rank_slice

Take = Callable[[str, mx.array, Slice], mx.array]
"""Gives the slice of a parameter, evaluated or not, from the parameter's name in the model, the
whole array as the model has it, unread if that is lazy, and which slice.
"""
_ROTATION = {"theta": 2, "pairs": 1, "channel_scales": 1}
"""The parameters of a rotation, and how many channels one item of each last axis is for."""
_lock = threading.Lock()


def split_tensors(model: nn.Module, group: Any, take: Take | None = None) -> None:
    """Leave in a model what this rank of a group needs for its part of every layer.

    All ranks call it, each with a model of its own, and then call the model with the same inputs.
    Nothing is evaluated.

    Args:
        model: Its weights not read yet, so that no more is read than is needed.
        group: An `mx.distributed` group.
        take: Gives the parts, once it is sure that the model can be split; by default they are cut
            out of the model's own arrays.

    Raises:
        SplitError: Its class cannot be split, or a layer or its heads do not divide over the ranks;
            the model is as it was.
    """
    if not hasattr(model, "shard"):
        raise SplitError(
            f"{type(model).__module__}.{type(model).__name__}: expected a model class that has "
            "shard(), this one has none; run it in one process or split it by layers (of a vision "
            "model the text part may have one: load it with force_text=True)"
        )
    if group.size() > 1:
        _split(model, group, take)


def read_by_layer(model: nn.Module) -> None:
    """Evaluate a model layer by layer, so that of what is cut off one layer at most is in memory."""
    for module in model.modules():
        mx.eval([array for array in module.values() if isinstance(array, mx.array)])


def _split(model: nn.Module, group: Any, take: Take | None) -> None:
    with _all_or_nothing(model, group.size()) as before:
        cutter = _Cutter(model)
        _cut_layers(model, group, cutter)
        for path, module, _, attributes in before:
            _check_divided(path, attributes, vars(module), group.size())
        if take:
            cutter.replace(model, take)


def _cut_layers(model: nn.Module, group: Any, cutter: _Cutter) -> None:
    kinds = RotateQuantizedLinear, RotateSwitchGLU
    layers = {path: module for path, module in model.named_modules() if isinstance(module, kinds)}
    if any(getattr(layer, "ranks", None) for layer in layers.values()):
        raise SplitError(f"{type(model).__name__}: is split already; load it again to split it")
    rotations = {path: _without_rotations(layer) for path, layer in layers.items()}
    with _in_the_place_of_mlx(cutter):
        model.shard(group)
    for path, layer in layers.items():
        for prefix, reader in layer.readers.items():
            weights = layer[reader] if reader else layer
            part = cutter.part(".".join(filter(None, (path, reader, "scales"))))
            by_inputs = part is not None and part.axis == weights.scales.ndim - 1
            for leaf, channels in _ROTATION.items():
                name, array = f"{path}.{prefix}{leaf}", rotations[path].pop(prefix + leaf)
                if part and by_inputs:
                    groups = Slice(1, part.ranges).widened(layer.group_size // channels)
                    array = cutter.cut(name, array, groups)
                layer[prefix + leaf] = array
            if layer[f"{prefix}pairs"].shape[1] != weights.scales.shape[-1] * layer.group_size:
                raise SplitError(f"{path}: its class cuts its inputs in a way not known here")


def _without_rotations(layer: RotatedLayer) -> dict[str, mx.array]:
    """Takes the rotations' parameters out of a layer, so that `shard` sees the others only."""
    names = [prefix + leaf for prefix in layer.readers for leaf in _ROTATION]
    return {name: layer.pop(name) for name in names}


class _Cutter:
    """Cuts a layer's parameters as mlx's own function does, and notes how each was cut."""

    def __init__(self, model: nn.Module) -> None:
        self._cuts: dict[str, tuple[mx.array, Slice, mx.array]] = {}
        self._names = {
            id(array): name for name, array in dict(tree_flatten(model.parameters())).items()
        }

    def __call__(
        self, parameters: dict[Any, Any], sharding_predicate: Callable[..., Any], group: Any = None
    ) -> Any:
        """The tree of parameters, each cut where the predicate of path and array says how."""
        group = group or mx.distributed.init()

        def cut(path: str, array: Any) -> Any:
            how = sharding_predicate(path, array) if isinstance(array, mx.array) else None
            if how is None:
                return array
            axis, segments = (how, 1) if isinstance(how, int) else how
            name = self._names.get(id(array))
            try:
                part = rank_slice(array.shape, axis, segments, group.rank(), group.size())
            except ValueError as error:
                raise SplitError(
                    f"{name or path}, shape {array.shape}: {error}; take a number of ranks that "
                    "divides it"
                ) from error
            if name is None:  # made by `shard` itself, as heads repeated for ranks to have one each
                return part.of(array)
            return self.cut(name, array, part)

        return tree_map_with_path(cut, parameters)

    def cut(self, name: str, array: mx.array, part: Slice) -> mx.array:
        """The slice of a parameter, unread."""
        self._cuts[name] = array, part, part.of(array)
        return self._cuts[name][2]

    def part(self, name: str) -> Slice | None:
        """What was cut out of a parameter; None: it is whole."""
        return self._cuts[name][1] if name in self._cuts else None

    def replace(self, model: nn.Module, take: Take) -> None:
        """Puts in the place of each slice what `take` gives."""
        found = dict(tree_flatten(model.parameters()))
        for name, (whole, part, lazy) in self._cuts.items():
            if found.get(name) is lazy:  # else `shard` has worked on it
                model.update(tree_unflatten([(name, take(name, whole, part))]))


@contextlib.contextmanager
def _in_the_place_of_mlx(cutter: _Cutter) -> Iterator[None]:
    """For the body MLX cuts parameters by `cutter`, and its two classes of quantized linears are
    not put in the place of rotated ones, which are cut where they are.
    """

    def from_quantized_linear(kind: Any, by_inputs: bool) -> Any:
        original: Callable[..., nn.Module] = kind.from_quantized_linear

        def split(layer: nn.Module, *, segments: Any = 1, group: Any = None) -> nn.Module:
            if not isinstance(layer, RotateQuantizedLinear):
                return original(layer, segments=segments, group=group)
            how = "sharded-to-all" if by_inputs else "all-to-sharded"
            distributed.shard_inplace(layer, how, segments=segments, group=group)
            layer.ranks = (group or mx.distributed.init()) if by_inputs else None
            return layer

        return staticmethod(split)

    columns, rows = distributed.QuantizedAllToShardedLinear, distributed.QuantizedShardedToAllLinear
    ours: list[tuple[Any, str, Any]] = [
        (distributed, "_shard", cutter),
        (columns, "from_quantized_linear", from_quantized_linear(columns, by_inputs=False)),
        (rows, "from_quantized_linear", from_quantized_linear(rows, by_inputs=True)),
    ]
    with _lock:
        before = [(home, name, vars(home)[name]) for home, name, _ in ours]
        try:
            for home, name, value in ours:
                setattr(home, name, value)
            yield
        finally:
            for home, name, value in before:
                setattr(home, name, value)


@contextlib.contextmanager
def _all_or_nothing(
    model: nn.Module, count: int
) -> Iterator[list[tuple[str, nn.Module, dict[str, Any], dict[str, Any]]]]:
    """Every module's path, items and attributes before the body; put back when it fails.

    Raises SplitError for what else the body raises.
    """
    before = [(path, m, dict(m), dict(vars(m))) for path, m in model.named_modules()]
    try:
        yield before
    except BaseException as error:
        for _, module, parameters, attributes in before:
            dict.clear(module)
            dict.update(module, parameters)
            vars(module).clear()
            vars(module).update(attributes)
        if isinstance(error, ParoquantStreamError) or not isinstance(error, Exception):
            raise
        raise SplitError(f"{type(model).__module__}, {count} ranks: {error}") from error


def _check_divided(path: str, before: dict[str, Any], after: dict[str, Any], count: int) -> None:
    """`shard` divides numbers of heads by the ranks and rounds down; fewer heads than ranks are
    right only where it leaves one of them on several ranks.
    """
    for name, old in before.items():
        new = after.get(name)
        if type(old) is not int or type(new) is not int or new >= old or new * count == old:
            continue
        if new != 1 or count % old:
            raise SplitError(
                f"{path}: its {name} of {old} does not divide over {count} ranks; take a number of "
                "ranks that divides it"
            )
