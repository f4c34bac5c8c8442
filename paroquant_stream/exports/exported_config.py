"""The config.json of an export: one that only those accept who can run the rotations.

A library that knows no rotations would find every other tensor in its place, so it may load an
export in silence and answer nonsense. It finds no class for the model type here, and stops. The
model's own type stands under our key, and in a second file for transformers, which chooses the
tokenizer's class by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.nn as nn

from ..checkpoint.config import EXPORTED
from ..rotation.layers import RotateQuantizedLinear, RotateSwitchGLU
from ..store.manifest import Manifest
from .mlx_directory_reader import FORMAT

MODEL_FILE = "paroquant_model.py"
"""The code of a self-contained directory: `standalone.py`, byte for byte."""
NEEDS_PACKAGE = "paroquant_stream_required__"
"""Before the model type of a plain export: "Model type ... not supported" says what to do."""
NEEDS_TRUST = "trust_remote_code_required__"
"""The same of a self-contained one, for libraries that do not look for `model_file`."""
TRANSFORMERS_CONFIG = "config.4.0.0.json"
"""What transformers of this version or newer reads instead, by `configuration_files`.

It loads no model by it, as `quantization_config` has no `quant_method` there.
"""
_LEFT_OUT = ("_name_or_path", "vision_config", "audio_config")


def exported_config(
    original: dict[str, Any], manifest: Manifest, model: nn.Module, self_contained: bool
) -> dict[str, dict[str, Any]]:
    """Make the config files of an export.

    Args:
        original: The model's config.json without keys that name code.
        manifest: Of its conversion.
        model: As it is written.
        self_contained: Whether the export brings its own code.

    Returns:
        The names of the files and what they hold: MLX's `quantization`, no tower.
    """
    config = {key: value for key, value in original.items() if key not in _LEFT_OUT}
    if type(config.get("text_config")) is dict:
        text = config["text_config"]
        config["text_config"] = {k: v for k, v in text.items() if k != "quantization_config"}
    config["quantization"] = {"group_size": manifest.group_size, "bits": manifest.bits}
    config["quantization_config"] = config["quantization"]
    model_type = config.get("model_type")
    mark: dict[str, Any] = {"format": FORMAT, "model_type": model_type}
    ours: dict[str, Any] = {"configuration_files": [TRANSFORMERS_CONFIG], EXPORTED: mark}
    ours["model_type"] = f"{NEEDS_TRUST if self_contained else NEEDS_PACKAGE}{model_type}"
    if self_contained:
        ours["model_file"] = MODEL_FILE
        mark["module"] = type(model).__module__.removeprefix("mlx_lm.models.")
        mark["rotated"] = dict(_rotated(model))
    config.pop("configuration_files", None)
    return {
        TRANSFORMERS_CONFIG: dict(sorted(config.items())),
        "config.json": dict(sorted((config | ours).items())),
    }


def _rotated(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Return path and number of rotation rounds of each rotated layer."""
    for path, module in model.named_modules():
        if isinstance(module, RotateQuantizedLinear):
            yield path, module.theta.shape[0]
        elif isinstance(module, RotateSwitchGLU):
            yield path, module.gate_up_rot_theta.shape[0]
