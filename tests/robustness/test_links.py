"""Links that lead out of a model directory: nothing at their other end is removed, moved or
written.
"""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.robustness.cuts import CUTS, write_tiny
from tests.robustness.harness import (
    Model,
    Parameters,
    assert_completes,
    assert_loads,
    completes,
    flip,
    loads_right,
    one_line,
    sha256,
    snapshot,
    undisturbed,
)

CUT = CUTS["between linears"]


def contents(directory: Path) -> dict[str, str]:
    """Path -> SHA-256 of every file below a directory."""
    files = [path for path in directory.rglob("*") if path.is_file() and not path.is_symlink()]
    return {str(path.relative_to(directory)): sha256(path) for path in files}


def assert_untouched(model: Model, right: Parameters, others: Path) -> None:
    """A drop leaves the others' files as they are, and its model whole or complete."""
    before = contents(others)
    ended = model.drop()
    gone = before.keys() - contents(others).keys()
    assert contents(others) == before, f"gone from elsewhere: {sorted(gone)}, exit {ended.code}"
    if ended.code:
        assert "Traceback" not in ended.err
        assert len(model.sources) == 3, one_line(ended)
    else:
        assert_loads(model, right)


@pytest.fixture
def others(place) -> Path:
    """Another model's directory, with the same weights."""
    return write_tiny(place / "others" / "model", CUT)


def linked(place: Path, others: Path, target: Callable[[str], str]) -> tuple[Model, Parameters]:
    """A model whose shards are links, as `target` spells them; what it would load."""
    directory = write_tiny(place / "model", CUT)
    model = Model(directory, place / "cache")
    right = undisturbed(model)
    for path in directory.glob("*.safetensors"):
        path.unlink()
        path.symlink_to(target(path.name))
    return model, right


def test_a_hub_like_link_does_not_lead_to_anothers_shard(place, others):
    model, right = linked(place, others, lambda name: f"models--a/blobs/{name}")
    (model.directory / "models--a").mkdir()
    (model.directory / "models--a" / "blobs").symlink_to(others)
    assert_untouched(model, right, others)


@pytest.mark.long
def test_nor_where_the_repository_is_the_link(place, others):
    blobs = others.parent / "blobs"
    others.rename(blobs)
    model, right = linked(place, blobs, lambda name: f"models--a/blobs/{name}")
    (model.directory / "models--a").symlink_to(blobs.parent)
    assert_untouched(model, right, blobs.parent)


def test_nor_where_it_leads_up_to_a_directory_of_that_name(place, others):
    repository = place / "models--a"
    repository.mkdir()
    others.rename(repository / "blobs")
    model, right = linked(place, repository, lambda name: f"../models--a/blobs/{name}")
    assert_untouched(model, right, repository)


def test_a_link_to_a_hub_blob_keeps_what_a_snapshot_uses(place, others):
    repository = place / "hub" / "models--owner--name"
    repository.mkdir(parents=True)
    others.rename(repository / "blobs")
    snapshot_of_others = repository / "snapshots" / ("c" * 40)
    snapshot_of_others.mkdir(parents=True)
    for path in (repository / "blobs").iterdir():
        (snapshot_of_others / path.name).symlink_to(f"../../blobs/{path.name}")
    blobs = repository / "blobs"
    model, right = linked(place, repository, lambda name: str(blobs / name))
    assert_untouched(model, right, repository)


def test_a_blob_that_links_to_anothers_file_keeps_it(place, others):
    model, right = linked(place, others, lambda name: f"models--a/blobs/{name}")
    blobs = model.directory / "models--a" / "blobs"
    blobs.mkdir(parents=True)
    for path in others.glob("*.safetensors"):
        (blobs / path.name).symlink_to(path)
    assert_untouched(model, right, others)


@pytest.mark.long
def test_a_link_to_a_link_that_leads_out_keeps_the_file(place, others):
    model, right = linked(place, others, lambda name: f"real/{name}")
    (model.directory / "real").symlink_to(others)
    assert_untouched(model, right, others)


@pytest.mark.long
def test_a_directory_that_is_a_link_is_the_directory_itself(place, others):
    """Whoever names a link to a model directory means that model."""
    right = undisturbed(Model(others, None))
    (place / "model").symlink_to(others)
    model = Model(place / "model", place / "cache")
    assert model.drop().code == 0
    assert not model.sources
    assert_loads(model, right)


