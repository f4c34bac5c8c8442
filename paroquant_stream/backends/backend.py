"""The boundary to mlx-lm and mlx-vlm: which class a model is, how its names are sanitized, its
tokenizer.

Everything of theirs that is used is used here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..checkpoint.config_bounds import check_tokenizer
from ..checkpoint.model_files import check_directory
from ..errors import AssemblyError, CheckpointError, MissingExtra, NoSuchPart
from .model_kind import TEXT_TYPES

logger = logging.getLogger(__name__)

_PARTS = ["text", "vision", "perceiver", "projector", "audio"]


def load_config(directory: Path) -> dict[str, Any]:
    """config.json as mlx-lm reads it, with the end-of-text tokens of generation_config.json.

    Raises CheckpointError when one of them is not what mlx-lm expects, and what `check_directory`
    raises.
    """
    check_directory(directory)
    utils = _mlx_lm()
    try:
        config: dict[str, Any] = utils.load_config(directory)
    except Exception as error:  # of any kind: they are another library's ideas of a JSON file
        raise CheckpointError(
            f"{directory}: mlx-lm cannot read config.json or generation_config.json: "
            f"{_one_line(error)}"
        ) from error
    config["model_type"] = TEXT_TYPES.get(config.get("model_type", ""), config.get("model_type"))
    return config


def build(config: dict[str, Any], is_vlm: bool) -> nn.Module:
    """The model of a config, at its lazy random start.

    Raises AssemblyError for a model type that the library does not know and for a config that its
    class cannot use, MissingExtra when the library is not installed. What the config's numbers may
    be is for `check_config` to say before.
    """
    utils = _mlx_vlm() if is_vlm else _mlx_lm()
    try:
        if not is_vlm:
            model_class, arguments = utils._get_classes(config)
            return cast(nn.Module, model_class(arguments.from_dict(config)))
        module, _ = utils.get_model_and_args(config=config)
        arguments = utils.update_module_configs(
            module.ModelConfig.from_dict(config), module, config, _PARTS
        )
        return cast(nn.Module, module.Model(arguments))
    except Exception as error:  # a missing key, a zero, a number beyond MLX's: each of another kind
        raise AssemblyError(
            f"model_type {config.get('model_type')!r}: {type(error).__name__}: {_one_line(error)}"
        ) from error


def has_class(config: dict[str, Any], is_vlm: bool) -> bool:
    """Whether the installed library has a class for the config's model type."""
    try:
        if is_vlm:
            _mlx_vlm().get_model_and_args(config=config)
        else:
            _mlx_lm()._get_classes(config)
    except (MissingExtra, TypeError, ValueError, KeyError):
        return False
    return True


def sanitize(model: nn.Module, weights: dict[str, mx.array], is_vlm: bool) -> dict[str, mx.array]:
    """The weights under the model's own names, by the library's own chain, each link once.

    Some links change arrays in place, so `weights` must not be shared with another load.
    """
    parts = (
        model,
        *(getattr(model, name, None) for name in ("vision_tower", "language_model", "audio_tower")),
    )
    for part in parts if is_vlm else (model,):
        if part is not None and hasattr(part, "sanitize"):
            weights = part.sanitize(weights)
    return weights


def keep_pipeline_layers(model: nn.Module, group: Any) -> range:
    """The layers that this rank of `group` runs, by the class's own split; the model keeps no
    other.

    mlx-lm's classes leave None in the place of earlier layers, and end with the last of this rank.
    Raises NoSuchPart for a class that offers no pipeline, and for more ranks than layers.
    """
    owner: Any = getattr(model, "model", None)
    if not hasattr(owner, "pipeline"):
        kind = f"{type(model).__module__}.{type(model).__qualname__}"
        others = ["layers=range(first, beyond the last) for a loop of your own"]
        if hasattr(model, "shard"):
            others.append('parallel="tensor", which splits each layer')
        if kind.startswith("mlx_vlm."):
            others.append("perhaps a pipeline of its text part, with force_text=True")
        raise NoSuchPart(f"{kind} offers no pipeline; there is {'; '.join(others)}")
    try:
        owner.pipeline(group)
    except ValueError as error:
        raise NoSuchPart(f"no pipeline over {group.size()} ranks: {error}") from error
    return range(owner.start_idx, owner.end_idx)


def load_tokenizer(directory: Path, config: Mapping[str, Any], is_vlm: bool) -> Any:
    """The tokenizer of a text model, or the processor of a vision model.

    A vision model without processor files gets its tokenizer. No code of the model is ever run, and
    transformers is told so, else it would ask the user. Raises CheckpointError when they cannot be
    had, and what `check_directory` and `check_tokenizer` raise.
    """
    check_directory(directory)
    check_tokenizer(directory)
    try:
        return _load_tokenizer(directory, config, is_vlm)
    except MissingExtra:
        raise
    except Exception as error:  # as transformers has them, of two dozen kinds
        raise CheckpointError(
            f"{directory}: transformers cannot load the tokenizer: {type(error).__name__}: "
            f"{_one_line(error)}"
        ) from error


def _load_tokenizer(directory: Path, config: Mapping[str, Any], is_vlm: bool) -> Any:
    end = config.get("eos_token_id")
    if not is_vlm:
        extra = {"trust_remote_code": False}
        return _mlx_lm().load_tokenizer(directory, extra, eos_token_ids=end)
    utils = _mlx_vlm()
    try:
        processor = utils.load_processor(directory, eos_token_ids=end, trust_remote_code=False)
        image_processor = utils.load_image_processor(directory, trust_remote_code=False)
        if image_processor is not None:
            processor.image_processor = image_processor
        return processor
    except (ImportError, TypeError, AttributeError, OSError, ValueError) as error:
        logger.warning("no processor for %s, only its tokenizer: %s", directory, error)
    tokenizer = utils.load_tokenizer(directory)
    if not hasattr(tokenizer, "stopping_criteria"):
        tokenizer.stopping_criteria = utils.StoppingCriteria(end, tokenizer)
    return tokenizer


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 500 else f"{text[:497]}..."


def _mlx_lm() -> Any:
    try:
        import mlx_lm.utils
    except ImportError as error:
        raise MissingExtra(
            f"loading needs mlx-lm: pip install 'paroquant_stream[lm]' ({error})"
        ) from error
    return mlx_lm.utils


def _mlx_vlm() -> Any:
    try:
        import mlx_vlm.utils
    except ImportError as error:
        raise MissingExtra(
            "a vision model needs mlx-vlm: pip install 'paroquant_stream[vlm]', or load its text "
            f"part with force_text=True ({error})"
        ) from error
    return mlx_vlm.utils
