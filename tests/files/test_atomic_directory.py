"""A new directory is there whole or not at all."""

from __future__ import annotations

import os

import pytest

from paroquant_stream.errors import UnwritableFileError
from paroquant_stream.files.atomic_directory import new_directory


def test_appears_under_its_name_when_it_is_filled(tmp_path):
    target = tmp_path / "out"
    with new_directory(target, 10) as directory:
        (directory / "file").write_text("x")
        assert not target.exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_stays_of_one_that_failed(tmp_path, error):
    with pytest.raises(error), new_directory(tmp_path / "out", 10) as directory:
        (directory / "file").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_may_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        with new_directory(tmp_path / "out", 10):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


def test_too_little_room_is_told_first(tmp_path):
    with (
        pytest.raises(UnwritableFileError, match=f"{10**18:,} bytes needed"),
        new_directory(tmp_path / "out", 10**18),
    ):
        pytest.fail("the body ran")
    assert list(tmp_path.iterdir()) == []


def test_what_came_under_its_name_meanwhile_is_kept(tmp_path):
    with (
        pytest.raises(UnwritableFileError, match="cannot be written"),
        new_directory(tmp_path / "out", 10),
    ):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "of somebody else").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "of somebody else"]


def test_a_name_that_was_not_made_durable_is_taken_back(tmp_path, monkeypatch):
    def refused(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("paroquant_stream.files.atomic_directory.sync_directory", refused)
    with (
        pytest.raises(UnwritableFileError, match="Input/output error"),
        new_directory(tmp_path / "out", 10),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
