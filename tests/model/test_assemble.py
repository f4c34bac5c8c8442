"""The assembled model: every parameter from a stored tensor, every tensor used, or an error."""

from __future__ import annotations

import json
import logging
import os
import threading

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from safetensors.numpy import load_file

from paroquant_stream import convert_checkpoint, load
from paroquant_stream.api.export import export_model
from paroquant_stream.backends.selection import TOWER_PREFIXES
from paroquant_stream.checkpoint.config import ModelConfig
from paroquant_stream.conversion.converter import convert
from paroquant_stream.conversion.request import make_request
from paroquant_stream.distributed.split import WHOLE, Split
from paroquant_stream.errors import AssemblyError, MalformedFileError
from paroquant_stream.exports.single_file_writer import export_single_file
from paroquant_stream.model import assemble as assembling
from paroquant_stream.model.assemble import assemble
from paroquant_stream.rotation.layers import RotateQuantizedLinear
from paroquant_stream.store.store import cache_store
from tests.helpers.builders import VOCAB, llama_tensors, write_checkpoint, write_llama
from tests.helpers.parameters import parameters
from tests.helpers.paths import FIXTURES
from tests.helpers.ranks import Rank


def test_a_text_model_its_tokenizer_and_its_kind_are_returned(model_dir):
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
    directory = FIXTURES / "qwen3_moe-awq-adversarial"  # its experts are spread over the shards
    convert_checkpoint(directory)
    monkeypatch.setattr(mx, "eval", lambda *_: pytest.fail("something was evaluated"))
    load(directory, lazy=True)


def test_a_tied_model_needs_no_head_and_drops_one(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    found, _, _ = load(write_llama(tmp_path, {"tie_word_embeddings": True}))
    assert "lm_head.weight" in caplog.text
    assert not [name for name in parameters(found) if name.startswith("lm_head")]


def test_an_unknown_model_type_is_an_error(tmp_path):
    with pytest.raises(AssemblyError, match="no_such_model"):
        load(write_llama(tmp_path, {"model_type": "no_such_model"}))


def test_bfloat16_embeddings_keep_their_dtype_and_bits(tmp_path):
    """The embedding was quantized in chunks of rows; mx.quantize of all at once has these bits."""
    directory = write_checkpoint(tmp_path / "m")
    path = directory / "model.safetensors"
    tensors = load_file(path)
    embed = mx.array(tensors["model.embed_tokens.weight"]).astype(mx.bfloat16)
    arrays = {n: mx.array(a) for n, a in tensors.items()} | {"model.embed_tokens.weight": embed}
    mx.save_safetensors(str(path), arrays)
    found = parameters(load(directory)[0])
    expected = mx.quantize(embed, 32, 4, stream=mx.cpu)
    for leaf, array in zip(("weight", "scales", "biases"), expected, strict=True):
        stored = found[f"model.embed_tokens.{leaf}"]
        assert stored.dtype == array.dtype
        assert mx.array_equal(stored, array)
    assert found["model.embed_tokens.weight"].shape[0] == VOCAB


def test_a_directory_with_a_pipe_is_refused_before_any_library(model_dir):
    manifest = convert(make_request(model_dir, jobs=1)).manifest
    store = cache_store(None)
    os.mkfifo(model_dir / "merges.txt")
    with pytest.raises(MalformedFileError, match="found a pipe"):
        assemble(ModelConfig.read(model_dir), manifest, store, lazy=True, force_text=False)


def test_a_tokenizer_with_endless_tokens_is_refused(model_dir):
    (model_dir / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 10**9}))
    with pytest.raises(AssemblyError, match="extra_ids is 1,000,000,000"):
        load(model_dir)


@pytest.mark.parametrize("name", ["qwen3_5-awq-adversarial", "gemma4_e2b-awq-adversarial"])
def test_a_text_load_reads_no_tensor_of_a_tower(name, monkeypatch):
    read = []
    real = assembling.read_weights

    def recorded(*arguments, **options):
        found = real(*arguments, **options)
        read.extend(found)
        return found

    monkeypatch.setattr(assembling, "read_weights", recorded)
    load(FIXTURES / name, force_text=True)
    assert read
    assert not [tensor for tensor in read if tensor.startswith(TOWER_PREFIXES)]


