"""Joins stacked experts from pieces and from single experts."""

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
    """Make unevaluated arrays for tensors that are not read, with experts stacked.

    A class's `sanitize` needs all tensors, since it decides about some by the presence of others.
    The arrays take no memory, and their values are not the tensors': never evaluate them.

    Args:
        specs: Name, dtype and shape of the tensors.

    Returns:
        The arrays by name.
    """
    zeros = {spec.name: mx.zeros(spec.shape, MLX_DTYPES[spec.dtype]) for spec in specs}
    return stack_experts(join_pieces(zeros, lazy=True))


def join_pieces(weights: dict[str, mx.array], lazy: bool) -> dict[str, mx.array]:
    """Replace the pieces `X.experts_<first>_<last>` in `weights` by one X, ordered by expert.

    Args:
        weights: Changed in place.
        lazy: Leave the joined arrays unevaluated.

    Returns:
        `weights`.

    Raises:
        AssemblyError: Experts are missing between the pieces.
    """
    for stack, pieces in stacks_in_pieces(weights).items():
        weights[stack] = mx.concatenate([weights.pop(name) for name in pieces], axis=0)
        if not lazy:
            mx.eval(weights[stack])  # one by one: frees its pieces before the next is read
    return weights


def stack_experts(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Replace the tensors of unquantized single experts in `weights` by stacks.

    Args:
        weights: Changed in place.

    Returns:
        `weights`.

    Raises:
        AssemblyError: The experts of a stack are not numbered from 0 without gaps.
    """
    members: dict[str, dict[int, str]] = defaultdict(dict)
    for name in weights:
        if match := _EXPERT.fullmatch(name):
            members[f"{match['base']}.switch_mlp.{match['rest']}"][int(match["expert"])] = name
    for stack, experts in members.items():
        if sorted(experts) != list(range(len(experts))):
            raise AssemblyError(f"{stack}: experts are missing between 0 and {max(experts)}")
        weights[stack] = mx.stack([weights.pop(experts[expert]) for expert in range(len(experts))])
    return weights
