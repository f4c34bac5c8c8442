"""The layers of a ParoQuant model: RotateQuantizedLinear and RotateSwitchGLU.

Parameters have the names of the stored tensors. The tables of a rotation are not parameters: they
are built from theta, pairs and channel_scales at the first call, and again after one of these was
replaced (`load_weights`, `update`). A write into such an array in place is not noticed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from . import kernels
from .lora import LoRARotatedLinear

_SORT_FROM = 64
"""Number of routed rows from which they are sorted by expert, as in mlx-lm and mlx-vlm."""


class RotatedLayer(nn.Module):
    """A module that holds the parameters of one or more rotations, each under a name prefix."""

    readers: ClassVar[dict[str, str]] = {"": ""}
    """Prefix -> the projection inside the module that takes the rotated activations; "": itself."""

    def __init__(self, group_size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # mlx has no annotation here
        self.group_size = group_size

    def _add_rotation(self, prefix: str, dims: int, krot: int) -> None:
        """Add the parameters of an identity rotation, unevaluated, for stored values to replace."""
        if self.group_size % 2 or dims % self.group_size:
            raise ValueError(f"{dims} channels do not divide into groups of {self.group_size}")
        pairs = (mx.arange(dims) % self.group_size).astype(mx.int16)
        self[f"{prefix}theta"] = mx.zeros((krot, dims // 2))
        self[f"{prefix}pairs"] = mx.broadcast_to(pairs, (krot, dims))
        self[f"{prefix}channel_scales"] = mx.ones((1, dims))

    def _tables(self, prefix: str = "") -> kernels.RotationTables:
        """Return the tables of the current parameters, built if one was replaced."""
        # No lock: threads that come at the same time build equal tables, and one assignment stays.
        theta, pairs = self[f"{prefix}theta"], self[f"{prefix}pairs"]
        channel_scales = self[f"{prefix}channel_scales"]
        tables: kernels.RotationTables | None = getattr(self, f"_{prefix}built", None)
        if tables is None or not tables.built_from(theta, pairs, channel_scales):
            tables = kernels.RotationTables(theta, pairs, channel_scales, self.group_size)
            setattr(self, f"_{prefix}built", tables)
        return tables

    def _built_tables(self) -> list[kernels.RotationTables]:
        """List the tables built so far."""
        built = (getattr(self, f"_{prefix}built", None) for prefix in self.readers)
        return [tables for tables in built if tables is not None]

    def build(self) -> None:
        """Build the tables for the default device now instead of at the first call."""
        for prefix in self.readers:
            kernels.prepare(self._tables(prefix))

    def _rotate(self, x: mx.array, prefix: str = "") -> mx.array:
        """Rotate x by the rotation under a prefix."""
        return kernels.rotate(x, self._tables(prefix))


class RotateQuantizedLinear(RotatedLayer):
    """y = quantized_matmul(rotate(x)) + bias, from (..., input_dims) to (..., output_dims).

    Parameters of the module: theta (krot, input_dims / 2), pairs int16 (krot, input_dims),
    channel_scales (1, input_dims), weight uint32 (output_dims, input_dims * bits / 32), scales and
    biases (output_dims, input_dims / group_size), and bias (output_dims,) if there is one.

    The dtype of y is MLX's promotion of x and scales: bfloat16 x with float16 scales returns
    float32, as in the `paroquant` package, since rounding back to bfloat16 would change its tokens.

    It must not become a subclass of nn.QuantizedLinear: mlx-vlm reads the weights of those without
    calling them, which would skip the rotation.

    Args:
        input_dims: Number of input channels.
        output_dims: Number of output channels.
        bias: Whether there is a bias.
        group_size: Channels per group, of the quantization and of the rotation.
        bits: Bits per weight.
        krot: Rounds of the rotation.

    Raises:
        ValueError: `input_dims` is no multiple of `group_size`.
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
        """The `mx.distributed` group whose ranks hold the other input channels, or None."""
        self._add_rotation("", input_dims, krot)
        self.weight = mx.zeros((output_dims, input_dims * bits // 32), dtype=mx.uint32)
        self.scales = mx.zeros((output_dims, input_dims // group_size))
        self.biases = mx.zeros((output_dims, input_dims // group_size))
        if bias:
            self.bias = mx.zeros((output_dims,))
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        """Return the output for x, summed over the ranks that share the input channels."""
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

    def to_lora(self, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> LoRARotatedLinear:
        """Return this layer with a LoRA adapter; mlx-lm calls it, by these names."""
        outputs, inputs = self.scales.shape[0], self.scales.shape[1] * self.group_size
        return LoRARotatedLinear(self, inputs, outputs, r, dropout, scale)

    def _extra_repr(self) -> str:
        outputs, inputs = self.scales.shape[0], self.scales.shape[1] * self.group_size
        return f"{inputs}, {outputs}, group_size={self.group_size}, bits={self.bits}"


class RotateSwitchGLU(RotatedLayer):
    """The routed experts of a layer, with one rotation before gate and up and one before down.

    Called like the `SwitchGLU` of mlx-lm and mlx-vlm. All experts share the two rotations,
    `gate_up_rot_*` and `down_rot_*`.

    Args:
        gate_proj: A quantized switch layer of mlx-lm or mlx-vlm, like the next two.
        up_proj: From the same inputs as `gate_proj`.
        down_proj: From their product to the outputs.
        activation: Called as `activation(up, gate)`.
        group_size: Channels per group, of the quantization and of the rotations.
        krot: Rounds of each rotation.

    Raises:
        ValueError: A projection's inputs are no multiple of `group_size`.
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
        # Not `activation`: mlx-vlm's speculative decoding calls the projections of a module with
        # these four attributes directly, which would skip the rotations.
        self._activation = activation

    @classmethod
    def from_switch_glu(cls, glu: nn.Module, group_size: int, krot: int, bits: int) -> Self:
        """Make the module that replaces a `SwitchGLU`, with all weights zero and unevaluated.

        Args:
            glu: A `SwitchGLU` of mlx-lm or mlx-vlm.
            group_size: Channels per group, of the quantization and of the rotations.
            krot: Rounds of each rotation.
            bits: Bits per weight.

        Raises:
            ValueError: A projection's inputs are no multiple of `group_size`.
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
        """Compute the output of each chosen expert, without the router's weights.

        Args:
            x: (..., dims).
            indices: (..., k), the numbers of the experts of each row.

        Returns:
            (..., k, dims).
        """
        # Rotated before the rows are repeated for their k experts: same bits, 1/k of the work.
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
    """Return a row of x per routed expert, sorted by expert; the experts; the inverse order."""
    experts = indices.reshape(-1)
    order = mx.argsort(experts)
    rows = x.reshape(-1, 1, x.shape[-1])[order // indices.shape[-1]]
    return rows, experts[order], mx.argsort(order)


def _quantized(projection: nn.Module, group_size: int, bits: int) -> nn.Module:
    """Make an unevaluated QuantizedSwitchLinear of the library that this SwitchLinear is from."""
    if projection.input_dims % group_size:
        raise ValueError(
            f"{projection.input_dims} channels do not divide into groups of {group_size}"
        )
    quantized_class = sys.modules[type(projection).__module__].QuantizedSwitchLinear
    inputs, outputs = projection.input_dims, projection.output_dims
    experts, has_bias = projection.num_experts, "bias" in projection
    layer: nn.Module = quantized_class(inputs, outputs, experts, has_bias, group_size, bits)
    # The constructor leaves random weights unevaluated; replaced by zeros, they never take memory.
    layer.weight = mx.zeros((experts, outputs, inputs * bits // 32), dtype=mx.uint32)
    layer.scales = mx.zeros((experts, outputs, inputs // group_size))
    layer.biases = mx.zeros((experts, outputs, inputs // group_size))
    return layer


def _rotated_layers(model: nn.Module) -> Iterator[RotatedLayer]:
    """Iterate over the rotated layers of a model, a shared one once."""
    return iter({id(m): m for m in model.modules() if isinstance(m, RotatedLayer)}.values())


def build_tables(model: nn.Module) -> None:
    """Build the tables of all rotated layers for the default device, before the first call."""
    for layer in _rotated_layers(model):
        layer.build()


def table_bytes(model: nn.Module) -> int:
    """Count the bytes of all rotation tables built so far; the parameters do not include them."""
    return sum(
        tables.nbytes for layer in _rotated_layers(model) for tables in layer._built_tables()
    )


def table_seconds(model: nn.Module) -> float:
    """Return the seconds that were spent on building rotation tables so far."""
    return sum(
        tables.build_seconds for layer in _rotated_layers(model) for tables in layer._built_tables()
    )
