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

from ..backends.mlx_lm import flatten_rope
from ..checkpoint.config import EXPORTED
from ..rotation.layers import RotateQuantizedLinear, RotateSwitchGLU
from ..store.manifest import Manifest
from .mlx_directory_reader import FORMAT

MODEL_FILE = "paroquant_model.py"
"""The code of a self-contained directory: `standalone.py` and the rotation, see standalone_code."""
NEEDS_PACKAGE = "paroquant_stream_required__"
"""Before the model type of a plain export: "Model type ... not supported" says what to do."""
NEEDS_TRUST = "trust_remote_code_required__"
"""The same of a self-contained one, for libraries that do not look for `model_file`."""
TRANSFORMERS_CONFIG = "config.4.0.0.json"
"""What transformers of this version or newer reads instead, by `configuration_files`.

It loads no model by it, as `quantization_config` has no `quant_method` there.
"""
VISION_FILE = "paroquant_vision_model.py"
"""The code of a directory with a tower, beside `MODEL_FILE`: `standalone_vision.py`."""
NEEDS_MLX_VLM = "mlx_vlm_0.6.16_required"
"""The `quantization.mode` of a directory with a tower: no library has one of this name.

The model type stays, as mlx-vlm finds processors by it. Its versions that run `model_file` get the
real mode from there; the others stop.
"""
TOWERS = ("vision_config", "audio_config")


def exported_config(
    original: dict[str, Any], manifest: Manifest, model: nn.Module, code: str | None
) -> dict[str, dict[str, Any]]:
    """Make the config files of an export.

    Args:
        original: The model's config.json without keys that name code.
        manifest: Of its conversion.
        model: As it is written.
        code: The file that a library runs: `MODEL_FILE`, `VISION_FILE` or None.

    Returns:
        The names of the files and what they hold: MLX's `quantization`, and towers for mlx-vlm.
    """
    left_out = {"_name_or_path", "configuration_files", *(TOWERS if code != VISION_FILE else ())}
    config = {key: value for key, value in original.items() if key not in left_out}
    if type(config.get("text_config")) is dict:
        text = config["text_config"]
        config["text_config"] = {k: v for k, v in text.items() if k != "quantization_config"}
    sizes = {"group_size": manifest.group_size, "bits": manifest.bits}
    config |= {"quantization": sizes, "quantization_config": sizes}
    mark: dict[str, Any] = {"format": FORMAT, "model_type": config.get("model_type")}
    ours: dict[str, Any] = {EXPORTED: mark}
    if code is not None:
        ours["model_file"] = code
        mark["rotated"] = dict(_rotated(model))
    if code == VISION_FILE:
        ours["quantization"] = {**sizes, "mode": NEEDS_MLX_VLM}
        return {"config.json": dict(sorted((config | ours).items()))}
    if code == MODEL_FILE:
        mark["module"] = type(model).__module__.removeprefix("mlx_lm.models.")
    needs = NEEDS_PACKAGE if code is None else NEEDS_TRUST
    ours["model_type"] = f"{needs}{mark['model_type']}"
    ours["configuration_files"] = [TRANSFORMERS_CONFIG]
    written = {TRANSFORMERS_CONFIG: dict(sorted(config.items()))}
    flatten_rope(config)  # as `load` does: the library alone might use another theta
    return {
        **written,
        "config.json": dict(sorted((config | ours).items())),
    }


def _rotated(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Return path and number of rotation rounds of each rotated layer."""
    for path, module in model.named_modules():
        if isinstance(module, RotateQuantizedLinear):
            yield path, module.theta.shape[0]
        elif isinstance(module, RotateSwitchGLU):
            yield path, module.gate_up_rot_theta.shape[0]
