"""Convert ParoQuant checkpoints into MLX-native cache entries once, and load them fast.

    from paroquant_stream import load
    model, tokenizer, is_vlm = load("z-lab/Qwen3-4B-PARO")

load                  build the MLX model of a checkpoint, converting shards that are not cached
convert_checkpoint    fill the cache without loading; convert_checkpoints takes several models
export_model          write a converted model as a directory for other MLX programs
install, uninstall    let paroquant, mlx-lm and mlx-vlm load ParoQuant models by `load`; undo that
ConvertOptions        the options that all of these share
Manifest              the result of a conversion: its entries and the shards they come from
ParoquantStreamError  base of every error raised on purpose; CheckpointError, StoreError,
                      ModelError and ExecutionError are derived from it

Every name is imported on first use, so that `import paroquant_stream` imports nothing else.
"""

from __future__ import annotations

from .version import __version__

TYPE_CHECKING = False  # as `typing` has it, which is slow to import
if TYPE_CHECKING:
    from typing import Any

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
_MODULES = {
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
    """Import a public name on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    """List the public names, including those that are not imported yet."""
    return sorted({*globals(), *__all__})
