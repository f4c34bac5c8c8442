"""Renames stored tensors to the parameters of the model's class, and checks what it drops."""

from __future__ import annotations

import contextlib
import logging
import re

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..backends.backend import Backend
from ..errors import AssemblyError
from ..text import listed
from .entries import IO_WEIGHTS

logger = logging.getLogger(__name__)

Weights = dict[str, mx.array]


def rename_weights(model: nn.Module, weights: Weights, backend: Backend) -> Weights:
    """Rename weights to the model's parameters, without evaluating any.

    Args:
        model: An instance of the model's class.
        weights: The arrays by their names in the checkpoint.
        backend: The library that the class is from.

    Returns:
        The arrays by the names of the model's parameters.

    Raises:
        AssemblyError: `sanitize` drops a tensor that no class is known to drop.
    """
    return _align_experts(model, _sanitize(model, weights, backend))


def leave_out_absent(model: nn.Module, weights: Weights, backend: Backend) -> None:
    """Have the class remove parts that a checkpoint may lack: Gemma 3 a head that is tied.

    Some classes do so in `sanitize`, which weights under the model's own names do not need.

    Args:
        model: An instance of the model's class, changed in place.
        weights: The arrays by the names of the model's parameters.
        backend: The library that the class is from.
    """
    if dict(tree_flatten(model.parameters())).keys() <= weights.keys():
        return
    stand_ins = {name: mx.zeros(array.shape, array.dtype) for name, array in weights.items()}
    with contextlib.suppress(Exception):  # what is missing then is listed by the caller
        backend.sanitize(model, stand_ins)


def _sanitize(model: nn.Module, weights: Weights, backend: Backend) -> Weights:
    """Run the class's `sanitize`, and keep each quantized embedding's scales and biases with it."""
    # `sanitize` knows unquantized embeddings and heads only, so it gets their weight alone; scales
    # and biases follow to where that array went, or are dropped with it.
    companions: dict[int, tuple[mx.array, mx.array, mx.array]] = {}
    for name in [name for name in weights if name.endswith(IO_WEIGHTS)]:
        module = name.removesuffix(".weight")
        if f"{module}.scales" in weights:
            weight = weights[name]
            companions[id(weight)] = (
                weight,
                weights.pop(f"{module}.scales"),
                weights.pop(f"{module}.biases"),
            )
    before = dict(weights)
    weights = backend.sanitize(model, weights)
    modules = {path for path, _ in model.named_modules()}
    for name, array in list(weights.items()):
        if id(array) not in companions:
            continue
        module = name.removesuffix(".weight")
        if module in modules:
            _, weights[f"{module}.scales"], weights[f"{module}.biases"] = companions[id(array)]
        else:
            del weights[name]
    _check_dropped(before, weights)
    return weights


_MAY_DROP = re.compile(
    r"(^|.*\.)(mtp\.|rotary_emb|input_(min|max)$|output_(min|max)$|lm_head\.weight$)"
    r"|.*\.layers\.\d+\.self_attn\.([kv]_proj|[kv]_norm)\."  # of layers that share K and V
)
"""Tensors that a model class may drop; the tower of a text load is not read at all."""


def _check_dropped(before: Weights, after: Weights) -> None:
    """Log what `sanitize` dropped; raise AssemblyError for tensors that must not be dropped."""
    # A new array with the tail of an old name is that one, changed: a norm shifted, a convolution
    # transposed.
    kept = {id(array) for array in after.values()}
    known = {id(array) for array in before.values()}
    changed = {_tail(name) for name, array in after.items() if id(array) not in known}
    dropped = [
        name
        for name, array in before.items()
        if id(array) not in kept and _tail(name) not in changed
    ]
    unknown = [name for name in dropped if not _MAY_DROP.match(name)]
    if unknown:
        raise AssemblyError("the model class drops these tensors:" + listed(unknown))
    if dropped:
        logger.info("dropped by the model class: %s", ", ".join(dropped))


def _tail(name: str) -> str:
    """Return a name from its layer number on, or its last two components."""
    match = re.search(r"\.(layers|blocks)\.\d+\..*", name)
    return match[0] if match else ".".join(name.split(".")[-2:])


def _align_experts(model: nn.Module, weights: Weights) -> Weights:
    """Move stacked experts to the model's own SwitchGLU (`switch_mlp` or `experts.switch_glu`)."""
    paths = [path for path, module in model.named_modules() if type(module).__name__ == "SwitchGLU"]
    parents = {path.removesuffix(".switch_mlp") for path in paths if path.endswith(".switch_mlp")}
    aligned: Weights = {}
    for name, array in weights.items():
        base, marker, rest = name.partition(".switch_mlp.")
        target = f"{base}.switch_mlp"
        if marker and base not in parents:
            target = next((path for path in paths if path.startswith(base + ".")), target)
        aligned[f"{target}.{rest}" if marker else name] = array
    return aligned
