"""A new directory appears complete or not at all."""

from __future__ import annotations

import os

import pytest

from paroquant_stream.errors import UnwritableFileError
from paroquant_stream.files.atomic_directory import new_directory


def test_a_directory_appears_when_it_is_filled(tmp_path):
    target = tmp_path / "out"
    with new_directory(target, 10) as directory:
        (directory / "file").write_text("x")
        assert not target.exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_body_that_fails_leaves_nothing(tmp_path, error):
    with pytest.raises(error), new_directory(tmp_path / "out", 10) as directory:
        (directory / "file").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_the_mode_is_that_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with new_directory(tmp_path / "out", 10):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


def test_a_full_disk_is_an_error_before_the_body(tmp_path):
    with (
        pytest.raises(UnwritableFileError, match=r"1000000\.0 TB needed"),
        new_directory(tmp_path / "out", 10**18),
    ):
        pytest.fail("the body ran")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_made_meanwhile_is_kept(tmp_path):
    with (
        pytest.raises(UnwritableFileError, match="cannot be written"),
        new_directory(tmp_path / "out", 10),
    ):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "of another user").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "of another user"]


def test_a_directory_that_cannot_be_synced_is_removed(tmp_path, monkeypatch):
    def refused(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("paroquant_stream.files.atomic_directory.sync_directory", refused)
    with (
        pytest.raises(UnwritableFileError, match="Input/output error"),
        new_directory(tmp_path / "out", 10),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_parent_is_synced_once_the_name_is_there(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(
        "paroquant_stream.files.atomic_directory.sync_directory",
        lambda path: synced.append((path, os.listdir(path))),
    )
    with new_directory(tmp_path / "out", 10):
        assert synced == []
    assert synced == [(tmp_path, ["out"])]


def test_an_absent_parent_is_an_error_before_the_body(tmp_path):
    with (
        pytest.raises(UnwritableFileError, match="absent/out: cannot be written: No such file"),
        new_directory(tmp_path / "absent" / "out", 10),
    ):
        pytest.fail("the body ran")


@pytest.mark.parametrize(("free", "enough"), [(10, True), (9, False)])
def test_exactly_the_needed_bytes_are_enough(tmp_path, monkeypatch, free, enough):
    monkeypatch.setattr("paroquant_stream.files.atomic_directory.free_bytes", lambda _: free)
    if enough:
        with new_directory(tmp_path / "out", 10):
            pass
    else:
        with pytest.raises(UnwritableFileError, match="10 B needed, 9 B free"):
            with new_directory(tmp_path / "out", 10):
                pytest.fail("the body ran")
