"""Tests of the files of a model: real paths, irregular files and sizes."""

from __future__ import annotations

import os
import socket
import sys

import pytest

from paroquant_stream.checkpoint import model_files
from paroquant_stream.checkpoint.checkpoint import open_checkpoint
from paroquant_stream.checkpoint.config import ModelConfig
from paroquant_stream.checkpoint.model_files import (
    VOCABULARIES,
    check_directory,
    check_has_tokenizer,
    hub_blob,
    open_inside,
    read_inside,
    read_linked,
)
from paroquant_stream.errors import CheckpointError, MalformedFileError, MissingTokenizerError
from paroquant_stream.text import bytes_text
from tests.helpers.builders import cut_evenly, write_checkpoint

FIRST = "model-00001-of-00003.safetensors"
ETAG, XET = "a" * 64, "b" * 64


@pytest.fixture
def snapshot(tmp_path):
    """A snapshot whose first shard is a link to a blob of its repository."""
    repo = tmp_path / "hub" / "models--owner--name"
    directory = write_checkpoint(repo / "snapshots" / "rev", cut=cut_evenly(3))
    (repo / "blobs").mkdir()
    (directory / FIRST).rename(repo / "blobs" / ETAG)
    (directory / FIRST).symlink_to(f"../../blobs/{ETAG}")
    return directory


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "secret"
    path.write_text("of another user")
    return path


def content(path, directory=None) -> bytes:
    fd = open_inside(path, directory)
    with os.fdopen(fd, "rb") as file:
        return file.read()


def refuses(path, words: str, directory=None) -> None:
    with pytest.raises((CheckpointError, MalformedFileError), match=words):
        os.close(open_inside(path, directory))


def opened_during(action) -> list[str]:
    """List the paths that Python opens during an action."""
    found: list[str] = []
    watching = [True]

    def watch(event: str, arguments: tuple) -> None:
        if event == "open" and watching:
            found.append(str(arguments[0]))

    sys.addaudithook(watch)
    try:
        action()
    finally:
        watching.clear()
    return found


def test_files_and_links_inside_the_model_are_opened(model_dir):
    (model_dir / "sub").mkdir()
    (model_dir / "sub" / "real").write_bytes(b"1")
    (model_dir / "plain").write_bytes(b"2")
    (model_dir / "link").symlink_to("sub/real")
    (model_dir / "chain").symlink_to(model_dir / "link")
    assert [content(model_dir / name) for name in ("plain", "link", "chain")] == [b"2", b"1", b"1"]
    assert content(model_dir / "sub" / "real", model_dir) == b"1"


def test_a_linked_model_directory_contains_its_files(model_dir, tmp_path):
    (tmp_path / "name").symlink_to(model_dir)
    (model_dir / "link").symlink_to(tmp_path / "model" / FIRST)
    assert content(tmp_path / "name" / "link") == (model_dir / FIRST).read_bytes()


@pytest.mark.parametrize("spelled", ["absolute", "relative", "by a link inside", "by a directory",
                                     "like a blob", "like a blob inside"])  # fmt: skip
def test_files_outside_are_not_opened(model_dir, tmp_path, secret, spelled):
    path = model_dir / "tokenizer.json"
    path.unlink()
    match spelled:
        case "absolute":
            path.symlink_to(secret)
        case "relative":
            path.symlink_to("../secret")
        case "by a link inside":
            (model_dir / "inner").symlink_to(secret)
            path.symlink_to("inner")
        case "by a directory":
            (model_dir / "sub").symlink_to(tmp_path)
            path.symlink_to("sub/secret")
        case "like a blob":
            blobs = tmp_path / "models--a" / "blobs"
            blobs.mkdir(parents=True)
            secret.rename(blobs / ETAG)
            path.symlink_to(f"../models--a/blobs/{ETAG}")
        case _:
            blobs = model_dir / "models--a" / "blobs"
            blobs.mkdir(parents=True)
            (blobs / ETAG).symlink_to(secret)
            path.symlink_to(f"models--a/blobs/{ETAG}")
    opened = opened_during(lambda: refuses(path, "outside of the model directory"))
    assert [name for name in opened if name.startswith(str(tmp_path))] == []
    assert hub_blob(path) is None


def test_a_linked_subdirectory_is_outside(model_dir, tmp_path, secret):
    (model_dir / "sub").symlink_to(tmp_path)
    refuses(model_dir / "sub" / "secret", "outside of the model directory", model_dir)


def test_a_blob_of_the_own_repository_is_inside(snapshot, tmp_path):
    blob = tmp_path / "hub" / "models--owner--name" / "blobs" / ETAG
    assert content(snapshot / FIRST) == blob.read_bytes()
    assert hub_blob(snapshot / FIRST) == blob
    (snapshot / "sub").mkdir()
    (snapshot / "sub" / "x").symlink_to(f"../../../blobs/{ETAG}")
    assert hub_blob(snapshot / "sub" / "x") == blob
    assert content(snapshot / "sub" / "x", snapshot) == blob.read_bytes()


