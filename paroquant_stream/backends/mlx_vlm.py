"""The backend for vision models: mlx-vlm."""

from __future__ import annotations

import logging
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..text import one_line
from .backend import Backend

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

logger = logging.getLogger(__name__)
_CONFIGS = ["text", "vision", "perceiver", "projector", "audio"]
_PARTS = ("vision_tower", "language_model", "audio_tower")


class MlxVlm(Backend):
    """mlx-vlm, for vision models."""

    package = "mlx_vlm"
    extra = "vlm"
    needed = ("mlx_lm", "mlx_vlm")
    alternative = "; or load its text part with force_text=True"
    is_vlm = True

    def sanitize(self, model: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Rename weights to the model's own names, by the `sanitize` of the model and its parts."""
        for part in (model, *(getattr(model, name, None) for name in _PARTS)):
            if part is not None and hasattr(part, "sanitize"):
                weights = part.sanitize(weights)
        return weights

    def _utils(self) -> Any:
        try:
            return import_module("mlx_vlm.utils")  # as for mlx-lm
        except ImportError as error:
            raise self.missing(error) from error

    def _find_class(self, utils: Any, config: dict[str, Any]) -> Any:
        return utils.get_model_and_args(config=config)

    def _build(self, utils: Any, config: dict[str, Any]) -> nn.Module:
        module, _ = self._find_class(utils, config)
        arguments = module.ModelConfig.from_dict(config)
        arguments = utils.update_module_configs(arguments, module, config, _CONFIGS)
        return cast("nn.Module", module.Model(arguments))

    def _load_tokenizer(self, utils: Any, directory: Path, eos_ids: Any) -> Any:
        try:
            processor = utils.load_processor(
                directory, eos_token_ids=eos_ids, trust_remote_code=False
            )
            image_processor = utils.load_image_processor(directory, trust_remote_code=False)
            if image_processor is not None:
                processor.image_processor = image_processor
            return processor
        except (ImportError, TypeError, AttributeError, OSError, ValueError) as error:
            logger.warning(
                "%s: no processor, using its tokenizer alone: %s", directory, one_line(error)
            )
        tokenizer = utils.load_tokenizer(directory)
        if not hasattr(tokenizer, "stopping_criteria"):
            tokenizer.stopping_criteria = utils.StoppingCriteria(eos_ids, tokenizer)
        return tokenizer
