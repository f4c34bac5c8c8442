"""The boundary to mlx-lm and mlx-vlm."""

from __future__ import annotations

import json
import os
import sys

import pytest

from paroquant_stream.backends import backend as model_class
from paroquant_stream.errors import AssemblyError, CheckpointError, MalformedFile, MissingExtra
from tests.helpers.builders import CONFIG


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


@pytest.mark.parametrize(
    "change",
    [{"num_attention_heads": 0}, {"vocab_size": -1}, {"vocab_size": 2**40}, {"hidden_size": "x"},
     {"model_type": "base"}, {"model_type": None}, {"rope_scaling": 7}],
)  # fmt: skip
def test_a_config_that_a_class_cannot_use_is_one_error_that_names_the_model_type(change):
    config = {**CONFIG, **change}
    with pytest.raises(AssemblyError, match=f"model_type {config['model_type']!r}: ") as error:
        model_class.build(config, is_vlm=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[" * 100_000, '"text"', "[1]", "\udcff"])
def test_a_generation_config_that_mlx_lm_cannot_use_is_one_error(model_dir, text):
    data = text.encode("utf-8", "surrogateescape")
    (model_dir / "generation_config.json").write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"mlx-lm cannot read config\.json or generation_config"
    ):
        model_class.load_config(model_dir)


@pytest.mark.parametrize(
    ("name", "text"),
    [("tokenizer.json", "{"), ("tokenizer.json", "[" * 100_000), ("tokenizer.json", "{}"),
     ("special_tokens_map.json", "[" * 100_000), ("tokenizer_config.json", "[" * 100_000)],
)  # fmt: skip
def test_a_tokenizer_that_transformers_cannot_load_is_one_error(model_dir, name, text):
    (model_dir / name).write_text(text)
    with pytest.raises(CheckpointError, match="transformers cannot load the tokenizer: ") as error:
        model_class.load_tokenizer(model_dir, CONFIG, is_vlm=False)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("is_vlm", [False, True])
@pytest.mark.timeout(20)
def test_nothing_of_theirs_sees_a_directory_with_a_pipe(model_dir, is_vlm):
    os.mkfifo(model_dir / "merges.txt")
    with pytest.raises(MalformedFile, match="found a pipe"):
        model_class.load_config(model_dir)
    with pytest.raises(MalformedFile, match="found a pipe"):
        model_class.load_tokenizer(model_dir, CONFIG, is_vlm)


def test_nothing_of_theirs_sees_a_tokenizer_that_makes_up_tokens_without_end(model_dir):
    (model_dir / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 10**9}))
    with pytest.raises(AssemblyError, match="extra_ids is 1,000,000,000"):
        model_class.load_tokenizer(model_dir, CONFIG, is_vlm=False)
