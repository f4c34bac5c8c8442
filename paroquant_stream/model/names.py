"""The names that the model's own class has for stored tensors, and which it may drop."""

from __future__ import annotations

import logging
import re

import mlx.core as mx
import mlx.nn as nn

from ..backends.backend import Backend
from ..errors import AssemblyError
from ..text import listed
from .entries import IO_WEIGHTS

logger = logging.getLogger(__name__)

Weights = dict[str, mx.array]


def named_for(model: nn.Module, weights: Weights, backend: Backend) -> Weights:
    """The weights under the model's names; raises AssemblyError when `sanitize` drops a tensor of
    no known kind. No array is evaluated.
    """
    return _align_experts(model, _sanitize(model, weights, backend))


def _sanitize(model: nn.Module, weights: Weights, backend: Backend) -> Weights:
    """The weights under the model's names, each quantized embedding's scales and biases beside it.

    Of a quantized embedding or head only the weight passes through `sanitize`, which knows
    unquantized ones; where that array went, its scales and biases follow. Dropped, or of no use to
    the model, all three go.
    """
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


_DROPPED = re.compile(
    r"(^|.*\.)(mtp\.|rotary_emb|input_(min|max)$|output_(min|max)$|lm_head\.weight$)"
    r"|.*\.layers\.\d+\.self_attn\.([kv]_proj|[kv]_norm)\."  # of layers that share K and V
)
"""What a model class may drop of a checkpoint; a tower in text mode is not read at all."""


def _check_dropped(before: Weights, after: Weights) -> None:
    """Raises AssemblyError when `sanitize` dropped a tensor of no known kind; logs the others.

    A tensor that is not in `after` was dropped, unless a new one in `after` has its tail: then it
    was changed (a norm shifted, a convolution transposed).
    """
    kept = {id(array) for array in after.values()}
    known = {id(array) for array in before.values()}
    changed = {_tail(name) for name, array in after.items() if id(array) not in known}
    dropped = [
        name
        for name, array in before.items()
        if id(array) not in kept and _tail(name) not in changed
    ]
    unknown = [name for name in dropped if not _DROPPED.match(name)]
    if unknown:
        raise AssemblyError("the model class has no use for these tensors:" + listed(unknown))
    if dropped:
        logger.info("not used by the model class: %s", ", ".join(dropped))


def _tail(name: str) -> str:
    """A name from its layer's number on, or its last two words."""
    match = re.search(r"\.(layers|blocks)\.\d+\..*", name)
    return match[0] if match else ".".join(name.split(".")[-2:])


def _align_experts(model: nn.Module, weights: Weights) -> Weights:
    """Stacked experts under the path of the model's own MoE module (`switch_mlp`,
    `experts.switch_glu`).
    """
    paths = [path for path, module in model.named_modules() if type(module).__name__ == "SwitchGLU"]
    homes = {
        path.rsplit(".switch_mlp", 1)[0] if path.endswith(".switch_mlp") else None for path in paths
    }
    aligned: Weights = {}
    for name, array in weights.items():
        base, marker, rest = name.partition(".switch_mlp.")
        home = f"{base}.switch_mlp"
        if marker and base not in homes:
            home = next((path for path in paths if path.startswith(base + ".")), home)
        aligned[f"{home}.{rest}" if marker else name] = array
    return aligned
