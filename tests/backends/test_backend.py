"""The boundary to mlx-lm and mlx-vlm."""

from __future__ import annotations

import sys

import pytest

from paroquant_stream.backends.mlx_lm import MlxLm, load_config
from paroquant_stream.backends.mlx_vlm import MlxVlm
from paroquant_stream.errors import AssemblyError, CheckpointError, MissingExtraError
from tests.helpers.builders import CONFIG


def test_without_mlx_lm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx_lm.utils", None)
    with pytest.raises(MissingExtraError, match=r"paroquant_stream\[lm\]"):
        MlxLm().build({"model_type": "llama"})


def test_without_mlx_vlm_the_extra_and_force_text_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx_vlm", None)
    monkeypatch.setitem(sys.modules, "mlx_vlm.utils", None)
    with pytest.raises(MissingExtraError, match=r"paroquant_stream\[vlm\].*force_text=True"):
        MlxVlm().build({"model_type": "qwen3_5"})


def test_end_of_text_tokens_of_the_generation_config_reach_the_tokenizer(model_dir):
    (model_dir / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    config = load_config(model_dir)
    tokenizer = MlxLm().load_tokenizer(model_dir, config)
    assert {1, 7} <= set(tokenizer.eos_token_ids)


@pytest.mark.parametrize(
    "change",
    [{"num_attention_heads": 0}, {"vocab_size": -1}, {"vocab_size": 2**40}, {"hidden_size": "x"},
     {"model_type": "base"}, {"model_type": None}, {"rope_scaling": 7}],
)  # fmt: skip
def test_a_config_that_a_class_cannot_use_is_one_error_that_names_the_model_type(change):
    config = {**CONFIG, **change}
    with pytest.raises(AssemblyError, match=f"model_type {config['model_type']!r}: ") as error:
        MlxLm().build(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[" * 100_000, '"text"', "[1]", "\udcff"])
def test_a_generation_config_that_mlx_lm_cannot_use_is_one_error(model_dir, text):
    data = text.encode("utf-8", "surrogateescape")
    (model_dir / "generation_config.json").write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"mlx-lm cannot read config\.json or generation_config"
    ):
        load_config(model_dir)


@pytest.mark.parametrize(
    ("name", "text"),
    [("tokenizer.json", "{"), ("tokenizer.json", "[" * 100_000), ("tokenizer.json", "{}"),
     ("special_tokens_map.json", "[" * 100_000), ("tokenizer_config.json", "[" * 100_000)],
)  # fmt: skip
def test_a_tokenizer_that_transformers_cannot_load_is_one_error(model_dir, name, text):
    (model_dir / name).write_text(text)
    with pytest.raises(CheckpointError, match="transformers cannot load the tokenizer: ") as error:
        MlxLm().load_tokenizer(model_dir, CONFIG)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000
