"""The rotation of activations: chooses between the plain MLX reference and the GPU kernels.

On a row x, first multiplied by `channel_scales`, inside each group of `group_size` channels, for
k = 0 .. krot - 1 and for each pair (i, j) of round k:

    x_i' = x_i cos(theta) + x_j sin(theta)
    x_j' = x_j cos(theta) - x_i sin(theta)

Each kernel is a module of its own and tested against the reference. To add one, write a module with
`Tables` (a `KernelTables`), `usable(tables)` and `rotate(x, tables)`, and add it to `_KERNELS`.
"""

from __future__ import annotations

from types import ModuleType

import mlx.core as mx

from . import cuda, metal, reference
from .tables import RotationTables

__all__ = ["RotationTables", "prepare", "rotate"]
_KERNELS = (metal, cuda)


def rotate(x: mx.array, tables: RotationTables) -> mx.array:
    """Scale and rotate the channels of `x`, in float32, by the kernel of the default device.

    Args:
        x: (..., dims) in float16, bfloat16 or float32.
        tables: Of the rotation.

    Returns:
        An array in the shape and dtype of `x`.

    Raises:
        ValueError: The last axis of `x` is not `tables.dims` long, or the pairs are invalid.
    """
    if x.shape[-1] != tables.dims:
        raise ValueError(f"the rotation is over {tables.dims} channels, x has shape {x.shape}")
    y: mx.array = _kernel_for(tables).rotate(x, tables)
    return y


def prepare(tables: RotationTables) -> None:
    """Build the tables that `rotate` would build at its first call on the default device."""
    tables.for_kernel(_kernel_for(tables).Tables)


def _kernel_for(tables: RotationTables) -> ModuleType:
    """Choose the module whose kernel runs this rotation on the default device."""
    return next((kernel for kernel in _KERNELS if kernel.usable(tables)), reference)
