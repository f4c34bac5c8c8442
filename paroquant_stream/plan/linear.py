"""One quantized linear: whether its parts are complete and fit, and the operations that convert it.

N outputs, K inputs, G the group size:

    weight   U32 (N, K/8)   owned by the shard of qweight
    scales   F16 (N, K/G)   owned by the shard of scales
    biases   F16 (N, K/G)   owned by the shard of the zeros; AutoAWQ's borrow scales
    with five bits: weight U32 (N, 5K/32), and weight and biases borrow their planes
    theta, pairs, channel_scales, bias: copied
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from ..checkpoint.layout import Layout
from ..checkpoint.quantization import Quantization
from ..files.tensor_header import TensorSpec
from .task import Operation, Part

_FLOATS = ("F16", "BF16", "F32")
_ROTATION = ("theta", "pairs", "channel_scales")
_PACKED = {"qweight", "scales", "zeros"}
_PLANES = {"qweight_hi", "qzeros_hi"}
_PLANE_OUTPUTS = 32  # outputs whose fifth bits share a word
_LEGACY_INPUTS = 64  # a TinyChat block
_LEGACY_ROW_PADDING = {128: 8, 64: 16, 32: 32}  # group rows of a TinyChat linear come in multiples


@dataclass
class Linear:
    """The parts found of one quantized linear, by role."""

    module: str
    layout: Layout
    quantization: Quantization
    is_expert: bool
    """Experts have no rotation of their own; their layer shares one."""
    parts: dict[str, Part] = field(default_factory=dict)

    @cached_property
    def inputs(self) -> int:
        """K, the number of inputs."""
        return self.parts["qweight"].shape[0 if self.layout.is_awq else 1]

    @cached_property
    def outputs(self) -> int:
        """N, the number of outputs."""
        rows, columns = self.parts["qweight"].shape
        return columns * 8 if self.layout.is_awq else rows * 4

    @property
    def groups(self) -> int:
        """K/G, the number of groups of inputs."""
        return self.inputs // self.quantization.group_size

    @property
    def _has_planes(self) -> bool:
        return self.layout is Layout.INT5_BITPLANE

    @property
    def _packed(self) -> set[str]:
        """The roles of the parts that are not copied."""
        return _PACKED | _PLANES if self._has_planes else _PACKED

    def issues(self) -> list[str]:
        """List what is wrong with the parts, a line each with tensor, shard, expected and found."""
        required = self._packed | (set() if self.is_expert else set(_ROTATION))
        where = ", ".join(sorted({part.shard for part in self.parts.values()}))
        missing = [
            self.layout.spell(self.module, role) for role in sorted(required - self.parts.keys())
        ]
        if missing:
            return [f"{name}: missing; the other parts lie in {where}" for name in missing]
        if self.is_expert and self.parts.keys() & set(_ROTATION):
            return [f"{self.module}: an expert with a rotation of its own; experts share one"]
        qweight = self.parts["qweight"]
        if len(qweight.shape) != 2 or 0 in qweight.shape:
            return [_mismatch(qweight, "two dimensions", "I32" if self.layout.is_awq else "I16")]
        if self.inputs % self.quantization.group_size:
            return [
                f"{qweight.name} in {qweight.shard}: {self.inputs} inputs do not divide "
                f"by group_size {self.quantization.group_size} of config.json"
            ]
        if self._has_planes and (self.is_expert or self.outputs % _PLANE_OUTPUTS):
            return [
                f"{qweight.name} in {qweight.shard}: int5-bitplane is known for linears of a "
                f"multiple of {_PLANE_OUTPUTS} outputs that are no experts"
            ]
        if self.layout is Layout.PARO_NATIVE_LEGACY and self.inputs % _LEGACY_INPUTS:
            return [
                f"{qweight.name} in {qweight.shard}: {self.inputs} inputs; TinyChat packs "
                f"multiples of {_LEGACY_INPUTS}"
            ]
        expected = self._expected()
        return [
            _mismatch(part, " or ".join(map(str, expected[role][1])), "/".join(expected[role][0]))
            for role, part in self.parts.items()
            if part.dtype not in expected[role][0] or part.shape not in expected[role][1]
        ]

    def _expected(self) -> dict[str, tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]]:
        """Return the dtypes and shapes that each part may have."""
        inputs, outputs, groups = self.inputs, self.outputs, self.groups
        awq = self.layout.is_awq
        grids: tuple[tuple[int, ...], ...] = ((groups, outputs),)
        if self.layout is Layout.PARO_NATIVE_LEGACY:
            padding = _LEGACY_ROW_PADDING[self.quantization.group_size]
            grids = ((-(-groups // padding) * padding, outputs), *grids)
        expected: dict[str, tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]] = {
            "qweight": (("I32",) if awq else ("I16",), (self.parts["qweight"].shape,)),
            "scales": (("F16",), grids),
            "zeros": (("I32",), ((groups, outputs // 8),)) if awq else (("F16",), grids),
        }
        if self._has_planes:
            words = outputs // _PLANE_OUTPUTS
            expected["qweight_hi"] = (("I32",), ((inputs, words),))
            expected["qzeros_hi"] = (("I32",), ((groups, words),))
        if len(self.parts) > len(expected):
            rounds = [self.parts[role].shape for role in ("theta", "pairs") if role in self.parts]
            krot = next((shape[0] for shape in rounds if len(shape) == 2), 1)
            expected |= {
                "bias": (_FLOATS, ((outputs,),)),
                "theta": (_FLOATS, ((krot, inputs // 2),)),
                "pairs": (("I16",), ((krot, inputs),)),
                "channel_scales": (_FLOATS, ((1, inputs), (inputs,))),
            }
        return expected

    def operations(self) -> Iterator[Operation]:
        """Return the operations that convert this linear; `issues()` must be empty."""
        module, outputs, inputs = self.module, self.outputs, self.inputs
        grid = (outputs, self.groups)
        weight = TensorSpec(
            f"{module}.weight", "U32", (outputs, inputs * self.quantization.bits // 32)
        )
        scales = TensorSpec(f"{module}.scales", "F16", grid)
        biases = TensorSpec(f"{module}.biases", "F16", grid)
        parts = self.parts
        legacy = (("groups", self.groups),) if self.layout is Layout.PARO_NATIVE_LEGACY else ()
        if self._has_planes:
            planes = parts["qweight_hi"], parts["qzeros_hi"]
            yield Operation("int5_weight", ((parts["qweight"], planes[0]),), (weight,))
            yield Operation("group_scales", ((parts["scales"],),), (scales,))
            zeros = (parts["zeros"], planes[1], parts["scales"])
            yield Operation("int5_biases", (zeros,), (biases,))
        elif self.layout.is_awq:
            yield Operation("awq_weight", ((parts["qweight"],),), (weight,))
            yield Operation("group_scales", ((parts["scales"],),), (scales,))
            yield Operation("awq_biases", ((parts["zeros"], parts["scales"]),), (biases,))
        elif legacy:
            yield Operation("legacy_weight", ((parts["qweight"],),), (weight,))
            yield Operation("legacy_scales", ((parts["scales"],),), (scales,), legacy)
            yield Operation("legacy_biases", ((parts["zeros"],),), (biases,), legacy)
        else:  # PARO_NATIVE's int16 (N/4, K) and MLX's uint32 (N, K/8) are the same bytes
            yield Operation("copy", ((parts["qweight"],),), (weight,))
            yield Operation("group_scales", ((parts["scales"],),), (scales,))
            yield Operation("native_biases", ((parts["zeros"],),), (biases,))
        for role in sorted(parts.keys() - self._packed):
            shape = (1, inputs) if role == "channel_scales" else parts[role].shape
            output = TensorSpec(f"{module}.{role}", parts[role].dtype, shape)
            yield Operation("copy", ((parts[role],),), (output,))


def _mismatch(part: Part, shape: str, dtype: str) -> str:
    return f"{part.name} in {part.shard}: expected {dtype} {shape}, found {part.dtype} {part.shape}"