@pytest.mark.long
def test_a_hard_link_of_a_shard_elsewhere_keeps_its_bytes(place, others):
    right = undisturbed(Model(others, None))
    shutil.copytree(others, place / "kept", copy_function=os.link)
    before = contents(place / "kept")
    model = Model(others, place / "cache")
    assert model.drop().code == 0
    assert contents(place / "kept") == before
    assert_loads(model, right)


# A tree beside the model, with links in it that a repository may bring along.


OLD = time.time() - 3 * 24 * 3600
TEMP = "0badc0de-4194301-" + "ab" * 16
"""A name as a run gives its temps: of another host, and of no process."""


def aged(directory: Path) -> Path:
    """Makes everything below a directory three days old."""
    for path in directory.rglob("*"):
        os.utime(path, (OLD, OLD), follow_symlinks=False)
    return directory


def elsewhere(place: Path) -> Path:
    """Another user's directory: notes, files as old temps, a digest, a lock."""
    directory = place / "elsewhere"
    (directory / "deep").mkdir(parents=True)
    for name in ("notes.txt", TEMP, "12345-fe00-1", f"{'a' * 64}.lock", "deep/notes.txt"):
        (directory / name).write_text("another user's")
    return aged(directory)


def tree(place: Path) -> Model:
    """A model with a tree beside it, made by an earlier conversion."""
    model = Model(write_tiny(place / "model", CUT), None)
    assert model.convert().code == 0
    return model


def replace_by_link(path: Path, target: Path) -> None:
    """Puts a link in the place of a file or directory."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def link_mlx(model: Model, place: Path) -> None:
    replace_by_link(model.root, elsewhere(place))


def link_mlx_to_a_tree(model: Model, place: Path) -> None:
    shutil.copytree(model.root, place / "elsewhere")
    replace_by_link(model.root, aged(place / "elsewhere"))


def link_v1(model: Model, place: Path) -> None:
    replace_by_link(model.root / "v1", elsewhere(place))


def link_v1_to_a_tree(model: Model, place: Path) -> None:
    shutil.copytree(model.root / "v1", place / "elsewhere")
    (place / "elsewhere" / "tmp" / TEMP).write_text("another user's")
    replace_by_link(model.root / "v1", aged(place / "elsewhere"))


def link_a_folder(name: str) -> Callable[[Model, Path], None]:
    def link(model: Model, place: Path) -> None:
        replace_by_link(model.root / "v1" / name, elsewhere(place))

    return link


def link_entries_of_the_user(model: Model, place: Path) -> None:
    """To the entries of the user's cache, of which one is damaged."""
    other = Model(model.directory, place / "elsewhere")
    assert other.convert().code == 0
    entry = other.entries[0]
    for path in model.entries:
        folder = place / "elsewhere" / "v1" / "entries" / path.parent.name
        replace_by_link(path.parent, folder)
    flip(entry, 0.7)


def link_an_entry(model: Model, place: Path) -> None:
    (place / "elsewhere").mkdir()
    entry = model.entries[0]
    shutil.copy(entry, place / "elsewhere" / entry.name)
    flip(place / "elsewhere" / entry.name, 0.7)
    replace_by_link(entry, place / "elsewhere" / entry.name)


def link_the_manifest(model: Model, place: Path) -> None:
    (place / "elsewhere").mkdir()
    for path in (model.root / "v1" / "manifests").iterdir():
        shutil.copy(path, place / "elsewhere" / path.name)
        replace_by_link(path, place / "elsewhere" / path.name)
    aged(place / "elsewhere")


def link_every_digest(model: Model, place: Path) -> None:
    (place / "elsewhere").mkdir()
    for path in (model.root / "v1" / "memo").iterdir():
        (place / "elsewhere" / path.name).write_text("another user's")
        replace_by_link(path, place / "elsewhere" / path.name)
    aged(place / "elsewhere")


