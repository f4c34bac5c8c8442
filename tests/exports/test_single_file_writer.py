"""A converted model as one file: every bit of the entries, or nothing and one line."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from paroquant_stream.api import load as api
from paroquant_stream.cli import export
from paroquant_stream.conversion.converter import convert
from paroquant_stream.conversion.request import make_request
from paroquant_stream.errors import (
    EntryDamagedError,
    ParoquantStreamError,
    StoreError,
    UnwritableFileError,
)
from paroquant_stream.exports import single_file_writer as single_write
from paroquant_stream.exports.single_file import NAME
from paroquant_stream.exports.single_file_writer import export_single_file, write_single_file
from paroquant_stream.store.format import stacks_in_pieces
from tests.helpers.paths import FIXTURES

MOE = FIXTURES / "qwen3_moe-awq-adversarial"


def converted(directory: Path, cache: Path):
    request = make_request(directory, cache_dir=cache, jobs=1)
    return convert(request).manifest, request.store


@pytest.fixture
def model(model_dir, tmp_path):
    return converted(model_dir, tmp_path / "cache")


@pytest.fixture
def target(tmp_path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / NAME


def entries(manifest, store) -> dict:
    return {
        name: array
        for record in manifest.entries
        for name, array in load_file(store.entry_path(record.key)).items()
    }


@pytest.mark.parametrize("chunk", [4 << 20, 1000])
def test_holds_every_tensor_of_the_entries_bit_for_bit(model, target, monkeypatch, chunk):
    monkeypatch.setattr(single_write, "CHUNK", chunk)
    size = write_single_file(*model, target)
    assert size == target.stat().st_size
    found, expected = load_file(target), entries(*model)
    assert found.keys() == expected.keys()
    assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)


def test_joins_the_pieces_of_a_stack_in_the_order_of_the_experts(tmp_path, target):
    manifest, store = converted(MOE, tmp_path / "cache")
    expected = entries(manifest, store)
    stacks = stacks_in_pieces(expected)
    assert any(len(pieces) > 2 for pieces in stacks.values())
    write_single_file(manifest, store, target)
    found = load_file(target)
    for stack, pieces in stacks.items():
        parts = [expected.pop(piece) for piece in pieces]
        assert found[stack].shape == (sum(map(len, parts)), *parts[0].shape[1:])
        assert found[stack].tobytes() == b"".join(part.tobytes() for part in parts)
    assert found.keys() == expected.keys() | stacks.keys()


def test_two_runs_give_the_same_bytes(model, target):
    write_single_file(*model, target)
    first = target.read_bytes()
    target.unlink()
    write_single_file(*model, target)
    assert target.read_bytes() == first


def test_the_metadata_says_what_it_was_made_from(model, target):
    write_single_file(*model, target)
    with safe_open(target, "numpy") as file:
        metadata = file.metadata()
    assert metadata["format"] == "mlx"
    assert metadata["writer"].startswith("paroquant_stream ")
    assert metadata["names"] == "checkpoint"
    for record in model[0].entries:
        assert f'"{record.shard}": "{record.source_sha256}"' in metadata["sources"]


def test_the_file_follows_the_umask(model, target):
    before = os.umask(0o027)
    try:
        write_single_file(*model, target)
    finally:
        os.umask(before)
    assert target.stat().st_mode & 0o777 == 0o640


def test_a_file_that_is_there_is_left_alone(model, target):
    target.write_bytes(b"mine")
    with pytest.raises(UnwritableFileError, match="is there already; remove it"):
        write_single_file(*model, target)
    assert target.read_bytes() == b"mine"


@pytest.mark.parametrize("position", [9, 20_000, -1])
def test_a_damaged_entry_is_removed_and_nothing_is_written(model, target, position):
    manifest, store = model
    path = store.entry_path(manifest.entries[1].key)
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(EntryDamagedError, match="taken out of use"):
        write_single_file(*model, target)
    assert not path.exists()
    assert os.listdir(target.parent) == []


def test_an_absent_entry_is_one_line_and_nothing_is_written(model, target):
    manifest, store = model
    store.entry_path(manifest.entries[1].key).unlink()
    with pytest.raises(StoreError, match="the entry cannot be opened"):
        write_single_file(*model, target)
    assert os.listdir(target.parent) == []


def fail_at(monkeypatch, call: str, turn: int, error: BaseException) -> list[str]:
    """Lets one turn of an os call fail; the list tells whether it did."""
    real, turns, fired = getattr(os, call), [0], []

    def failing(*arguments, **options):
        turns[0] += 1
        if turns[0] == turn:
            fired.append(call)
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(os, call, failing)
    return fired


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize(
    ("call", "turn"),
    [
        ("open", 1),
        ("posix_fallocate", 1),
        ("pwrite", 1),
        ("pwrite", 9),
        ("fsync", 1),
        ("replace", 1),
    ],
)
def test_a_write_that_fails_is_one_line_and_leaves_nothing(
    model, target, monkeypatch, call, turn, number
):
    fired = fail_at(monkeypatch, call, turn, OSError(number, os.strerror(number)))
    with pytest.raises(UnwritableFileError, match=os.strerror(number)) as caught:
        write_single_file(*model, target)
    monkeypatch.undo()
    assert fired
    assert "\n" not in str(caught.value)
    assert (" needed, " in str(caught.value)) == (number == errno.ENOSPC)
    assert os.listdir(target.parent) == []


@pytest.mark.parametrize(
    ("call", "turn"), [("pwrite", 1), ("pwrite", 9), ("preadv", 5), ("fsync", 1)]
)
def test_an_interrupt_leaves_nothing(model, target, monkeypatch, call, turn):
    fired = fail_at(monkeypatch, call, turn, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        write_single_file(*model, target)
    assert fired
    assert os.listdir(target.parent) == []


def test_an_unreadable_entry_is_one_line_and_leaves_nothing(model, target, monkeypatch):
    fired = fail_at(monkeypatch, "preadv", 5, OSError(errno.EIO, "Input/output error"))
    with pytest.raises(ParoquantStreamError, match=r"entries.*cannot be read: Input/output error"):
        write_single_file(*model, target)
    assert fired
    assert os.listdir(target.parent) == []


def test_short_writes_are_gone_on_with(model, target, monkeypatch):
    real, short = os.pwrite, []

    def pwrite(fd, data, offset):
        short.append(len(data) > 3000)
        return real(fd, data[:3000], offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    write_single_file(*model, target)
    assert any(short)
    found, expected = load_file(target), entries(*model)
    assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)


def test_bytes_are_durable_before_the_name(model, target, monkeypatch):
    real_fsync, real_replace, done = os.fsync, os.replace, []

    def fsync(fd):
        done.append("directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        real_fsync(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(
        os, "replace", lambda *a, **k: done.append("rename") or real_replace(*a, **k)
    )
    write_single_file(*model, target)
    assert done == ["file", "rename", "directory"]


def test_an_absent_directory_is_one_line(model, tmp_path):
    with pytest.raises(UnwritableFileError, match="No such file or directory"):
        write_single_file(*model, tmp_path / "absent" / NAME)


KILLED = """
import os, signal, sys
from pathlib import Path
from paroquant_stream import convert_checkpoint
from paroquant_stream.store.store import cache_store
from paroquant_stream.exports.single_file_writer import write_single_file
model, cache, target = sys.argv[1:]
manifest = convert_checkpoint(model, cache_dir=cache)
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
write_single_file(manifest, cache_store(cache), Path(target))
"""


def test_what_a_killed_run_left_is_removed_by_the_next(model_dir, model, tmp_path, target):
    command = [sys.executable, "-c", KILLED, str(model_dir), str(tmp_path / "cache"), str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert len(os.listdir(target.parent)) == 1
    assert not target.exists()
    write_single_file(*model, target)
    assert os.listdir(target.parent) == [NAME]


def test_an_export_converts_first_and_lies_where_load_looks(model_dir):
    path, size = export_single_file(make_request(model_dir, jobs=1), beside_shards=True)
    assert path == model_dir / NAME
    assert path.stat().st_size == size
    api.load(model_dir)


def test_an_export_goes_into_a_directory_or_under_a_name(model_dir, tmp_path):
    request = make_request(model_dir, jobs=1)
    assert export_single_file(request, tmp_path)[0] == tmp_path / NAME
    assert export_single_file(request, tmp_path / "x.safetensors")[0].exists()


def test_an_export_that_cannot_be_written_converts_nothing(model_dir, tmp_path):
    (model_dir / NAME).write_bytes(b"mine")
    with pytest.raises(UnwritableFileError, match="is there already"):
        export_single_file(make_request(model_dir, cache_dir=tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_an_export_of_a_damaged_entry_converts_it_again(model_dir, model, tmp_path, target, caplog):
    manifest, store = model
    path = store.entry_path(manifest.entries[1].key)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    export_single_file(make_request(model_dir, cache_dir=tmp_path / "cache", jobs=1), target)
    assert "taken out of use" in caplog.text
    assert path.read_bytes() == good


def test_an_export_of_an_in_place_conversion_needs_no_source(model_dir, target, tmp_path):
    convert(make_request(model_dir, in_place=True, drop_source=True, jobs=1))
    assert list(model_dir.glob("*.safetensors")) == []
    export_single_file(make_request(model_dir, cache_dir=tmp_path / "cache"), target)
    assert not (tmp_path / "cache").exists()


def test_an_export_of_a_repository_must_be_told_where_to(hub, tmp_path):
    hub.push("owner/model", FIXTURES / "llama-awq-single")
    with pytest.raises(UnwritableFileError, match="say where"):
        export_single_file(make_request("owner/model"))


def test_a_single_file_beside_shards_must_be_asked_for(model_dir, tmp_path, capsys):
    arguments = [str(model_dir), "--single-file", "--cache-dir", str(tmp_path / "cache")]
    assert export.main(arguments) == 1
    error = capsys.readouterr().err
    assert f"{model_dir}: holds model-00001-of-" in error
    assert "--beside-shards" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "cache").exists()


def test_a_single_file_takes_the_place_of_dropped_shards(model_dir):
    convert(make_request(model_dir, in_place=True, drop_source=True, jobs=1))
    assert export_single_file(make_request(model_dir))[0] == model_dir / NAME


def test_the_export_command_writes_it_into_the_model_directory(model_dir, tmp_path, capsys):
    arguments = [str(model_dir), "--single-file", "--beside-shards"]
    arguments += ["--cache-dir", str(tmp_path / "cache")]
    assert export.main(arguments) == 0
    assert capsys.readouterr().out.startswith(f"{model_dir / NAME}: ")
    assert (model_dir / NAME).is_file()
    assert export.main(arguments) == 1
    assert capsys.readouterr().err.endswith("remove it to have it written anew\n")


def test_the_bytes_of_the_file_are_told(model, tmp_path):
    told = []
    write_single_file(*model, tmp_path / NAME, lambda *given: told.append(given))
    size = sum(tensor.nbytes for record in model[0].entries for tensor in record.tensors)
    assert told[0] == (NAME, 0, size)
    assert told[-1] == (NAME, size, size)
    assert [done for _, done, _ in told] == sorted({done for _, done, _ in told})
