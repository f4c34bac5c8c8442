"""Convert ParoQuant checkpoints into MLX-native cache entries once, and load them fast.

    from paroquant_stream import load
    model, tokenizer, is_vlm = load("z-lab/Qwen3-4B-PARO")

load                  build the MLX model of a checkpoint, converting shards that are not cached:
                      a Loaded, which unpacks as above
convert_checkpoint    fill the cache without loading; convert_checkpoints takes several models
export_model          write a converted model as a directory for other MLX programs: an Export
list_cache            what is converted, as a CacheListing of CachedModel, each with a ShardState
                      for every shard
verify_cache          read every byte: a Verification, with a Problem for each file that differs
plan_removal          what removing models would remove: a RemovalPlan of Removal, to execute
plan_prune            the same for what is useless, old or too much
install, uninstall    let paroquant, mlx-lm and mlx-vlm load ParoQuant models by `load`; undo that
ConvertOptions        the options that all of these share
Dtype, Progress       the types of the options `dtype` and `progress`
Manifest              the result of a conversion: its entries and the shards they come from
ParoquantStreamError  base of every error raised on purpose; CheckpointError, StoreError,
                      ModelError and ExecutionError are derived from it, and from that
                      SomeModelsFailedError, of functions that convert several models

Every name is imported on first use, so that `import paroquant_stream` imports nothing else.
"""

from __future__ import annotations

from .version import __version__

TYPE_CHECKING = False  # as `typing` has it, which is slow to import
if TYPE_CHECKING:
    from typing import Any

    from .api.cache import (
        CachedModel,
        CacheListing,
        RemovalPlan,
        list_cache,
        plan_prune,
        plan_removal,
    )
    from .api.convert import convert_checkpoint, convert_checkpoints
    from .api.export import export_model
    from .api.install import install, uninstall
    from .api.load import Loaded, load
    from .api.verification import Verification, verify_cache
    from .conversion.progress import Progress
    from .conversion.request import ConvertOptions
    from .errors import (
        CheckpointError,
        ExecutionError,
        ModelError,
        ParoquantStreamError,
        SomeModelsFailedError,
        StoreError,
    )
    from .exports.mlx_directory_writer import Export
    from .maintenance.removal import Removal
    from .maintenance.status import ShardState
    from .maintenance.verify import Problem
    from .store.format import Dtype
    from .store.manifest import Manifest

__all__ = [
    "CacheListing",
    "CachedModel",
    "CheckpointError",
    "ConvertOptions",
    "Dtype",
    "ExecutionError",
    "Export",
    "Loaded",
    "Manifest",
    "ModelError",
    "ParoquantStreamError",
    "Problem",
    "Progress",
    "Removal",
    "RemovalPlan",
    "ShardState",
    "SomeModelsFailedError",
    "StoreError",
    "Verification",
    "__version__",
    "convert_checkpoint",
    "convert_checkpoints",
    "export_model",
    "install",
    "list_cache",
    "load",
    "plan_prune",
    "plan_removal",
    "uninstall",
    "verify_cache",
]
_MODULES = {
    "CacheListing": "api.cache",
    "CachedModel": "api.cache",
    "CheckpointError": "errors",
    "ConvertOptions": "conversion.request",
    "Dtype": "store.format",
    "ExecutionError": "errors",
    "Export": "exports.mlx_directory_writer",
    "Loaded": "api.load",
    "Manifest": "store.manifest",
    "ModelError": "errors",
    "ParoquantStreamError": "errors",
    "Problem": "maintenance.verify",
    "Progress": "conversion.progress",
    "Removal": "maintenance.removal",
    "RemovalPlan": "api.cache",
    "ShardState": "maintenance.status",
    "SomeModelsFailedError": "errors",
    "StoreError": "errors",
    "Verification": "api.verification",
    "convert_checkpoint": "api.convert",
    "convert_checkpoints": "api.convert",
    "export_model": "api.export",
    "install": "api.install",
    "list_cache": "api.cache",
    "load": "api.load",
    "plan_prune": "api.cache",
    "plan_removal": "api.cache",
    "uninstall": "api.install",
    "verify_cache": "api.verification",
}


if not TYPE_CHECKING:  # to a type checker a module with this has every name, misspelled ones too

    def __getattr__(name: str) -> Any:
        """Import a public name on first use."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    """List the public names, including those that are not imported yet."""
    return sorted({*globals(), *__all__})
