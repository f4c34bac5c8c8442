"""Experts of a layer, and the pieces of stacked tensors that their shards make."""

from __future__ import annotations

import bisect
import itertools
from collections import defaultdict
from collections.abc import Iterator

from ..checkpoint.layout import EXPERT
from ..files.tensor_header import TensorSpec
from .task import Operation

_SHARED_LEAVES = ("theta", "pairs", "channel_scales")
_NAMED = 10  # missing experts of one stack that a message names
_Stacks = dict[str, dict[int, Operation]]


def split_experts(operations: Iterator[Operation]) -> tuple[list[Operation], _Stacks]:
    """Separate the operations of plain linears from those of experts.

    Returns:
        The plain ones, and the experts' by stacked name and number of the expert.
    """
    plain: list[Operation] = []
    stacks: _Stacks = defaultdict(dict)
    for operation in operations:
        module, leaf = operation.outputs[0].name.rsplit(".", 1)
        match = EXPERT.fullmatch(module)
        if match:
            stack = f"{match['base']}.switch_mlp.{match['projection']}.{leaf}"
            stacks[stack][int(match["expert"])] = operation
        else:
            plain.append(operation)
    return plain, stacks


def layer_of(stack: str) -> str:
    """Return the name of the layer whose experts a stacked tensor joins."""
    return stack.partition(".switch_mlp.")[0]


def counted_experts(stacks: _Stacks) -> dict[str, int]:
    """Count the experts of each layer where the config does not: the largest number plus one."""
    widest: dict[str, int] = defaultdict(int)
    for name, members in stacks.items():
        widest[layer_of(name)] = max(widest[layer_of(name)], 1 + max(members))
    return widest


def shared_rotation_issues(stacks: _Stacks, operations: list[Operation]) -> Iterator[str]:
    """Find rotations that a layer's experts need and lack, or have in a shape that does not fit.

    Args:
        stacks: Operations of experts, by stacked name and number.
        operations: All other operations.

    Returns:
        One line for each defect.
    """
    found = {op.outputs[0].name: op for op in operations if "_rot_" in op.outputs[0].name}
    for name, members in stacks.items():
        layer, _, leaf = name.partition(".switch_mlp.")
        which = {"gate_proj.weight": "gate_up", "down_proj.weight": "down"}.get(leaf)
        if which is None:
            continue
        inputs = 8 * next(iter(members.values())).outputs[0].shape[1]
        for role, width in zip(_SHARED_LEAVES, (inputs // 2, inputs, inputs), strict=True):
            rotation = found.pop(f"{layer}.switch_mlp.{which}_rot_{role}", None)
            wanted = f"{layer}.experts.{which}_weight_{role}"
            if rotation is None:
                yield f"{wanted}: in no shard; the experts of {layer} share it"
            elif (shape := rotation.outputs[0].shape)[-1:] != (width,) or len(shape) != 2:
                yield f"{wanted} in {_shard(rotation)}: expected (krot, {width}), found {shape}"
    for rotation in found.values():
        part = rotation.slices[0][0]
        yield f"{part.name} in {part.shard}: a shared rotation of a layer without quantized experts"


def runs(
    name: str, members: dict[int, Operation], count: int, issues: list[str]
) -> Iterator[Operation]:
    """Join consecutive experts of one shard to a piece of the stacked tensor.

    Args:
        name: Of the stacked tensor.
        members: The operation of each expert.
        count: Experts that the layer must have.
        issues: Gets one line for each defect.

    Returns:
        One operation for each run of consecutive experts.
    """
    issues += _missing(name, members, count)
    shapes = {operation.outputs[0].shape for operation in members.values()}
    if len(shapes) > 1 or max(members) >= count:
        issues.append(
            f"{name}: experts of unlike shapes {sorted(shapes)}, or more than {count} of them"
        )
        return
    run: list[int] = []
    for expert in sorted(members):
        if run and (expert != run[-1] + 1 or _shard(members[expert]) != _shard(members[run[0]])):
            yield _stack(name, run, members, count)
            run = []
        run.append(expert)
    yield _stack(name, run, members, count)


def _missing(name: str, members: dict[int, Operation], count: int) -> Iterator[str]:
    """List the first experts that are in no shard, and how many more.

    Loops over no number that a config or a name gives.
    """
    layer, _, leaf = name.partition(".switch_mlp.")
    known = sorted(members)
    absent = (expert for expert in range(count) if expert not in members)
    for expert in itertools.islice(absent, _NAMED):
        after = bisect.bisect(known, expert)
        near = min(known[max(after - 1, 0) : after + 1], key=lambda number: abs(number - expert))
        shard = _shard(members[near])
        yield f"{layer}: expert {expert} has no {leaf}; the nearest expert lies in {shard}"
    more = count - bisect.bisect_left(known, count) - _NAMED
    if more > 0:
        yield f"{layer}: {more:,} more of its {count:,} experts have no {leaf}"


def _shard(operation: Operation) -> str:
    return operation.slices[0][0].shard


def _stack(name: str, run: list[int], members: dict[int, Operation], count: int) -> Operation:
    first = members[run[0]]
    output = first.outputs[0]
    full = name if len(run) == count else f"{name}.experts_{run[0]}_{run[-1]}"
    spec = TensorSpec(full, output.dtype, (len(run), *output.shape))
    slices = tuple(members[expert].slices[0] for expert in run)
    return Operation(first.kind, slices, (spec,), first.values)
