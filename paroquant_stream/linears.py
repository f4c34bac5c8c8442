"""One quantized linear: whether its parts are all there and fit, and the operations that convert
it.

N outputs, K inputs, G the group size:

    weight   U32 (N, K/8)   owned by the shard of qweight
    scales   F16 (N, K/G)   owned by the shard of scales
    biases   F16 (N, K/G)   owned by the shard of the zeros; AutoAWQ's borrow scales
    theta, pairs, channel_scales, bias: copied
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from .layout import Layout, Quantization
from .task import Operation, Part
from .tensorfile import TensorSpec

_FLOATS = ("F16", "BF16", "F32")
_ROTATION = ("theta", "pairs", "channel_scales")
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

    @property
    def inputs(self) -> int:
        """K."""
        return self.parts["qweight"].shape[0 if self.layout.is_awq else 1]

    @property
    def outputs(self) -> int:
        """N."""
        rows, columns = self.parts["qweight"].shape
        return columns * 8 if self.layout.is_awq else rows * 4

    @property
    def groups(self) -> int:
        """K/G."""
        return self.inputs // self.quantization.group_size

    def issues(self) -> list[str]:
        """What is wrong with the parts, one line each with tensor, shard, expected and found."""
        required = {"qweight", "scales", "zeros"} | (set() if self.is_expert else set(_ROTATION))
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
                f"{qweight.name} in {qweight.shard}: {self.inputs} inputs do not divide by "
                f"group_size {self.quantization.group_size} of config.json"
            ]
        if self.layout is Layout.PARO_NATIVE_LEGACY and self.inputs % _LEGACY_INPUTS:
            return [
                f"{qweight.name} in {qweight.shard}: {self.inputs} inputs; TinyChat packs multiples "
                f"of {_LEGACY_INPUTS}"
            ]
        return [issue for part in self.parts.values() for issue in self._shape_issues(part)]

    def _shape_issues(self, part: Part) -> Iterator[str]:
        role = next(role for role, known in self.parts.items() if known is part)
        shapes, dtypes = self._expected(role)
        if part.shape not in shapes or part.dtype not in dtypes:
            yield _mismatch(part, " or ".join(map(str, shapes)), "/".join(dtypes))

    def _expected(self, role: str) -> tuple[tuple[tuple[int, ...], ...], tuple[str, ...]]:
        """The shapes and dtypes that a part may have."""
        inputs, outputs, groups = self.inputs, self.outputs, self.groups
        rotation = [self.parts[role].shape for role in ("theta", "pairs") if role in self.parts]
        krot = next((shape[0] for shape in rotation if len(shape) == 2), 1)
        if self.layout is Layout.PARO_NATIVE_LEGACY and role in ("scales", "zeros"):
            padding = _LEGACY_ROW_PADDING[self.quantization.group_size]
            padded = -(-groups // padding) * padding
            return ((padded, outputs), (groups, outputs)), ("F16",)
        match role:
            case "qweight":
                return (self.parts["qweight"].shape,), ("I32",) if self.layout.is_awq else ("I16",)
            case "zeros" if self.layout.is_awq:
                return ((groups, outputs // 8),), ("I32",)
            case "scales" | "zeros":
                return ((groups, outputs),), ("F16",)
            case "bias":
                return ((outputs,),), _FLOATS
            case "theta":
                return ((krot, inputs // 2),), _FLOATS
            case "pairs":
                return ((krot, inputs),), ("I16",)
        return ((1, inputs), (inputs,)), _FLOATS  # channel_scales

    def operations(self) -> Iterator[Operation]:
        """What converts this linear; `issues()` must be empty."""
        grid = (self.outputs, self.groups)
        weight = TensorSpec(f"{self.module}.weight", "U32", (self.outputs, self.inputs // 8))
        scales = TensorSpec(f"{self.module}.scales", "F16", grid)
        biases = TensorSpec(f"{self.module}.biases", "F16", grid)
        parts = self.parts
        legacy = (("groups", self.groups),) if self.layout is Layout.PARO_NATIVE_LEGACY else ()
        if self.layout.is_awq:
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
        for role in sorted(parts.keys() - {"qweight", "scales", "zeros"}):
            shape = (1, self.inputs) if role == "channel_scales" else parts[role].shape
            output = TensorSpec(f"{self.module}.{role}", parts[role].dtype, shape)
            yield Operation("copy", ((parts[role],),), (output,))


def _mismatch(part: Part, shape: str, dtype: str) -> str:
    return f"{part.name} in {part.shard}: expected {dtype} {shape}, found {part.dtype} {part.shape}"
