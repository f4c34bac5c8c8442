"""ParoQuant checkpoints as MLX-native cache entries: convert once, load fast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .api.convert import convert_checkpoint, convert_checkpoints
    from .api.install import install, uninstall
    from .api.load import load
    from .errors import ParoquantStreamError
    from .exports.mlx_directory_writer import export_model
    from .store.manifest import Manifest

__all__ = [
    "Manifest",
    "ParoquantStreamError",
    "__version__",
    "convert_checkpoint",
    "convert_checkpoints",
    "export_model",
    "install",
    "load",
    "uninstall",
]
_HOMES = {
    "convert_checkpoint": "api.convert",
    "convert_checkpoints": "api.convert",
    "export_model": "exports.mlx_directory_writer",
    "load": "api.load",
    "install": "api.install",
    "uninstall": "api.install",
    "ParoquantStreamError": "errors",
    "Manifest": "store.manifest",
}


def __getattr__(name: str) -> Any:
    """The public names, imported when first used: `import paroquant_stream` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
