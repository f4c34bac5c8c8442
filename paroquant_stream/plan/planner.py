"""The plan: for every shard one task, for every task its operations; from headers and config alone.

Ownership makes each shard independent: an output belongs to the shard of its first part, and
whatever else it needs is borrowed. Every defect of the checkpoint is found here, before a byte is
converted.
"""

from __future__ import annotations

import bisect
import gc
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..checkpoint.layout import EXPERT, Layout, Quantization, shared_rotation
from ..errors import PlanError
from ..files.tensor_header import Header, TensorSpec
from .linear import Linear
from .task import Operation, Part, Task

_IO_LAYERS = ("embed_tokens", "lm_head")  # stored quantized, whatever `tie_word_embeddings` says
_SHARED_LEAVES = ("theta", "pairs", "channel_scales")
_SHOWN = 50  # defects that a message lists
_NAMED = 10  # experts of one stack among them


@dataclass(frozen=True)
class Plan:
    """All tasks of a checkpoint, in the order of the shards."""

    layout: Layout
    quantization: Quantization
    tasks: tuple[Task, ...]


def make_plan(
    headers: Mapping[str, Header],
    layout: Layout,
    quantization: Quantization,
    experts: int | None = None,
    dtype: str | None = None,
) -> Plan:
    """The plan of a checkpoint with these headers by shard name.

    `experts`: how many experts a layer has, if the config says so. `dtype`: "F16" or "BF16" for
    floating tensors in that width, None for the source's. Linear in the number of tensors.
    Raises PlanError listing everything that is missing, left over or does not fit.
    """
    collecting = gc.isenabled()
    gc.disable()  # nothing here is cyclic, and collecting half a million objects took 1.2 of 2.3 s
    try:
        return _make_plan(headers, layout, quantization, experts, dtype)
    finally:
        if collecting:
            gc.enable()


def _make_plan(
    headers: Mapping[str, Header],
    layout: Layout,
    quantization: Quantization,
    experts: int | None,
    dtype: str | None,
) -> Plan:
    parts = [
        Part(t.name, t.dtype, t.shape, shard, t.start, t.stop)
        for shard, header in headers.items()
        for t in header.tensors
    ]
    linears, rest = _group(parts, layout, quantization)
    issues = [issue for linear in linears.values() for issue in linear.issues()]
    issues += _left_over(rest, layout)
    if issues:
        raise _error(issues)
    operations, stacks = _split_experts(
        op for linear in linears.values() for op in linear.operations()
    )
    for part in rest:
        operations.append(_operation_of_rest(part, quantization, issues))
    issues += _shared_rotation_issues(stacks, operations)
    widest = _widest(stacks)
    for name, members in stacks.items():
        operations += _runs(name, members, experts or widest[_layer(name)], issues)
    if issues:
        raise _error(issues)
    owned: dict[str, list[Operation]] = {shard: [] for shard in headers}
    for operation in operations:
        stored = operation.cast_to(dtype) if dtype else operation
        owned[operation.slices[0][0].shard].append(stored)
    tasks = tuple(
        Task(shard, headers[shard].size, tuple(sorted(found, key=lambda op: op.start)))
        for shard, found in owned.items()
    )
    return Plan(layout, quantization, tasks)


def _error(issues: list[str]) -> PlanError:
    shown = issues[:_SHOWN]
    shown += [f"... and {len(issues) - _SHOWN} more"] if len(issues) > _SHOWN else []
    return PlanError(
        f"{len(issues)} defects in the checkpoint, nothing was converted:\n  " + "\n  ".join(shown)
    )


