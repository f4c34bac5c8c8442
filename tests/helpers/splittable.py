"""Checkpoints that two ranks can split."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np

from tests.helpers.builders import CONFIG, awq_linear, llama_tensors, write_checkpoint
from tests.helpers.paths import FIXTURES

HEADS = {"self_attn.k_proj": (64, 64), "self_attn.v_proj": (64, 64)}


DELTA = {"linear_attn.in_proj_qkv": (192, 64)}


GROUPS_OF_32 = {
    **{f"self_attn.{name}_proj": (128, 128) for name in "qo"},
    **{f"self_attn.{name}_proj": (64, 128) for name in "kv"},
    **{f"mlp.{name}_proj": (256, 128) for name in ("gate", "up")},
    "mlp.down_proj": (128, 256),
}


FAMILIES = {
    "llama": (None, HEADS, {"num_key_value_heads": 2}),
    "qwen2": (
        "qwen2-awq-size",
        GROUPS_OF_32,
        {"quantization_config": CONFIG["quantization_config"]},
    ),
    "qwen3": ("qwen3-awq-size", HEADS, {"num_key_value_heads": 2}),
    "qwen3_moe": ("qwen3_moe-awq-adversarial", HEADS, {"num_key_value_heads": 2}),
    "qwen3_5": ("qwen3_5_text-awq-size", DELTA, {"linear_num_key_heads": 2}),
    "qwen3_5_moe": ("qwen3_5_moe_text-awq-size", DELTA, {"linear_num_key_heads": 2}),
}


VISION = ("qwen3_5-awq-adversarial", DELTA, {"linear_num_key_heads": 2})
"""The fixture, and the changes that two ranks need: linears with the outputs and inputs of two key
heads or of more groups, and the settings of config.json for them. `FAMILIES` has the same fields.
"""


def splittable(directory: Path, family: str) -> Path:
    """Write a checkpoint that two ranks can split."""
    fixture, linears, settings = VISION if family == "vision" else FAMILIES[family]
    config, tensors = CONFIG, {name: mx.array(a) for name, a in llama_tensors().items()}
    write_checkpoint(directory)
    if fixture:
        tensors = {}
        for path in sorted((FIXTURES / fixture).glob("*.safetensors")):
            tensors |= mx.load(str(path))
        config = json.loads((FIXTURES / fixture / "config.json").read_text())
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(FIXTURES / fixture / name, directory)
    rng = np.random.default_rng(0)
    for name in sorted(tensors):
        module, _, leaf = name.rpartition(".")
        for end, (outputs, inputs) in linears.items():
            if module.endswith(end) and leaf == "qweight":
                parts = awq_linear(rng, module, outputs, inputs)
                tensors |= {part: mx.array(array) for part, array in parts.items()}
        if name.endswith("conv1d.weight"):
            tensors[name] = mx.array(rng.normal(0, 0.3, (192, 1, 4)).astype(np.float16))
    mx.save_safetensors(str(directory / "model.safetensors"), tensors)
    config = json.loads(json.dumps(config))
    config.get("text_config", config).update(settings)
    (directory / "config.json").write_text(json.dumps(config))
    return directory
