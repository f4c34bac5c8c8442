"""An MLX model directory written from the store: whole or not at all, a tensor at a time."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from safetensors import safe_open

from paroquant_stream import convert_checkpoint, load
from paroquant_stream.api.export import export_model
from paroquant_stream.errors import (
    CheckpointError,
    MalformedFileError,
    ParoquantStreamError,
    StoreError,
)
from paroquant_stream.exports import mlx_directory_writer as mlx_directory
from paroquant_stream.exports.exported_config import MODEL_FILE, TRANSFORMERS_CONFIG
from paroquant_stream.exports.standalone_code import model_code
from paroquant_stream.store.store import cache_store
from tests.helpers.builders import CONFIG, llama_tensors, write_checkpoint
from tests.helpers.paths import FIXTURES

PLAIN = {"config.json", TRANSFORMERS_CONFIG, "model.safetensors", "model.safetensors.index.json",
         "tokenizer.json", "tokenizer_config.json"}  # fmt: skip


def names(directory) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_holds_the_files_of_an_mlx_model_and_no_code(model_dir, tmp_path):
    for name in ("modeling_x.py", "pytorch_model.bin", "x.pkl", "README.md", "trainer_state.json",
                 "LICENSE.py", "LICENSE.so", "notes.txt", "x.jinja", "x.model"):  # fmt: skip
        (model_dir / name).write_text("not for MLX")
    for name in ("merges.txt", "chat_template.jinja", "tokenizer.model", "LICENSE"):
        (model_dir / name).write_text(name)
    export = export_model(model_dir, tmp_path / "out")
    assert names(export.directory) == {
        *PLAIN, "merges.txt", "chat_template.jinja", "tokenizer.model", "LICENSE"
    }  # fmt: skip
    assert (tmp_path / "out" / "merges.txt").read_text() == "merges.txt"


def test_files_beside_the_weights_arrive_as_they_are(model_dir, tmp_path):
    """Byte for byte; only where `auto_map` was removed as the same JSON in another form."""
    odd = '{ "eos_token_id":[1,7],\n\t"note": "\u00fc" }'
    (model_dir / "generation_config.json").write_text(odd)
    (model_dir / "chat_template.jinja").write_text("{{ messages }}\r\n")
    mapped = json.loads((model_dir / "tokenizer_config.json").read_text())
    text = json.dumps(mapped | {"auto_map": {"AutoTokenizer": ["x.X", None]}})
    (model_dir / "tokenizer_config.json").write_text(text)
    out = export_model(model_dir, tmp_path / "out", self_contained=True).directory
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (out / name).read_bytes() == (model_dir / name).read_bytes()
    assert json.loads((out / "tokenizer_config.json").read_text()) == mapped


def test_self_contained_adds_the_one_file_verbatim(model_dir, tmp_path):
    export_model(model_dir, tmp_path / "out", self_contained=True)
    assert names(tmp_path / "out") == {*PLAIN, MODEL_FILE}
    assert (tmp_path / "out" / MODEL_FILE).read_text() == model_code()


def test_index_and_files_agree_under_the_models_names(model_dir, tmp_path):
    export = export_model(model_dir, tmp_path / "out", shard_size=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = {}
    for path in sorted((tmp_path / "out").glob("model-*.safetensors")):
        with safe_open(path, "numpy") as file:
            assert file.metadata() == {"format": "mlx"}
            found |= dict.fromkeys(file.keys(), path.name)
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == export.nbytes
    model, _, _ = load(model_dir)
    parameters = dict(tree_flatten(model.parameters()))
    assert found.keys() == parameters.keys()
    assert export.nbytes == sum(array.nbytes for array in parameters.values())
    assert len(set(found.values())) == export.files == 4


def test_layers_lie_together_in_files_no_larger_than_allowed(model_dir, tmp_path):
    export_model(model_dir, tmp_path / "out", shard_size=20_000)
    weight_map = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())[
        "weight_map"
    ]
    by_file: dict[str, set] = {}
    for name, file in weight_map.items():
        by_file.setdefault(file, set()).add(name.split(".")[2] if ".layers." in name else name)
    order = [layer for file in sorted(by_file) for layer in sorted(by_file[file] & {"0", "1"})]
    assert order == sorted(order)
    for path in (tmp_path / "out").glob("model-*.safetensors"):
        with safe_open(path, "numpy") as file:
            assert sum(file.get_tensor(name).nbytes for name in file.keys()) <= 20_000  # noqa: SIM118


def test_nothing_is_shared_with_the_store(model_dir, tmp_path):
    export_model(model_dir, tmp_path / "out", cache_dir=tmp_path / "cache")
    store = {path.stat().st_ino for path in (tmp_path / "cache").rglob("*")}
    for path in (tmp_path / "out").iterdir():
        status = path.lstat()
        assert stat.S_ISREG(status.st_mode)
        assert status.st_nlink == 1
        assert status.st_ino not in store


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    """The most that MLX holds does not grow with the model."""
    peaks, sizes = [], []
    for layers in (2, 12):
        config = {**CONFIG, "num_hidden_layers": layers}
        tensors = llama_tensors(layers=layers)
        model = write_checkpoint(tmp_path / f"{layers}", tensors, config=config)
        convert_checkpoint(model)
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        sizes.append(export_model(model, tmp_path / f"out{layers}").nbytes)
        peaks.append(mx.get_peak_memory() - held)
    assert sizes[1] > 4 * sizes[0]
    assert 0 < peaks[1] <= 1.1 * peaks[0]
    assert peaks[1] < sizes[1] / 10


def test_a_conversion_beside_the_model_is_used(model_dir, tmp_path):
    convert_checkpoint(model_dir, in_place=True)
    export_model(model_dir, tmp_path / "out", cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_file_outside_the_model_is_refused_before_any_work(model_dir, tmp_path):
    (tmp_path / "secret").write_text("of another user")
    (model_dir / "merges.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="outside of the model directory"):
        export_model(model_dir, tmp_path / "out", cache_dir=tmp_path / "cache")
    assert names(tmp_path) & {"out", "cache"} == set()


@pytest.mark.parametrize("name", ["tokenizer.json", "notes"])
def test_a_pipe_is_refused_before_anything_is_converted(model_dir, tmp_path, name):
    (model_dir / name).unlink(missing_ok=True)
    os.mkfifo(model_dir / name)
    with pytest.raises(MalformedFileError, match=f"{name}: expected a regular file"):
        export_model(model_dir, tmp_path / "out", cache_dir=tmp_path / "cache")
    assert names(tmp_path) & {"out", "cache"} == set()


def test_no_key_by_which_code_is_found_is_in_any_file(tmp_path):
    """With --trust-remote-code transformers runs what `auto_map` names, which is not ours."""
    code = {"auto_map": {"AutoTokenizer": ["evil.T", None]}, "custom_pipelines": {"x": {}}}
    config = {**CONFIG, **code, "rope_parameters": {"rope_type": "default", **code}}
    model = write_checkpoint(tmp_path / "model", config=config)
    for name in ("tokenizer_config.json", "generation_config.json", "special_tokens_map.json"):
        path = model / name
        found = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**found, **code, "deep": [{**code, "kept": 1}]}))
    export_model(model, tmp_path / "out", self_contained=True)
    written = {path.name: path.read_text() for path in (tmp_path / "out").glob("*.json")}
    assert len(written) >= 5
    for text in written.values():
        assert "auto_map" not in text
        assert "custom_pipelines" not in text
    assert [name for name, text in written.items() if "model_file" in text] == ["config.json"]
    assert '"kept": 1' in written["generation_config.json"]


def test_an_entry_that_vanished_is_an_error_and_leaves_nothing(model_dir, tmp_path, monkeypatch):
    real = mlx_directory.assemble

    def without_an_entry(directory, manifest, store, **options):
        store.entry_path(manifest.entries[1].key).unlink()
        return real(directory, manifest, store, **options)

    monkeypatch.setattr(mlx_directory, "assemble", without_an_entry)
    before = names(tmp_path)
    with pytest.raises(StoreError, match="entries"):
        export_model(model_dir, tmp_path / "out", cache_dir=tmp_path / "cache")
    assert names(tmp_path) == before | {"cache"}


def test_an_entry_cut_short_while_it_is_read_is_converted_again(model_dir, tmp_path, monkeypatch):
    export_model(model_dir, tmp_path / "good", cache_dir=tmp_path / "cache")
    real, cut = mlx_directory._write_shard, []

    def with_a_cut(*arguments):
        if not cut:
            manifest = convert_checkpoint(model_dir, cache_dir=tmp_path / "cache")
            entry = cache_store(tmp_path / "cache").entry_path(manifest.entries[1].key)
            cut.append(entry)
            os.truncate(entry, 20_000)
        real(*arguments)

    monkeypatch.setattr(mlx_directory, "_write_shard", with_a_cut)
    export_model(model_dir, tmp_path / "out", cache_dir=tmp_path / "cache")
    assert cut
    for name in PLAIN:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "good" / name).read_bytes()


def test_a_full_disk_is_told_before_anything_is_written(model_dir, tmp_path, monkeypatch):
    convert_checkpoint(model_dir)
    full = os.statvfs_result((4096, 4096, 100, 2, 2, 100, 100, 100, 0, 255))
    real = os.statvfs
    monkeypatch.setattr(os, "statvfs", lambda path: full if path == tmp_path else real(path))
    before = names(tmp_path)
    with pytest.raises(ParoquantStreamError, match=r"kB needed, 8\.2 kB free; free some space"):
        export_model(model_dir, tmp_path / "out")
    assert names(tmp_path) == before


class Failing:
    """An os function that fails at its n-th call for a path of the export."""

    def __init__(self, monkeypatch, name: str, number: int, code: int) -> None:
        self._real, self._number, self._code, self.calls = getattr(os, name), number, code, 0
        monkeypatch.setattr(os, name, self)

    def __call__(self, first, *arguments, **options):
        where = options.get("dir_fd", options.get("src_dir_fd", first))
        path = os.readlink(f"/proc/self/fd/{where}") if type(where) is int else str(first)
        if "/.out." in path or path.endswith("/parent"):
            self.calls += 1
            if self.calls == self._number:
                raise OSError(self._code, os.strerror(self._code))
        return self._real(first, *arguments, **options)


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="reads /proc to see which file")
@pytest.mark.parametrize(
    ("name", "code", "fewest"),
    [
        ("open", errno.EACCES, 10),
        ("mkdir", errno.EROFS, 1),
        ("pwrite", errno.ENOSPC, 5),
        ("fsync", errno.EIO, 10),
        ("replace", errno.EIO, 5),
        ("rename", errno.EIO, 1),
        ("statvfs", errno.EIO, 1),
        ("posix_fallocate", errno.ENOSPC, 5),
    ],
)
def test_a_failing_call_leaves_no_export_and_the_store_unchanged(
    name, code, fewest, model_dir, tmp_path, monkeypatch
):
    parent = tmp_path / "parent"
    parent.mkdir()
    convert_checkpoint(model_dir, cache_dir=tmp_path / "cache")
    before = names(tmp_path / "cache" / "v1" / "entries")
    errors, number = 0, 1
    while True:
        with monkeypatch.context() as patch:
            failing = Failing(patch, name, number, code)
            message = message_of(model_dir, parent / "out", tmp_path / "cache")
        if failing.calls < number:  # none was left to fail
            break
        if message is None:  # one that may fail, like mkdir of what is there
            assert names(parent / "out") == PLAIN
            shutil.rmtree(parent / "out")
        else:
            assert os.strerror(code) in message
            assert names(parent) == set()
            errors += 1
        number += 1
    assert errors >= fewest
    assert names(parent / "out") == PLAIN
    assert names(tmp_path / "cache" / "v1" / "entries") == before


def message_of(model, out, cache) -> str | None:
    """The error of an export, or None."""
    try:
        export_model(model, out, cache_dir=cache)
    except ParoquantStreamError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", ["qwen3_5-awq-adversarial", "gemma4_e2b-awq-adversarial"])
def test_of_a_vision_model_the_text_part_is_written(name, tmp_path):
    export = export_model(FIXTURES / name, tmp_path / "out")
    assert export.text_only
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "vision_config" not in config
    text, _, _ = load(FIXTURES / name, force_text=True)
    again, _, is_vlm = load(tmp_path / "out")
    assert not is_vlm
    tokens = mx.array([[5, 9, 17]])
    assert mx.array_equal(again(tokens), text(tokens))
