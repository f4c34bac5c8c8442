"""Directories of paroquant's own cache: exactly that form, and nothing else of the user's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from paroquant_stream.maintenance.paroquant_cache import foreign_directories, remove_foreign

NAME = "0123456789abcdef"


def left_behind(root: Path, name: str = NAME) -> Path:
    directory = root / name
    directory.mkdir(parents=True)
    (directory / "converted_mlx.safetensors").write_bytes(b"12345")
    return directory


def test_a_directory_of_the_form_is_found_with_its_size(tmp_path):
    directory = left_behind(tmp_path)
    (directory / "meta.json").write_text("{}")
    (found,) = foreign_directories(tmp_path)
    assert (found.path, found.size) == (directory, 7)


def spoil(directory: Path, how: str) -> None:
    file = directory / "converted_mlx.safetensors"
    if how == "another file":
        (directory / "notes.txt").write_text("mine")
    elif how == "a directory inside":
        (directory / "more.json").mkdir()
    elif how == "the file is a link":
        file.rename(directory.parent / "real")
        file.symlink_to(directory.parent / "real")
    elif how == "JSON alone":
        file.rename(directory / "a.json")
    elif how == "the directory is a link":
        directory.rename(directory.parent / "real")
        directory.symlink_to(directory.parent / "real")
    else:
        directory.rename(directory.parent / how)


@pytest.mark.parametrize(
    "how",
    [
        "another file",
        "a directory inside",
        "the file is a link",
        "JSON alone",
        "the directory is a link",
        "0123456789abcde",
        "0123456789abcdef0",
        "0123456789ABCDEF",
        "0123456789abcdeg",
        "v1",
    ],
)
def test_anything_else_of_the_user_is_not_found(tmp_path, how):
    directory = left_behind(tmp_path)
    assert len(list(foreign_directories(tmp_path))) == 1
    spoil(directory, how)
    assert list(foreign_directories(tmp_path)) == []


def test_removal_frees_the_bytes_and_removes_the_directory_alone(tmp_path):
    directory = left_behind(tmp_path)
    (tmp_path / "mine").write_text("x")
    (found,) = foreign_directories(tmp_path)
    assert remove_foreign(found) == 5
    assert not directory.exists()
    assert os.listdir(tmp_path) == ["mine"]


def test_a_link_put_in_its_place_meanwhile_is_not_followed(tmp_path):
    directory = left_behind(tmp_path)
    (found,) = foreign_directories(tmp_path)
    directory.rename(tmp_path / "moved")
    directory.symlink_to(tmp_path / "moved")
    with pytest.raises(OSError, match=r"Not a directory|Too many levels"):
        remove_foreign(found)
    assert (tmp_path / "moved" / "converted_mlx.safetensors").exists()


def test_what_changed_since_it_was_found_stays(tmp_path):
    directory = left_behind(tmp_path)
    (found,) = foreign_directories(tmp_path)
    (directory / "notes.txt").write_text("mine")
    assert remove_foreign(found) == 0
    assert (directory / "converted_mlx.safetensors").exists()


def test_an_absent_root_has_none(tmp_path):
    assert list(foreign_directories(tmp_path / "absent")) == []
