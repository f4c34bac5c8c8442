"""The assembled model: every parameter from a stored tensor, every tensor used, or one error."""

from __future__ import annotations

import json
import logging
import os

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from paroquant_stream import convert_checkpoint, load
from paroquant_stream.checkpoint.config import ModelConfig
from paroquant_stream.conversion.converter import convert
from paroquant_stream.conversion.request import make_request
from paroquant_stream.errors import AssemblyError, MalformedFileError
from paroquant_stream.model.assemble import assemble
from paroquant_stream.rotation.layers import RotateQuantizedLinear
from paroquant_stream.store.store import cache_store
from tests.helpers.builders import (
    HIDDEN,
    VOCAB,
    llama_tensors,
    write_checkpoint,
    write_llama,
)


def parameters(module) -> dict[str, mx.array]:
    return dict(tree_flatten(module.parameters()))


def test_gives_the_model_its_tokenizer_and_that_it_is_no_vision_model(model_dir):
    found, tokenizer, is_vlm = load(model_dir)
    assert isinstance(found.model.layers[0].self_attn.q_proj, RotateQuantizedLinear)
    assert isinstance(found.model.embed_tokens, nn.QuantizedEmbedding)
    assert isinstance(found.lm_head, nn.QuantizedLinear)
    assert tokenizer.encode("w5 w6") == [5, 6]
    assert is_vlm is False
    assert not found.training


def test_stored_tensors_reach_their_parameters(model_dir):
    tensors, found = llama_tensors(), parameters(load(model_dir)[0])
    name = "model.layers.1.mlp.down_proj"
    assert np.array_equal(np.array(found[f"{name}.pairs"]), tensors[f"{name}.pairs"])
    assert np.array_equal(np.array(found[f"{name}.scales"]), tensors[f"{name}.scales"].T)


def test_lazy_leaves_the_parameters_unread(model_dir, monkeypatch):
    convert_checkpoint(model_dir)
    monkeypatch.setattr(mx, "eval", lambda *_: pytest.fail("something was evaluated"))
    load(model_dir, lazy=True)


def test_lazy_joins_no_stack(monkeypatch):
    from tests.helpers.paths import FIXTURES

    directory = FIXTURES / "qwen3_moe-awq-adversarial"  # its experts are spread over the shards
    convert_checkpoint(directory)
    monkeypatch.setattr(mx, "eval", lambda *_: pytest.fail("something was evaluated"))
    load(directory, lazy=True)


def test_a_missing_an_extra_and_a_misshapen_tensor_are_one_error(tmp_path):
    norm = np.ones(HIDDEN + 32, np.float16)
    directory = write_llama(
        tmp_path,
        drop=["model.norm.weight"],
        **{"model.layers.0.input_layernorm.weight": norm, "model.extra.weight": norm},
    )
    with pytest.raises(AssemblyError) as caught:
        load(directory)
    message = str(caught.value)
    assert "3 differences" in message
    assert "model.norm.weight: no stored tensor" in message
    assert "model.extra.weight: no such parameter" in message
    assert "model.layers.0.input_layernorm.weight: the model has" in message


def test_an_integer_in_the_place_of_a_float_is_an_error(tmp_path):
    directory = write_llama(tmp_path, **{"model.norm.weight": np.ones(HIDDEN, np.int32)})
    with pytest.raises(AssemblyError, match=r"model\.norm\.weight"):
        load(directory)


def test_a_bias_that_the_class_has_no_place_for_is_an_error(tmp_path):
    bias = {"model.layers.0.self_attn.q_proj.bias": np.ones(64, np.float16)}
    with pytest.raises(AssemblyError, match=r"q_proj\.bias: no such parameter"):
        load(write_llama(tmp_path, **bias))


def test_a_bias_that_the_class_has_is_loaded(tmp_path):
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    sizes = dict(zip(names, (64, 32, 32, 64), strict=True))
    biases = {
        f"model.layers.{layer}.self_attn.{name}.bias": np.full(size, 0.5, np.float16)
        for layer in (0, 1)
        for name, size in sizes.items()
    }
    found, _, _ = load(write_llama(tmp_path, {"attention_bias": True}, **biases))
    assert found.model.layers[0].self_attn.q_proj.bias.tolist() == [0.5] * 64


def test_a_model_with_fewer_layers_than_the_checkpoint_is_an_error(tmp_path):
    with pytest.raises(AssemblyError, match=r"layers\.1\..*no such parameter"):
        load(write_llama(tmp_path, {"num_hidden_layers": 1}))


def test_a_tied_model_needs_no_head_and_drops_one_that_is_there(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    found, _, _ = load(write_llama(tmp_path, {"tie_word_embeddings": True}))
    assert "lm_head.weight" in caplog.text
    assert not [name for name in parameters(found) if name.startswith("lm_head")]


def test_an_unknown_model_type_is_an_error(tmp_path):
    with pytest.raises(AssemblyError, match="no_such_model"):
        load(write_llama(tmp_path, {"model_type": "no_such_model"}))


def test_bfloat16_embeddings_keep_their_dtype_and_bits(tmp_path):
    """mx.quantize of the whole embedding at once gives the bits that row chunks gave."""
    import json

    from safetensors.numpy import load_file

    directory = write_checkpoint(tmp_path / "m")
    path = directory / "model.safetensors"
    tensors = load_file(path)
    embed = mx.array(tensors["model.embed_tokens.weight"]).astype(mx.bfloat16)
    arrays = {n: mx.array(a) for n, a in tensors.items()} | {"model.embed_tokens.weight": embed}
    mx.save_safetensors(str(path), arrays)
    json.loads((directory / "config.json").read_text())
    found = parameters(load(directory)[0])
    wanted = mx.quantize(embed, 32, 4, stream=mx.cpu)
    for leaf, array in zip(("weight", "scales", "biases"), wanted, strict=True):
        stored = found[f"model.embed_tokens.{leaf}"]
        assert stored.dtype == array.dtype
        assert mx.array_equal(stored, array)
    assert found["model.embed_tokens.weight"].shape[0] == VOCAB


@pytest.mark.timeout(20)
def test_nothing_of_theirs_sees_a_directory_with_a_pipe(model_dir):
    manifest = convert(make_request(model_dir, jobs=1)).manifest
    store = cache_store(None)
    os.mkfifo(model_dir / "merges.txt")
    with pytest.raises(MalformedFileError, match="found a pipe"):
        assemble(ModelConfig.read(model_dir), manifest, store, lazy=True, force_text=False)


def test_nothing_of_theirs_sees_a_tokenizer_that_makes_up_tokens_without_end(model_dir):
    (model_dir / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 10**9}))
    with pytest.raises(AssemblyError, match="extra_ids is 1,000,000,000"):
        load(model_dir)
