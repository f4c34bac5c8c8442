"""Which library runs a model: mlx-vlm one with a tower, mlx-lm any other."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

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
"""Tensors of vision and audio towers, by the checkpoint's names and by mlx-vlm's; a text model
reads none of them.
"""
TEXT_TYPES = {"qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5_moe"}
"""Model types that transformers writes for a text-only save and mlx-lm knows by another name."""


def is_vision_model(config: Mapping[str, Any], names: Collection[str], force_text: bool) -> bool:
    """Whether a model is loaded through mlx-vlm: a vision config, a tower's tensor, and no
    `force_text`.
    """
    tower = any(name.startswith(TOWER_PREFIXES) for name in names)
    return bool(config.get("vision_config")) and tower and not force_text
