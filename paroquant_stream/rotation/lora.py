"""A rotated layer with a LoRA adapter, as mlx-lm's `load_adapters` asks the layer for it."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


class LoRARotatedLinear(nn.Module):
    """y = linear(x) + scale * dropout(x) @ lora_a @ lora_b; the adapter sees x before the rotation.

    Parameters of the module: `linear`, lora_a (input_dims, rank) and lora_b (rank, output_dims),
    with mlx-lm's names. A new adapter changes nothing, as lora_b is zero.

    Args:
        linear: A RotateQuantizedLinear.
        input_dims: Number of its input channels.
        output_dims: Number of its output channels.
        rank: Of the adapter.
        dropout: Probability, in training.
        scale: Factor of the adapter.
    """

    def __init__(
        self,
        linear: nn.Module,
        input_dims: int,
        output_dims: int,
        rank: int,
        dropout: float,
        scale: float,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # mlx has no annotation here
        self.linear = linear
        self.dropout = nn.Dropout(p=dropout)
        self.scale = scale
        bound = input_dims**-0.5
        self.lora_a = mx.random.uniform(low=-bound, high=bound, shape=(input_dims, rank))
        self.lora_b = mx.zeros((rank, output_dims))

    def __call__(self, x: mx.array) -> mx.array:
        """Return the output of the layer and its adapter for x."""
        change = (self.dropout(x) @ self.lora_a) @ self.lora_b
        y: mx.array = self.linear(x)
        return y + (self.scale * change).astype(x.dtype)