LINKS = {
    "mlx": link_mlx,
    "mlx to a tree": link_mlx_to_a_tree,
    "v1": link_v1,
    "v1 to a tree": link_v1_to_a_tree,
    "tmp": link_a_folder("tmp"),
    "entries": link_a_folder("entries"),
    "manifests": link_a_folder("manifests"),
    "memo": link_a_folder("memo"),
    "locks": link_a_folder("locks"),
    "headers": link_a_folder("headers"),
    "entries of the user": link_entries_of_the_user,
    "an entry": link_an_entry,
    "the manifest": link_the_manifest,
    "every digest": link_every_digest,
}
COMMANDS = {
    "convert": Model.convert,
    "convert --force": lambda model: model.convert("--force"),
    "drop": Model.drop,
    "load": Model.load,
    "load verify=full": lambda model: model.load("--verify", "full"),
}
FEW = [
    ("mlx", "convert"),
    ("mlx", "drop"),
    ("v1 to a tree", "load"),
    ("tmp", "convert"),
    ("entries of the user", "load"),
    ("entries", "drop"),
    ("memo", "load"),
    ("locks", "convert"),
    ("the manifest", "drop"),
]


@pytest.mark.parametrize(
    ("link", "command"),
    [
        pair if pair in FEW else pytest.param(*pair, marks=pytest.mark.long)
        for pair in itertools.product(LINKS, COMMANDS)
    ],
)
def test_a_link_in_the_tree_leads_nowhere(place, link, command):
    """Nothing outside of the model directory is removed, moved or written, and no weight lost."""
    model = tree(place)
    right = undisturbed(model)
    LINKS[link](model, place)
    before = snapshot(place / "elsewhere")
    ended = COMMANDS[command](model)
    assert "Traceback" not in ended.err, ended.err
    after = snapshot(place / "elsewhere")
    changed = [path for path in before.keys() | after.keys() if before.get(path) != after.get(path)]
    assert not changed, f"changed outside: {sorted(p.replace(str(place), '') for p in changed)}"
    if len(model.sources) < 3:
        assert loads_right(model, right), "shards are gone, and the model does not load"


@pytest.mark.parametrize("clock", [60, pytest.param(0, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "dropped", [True, pytest.param(False, marks=pytest.mark.long)], ids=["dropped", "with shards"]
)
@pytest.mark.parametrize("damaged", [False, True], ids=["sound", "damaged"])
def test_a_load_of_an_in_place_tree_writes_nothing(place, dropped, damaged, clock):
    model = Model(write_tiny(place / "model", CUT), None)
    right = undisturbed(model)
    assert (model.drop() if dropped else model.convert()).code == 0
    (model.root / "v1" / "tmp" / TEMP).write_text("of a run on another host")
    os.utime(model.root / "v1" / "tmp" / TEMP, (OLD, OLD))
    for path in (model.root / "v1" / "memo").iterdir():  # as a repository is downloaded
        path.unlink()
    if damaged:
        flip(model.entries[0], 0.7)
    before = snapshot(model.directory)
    loaded = model.load(fault={"clock": clock})
    after = snapshot(model.directory)
    changed = [path for path in before.keys() | after.keys() if before.get(path) != after.get(path)]
    assert not changed, f"changed: {sorted(p.replace(str(place), '') for p in changed)}"
    if dropped and damaged:
        assert loaded.code == 1
    else:
        assert_loads(model, right)


@pytest.mark.long
def test_a_tree_that_cannot_be_written_is_loaded(place):
    """As from a read-only disk: directories without a write bit, for whom that counts."""
    model = Model(write_tiny(place / "model", CUT), None)
    right = undisturbed(model)
    assert model.drop().code == 0
    for path in [model.directory, *model.directory.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert_loads(model, right)


@pytest.mark.long
def test_a_drop_completes_once_the_links_are_removed(place):
    model = tree(place)
    right = undisturbed(model)
    link_v1(model, place)
    model.drop()
    if (model.root / "v1").is_symlink():
        (model.root / "v1").unlink()
    if len(model.sources) == 3:
        assert completes(model, right)


@pytest.mark.long
@pytest.mark.parametrize("inside", ["cache", "mlx", "mlx/deeper", "."])
def test_a_cache_inside_the_model_directory_stays(place, inside):
    directory = write_tiny(place / "model", CUT)
    model = Model(directory, directory / inside)
    right = undisturbed(replace(model, cache=place / "other"))
    ended = model.drop()
    assert ended.code in (0, 1), one_line(ended)
    assert_completes(model, right)
