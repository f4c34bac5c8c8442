"""Tensor parallelism: each rank of a group keeps its part of every layer.

The method `shard` of mlx-lm's model class decides which layers are split along their outputs and
which along their inputs. It sees rotated layers as quantized layers, without their rotations. A
rotation mixes channels only inside a group: a rank with all inputs of a layer needs the whole
rotation; of a layer split along its inputs, a rank needs the groups that its weights read.
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

SliceReader = Callable[[str, mx.array, Slice], mx.array]
"""Called with a parameter's name in the model, its whole array, perhaps lazy, and a slice; returns
the slice, evaluated or lazy.
"""
_ROTATION = {"theta": 2, "pairs": 1, "channel_scales": 1}
"""Parameter of a rotation -> channels for each item of its last axis."""
_lock = threading.Lock()


def split_tensors(model: nn.Module, group: Any, reader: SliceReader | None = None) -> None:
    """Reduce a model to this rank's part of every layer, without evaluating anything.

    All ranks call it, each with its own copy of the model, and then call the model with the same
    inputs. If it fails, the model is unchanged.

    Args:
        model: Its weights should be unevaluated, so that only the needed ones are read.
        group: An `mx.distributed` group.
        reader: Returns the slices, called once it is certain that the model can be split; None to
            slice the model's own arrays.

    Raises:
        SplitError: The model class cannot be split, or a layer or its heads do not divide over the
            ranks.
    """
    if not hasattr(model, "shard"):
        raise SplitError(
            f"{type(model).__module__}.{type(model).__name__}: expected a model class that has "
            "shard(), this one has none; run it in one process or split it by layers (of a vision "
            "model the text part may have one: load it with force_text=True)"
        )
    if group.size() > 1:
        _split(model, group, reader)


def read_by_layer(model: nn.Module) -> None:
    """Evaluate a model layer by layer, so that at most one unsplit layer is in memory."""
    for module in model.modules():
        mx.eval([array for array in module.values() if isinstance(array, mx.array)])


def _split(model: nn.Module, group: Any, reader: SliceReader | None) -> None:
    with _restored_on_error(model, group.size()) as before:
        slicer = _Slicer(model)
        _split_layers(model, group, slicer)
        for path, module, _, attributes in before:
            _check_divided(path, attributes, vars(module), group.size())
        if reader:
            slicer.replace(model, reader)


def _split_layers(model: nn.Module, group: Any, slicer: _Slicer) -> None:
    kinds = RotateQuantizedLinear, RotateSwitchGLU
    layers = {path: module for path, module in model.named_modules() if isinstance(module, kinds)}
    if any(getattr(layer, "ranks", None) for layer in layers.values()):
        raise SplitError(f"{type(model).__name__}: is already split; load it again to split it")
    rotations = {path: _remove_rotations(layer) for path, layer in layers.items()}
    with _mlx_patched(slicer):
        model.shard(group)
    for path, layer in layers.items():
        for prefix, reader in layer.readers.items():
            weights = layer[reader] if reader else layer
            part = slicer.part(".".join(filter(None, (path, reader, "scales"))))
            by_inputs = part is not None and part.axis == weights.scales.ndim - 1
            for leaf, channels in _ROTATION.items():
                name, array = f"{path}.{prefix}{leaf}", rotations[path].pop(prefix + leaf)
                if part and by_inputs:
                    groups = Slice(1, part.ranges).scaled(layer.group_size // channels)
                    array = slicer.slice(name, array, groups)
                layer[prefix + leaf] = array
            if layer[f"{prefix}pairs"].shape[1] != weights.scales.shape[-1] * layer.group_size:
                raise SplitError(f"{path}: its class splits its inputs in an unknown way")


def _remove_rotations(layer: RotatedLayer) -> dict[str, mx.array]:
    """Remove and return a layer's rotation parameters, so that `shard` does not see them."""
    names = [prefix + leaf for prefix in layer.readers for leaf in _ROTATION]
    return {name: layer.pop(name) for name in names}


class _Slicer:
    """Slices a layer's parameters as mlx's own function does, and records each slice."""

    def __init__(self, model: nn.Module) -> None:
        self._slices: dict[str, tuple[mx.array, Slice, mx.array]] = {}
        self._names = {
            id(array): name for name, array in dict(tree_flatten(model.parameters())).items()
        }

    def __call__(
        self, parameters: dict[Any, Any], sharding_predicate: Callable[..., Any], group: Any = None
    ) -> Any:
        """Slice a tree of parameters; the predicate returns the axis for a path and an array."""
        group = group or mx.distributed.init()

        def slice_parameter(path: str, array: Any) -> Any:
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
            if name is None:  # computed by `shard` itself, like heads repeated for the ranks
                return part.of(array)
            return self.slice(name, array, part)

        return tree_map_with_path(slice_parameter, parameters)

    def slice(self, name: str, array: mx.array, part: Slice) -> mx.array:
        """Return a slice of a parameter, lazy."""
        self._slices[name] = array, part, part.of(array)
        return self._slices[name][2]

    def part(self, name: str) -> Slice | None:
        """Return which slice of a parameter was kept; None if it is whole."""
        return self._slices[name][1] if name in self._slices else None

    def replace(self, model: nn.Module, reader: SliceReader) -> None:
        """Replace each slice in the model by what the reader returns."""
        found = dict(tree_flatten(model.parameters()))
        for name, (whole, part, lazy) in self._slices.items():
            if found.get(name) is lazy:  # else `shard` computed something from it
                model.update(tree_unflatten([(name, reader(name, whole, part))]))


@contextlib.contextmanager
def _mlx_patched(slicer: _Slicer) -> Iterator[None]:
    """Let MLX slice by `slicer` during the body, and split rotated layers in place."""

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
        (distributed, "_shard", slicer),
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
def _restored_on_error(
    model: nn.Module, count: int
) -> Iterator[list[tuple[str, nn.Module, dict[str, Any], dict[str, Any]]]]:
    """Provide every module's path, items and attributes; restore them if the body fails."""
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
    """Check that the numbers of heads, which `shard` divides and rounds down, divide evenly."""
    for name, old in before.items():
        new = after.get(name)
        if type(old) is not int or type(new) is not int or new >= old or new * count == old:
            continue
        if new != 1 or count % old:  # fewer heads than ranks: one head on several ranks is right
            raise SplitError(
                f"{path}: its {name} of {old} does not divide over {count} ranks; take a number of "
                "ranks that divides it"
            )
