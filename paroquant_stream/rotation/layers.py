"""Layers of a ParoQuant model: RotateQuantizedLinear, RotateSwitchGLU.

Parameters have the names of the stored tensors. The rotation's tables are derived from them at the
first call, are no parameters, and are made anew after theta, pairs or channel_scales were replaced
(`load_weights`, `update`); writing into one of these arrays in place is not noticed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from . import kernels

_SORT_FROM = 64
"""Routed rows from which experts are visited in order, as mlx-lm and mlx-vlm do."""


class RotatedLayer(nn.Module):
    """A module with rotations of its own, flat among its parameters, each under a prefix."""

    readers: ClassVar[dict[str, str]] = {"": ""}
    """Prefix -> the projection in it that reads what this rotation gives; "": itself."""

    def __init__(self, group_size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # mlx has no annotation here
        self.group_size = group_size

    def _add_rotation(self, prefix: str, dims: int, krot: int) -> None:
        """Adds the rotation that changes nothing, unevaluated, for stored values to replace."""
        if self.group_size % 2 or dims % self.group_size:
            raise ValueError(f"{dims} channels do not divide into groups of {self.group_size}")
        pairs = (mx.arange(dims) % self.group_size).astype(mx.int16)
        self[f"{prefix}theta"] = mx.zeros((krot, dims // 2))
        self[f"{prefix}pairs"] = mx.broadcast_to(pairs, (krot, dims))
        self[f"{prefix}channel_scales"] = mx.ones((1, dims))

    def _tables(self, prefix: str = "") -> kernels.RotationTables:
        """The tables of the current parameters.

        Threads that meet here make equal ones and one assignment stays: a lock would save nothing
        but work that happens once.
        """
        theta, pairs = self[f"{prefix}theta"], self[f"{prefix}pairs"]
        channel_scales = self[f"{prefix}channel_scales"]
        tables: kernels.RotationTables | None = getattr(self, f"_{prefix}made", None)
        if tables is None or not tables.built_from(theta, pairs, channel_scales):
            tables = kernels.RotationTables(theta, pairs, channel_scales, self.group_size)
            setattr(self, f"_{prefix}made", tables)
        return tables

    def _made_tables(self) -> list[kernels.RotationTables]:
        """The tables made so far."""
        made = (getattr(self, f"_{prefix}made", None) for prefix in self.readers)
        return [tables for tables in made if tables is not None]

    def build(self) -> None:
        """Builds its tables for the default device now, not at the first call."""
        for prefix in self.readers:
            kernels.prepare(self._tables(prefix))

    def _rotate(self, x: mx.array, prefix: str = "") -> mx.array:
        return kernels.rotate(x, self._tables(prefix))


class RotateQuantizedLinear(RotatedLayer):
    """y = quantized_matmul(rotated x) + bias: (..., input_dims) to (..., output_dims).

    Parameters: theta (krot, input_dims / 2), pairs int16 (krot, input_dims), channel_scales
    (1, input_dims), weight uint32 (output_dims, input_dims * bits / 32), scales and
    biases (output_dims, input_dims / group_size), and bias (output_dims,) if asked for. The dtype
    of y is MLX's promotion of x and scales: float16 stays float16; bfloat16 x with ParoQuant's
    float16 scales gives float32, as in the `paroquant` package, whose tokens a rounding back to
    bfloat16 would change. It must not become a subclass of nn.QuantizedLinear: mlx-vlm takes the
    weights of those past their `__call__`, and past the rotation.
    """

    def __init__(
        self,
        input_dims: int,
        output_dims: int,
        *,
        bias: bool = False,
        group_size: int = 128,
        bits: int = 4,
        krot: int = 8,
    ) -> None:
        super().__init__(group_size)
        self.bits = bits
        self.ranks: Any = None
        """The `mx.distributed` group that holds the other inputs, if `shard` cut them off."""
        self._add_rotation("", input_dims, krot)
        self.weight = mx.zeros((output_dims, input_dims * bits // 32), dtype=mx.uint32)
        self.scales = mx.zeros((output_dims, input_dims // group_size))
        self.biases = mx.zeros((output_dims, input_dims // group_size))
        if bias:
            self.bias = mx.zeros((output_dims,))
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        """The layer's output."""
        y = mx.quantized_matmul(
            self._rotate(x),
            self.weight,
            scales=self.scales,
            biases=self.biases,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
        )
        if self.ranks is not None:
            y = mx.distributed.all_sum(y, group=self.ranks)
        return y + self.bias if "bias" in self else y

    def _extra_repr(self) -> str:
        outputs, inputs = self.scales.shape[0], self.scales.shape[1] * self.group_size
        return f"{inputs}, {outputs}, group_size={self.group_size}, bits={self.bits}"


