"""An old single file beside the shards, not used while they are there, is not used for the lack of
them: what was converted and dropped is what loads.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.robustness.cuts import CUTS, write_tiny
from tests.robustness.harness import (
    LOAD,
    Model,
    Parameters,
    assert_completes,
    assert_loads,
    in_zygote,
    one_line,
    undisturbed,
)

CUT = CUTS["between linears"]
NAME = "converted_mlx.safetensors"
EXPORT = "paroquant_stream.export"


def ours(old: Path, target: Path, place: Path) -> None:
    """The file as `export --single-file` writes it, from the old shards."""
    model = Model(old, place / "old cache")
    assert model.convert().code == 0
    arguments = (old, old, "--single-file", "--beside-shards", "--cache-dir", model.cache)
    done = in_zygote(EXPORT, *arguments)
    assert done.code == 0, one_line(done)
    shutil.copy2(old / NAME, target / NAME)


def of_pull_request_50(old: Path, target: Path, place: Path) -> None:
    """The file as that pull request saves it: the model's own names, nothing that tells its origin;
    here with the embeddings already quantized, which it is free to be.
    """
    done = in_zygote(LOAD, old, "--cache-dir", place / "old cache", "--save", target / NAME)
    assert done.code == 0, one_line(done)


@pytest.fixture
def updated(place) -> tuple[Model, Parameters, Path]:
    """A model whose weights were updated, what it loads, and the directory of its old weights."""
    old = write_tiny(place / "old", CUT, seed=1)
    model = Model(write_tiny(place / "model", CUT), place / "cache")
    return model, undisturbed(model), old


@pytest.mark.parametrize(
    "in_place", [False, pytest.param(True, marks=pytest.mark.long)], ids=["cache", "in place"]
)
@pytest.mark.parametrize("write", [ours, of_pull_request_50])
def test_an_old_single_file_does_not_win_after_a_drop(place, updated, write, in_place):
    model, right, old = updated
    model = replace(model, cache=None if in_place else model.cache)
    write(old, model.directory, place)
    wrong = undisturbed(replace(model, directory=old, cache=place / "other"))
    assert wrong != right
    assert_loads(model, right)  # it is ignored while the shards are there
    ended = model.drop()
    assert ended.code in (0, 1)
    assert_loads(model, right)
    if ended.code == 0:
        assert_completes(model, right)


def test_an_old_single_file_is_not_used_after_a_drop(place, updated):
    model, right, old = updated
    assert model.drop().code == 0
    ours(old, model.directory, place)
    later = (model.directory / NAME).stat().st_mtime + 3600
    os.utime(model.directory / NAME, (later, later))
    ended = model.load()
    found = json.loads(ended.out) if ended.code == 0 else None
    assert found in (None, right), "the old file's weights were loaded"


@pytest.mark.long
def test_a_single_file_of_the_same_shards_serves_after_a_drop(place, updated):
    model, right, _ = updated
    done = in_zygote(EXPORT, model.directory, model.directory, "--single-file",
                     "--beside-shards", "--cache-dir", model.cache)  # fmt: skip
    assert done.code == 0, one_line(done)
    assert model.drop().code == 0
    assert_loads(model, right)


def test_an_older_in_place_tree_is_not_used_after_a_drop(place, updated):
    """`mlx/` of the old weights, ignored while the new shards are there; then those are dropped."""
    model, right, old = updated
    assert Model(old, None).convert().code == 0
    shutil.copytree(old / "mlx", model.directory / "mlx")
    assert_loads(model, right)
    assert model.drop().code in (0, 1)
    assert_loads(model, right)


def test_an_older_dropped_tree_is_not_used_after_a_drop(place, updated):
    model, right, old = updated
    assert Model(old, None).drop().code == 0
    shutil.copytree(old / "mlx", model.directory / "mlx")
    assert_loads(model, right)
    assert model.drop().code in (0, 1)
    assert_loads(model, right)
