"""Puts stored tensors into the model's parameters; every difference is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import AssemblyError
from ..rotation.layers import RotateQuantizedLinear, RotateSwitchGLU
from ..store.format import IO_BITS
from ..text import listed
from .names import Weights


def place_weights(
    model: nn.Module, weights: Weights, bits: int, group_size: int, directory: Path
) -> None:
    """Replace layers by rotated and quantized ones, load the weights and set eval mode.

    Args:
        model: An instance of the model's class, changed in place.
        weights: The arrays by the names of the model's parameters.
        bits: Bits per quantized weight.
        group_size: Channels per group, of the quantization and of the rotations.
        directory: The model directory, for messages.

    Raises:
        AssemblyError: Weights and parameters do not match in name, shape or kind of dtype.
    """
    try:
        _swap_layers(model, weights, bits, group_size)
    except (ValueError, LookupError, ArithmeticError, AttributeError, TypeError) as error:
        raise AssemblyError(  # names and shapes that no conversion writes
            f"{directory}: the stored tensors do not fit the layers of this model: {error}"
        ) from error
    _check(model, weights)
    model.load_weights(list(weights.items()))
    model.eval()


def _swap_layers(model: nn.Module, weights: Weights, bits: int, group_size: int) -> None:
    """Replace the layers whose weights are rotated or quantized."""
    modules = dict(model.named_modules())
    swaps: list[tuple[str, nn.Module]] = []
    for path, module in modules.items():
        if f"{path}.gate_up_rot_theta" in weights:
            krot = weights[f"{path}.gate_up_rot_theta"].shape[0]
            swaps.append((path, RotateSwitchGLU.from_switch_glu(module, group_size, krot, bits)))
        elif f"{path}.theta" in weights and "weight" in module:
            outputs, inputs = module.weight.shape
            krot = weights[f"{path}.theta"].shape[0]
            layer = RotateQuantizedLinear(
                inputs, outputs, bias="bias" in module, group_size=group_size, bits=bits, krot=krot
            )
            swaps.append((path, layer))
    model.update_modules(tree_unflatten(swaps))
    nn.quantize(
        model,
        group_size,
        bits,
        class_predicate=lambda path, module: (
            f"{path}.scales" in weights
            and hasattr(module, "to_quantized")
            and {"group_size": group_size, "bits": _stored_bits(weights, path, group_size, bits)}
        ),
    )


def _stored_bits(weights: Weights, path: str, group_size: int, bits: int) -> int:
    """Return the bits per weight of an embedding or head, which have their own (`--io-bits`)."""
    words, groups = weights[f"{path}.weight"].shape[-1], weights[f"{path}.scales"].shape[-1]
    stored = 32 * words // (group_size * groups)
    return stored if stored in IO_BITS else bits  # what fits neither, `_check` lists


def _check(model: nn.Module, weights: Weights) -> None:
    """Check that weights and parameters match in name, shape and kind of dtype."""
    parameters = dict(tree_flatten(model.parameters()))
    issues = [f"{name}: no stored tensor" for name in parameters.keys() - weights.keys()]
    issues += [f"{name}: no such parameter" for name in weights.keys() - parameters.keys()]
    for name in parameters.keys() & weights.keys():
        wanted, found = parameters[name], weights[name]
        if wanted.shape != found.shape or _kind(wanted) != _kind(found):
            issues.append(
                f"{name}: the model has {wanted.dtype} {wanted.shape}, "
                f"stored is {found.dtype} {found.shape}"
            )
    if issues:
        count = f"{len(issues)} differences between the model class and the stored tensors:"
        raise AssemblyError(count + listed(issues))


def _kind(array: mx.array) -> Any:
    """Return the dtype, one for all floats: a class starts in float32, whatever is stored."""
    return mx.floating if mx.issubdtype(array.dtype, mx.floating) else array.dtype
