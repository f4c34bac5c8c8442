"""The quantization settings in config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import LayoutError


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
    if type(bits) is not int or bits != 4:
        raise LayoutError(
            f"{label}: expected 4 bits, the only width ParoQuant packs, found {bits!r}"
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


def _quantization_block(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    text = config.get("text_config")
    places = [config, text] if isinstance(text, Mapping) else [config]
    for key in ("quantization_config", "paroquant_config"):
        for place in places:
            block = place.get(key)
            if isinstance(block, Mapping):
                return block
    return None