@pytest.mark.parametrize("size", [0, -1])
def test_an_entry_truncated_after_opening_is_converted_again(model_dir, monkeypatch, size, caplog):
    """MLX before 0.32.4 returns zeros for what it can no longer read."""
    manifest = convert_checkpoint(model_dir, jobs=1)
    store, record = make_request(model_dir).store, manifest.entries[1]
    real, cut = mx.eval, []

    def truncate_then_return_zeros(arrays):
        if not cut and threading.current_thread() is threading.main_thread():
            cut.append(record.key)
            os.truncate(store.entry_path(record.key), record.size + size if size else 0)
            return
        real(arrays)

    monkeypatch.setattr(mx, "async_eval", lambda _: None)
    monkeypatch.setattr(mx, "eval", truncate_then_return_zeros)
    load(model_dir, jobs=1)
    assert cut
    assert "became shorter while it was read" in caplog.text
    assert store.entry_size(record.key) == record.size  # made again


@pytest.mark.parametrize("form", ["export", "single file"])
def test_a_file_truncated_after_opening_is_an_error(model_dir, tmp_path, monkeypatch, form):
    if form == "export":
        export_model(model_dir, tmp_path / "out")
        place, path = tmp_path / "out", tmp_path / "out" / "model.safetensors"
    else:
        request = make_request(model_dir)
        place, (path, _) = model_dir, export_single_file(request, beside_shards=True)
    monkeypatch.setattr(mx, "async_eval", lambda _: None)
    monkeypatch.setattr(mx, "eval", lambda _: os.truncate(path, path.stat().st_size - 1))
    with pytest.raises(AssemblyError, match=f"{path}: its size changed while it was read"):
        load(place)


def test_a_failure_of_mlx_with_undamaged_entries_is_an_error(model_dir, monkeypatch):
    convert_checkpoint(model_dir)

    def fail(*_):
        raise RuntimeError("[read] Unable to read from file.")

    monkeypatch.setattr(mx, "eval", fail)
    with pytest.raises(AssemblyError, match="MLX could not read the weights"):
        load(model_dir)


def test_weights_beyond_the_memory_are_refused_unless_lazy(model_dir, monkeypatch):
    convert_checkpoint(model_dir)
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 1000}[name])
    with pytest.raises(AssemblyError, match=r"this machine has 1\.0 kB; lazy=True"):
        load(model_dir)
    load(model_dir, lazy=True)


@pytest.mark.parametrize(
    ("split", "lazy"), [(Split(group=Rank(0, 2), parallel="tensor"), True), (WHOLE, False)]
)
def test_stacks_that_ranks_cut_are_joined_lazily(model_dir, monkeypatch, split, lazy):
    manifest, config, asked = convert_checkpoint(model_dir), ModelConfig.read(model_dir), []

    def record(*_, **options):
        asked.append(options["lazy"])
        raise InterruptedError

    monkeypatch.setattr(assembling, "read_weights", record)
    with pytest.raises(InterruptedError):
        assemble(config, manifest, cache_store(None), lazy=False, force_text=False, split=split)
    assert asked == [lazy]


def test_ranks_wait_for_each_other_after_the_load(model_dir, monkeypatch):
    waited, group = [], Rank(0, 1)
    monkeypatch.setattr(assembling, "barrier", waited.append)
    load(model_dir)
    assert waited == []
    load(model_dir, group=group, parallel="tensor")
    assert waited == [group]


def test_each_stage_of_a_load_is_traced(model_dir, tmp_path):
    load(model_dir, trace=tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    stages = {"open the entries", "build the model", "tokenizer", "place the weights", "read"}
    assert {event["name"] for event in events} >= stages


@pytest.mark.parametrize(
    ("config", "error"),
    [({"model_type": "nosuch"}, "nosuch"), ({"num_hidden_layers": 3}, r"layers\.2\..*no stored"),
     ({"num_hidden_layers": 1}, r"layers\.1\..*no such parameter")],
)  # fmt: skip
def test_a_plan_that_fits_no_model_is_an_error(tmp_path, config, error):
    """`drop_source` checks this before it removes a shard."""
    directory = write_llama(tmp_path, config)
    request = make_request(directory, drop_source=True, jobs=1)
    with pytest.raises(AssemblyError, match=error):
        convert(request)
    assert len(list(directory.glob("*.safetensors"))) == 2


def test_a_checkpoint_without_a_tower_loads_without_a_warning(tmp_path, caplog):
    _, _, is_vlm = load(write_llama(tmp_path, {"vision_config": {"depth": 1}}))
    assert not is_vlm
    assert "vision tower" not in caplog.text
