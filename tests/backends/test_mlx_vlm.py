"""The backend for vision models."""

from __future__ import annotations

import sys
from types import SimpleNamespace

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
    with pytest.raises(MissingExtraError, match=r"pip install mlx-vlm \(.*force_text=True"):
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


def test_the_configs_end_tokens_reach_the_tokenizer(model_dir):
    tokenizer = MlxVlm().load_tokenizer(model_dir, {"eos_token_id": [7]})
    assert tokenizer.stopping_criteria(7)
    assert not tokenizer.stopping_criteria(5)


@pytest.mark.parametrize("own", [None, "image processor"])
def test_a_processor_gets_the_end_tokens_and_its_image_processor(tmp_path, monkeypatch, own):
    calls = []

    def load_processor(directory, **options):
        calls.append((directory, options))
        return SimpleNamespace(image_processor="default")

    utils = SimpleNamespace(
        load_processor=load_processor, load_image_processor=lambda *_, **options: own
    )
    # Private, as no fixture has the files of a processor.
    monkeypatch.setattr(MlxVlm, "_utils", lambda _: utils)
    processor = MlxVlm().load_tokenizer(tmp_path, {"eos_token_id": [1, 7]})
    assert processor.image_processor == (own or "default")
    assert calls == [(tmp_path, {"eos_token_ids": [1, 7], "trust_remote_code": False})]


def test_a_tokenizer_without_a_processor_gets_the_end_tokens(tmp_path, monkeypatch):
    def load_processor(*_, **options):
        raise OSError("no processor")

    utils = SimpleNamespace(
        load_processor=load_processor,
        load_tokenizer=lambda _: SimpleNamespace(),
        StoppingCriteria=lambda tokens, tokenizer: tokens,
    )
    # Private, as the fixtures' end token is also their tokenizer's.
    monkeypatch.setattr(MlxVlm, "_utils", lambda _: utils)
    tokenizer = MlxVlm().load_tokenizer(tmp_path, {"eos_token_id": [1, 7]})
    assert tokenizer.stopping_criteria == [1, 7]
