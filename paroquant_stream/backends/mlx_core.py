"""MLX itself: on Linux its package needs another one with a backend."""

from __future__ import annotations

import sys

from ..errors import MissingExtraError
from ..text import install_text, one_line


def check_mlx() -> None:
    """Import MLX; called before any work that needs it.

    Raises:
        MissingExtraError: It cannot be imported, most often for want of a backend.
    """
    try:
        import mlx.core  # noqa: F401 (only the import shows whether it works)
    except ImportError as error:
        advice = "pip install --force-reinstall mlx"
        if sys.platform == "linux":
            advice = install_text("'mlx[cpu]'", "cpu") + "; for an NVIDIA GPU `cuda12` or `cuda13`"
        raise MissingExtraError(f"MLX cannot be used here ({one_line(error)}): {advice}") from error