class RotateSwitchGLU(RotatedLayer):
    """The routed experts of a layer, x rotated before gate and up, their product before down.

    Called with x (..., dims) and expert numbers (..., k), gives (..., k, dims), like the
    `SwitchGLU` of mlx-lm and mlx-vlm. All experts share two rotations, `gate_up_rot_*` and
    `down_rot_*`; gate_proj, up_proj and down_proj are of that library's quantized class.
    """

    readers: ClassVar[dict[str, str]] = {"gate_up_rot_": "gate_proj", "down_rot_": "down_proj"}

    def __init__(
        self,
        gate_proj: nn.Module,
        up_proj: nn.Module,
        down_proj: nn.Module,
        activation: Any,
        *,
        group_size: int,
        krot: int,
    ) -> None:
        super().__init__(group_size)
        self._add_rotation("gate_up_rot_", gate_proj.input_dims, krot)
        self._add_rotation("down_rot_", down_proj.input_dims, krot)
        self.freeze()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        # Not `activation`: mlx-vlm's speculative verifier calls the projections of any module
        # that has all four attributes by itself, and would leave out the rotations.
        self._activation = activation

    @classmethod
    def from_switch_glu(cls, glu: nn.Module, group_size: int, krot: int, bits: int) -> Self:
        """The module that takes the place of a `SwitchGLU` of mlx-lm or mlx-vlm, all weights zero.

        Raises ValueError when a projection's inputs do not divide by `group_size`.
        """
        return cls(
            _quantized(glu.gate_proj, group_size, bits),
            _quantized(glu.up_proj, group_size, bits),
            _quantized(glu.down_proj, group_size, bits),
            glu.activation,
            group_size=group_size,
            krot=krot,
        )

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """The output of each chosen expert, not yet weighted."""
        # Before rows are repeated for their k experts: the same bits for 1/k of the work.
        x = self._rotate(x, "gate_up_rot_")
        chosen, inverse = indices, None
        if indices.size >= _SORT_FROM:
            x, chosen, inverse = _by_expert(x, indices)
        else:
            x = mx.expand_dims(x, (-2, -3))
        in_order = inverse is not None
        up = self.up_proj(x, chosen, sorted_indices=in_order)
        gate = self.gate_proj(x, chosen, sorted_indices=in_order)
        hidden = self._rotate(self._activation(up, gate), "down_rot_")
        y: mx.array = self.down_proj(hidden, chosen, sorted_indices=in_order).squeeze(-2)
        return y if inverse is None else y[inverse].reshape(*indices.shape, -1)


def _by_expert(x: mx.array, indices: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """One row of x per routed expert, sorted by expert; the experts; the way back."""
    experts = indices.reshape(-1)
    order = mx.argsort(experts)
    rows = x.reshape(-1, 1, x.shape[-1])[order // indices.shape[-1]]
    return rows, experts[order], mx.argsort(order)


def _quantized(projection: nn.Module, group_size: int, bits: int) -> nn.Module:
    """The quantized class that lies beside this SwitchLinear's own, with nothing allocated.

    Its constructor draws and quantizes random weights, unevaluated; zeros replace them here, so
    that they never are: 256 experts of 768 x 2048 would take 1.6 GB.
    """
    if projection.input_dims % group_size:
        raise ValueError(
            f"{projection.input_dims} channels do not divide into groups of {group_size}"
        )
    quantized_class = sys.modules[type(projection).__module__].QuantizedSwitchLinear
    inputs, outputs = projection.input_dims, projection.output_dims
    experts, has_bias = projection.num_experts, "bias" in projection
    layer: nn.Module = quantized_class(inputs, outputs, experts, has_bias, group_size, bits)
    layer.weight = mx.zeros((experts, outputs, inputs * bits // 32), dtype=mx.uint32)
    layer.scales = mx.zeros((experts, outputs, inputs // group_size))
    layer.biases = mx.zeros((experts, outputs, inputs // group_size))
    return layer


def _rotated_layers(model: nn.Module) -> Iterator[RotatedLayer]:
    """The rotated layers of a model, a shared one once."""
    return iter({id(m): m for m in model.modules() if isinstance(m, RotatedLayer)}.values())


def build_tables(model: nn.Module) -> None:
    """Builds the tables of all rotated layers for the default device, before any first call."""
    for layer in _rotated_layers(model):
        layer.build()


def table_bytes(model: nn.Module) -> int:
    """Bytes of all layers' rotation tables, which no parameter counts; 0 before they are built."""
    return sum(made.nbytes for layer in _rotated_layers(model) for made in layer._made_tables())


def table_seconds(model: nn.Module) -> float:
    """Seconds that building the rotation tables of all layers took so far."""
    return sum(
        made.build_seconds for layer in _rotated_layers(model) for made in layer._made_tables()
    )