def _group(
    parts: list[Part], layout: Layout, quantization: Quantization
) -> tuple[dict[str, Linear], list[Part]]:
    """The quantized linears by module path, and the tensors that belong to none."""
    linears: dict[str, Linear] = {}
    splits = [layout.split(part.name) for part in parts]
    for split in splits:
        if split and split[1] == "qweight":
            expert = EXPERT.fullmatch(split[0]) is not None
            linears[split[0]] = Linear(split[0], layout, quantization, expert)
    rest = []
    for part, split in zip(parts, splits, strict=True):
        if split and split[0] in linears:
            linears[split[0]].parts[split[1]] = part
        else:
            rest.append(part)
    return linears, rest


def _left_over(rest: list[Part], layout: Layout) -> Iterator[str]:
    """Parts of a linear whose qweight is in no shard."""
    for part in rest:
        split = layout.split(part.name)
        if split and split[1] != "bias" and not shared_rotation(part.name):
            yield f"{part.name} in {part.shard}: no shard holds {layout.spell(split[0], 'qweight')}"
        elif part.name.rsplit(".", 1)[-1] in ("qweight", "qzeros", "scaled_zeros"):
            yield f"{part.name} in {part.shard}: not a part that layout {layout.value} has"


def _operation_of_rest(part: Part, quantization: Quantization, issues: list[str]) -> Operation:
    """A copy byte for byte, or the quantization of an embedding or head."""
    module = part.name.removesuffix(".weight")
    floating = part.dtype in ("F16", "BF16", "F32")
    if not (
        module.endswith(_IO_LAYERS) and module != part.name and len(part.shape) == 2 and floating
    ):
        name = shared_rotation(part.name) or part.name
        two_rows = name.endswith("_rot_channel_scales") and len(part.shape) == 1
        shape = (1, *part.shape) if two_rows else part.shape
        return Operation("copy", ((part,),), (TensorSpec(name, part.dtype, shape),))
    rows, columns = part.shape
    bits, group_size = quantization.bits, quantization.group_size
    if columns % group_size:
        issues.append(
            f"{part.name} in {part.shard}: rows of {columns} do not divide by "
            f"group_size {group_size}"
        )
    grid = (rows, columns // group_size)
    outputs = (
        TensorSpec(f"{module}.weight", "U32", (rows, columns * bits // 32)),
        TensorSpec(f"{module}.scales", part.dtype, grid),
        TensorSpec(f"{module}.biases", part.dtype, grid),
    )
    return Operation("quantize", ((part,),), outputs, (("bits", bits), ("group_size", group_size)))


_Stacks = dict[str, dict[int, Operation]]


def _split_experts(operations: Iterator[Operation]) -> tuple[list[Operation], _Stacks]:
    """Operations of plain linears, and those of experts by stacked name and expert."""
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


def _layer(stack: str) -> str:
    return stack.partition(".switch_mlp.")[0]


def _widest(stacks: _Stacks) -> dict[str, int]:
    """Experts of each layer when the config does not say: one more than the largest number seen."""
    widest: dict[str, int] = defaultdict(int)
    for name, members in stacks.items():
        widest[_layer(name)] = max(widest[_layer(name)], 1 + max(members))
    return widest


def _shared_rotation_issues(stacks: _Stacks, operations: list[Operation]) -> Iterator[str]:
    """Rotations that a layer's experts need and lack, or have in a shape that does not fit."""
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


def _runs(
    name: str, members: dict[int, Operation], count: int, issues: list[str]
) -> Iterator[Operation]:
    """One operation for each run of consecutive experts that a shard holds of a stacked tensor."""
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
    """The experts that are in no shard: the first ones, and how many more.

    `count` and the largest number are somebody's word for it: no loop goes over them.
    """
    layer, _, leaf = name.partition(".switch_mlp.")
    known = sorted(members)
    absent = (expert for expert in range(count) if expert not in members)
    for expert in itertools.islice(absent, _NAMED):
        after = bisect.bisect(known, expert)
        near = min(known[max(after - 1, 0) : after + 1], key=lambda number: abs(number - expert))
        shard = _shard(members[near])
        yield f"{layer}: expert {expert} has no {leaf}; its nearest neighbour lies in {shard}"
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
