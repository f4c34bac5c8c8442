"""Chooses the library that runs a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from .backend import Backend
from .mlx_lm import MlxLm
from .mlx_vlm import MlxVlm

TOWER_PREFIXES = (
    "vision_tower.",
    "model.visual.",
    "visual.",
    "model.vision_tower.",
    "model.embed_vision.",
    "model.vision_embedder.",
    "model.embed_audio.",
    "model.audio_tower.",
    "embed_vision.",
    "vision_embedder.",
    "embed_audio.",
    "audio_tower.",
)
"""Prefixes of the tensors of vision and audio towers, in checkpoints and in mlx-vlm's models.

A text load reads none of these tensors.
"""


def select_backend(config: Mapping[str, Any], names: Collection[str], force_text: bool) -> Backend:
    """Choose the library that loads a model.

    Args:
        config: The values of config.json.
        names: The names of the model's stored tensors.
        force_text: Load the text part of a vision model.

    Returns:
        mlx-vlm for a model with a vision config and tensors of a tower, else mlx-lm.
    """
    tower = any(name.startswith(TOWER_PREFIXES) for name in names)
    return MlxVlm() if config.get("vision_config") and tower and not force_text else MlxLm()
