"""The backend for vision models."""

from __future__ import annotations

import sys

import mlx.core as mx
import mlx.nn as nn
import pytest

from paroquant_stream import load
from paroquant_stream.backends.mlx_vlm import MlxVlm
from paroquant_stream.errors import MissingExtraError
from tests.helpers.paths import FIXTURES


def test_without_mlx_vlm_the_extra_and_force_text_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx_vlm", None)
    monkeypatch.setitem(sys.modules, "mlx_vlm.utils", None)
    with pytest.raises(MissingExtraError, match=r"paroquant_stream\[vlm\].*force_text=True"):
        MlxVlm().build({"model_type": "qwen3_5"})


def test_without_processor_files_the_tokenizer_is_loaded(caplog):
    _, processor, is_vlm = load(FIXTURES / "gemma4_e2b-awq-adversarial")
    assert is_vlm
    assert "its tokenizer alone" in caplog.text
    assert processor.stopping_criteria(1)
    assert not processor.stopping_criteria(5)


def test_the_model_and_each_part_sanitize_once():
    class Part(nn.Module):
        def sanitize(self, weights):
            return {f"{name}.{self.label}": array for name, array in weights.items()}

    model = Part()
    model.label = "model"
    for label in ("audio_tower", "language_model", "vision_tower"):
        model[label] = Part()
        model[label].label = label
    model.other = Part()
    assert list(MlxVlm().sanitize(model, {"x": mx.zeros(1)})) == [
        "x.model.vision_tower.language_model.audio_tower"
    ]


def test_a_part_without_sanitize_changes_nothing():
    model = nn.Module()
    model.vision_tower = nn.Module()
    weights = {"x": mx.zeros(1)}
    assert MlxVlm().sanitize(model, weights) == weights
