"""The boundary to mlx-lm and mlx-vlm."""

from __future__ import annotations

import sys

import pytest

from paroquant_stream import model_class
from paroquant_stream.errors import MissingExtra


def test_without_mlx_lm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx_lm.utils", None)
    with pytest.raises(MissingExtra, match=r"paroquant_stream\[lm\]"):
        model_class.build({"model_type": "llama"}, is_vlm=False)


def test_without_mlx_vlm_the_extra_and_force_text_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx_vlm", None)
    monkeypatch.setitem(sys.modules, "mlx_vlm.utils", None)
    with pytest.raises(MissingExtra, match=r"paroquant_stream\[vlm\].*force_text=True"):
        model_class.build({"model_type": "qwen3_5"}, is_vlm=True)


def test_end_of_text_tokens_of_the_generation_config_reach_the_tokenizer(model_dir):
    (model_dir / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    config = model_class.load_config(model_dir)
    tokenizer = model_class.load_tokenizer(model_dir, config, is_vlm=False)
    assert {1, 7} <= set(tokenizer.eos_token_ids)
