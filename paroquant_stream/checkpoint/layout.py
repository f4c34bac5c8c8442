"""The layouts: the tensor names of a quantized linear, and which layout a checkpoint has.

    AUTOAWQ             X.qweight I32 (K, N/8), X.qzeros, X.scales, X.theta, ...
    AWQ_QLINEAR         X.qlinear.qweight I32 (K, N/8), X.qlinear.qzeros, ... X.rotation.theta, ...
    PARO_NATIVE         X.qlinear.qweight I16 (N/4, K), X.qlinear.scaled_zeros, ... X.rotation.theta
    PARO_NATIVE_LEGACY  the same names; TinyChat interleave, padded rows, negative scaled_zeros

    INT5_BITPLANE       AUTOAWQ's names, with the fifth bits in X.qweight_hi I32 (K, N/32) and
                        X.qzeros_hi I32 (K/G, N/32)

X is the module, N its outputs, K its inputs, G the group size. AWQ_QLINEAR comes from an early
AutoAWQ converter and is rare.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from typing import Any

from ..errors import LayoutError
from .quantization import INT5_FORMAT, quantization_format

_ROTATION = ("theta", "pairs", "channel_scales")
EXPERT = re.compile(r"(?P<base>.+)\.experts\.(?P<expert>\d+)\.(?P<projection>\w+)")
_SHARED = re.compile(
    r"(?P<base>.+)\.experts\.(?P<which>gate_up|down)_weight_(?P<leaf>theta|pairs|channel_scales)"
)


class Layout(enum.Enum):
    """How a checkpoint names and packs the tensors of a quantized linear."""

    AUTOAWQ = "AUTOAWQ"
    AWQ_QLINEAR = "AWQ_QLINEAR"
    PARO_NATIVE = "PARO_NATIVE"
    PARO_NATIVE_LEGACY = "PARO_NATIVE_LEGACY"
    INT5_BITPLANE = "INT5_BITPLANE"

    @property
    def is_awq(self) -> bool:
        """Return whether 4 bits of each code are packed as AutoAWQ packs them."""
        return self in (Layout.AUTOAWQ, Layout.AWQ_QLINEAR, Layout.INT5_BITPLANE)

    @property
    def is_nested(self) -> bool:
        """Return whether names have two components after the module, like `qlinear.qweight`."""
        return self not in (Layout.AUTOAWQ, Layout.INT5_BITPLANE)

    @property
    def roles(self) -> dict[str, str]:
        """Return suffix of a tensor's name -> role: qweight, scales, zeros, bias, theta, ..."""
        return _ROLES[self]

    def split(self, name: str) -> tuple[str, str] | None:
        """Split a tensor's name into its module and its role.

        The `.bias` of a module that is not quantized is split too; the planner knows the modules.

        Args:
            name: The name of a tensor in a checkpoint.

        Returns:
            Module path and role; None if the name ends in no suffix of this layout.
        """
        module, _, suffix = name.rpartition(".")
        if self.is_nested:
            module, _, parent = module.rpartition(".")
            suffix = f"{parent}.{suffix}"
        role = _ROLES[self].get(suffix)
        return (module, role) if role else None

    def spell(self, module: str, role: str) -> str:
        """Return the name of a module's tensor in this layout; the inverse of `split`.

        Args:
            module: The path of the module.
            role: One of the values of `roles`.
        """
        return next(f"{module}.{suffix}" for suffix, known in self.roles.items() if known == role)


def _roles(layout: Layout) -> dict[str, str]:
    if not layout.is_nested:
        planes = ("qweight_hi", "qzeros_hi") if layout is Layout.INT5_BITPLANE else ()
        plain = ("qweight", "scales", "bias", *_ROTATION, *planes)
        return {name: name for name in plain} | {"qzeros": "zeros"}
    zeros = "qlinear.qzeros" if layout is Layout.AWQ_QLINEAR else "qlinear.scaled_zeros"
    linear = {f"qlinear.{name}": name for name in ("qweight", "scales", "bias")}
    return linear | {zeros: "zeros"} | {f"rotation.{name}": name for name in _ROTATION}


_ROLES = {layout: _roles(layout) for layout in Layout}


def detect(config: Mapping[str, Any], dtypes: Mapping[str, str]) -> Layout:
    """Detect the layout of a checkpoint.

    Args:
        config: The parsed config.json.
        dtypes: Tensor name -> dtype, as headers name it.

    Returns:
        The one layout of all quantized linears.

    Raises:
        LayoutError: No tensor is quantized, a dtype fits no layout, or two layouts are mixed.
    """
    found = {
        _layout_of(config, name, dtype)
        for name, dtype in dtypes.items()
        if name.endswith(".qweight")
    }
    if not found:
        raise LayoutError("no tensor named *.qweight in any shard: nothing here is quantized")
    if len(found) > 1:
        raise LayoutError(
            f"two layouts in one checkpoint: {', '.join(sorted(f.value for f in found))}"
        )
    return found.pop()


def _layout_of(config: Mapping[str, Any], name: str, dtype: str) -> Layout:
    nested = name.endswith(".qlinear.qweight")
    if dtype == "I32" and not nested and quantization_format(config) == INT5_FORMAT:
        return Layout.INT5_BITPLANE
    if dtype == "I32":
        return Layout.AWQ_QLINEAR if nested else Layout.AUTOAWQ
    if nested and dtype == "I16":
        # The shapes are equal when K/G is a multiple of the padding; only the config differs.
        legacy = "paroquant_config" in config and "quantization_config" not in config
        return Layout.PARO_NATIVE_LEGACY if legacy else Layout.PARO_NATIVE
    raise LayoutError(
        f"{name}: dtype {dtype} fits no layout (I32: AutoAWQ, I16 under qlinear: native)"
    )


def shared_rotation(name: str) -> str | None:
    """Return the stored name of a rotation that the experts of a layer share.

    Args:
        name: The name of a tensor in a checkpoint.

    Returns:
        Its name in an entry, as the model names it; None for any other tensor.
    """
    match = _SHARED.fullmatch(name)
    return f"{match['base']}.switch_mlp.{match['which']}_rot_{match['leaf']}" if match else None
