"""The plan: one task per shard, made of operations, from headers and config alone.

Ownership makes each shard independent: an output belongs to the shard of its first part, and
what else it needs is borrowed. Every defect of the checkpoint is found here, before a byte is
converted.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..checkpoint.layout import EXPERT, Layout, shared_rotation
from ..checkpoint.quantization import Quantization
from ..errors import LayoutError, PlanError
from ..files.tensor_header import Header, TensorSpec
from ..text import counted, listed
from .experts import counted_experts, layer_of, runs, shared_rotation_issues, split_experts
from .linear import Linear
from .task import Operation, Part, Task

_PACKED = ("qweight", "qzeros", "scaled_zeros", "qweight_hi", "qzeros_hi")
_IO_LAYERS = ("embed_tokens", "lm_head")  # stored quantized, whatever `tie_word_embeddings` says


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
    io_bits: int = 4,
) -> Plan:
    """Plan a checkpoint, in time linear in the number of tensors.

    Args:
        headers: By shard name.
        layout: How quantized linears are spelled.
        quantization: Bits and group size.
        experts: How many experts a layer has, if the config says so.
        dtype: "F16" or "BF16" for floating tensors in that width, None for the source's.
        io_bits: Bits per weight of embedding and head; 4 stands for those of the linears.

    Raises:
        PlanError: Lists everything that is missing, left over or does not fit.
        LayoutError: Scales are in bfloat16.
    """
    collecting = gc.isenabled()
    gc.disable()  # nothing here is cyclic, and collecting takes half of the time
    try:
        return _make_plan(headers, layout, quantization, experts, dtype, io_bits)
    finally:
        if collecting:
            gc.enable()


def _make_plan(
    headers: Mapping[str, Header],
    layout: Layout,
    quantization: Quantization,
    experts: int | None,
    dtype: str | None,
    io_bits: int,
) -> Plan:
    parts = [
        Part(t.name, t.dtype, t.shape, shard, t.start, t.stop)
        for shard, header in headers.items()
        for t in header.tensors
    ]
    linears, rest = _group(parts, layout, quantization)
    _check_scales(linears)
    issues = [issue for linear in linears.values() for issue in linear.issues()]
    issues += _left_over(rest, layout)
    if issues:
        raise _error(issues)
    operations, stacks = split_experts(
        op for linear in linears.values() for op in linear.operations()
    )
    for part in rest:
        bits = quantization.bits if io_bits == 4 else io_bits  # as the public loader does
        operations.append(_operation_of_rest(part, bits, quantization.group_size, issues))
    issues += shared_rotation_issues(stacks, operations)
    widest = counted_experts(stacks)
    for name, members in stacks.items():
        operations += runs(name, members, experts or widest[layer_of(name)], issues)
    if issues:
        raise _error(issues)
    owned: dict[str, list[Operation]] = {shard: [] for shard in headers}
    for operation in operations:
        stored = operation.cast_to(dtype) if dtype else operation
        owned[operation.slices[0][0].shard].append(stored)
    tasks = tuple(
        Task(
            shard,
            headers[shard].size,
            tuple(sorted(found, key=lambda op: op.start)),
            headers[shard].sha256,
        )
        for shard, found in owned.items()
    )
    return Plan(layout, quantization, tasks)


def _check_scales(linears: Mapping[str, Linear]) -> None:
    """Raise LayoutError, once for the checkpoint, for scales in bfloat16."""
    for linear in linears.values():
        if (scales := linear.parts.get("scales")) and scales.dtype == "BF16":
            raise LayoutError(
                f"{scales.name} in {scales.shard}: scales in bfloat16, as GPTQModel writes them "
                "for a bfloat16 model; expected float16: quantize the model in float16"
            )


def _error(issues: list[str]) -> PlanError:
    return PlanError(f"{counted(len(issues), 'defect')}, nothing was converted:{listed(issues)}")


def _group(
    parts: list[Part], layout: Layout, quantization: Quantization
) -> tuple[dict[str, Linear], list[Part]]:
    """Group parts into quantized linears by module path, and tensors that belong to none."""
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
    """List parts of linears whose qweight is in no shard."""
    for part in rest:
        split = layout.split(part.name)
        if split and split[1] != "bias" and not shared_rotation(part.name):
            yield f"{part.name} in {part.shard}: no shard holds {layout.spell(split[0], 'qweight')}"
        elif part.name.rsplit(".", 1)[-1] in _PACKED:
            yield f"{part.name} in {part.shard}: not a part that layout {layout.value} has"


def _operation_of_rest(part: Part, bits: int, group_size: int, issues: list[str]) -> Operation:
    """Copy a tensor byte for byte, or quantize an embedding or head."""
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
