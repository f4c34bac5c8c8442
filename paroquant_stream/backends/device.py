"""MLX's backend and device, for a person."""

from __future__ import annotations

from typing import Any

from ..text import one_line


def describe_device() -> dict[str, Any]:
    """Return MLX's backend (`metal`, `cuda` or `cpu`), default device and what is known of it.

    Where MLX is not installed, or lacks its backend, `backend` is None and `error` says why.
    """
    try:
        import mlx.core as mx

        device = mx.default_device()
        backends = {"metal": mx.metal, "cuda": mx.cuda}
        found = [name for name, module in backends.items() if module.is_available()]
        known = mx.device_info()
    except Exception as error:  # a missing library, driver or device each raises its own
        return {"backend": None, "error": one_line(error)}
    names = ("device_name", "architecture", "memory_size", "max_recommended_working_set_size")
    return {
        "backend": found[0] if found else "cpu",
        "device": str(device),
        **{name: known[name] for name in names if name in known},
    }
