"""The fixtures in other layouts, with tied and with untied embeddings."""

from __future__ import annotations

import importlib.util
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from tests.helpers.paths import FIXTURES

LAYOUTS = ("AUTOAWQ", "PARO_NATIVE", "PARO_NATIVE_LEGACY", "AWQ_QLINEAR")
_OLD = ("PARO_NATIVE_LEGACY", "AWQ_QLINEAR")
_HEAD = "lm_head.weight"
_PERIOD = {"gemma3_text": {"sliding_window_pattern": 2}}
"""mlx-lm's class runs whole periods only: six layers, where the config does not say otherwise."""


def variant(name: str, out: Path, *, layout: str = "AUTOAWQ", tied: bool) -> Path:
    """Write a fixture in AUTOAWQ spelled as `layout`; a tied one has no head, an untied one has."""
    source = FIXTURES / name
    out.mkdir(parents=True)
    for file in source.glob("*.json"):
        if file.name != "model.safetensors.index.json":
            shutil.copy(file, out)
    config = json.loads((source / "config.json").read_text())
    config |= _PERIOD.get(config["model_type"], {})
    tensors = _tensors(source)
    group = config["quantization_config"]["group_size"]
    tensors = _spelled(tensors, layout, group)
    _tie(tensors, config, tied)
    if layout in _OLD:
        sizes = config.pop("quantization_config")
        config["paroquant_config"] = {
            "quant_method": "ParoQuant",
            "nbit": sizes["bits"],
            "group_size": group,
            "krot": sizes["krot"],
        }
    (out / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(out / "model.safetensors"), tensors, {"format": "pt"})
    return out


def _tensors(source: Path) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    for shard in sorted(source.glob("*.safetensors")):
        found |= mx.load(str(shard))
    return found


def _spelled(tensors: dict[str, mx.array], layout: str, group: int) -> dict[str, mx.array]:
    if layout == "AUTOAWQ":
        return tensors
    linears = tuple(name.removesuffix("qweight") for name in tensors if name.endswith(".qweight"))
    parts = {n: np.array(a) for n, a in tensors.items() if n.startswith(linears)}
    rest = {n: a for n, a in tensors.items() if n not in parts}
    spelled = _layouts().relayout(parts, layout, group)
    return rest | {n: mx.array(np.ascontiguousarray(a)) for n, a in spelled.items()}


def _tie(tensors: dict[str, mx.array], config: dict[str, Any], tied: bool) -> None:
    config["tie_word_embeddings"] = tied
    if "text_config" in config:
        config["text_config"]["tie_word_embeddings"] = tied
    if tied:
        tensors.pop(_HEAD, None)
    elif _HEAD not in tensors:
        embedding = next(a for n, a in tensors.items() if n.endswith("embed_tokens.weight"))
        rows = np.random.default_rng(3).normal(0, 0.05, embedding.shape)
        tensors[_HEAD] = mx.array(rows.astype(np.float32)).astype(embedding.dtype)


@cache
def _layouts() -> Any:
    """The functions that made the fixtures."""
    spec = importlib.util.spec_from_file_location("fixture_layouts", FIXTURES / "layouts.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
