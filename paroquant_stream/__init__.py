"""Convert ParoQuant checkpoints into MLX-native cache entries once, and load them fast.

    from paroquant_stream import load
    model, tokenizer, is_vlm = load("z-lab/Qwen3-4B-PARO")

load                  build the MLX model of a checkpoint, converting what the cache lacks
convert_checkpoint    fill the cache without loading; convert_checkpoints does several models
export_model          write a converted model as a directory for other MLX programs
install, uninstall    put `load` in the place of the `paroquant` package's own loader
ConvertOptions        the options that all of these share
Manifest              what a conversion made: its entries and where they come from
ParoquantStreamError  base of every error raised on purpose, with CheckpointError, StoreError,
                      ModelError and ExecutionError below it

Every name is imported when it is first used, so that `import paroquant_stream` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .api.convert import convert_checkpoint, convert_checkpoints
    from .api.install import install, uninstall
    from .api.load import load
    from .conversion.request import ConvertOptions
    from .errors import (
        CheckpointError,
        ExecutionError,
        ModelError,
        ParoquantStreamError,
        StoreError,
    )
    from .exports.mlx_directory_writer import export_model
    from .store.manifest import Manifest

__all__ = [
    "CheckpointError",
    "ConvertOptions",
    "ExecutionError",
    "Manifest",
    "ModelError",
    "ParoquantStreamError",
    "StoreError",
    "__version__",
    "convert_checkpoint",
    "convert_checkpoints",
    "export_model",
    "install",
    "load",
    "uninstall",
]
_HOMES = {
    "CheckpointError": "errors",
    "ConvertOptions": "conversion.request",
    "ExecutionError": "errors",
    "Manifest": "store.manifest",
    "ModelError": "errors",
    "ParoquantStreamError": "errors",
    "StoreError": "errors",
    "convert_checkpoint": "api.convert",
    "convert_checkpoints": "api.convert",
    "export_model": "exports.mlx_directory_writer",
    "install": "api.install",
    "load": "api.load",
    "uninstall": "api.install",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    """List the public names, also those that are not imported yet."""
    return sorted({*globals(), *__all__})
