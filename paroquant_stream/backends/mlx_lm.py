"""The backend for text models: mlx-lm."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import CheckpointError, ExecutionError
from ..text import one_line
from .backend import Backend

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

_TYPES = {"qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5_moe"}
"""Model types of text-only saves by transformers -> the names that mlx-lm has for them."""
EXPORT_MARK = "paroquant_stream"
"""The key of an export's config.json with the model's own type: `model_type` is no library's."""


class MlxLm(Backend):
    """mlx-lm, for text models."""

    package = "mlx_lm"
    extra = "lm"
    needed = ("mlx_lm",)
    is_vlm = False

    def sanitize(self, model: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Rename weights to the model's own names."""
        return model.sanitize(weights) if hasattr(model, "sanitize") else weights

    def type_name(self, model_type: str) -> str:
        """Return mlx-lm's name for a model type."""
        return _TYPES.get(model_type, model_type)

    def _utils(self) -> Any:
        return import_utils()

    def _find_class(self, utils: Any, config: dict[str, Any]) -> Any:
        return utils._get_classes(config)

    def _build(self, utils: Any, config: dict[str, Any]) -> nn.Module:
        model_class, arguments = self._find_class(utils, config)
        return cast("nn.Module", model_class(arguments.from_dict(config)))

    def _load_tokenizer(self, utils: Any, directory: Path, eos_ids: Any) -> Any:
        return utils.load_tokenizer(directory, {"trust_remote_code": False}, eos_token_ids=eos_ids)


def load_config(directory: Path) -> dict[str, Any]:
    """Read config.json by mlx-lm, with the end-of-text tokens of generation_config.json.

    Args:
        directory: A model directory that `check_directory` accepted.

    Returns:
        The config, with mlx-lm's own name of the model type, also of an export.

    Raises:
        CheckpointError: mlx-lm cannot use one of the files.
        MissingExtraError: mlx-lm is not installed.
    """
    utils = import_utils()
    try:
        config: dict[str, Any] = utils.load_config(directory)
    except Exception as error:  # another library may raise any type
        raise CheckpointError(
            f"{directory}: mlx-lm cannot read config.json or generation_config.json: "
            f"{one_line(error)}"
        ) from error
    flatten_rope(config)
    mark, model_type = config.get(EXPORT_MARK), config.get("model_type")
    if isinstance(mark, dict):
        model_type = mark.get("model_type", model_type)
    if isinstance(model_type, str):  # a list cannot be looked up
        model_type = _TYPES.get(model_type, model_type)
    config["model_type"] = model_type
    return config


def flatten_rope(config: dict[str, Any]) -> None:
    """Add rope_theta and rope_scaling where they lie in rope_parameters, as transformers 5 saves.

    Many classes know only the old names: some raise, others use a theta of 10,000 in silence.

    Args:
        config: config.json; changed in place.
    """
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:  # absent, or one for each layer type
        return
    config.setdefault("rope_theta", rope["rope_theta"])
    if rope.get("rope_type", "default") != "default" and config.get("rope_scaling") is None:
        config["rope_scaling"] = rope


def import_utils() -> Any:
    """Import `mlx_lm.utils`.

    Raises:
        MissingExtraError: mlx-lm is not installed.
        ExecutionError: It cannot be imported.
    """
    try:
        # an import statement says nothing where the import of another thread has just failed
        return import_module("mlx_lm.utils")
    except ImportError as error:
        raise MlxLm().missing(error) from error
    except ValueError as error:  # it sets a limit of 4096 open files, beyond a lower hard limit
        raise ExecutionError(
            f"mlx-lm cannot be imported: {error}; it needs 4096 open files, see `ulimit -Hn`"
        ) from error
    except OSError as error:  # as where the working directory was removed
        raise ExecutionError(f"mlx-lm cannot be imported: {error}") from error