def test_a_linked_snapshot_has_its_blobs(snapshot, tmp_path):
    (tmp_path / "name").symlink_to(snapshot)
    assert hub_blob(tmp_path / "name" / FIRST) == hub_blob(snapshot / FIRST) is not None
    assert content(tmp_path / "name" / FIRST)


def test_a_link_by_another_revision_is_inside_but_no_blob(snapshot):
    other = snapshot.parent / "other"
    other.mkdir()
    (other / FIRST).symlink_to(f"../rev/{FIRST}")
    assert content(other / FIRST)
    assert hub_blob(other / FIRST) is None


def test_a_blob_of_another_repository_is_outside(snapshot, tmp_path):
    blobs = tmp_path / "hub" / "models--other--private" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / XET).write_bytes(b"private")
    (snapshot / "x").symlink_to(blobs / XET)
    refuses(snapshot / "x", "outside of the model directory")
    assert hub_blob(snapshot / "x") is None


def test_a_blob_that_links_out_of_the_cache_is_outside(snapshot, tmp_path, secret):
    blobs = tmp_path / "hub" / "models--owner--name" / "blobs"
    (blobs / XET).symlink_to(secret)
    (snapshot / "x").symlink_to(f"../../blobs/{XET}")
    refuses(snapshot / "x", "outside of the model directory")


def test_a_linked_blobs_directory_is_outside(snapshot, tmp_path):
    blobs = tmp_path / "hub" / "models--owner--name" / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    refuses(snapshot / FIRST, "outside of the model directory")
    assert hub_blob(snapshot / FIRST) is None


@pytest.mark.parametrize("name", ["/..", "/.", f"/{ETAG}/", "", "/"])
def test_a_link_to_a_directory_is_not_a_blob(snapshot, name):
    (snapshot / "x").symlink_to(f"../../blobs{name}")
    assert hub_blob(snapshot / "x") is None


def share(snapshot, place):
    """Move the blob to `place` and leave a link, as the Hub's client does for shared blobs."""
    blob = hub_blob(snapshot / FIRST)
    place.parent.mkdir(parents=True)
    blob.rename(place)
    blob.symlink_to(place)


def test_a_shared_blob_is_inside(snapshot, tmp_path):
    share(snapshot, tmp_path / "hub" / "blobs" / "bb" / XET)
    assert content(snapshot / FIRST)
    assert hub_blob(snapshot / FIRST).name == ETAG
    assert open_checkpoint(ModelConfig.read(snapshot)).headers()


@pytest.mark.parametrize("place", ["hub/blobs/cc/X", "hub/blobs/bb/notes", "hub/other/bb/X",
                                   "blobs/bb/X", "hub/blobs/X"])  # fmt: skip
def test_only_the_path_of_shared_blobs_is_accepted(snapshot, tmp_path, place):
    share(snapshot, tmp_path / place.replace("X", XET))
    refuses(snapshot / FIRST, "outside of the model directory")


def test_a_direct_link_to_a_shared_blob_is_outside(snapshot, tmp_path):
    """It may belong to a private repository."""
    shared = tmp_path / "hub" / "blobs" / "bb" / XET
    shared.parent.mkdir(parents=True)
    shared.write_bytes(b"private")
    (snapshot / "x").symlink_to(shared)
    refuses(snapshot / "x", "outside of the model directory")


def test_a_link_changed_before_the_opening_is_an_error(model_dir, secret, monkeypatch):
    (model_dir / "real").write_bytes(b"1")
    (model_dir / "link").symlink_to("real")
    real_open = model_files.open_regular

    def swapped(path, **options):
        path.unlink()
        path.symlink_to(secret)
        fd = real_open(path, **options)
        path.unlink()
        path.symlink_to("real")  # and back
        return fd

    monkeypatch.setattr(model_files, "open_regular", swapped)
    refuses(model_dir / "link", "was replaced while")


def test_a_file_removed_after_the_opening_is_readable(snapshot, monkeypatch):
    """Another process may drop shards that this one still reads."""
    real_open = model_files.open_regular

    def removed(path, **options):
        fd = real_open(path, **options)
        hub_blob(path).unlink()
        path.unlink()
        return fd

    monkeypatch.setattr(model_files, "open_regular", removed)
    assert content(snapshot / FIRST)


def test_a_file_replaced_by_a_link_is_not_followed(model_dir, secret, monkeypatch):
    real_open = model_files.open_regular

    def swapped(path, **options):
        path.unlink()
        path.symlink_to(secret)
        return real_open(path, **options)

    monkeypatch.setattr(model_files, "open_regular", swapped)
    with pytest.raises(OSError, match="symbolic link"):
        open_inside(model_dir / FIRST)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_config_and_index_must_be_inside_too(model_dir, tmp_path, name):
    (model_dir / name).rename(tmp_path / "other")
    (model_dir / name).symlink_to("../other")
    for read in (lambda d: open_checkpoint(ModelConfig.read(d)), ModelConfig.read):
        with pytest.raises(CheckpointError, match=f"{name}: a link to .*, outside of the model"):
            read(model_dir)


