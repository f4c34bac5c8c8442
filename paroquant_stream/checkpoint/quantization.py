"""The quantization settings in config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import LayoutError
from .config import EXPORTED

INT5_FORMAT = "int5-bitplane"
"""The `format` of checkpoints whose fifth bits lie in tensors of their own."""


@dataclass(frozen=True)
class Quantization:
    """Bits per weight and group size."""

    bits: int
    group_size: int
    """Inputs that share a scale and a zero point."""


def read_quantization(config: Mapping[str, Any], label: str = "config.json") -> Quantization:
    """Read bits and group size from a config.

    Args:
        config: The parsed config.json.
        label: The path of that file, for errors.

    Returns:
        The settings, with the defaults of ParoQuant for absent ones.

    Raises:
        LayoutError: The model is not quantized by ParoQuant, or a value is not supported.
    """
    block = _quantization_block(config)
    if block is None:
        raise LayoutError(
            f"{label}: neither quantization_config nor paroquant_config; not a ParoQuant model"
        )
    method = block.get("quant_method", "paroquant")
    if str(method).lower() != "paroquant":  # legacy files spell it ParoQuant
        raise LayoutError(f"{label}: expected quant_method paroquant, found {method!r}")
    bits, group_size = block.get("bits", block.get("nbit", 4)), block.get("group_size", 128)
    expected = {5 if quantization_format(config) == INT5_FORMAT else 4}
    if EXPORTED in config:
        expected = {4, 5}  # repacked already
    if type(bits) is not int or bits not in expected:
        raise LayoutError(
            f"{label}: expected 4 bits, or 5 in the format {INT5_FORMAT}, found {bits!r} in "
            f"the format {block.get('format') or 'paroquant'}"
        )
    if group_size == -1:
        raise LayoutError(
            f"{label}: group_size -1 (all inputs of a layer in one group) cannot be loaded: "
            "MLX's groups are 32, 64 or 128 inputs"
        )
    if type(group_size) is not int or group_size not in (32, 64, 128):
        raise LayoutError(
            f"{label}: expected a group_size of 32, 64 or 128 (MLX's), found {group_size!r}"
        )
    return Quantization(bits, group_size)


def is_paroquant(config: Mapping[str, Any]) -> bool:
    """Return whether a config says that ParoQuant quantized the model, by its quant_method.

    Args:
        config: The parsed config.json.
    """
    block = _quantization_block(config) or {}
    return str(block.get("quant_method")).lower() == "paroquant"


def quantization_format(config: Mapping[str, Any]) -> object:
    """Return the `format` that a config's quantization block names; None if it names none."""
    return (_quantization_block(config) or {}).get("format")


def _quantization_block(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    text = config.get("text_config")
    places = [config, text] if isinstance(text, Mapping) else [config]
    for key in ("quantization_config", "paroquant_config"):
        for place in places:
            block = place.get(key)
            if isinstance(block, Mapping):
                return block
    return None
