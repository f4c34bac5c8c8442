"""A fixture of a vision model with what its processor needs, and an image."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from tests.helpers.paths import FIXTURES

_SPECIAL = {
    250: "<|image_pad|>",
    251: "<|video_pad|>",
    252: "<|vision_start|>",
    253: "<|vision_end|>",
}
_TEMPLATE = (
    "{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|> {% else %}{{ p['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}"
)
_IMAGES = {
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "processor_class": "Qwen3VLProcessor",
    "patch_size": 4,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "min_pixels": 64,
    "max_pixels": 4096,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def with_processor(out: Path) -> Path:
    """Write the Qwen 3.5 fixture, with special tokens and settings for images."""
    shutil.copytree(FIXTURES / "qwen3_5-awq-adversarial", out)
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for number, word in _SPECIAL.items():
        del words[f"w{number}"]
        words[word] = number
        added = {"id": number, "content": word, "special": True, **flags}
        tokenizer["added_tokens"].append(added)
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((out / "tokenizer_config.json").read_text())
    settings["chat_template"] = _TEMPLATE
    (out / "tokenizer_config.json").write_text(json.dumps(settings))
    (out / "preprocessor_config.json").write_text(json.dumps(_IMAGES))
    return out


def write_image(path: Path, seed: int = 0) -> Path:
    """Write an image of random colours."""
    from PIL import Image  # comes with mlx-vlm

    pixels = np.random.default_rng(seed).integers(0, 255, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path
