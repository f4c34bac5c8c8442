"""An exported directory read back by load()."""

from __future__ import annotations

import json
import os

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from paroquant_stream import load
from paroquant_stream.api.export import export_model
from paroquant_stream.checkpoint.checkpoint import Checkpoint
from paroquant_stream.errors import AssemblyError, CheckpointError, LayoutError, MalformedFileError
from paroquant_stream.exports.exported_config import MODEL_FILE
from tests.helpers.paths import FIXTURES
from tests.helpers.variants import variant

FAMILIES = ["llama-awq-adversarial", "qwen3_moe-awq-adversarial", "qwen3_5_text-awq-size"]


def bits(array: mx.array) -> tuple:
    words = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[array.itemsize]
    return str(array.dtype), array.shape, bytes(memoryview(mx.contiguous(array.view(words))))


def parameters(model) -> dict:
    return {name: bits(array) for name, array in tree_flatten(model.parameters())}


@pytest.fixture
def exported(model_dir, tmp_path):
    export_model(model_dir, tmp_path / "out", shard_size=20_000)
    return tmp_path / "out"


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("lazy", "self_contained"),
    [
        (False, False),
        (True, True),
        pytest.param(False, True, marks=pytest.mark.slow),
        pytest.param(True, False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_load_returns_every_parameter_bit_for_bit(
    name, lazy, self_contained, tmp_path, monkeypatch
):
    original, words, _ = load(FIXTURES / name)
    export_model(FIXTURES / name, tmp_path / "out", self_contained=self_contained)
    monkeypatch.setattr("paroquant_stream.api.load.convert", lambda *_: pytest.fail("converted"))
    model, tokenizer, is_vlm = load(tmp_path / "out", lazy=lazy)
    assert parameters(model) == parameters(original)
    assert tokenizer.encode("w5 w9") == words.encode("w5 w9") != []
    assert not is_vlm
    assert not model.training


def test_an_export_with_its_own_model_type_is_read(exported, model_dir):
    """As it was written before the type was hidden from other libraries."""

    def as_before(config):
        config["model_type"] = config["paroquant_stream"].pop("model_type")

    edit(exported / "config.json", as_before)
    assert parameters(load(exported)[0]) == parameters(load(model_dir)[0])


def test_a_tied_head_that_the_class_itself_removes_is_not_missed(tmp_path):
    model = variant("gemma3_text-awq-adversarial", tmp_path / "model", tied=True)
    export_model(model, tmp_path / "out")
    found = load(tmp_path / "out")[0]
    assert parameters(found) == parameters(load(model)[0])
    assert "lm_head" not in found


def test_code_in_the_directory_is_not_run(model_dir, tmp_path):
    export_model(model_dir, tmp_path / "out", self_contained=True)
    (tmp_path / "out" / MODEL_FILE).write_text("raise SystemExit('it ran')")
    load(tmp_path / "out")


def test_a_missing_tensor_is_named(exported):
    shard = sorted(exported.glob("model-*.safetensors"))[1]
    tensors = mx.load(str(shard))
    gone = sorted(tensors)[0]
    del tensors[gone]
    mx.save_safetensors(str(shard), tensors)
    edit(exported / "model.safetensors.index.json", lambda index: index["weight_map"].pop(gone))
    with pytest.raises(AssemblyError, match=f"{gone}: no stored tensor"):
        load(exported)


def test_a_file_cut_short_is_refused_before_mlx_reads_it(exported):
    shard = sorted(exported.glob("model-*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(MalformedFileError, match="the header describes"):
        load(exported)


def test_a_file_changed_since_it_was_checked_is_refused(exported, monkeypatch):
    real, cut = Checkpoint.headers, []

    def headers(self):
        found = real(self)
        cut.append(self.shards[0].path)
        os.truncate(cut[0], 100)
        return found

    monkeypatch.setattr(Checkpoint, "headers", headers)
    with pytest.raises(MalformedFileError, match="safetensors header"):
        load(exported)
    assert cut


def test_an_absent_file_is_named(exported):
    shard = sorted(exported.glob("model-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        load(exported)


@pytest.mark.parametrize("mark", [{"format": 2}, {}, None, [1]])
def test_another_format_is_refused_with_what_to_do(exported, mark):
    edit(exported / "config.json", lambda config: config.update(paroquant_stream=mark))
    with pytest.raises(CheckpointError, match="upgrade"):
        load(exported)


@pytest.mark.parametrize("sizes", [None, {"bits": 8}, {"bits": "4"}, {"group_size": 0}])
def test_a_config_with_other_bits_or_group_size_is_refused(exported, sizes):
    edit(exported / "config.json", lambda config: config.update(quantization_config=sizes))
    with pytest.raises(LayoutError, match=r"config\.json"):
        load(exported)


def test_another_group_size_than_the_weights_have_is_refused(exported):
    sizes = {"bits": 4, "group_size": 128}
    edit(exported / "config.json", lambda config: config.update(quantization_config=sizes))
    with pytest.raises(AssemblyError, match="do not fit the layers of this model"):
        load(exported)


@pytest.mark.parametrize("shape", [(), (1,), (3, 7)])
def test_a_rotation_of_another_shape_is_refused(exported, shape):
    shard = sorted(exported.glob("model-*.safetensors"))[1]
    tensors = mx.load(str(shard))
    name = next(name for name in tensors if name.endswith("theta"))
    tensors[name] = mx.zeros(shape)
    mx.save_safetensors(str(shard), tensors)
    with pytest.raises(AssemblyError):
        load(exported)