def test_an_oversized_file_is_not_read(tmp_path):
    with (tmp_path / "x").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match=r"1\.1 TB, over 67\.1 MB, which no"):
        read_inside(tmp_path / "x", model_files.MAX_JSON)


def irregular(path, kind: str) -> None:
    """Create a file that must never be opened."""
    path.unlink(missing_ok=True)
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "socket":
            os.chdir(path.parent)  # a socket's path has at most 107 bytes
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(path.name)
        case "device":
            path.symlink_to("/dev/zero")
        case "link to a pipe":
            (path.parent / "sub").mkdir()
            os.mkfifo(path.parent / "sub" / "pipe")
            path.symlink_to("sub/pipe")


KINDS = ["pipe", "socket", "device", "link to a pipe"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_irregular_file_is_never_opened(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    irregular(tmp_path / "x", kind)
    opened = opened_during(lambda: refuses(tmp_path / "x", "expected a regular file|outside of"))
    assert str(tmp_path / "x") not in opened


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "merges.txt", "notes", "additional_chat_templates/x.jinja"]
)
def test_a_directory_with_an_irregular_file_is_refused(model_dir, kind, name, monkeypatch):
    monkeypatch.chdir(model_dir)
    (model_dir / name).parent.mkdir(exist_ok=True)
    check_directory(model_dir)
    irregular(model_dir / name, kind)
    with pytest.raises(MalformedFileError, match=f"{name}: expected a regular file") as error:
        check_directory(model_dir)
    assert "\n" not in str(error.value)


def test_irregular_shards_are_left_to_their_reader(model_dir):
    """`load` ignores a `converted_mlx.safetensors` that is a pipe, and reports a shard by name."""
    os.mkfifo(model_dir / "converted_mlx.safetensors")
    check_directory(model_dir)


def test_dangling_links_and_directories_are_accepted(model_dir):
    (model_dir / "dropped.safetensors").symlink_to("../../blobs/gone")
    (model_dir / "loop.json").symlink_to("loop.json")
    (model_dir / "sub").mkdir()
    os.mkfifo(model_dir / "sub" / "unread")
    check_directory(model_dir)


@pytest.mark.parametrize(
    ("name", "mib"),
    [("config.json", 16), ("tokenizer.json", 64), ("x.JSON", 64), ("chat_template.jinja", 64),
     ("vocab.txt", 256), ("tokenizer.model", 256), ("qwen.tiktoken", 256),
     ("additional_chat_templates/x.jinja", 64)],
)  # fmt: skip
def test_oversized_settings_and_vocabularies_are_refused(model_dir, name, mib):
    path = model_dir / name
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.truncate(mib << 20)
    check_directory(model_dir)
    os.truncate(path, (mib << 20) + 1)
    with pytest.raises(CheckpointError, match=f"over {bytes_text(mib << 20)}, which no model"):
        check_directory(model_dir)


@pytest.mark.parametrize("name", ["other.safetensors", "pytorch_model.bin", "trainer_state.json"])
def test_files_that_are_not_read_whole_may_be_large(model_dir, name):
    with (model_dir / name).open("wb") as file:
        file.truncate(1 << 40)
    check_directory(model_dir)


def test_an_unlisted_directory_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="absent: cannot be listed"):
        check_directory(tmp_path / "absent")


def test_a_linked_file_may_be_anywhere(tmp_path, secret):
    (tmp_path / "link").symlink_to(secret)
    assert read_linked(tmp_path / "link", 100) == b"of another user"
    with pytest.raises(CheckpointError, match="link: 15 B, over 10 B"):
        read_linked(tmp_path / "link", 10)
    with pytest.raises(FileNotFoundError):
        read_linked(tmp_path / "absent", 10)


def test_a_file_of_exactly_the_limit_is_read(tmp_path):
    (tmp_path / "x").write_bytes(b"12345")
    assert read_inside(tmp_path / "x", 5) == b"12345"
    with pytest.raises(CheckpointError, match="5 B, over"):
        read_inside(tmp_path / "x", 4)


def test_a_file_that_cannot_be_opened_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"1")

    def fail(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(model_files, "open_regular", fail)
    with pytest.raises(CheckpointError, match="x: cannot be opened: Permission denied"):
        read_inside(tmp_path / "x", 5)


def test_without_a_vocabulary_there_is_no_tokenizer(tmp_path):
    with pytest.raises(MissingTokenizerError, match=f"^{tmp_path}: no tokenizer.* tokenizer.json"):
        check_has_tokenizer(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    for text in ("{}", "[]", "{", "[" * 100_000, '{"tokenizer_class": "LlamaTokenizer"}'):
        settings.write_text(text)
        with pytest.raises(MissingTokenizerError):
            check_has_tokenizer(tmp_path)
    settings.write_text('{"tokenizer_class": "ByT5Tokenizer"}')  # its tokens are the bytes
    check_has_tokenizer(tmp_path)
    settings.unlink()
    os.mkfifo(settings)
    with pytest.raises(MissingTokenizerError):
        check_has_tokenizer(tmp_path)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_any_vocabulary_is_a_tokenizer(tmp_path, name):
    (tmp_path / name).touch()
    check_has_tokenizer(tmp_path)
