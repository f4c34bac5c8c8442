"""Stacks of experts, joined from pieces and from single experts."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

import mlx.core as mx

from ..backends.dtypes import MLX_DTYPES
from ..errors import AssemblyError
from ..files.tensor_header import TensorSpec
from ..store.format import stacks_in_pieces

_EXPERT = re.compile(r"(?P<base>.+)\.experts\.(?P<expert>\d+)\.(?P<rest>\w+_proj\.\w+)")


def placeholders(specs: Iterable[TensorSpec]) -> dict[str, mx.array]:
    """Name -> an array of the tensor's shape and dtype that must never be evaluated; stacks whole.

    For tensors that are not read here: `sanitize` judges tensors by others, so it must see them
    all. Unevaluated, they take no memory.
    """
    found = {spec.name: mx.zeros(spec.shape, MLX_DTYPES[spec.dtype]) for spec in specs}
    return stack_experts(join_pieces(found, lazy=True))


def join_pieces(weights: dict[str, mx.array], lazy: bool) -> dict[str, mx.array]:
    """Pieces `X.experts_<first>_<last>` become one X, in the order of the experts."""
    for stack, pieces in stacks_in_pieces(weights).items():
        weights[stack] = mx.concatenate([weights.pop(name) for name in pieces], axis=0)
        if not lazy:
            mx.eval(weights[stack])  # one at a time: its pieces are freed before the next is read
    return weights


def stack_experts(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Experts that were left unquantized, one tensor each, become stacks."""
    members: dict[str, dict[int, str]] = defaultdict(dict)
    for name in weights:
        if match := _EXPERT.fullmatch(name):
            members[f"{match['base']}.switch_mlp.{match['rest']}"][int(match["expert"])] = name
    for stack, experts in members.items():
        if sorted(experts) != list(range(len(experts))):
            raise AssemblyError(f"{stack}: experts are missing between 0 and {max(experts)}")
        weights[stack] = mx.stack([weights.pop(experts[expert]) for expert in range(len(experts))])
    return weights
