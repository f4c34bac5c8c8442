"""Tests of the note in a model directory that names its drop record."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager

import pytest

from paroquant_stream.errors import StoreError
from paroquant_stream.files.folder import Folder
from paroquant_stream.store import drop_note
from paroquant_stream.store.drop_note import NOTE, read_note, write_note

ID = "1" * 64


def note(directory, drop_id: str) -> None:
    with Folder.open(directory) as home:
        write_note(home, drop_id)


def test_a_damaged_note_or_a_link_is_none(tmp_path):
    note(tmp_path, "a" * 64)
    assert read_note(tmp_path) == "a" * 64
    for text in ("", "[]", '{"id": 5}', '{"id": "../x"}', "{" * 10):
        (tmp_path / NOTE).write_text(text)
        assert read_note(tmp_path) is None
    (tmp_path / NOTE).unlink()
    (tmp_path / "other").write_text(json.dumps({"id": "a" * 64}))
    (tmp_path / NOTE).symlink_to("other")
    assert read_note(tmp_path) is None
    note(tmp_path, "b" * 64)
    assert "a" * 64 in (tmp_path / "other").read_text()
    assert read_note(tmp_path) == "b" * 64


def test_an_error_while_a_note_is_written_is_logged(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(drop_note, "new_file_in", full)
    note(tmp_path, ID)
    assert f"{tmp_path / NOTE}: not written: " in caplog.text


def test_a_long_note_is_none(tmp_path):
    (tmp_path / NOTE).write_text(json.dumps({"id": ID, "text": "x" * (64 << 10)}))
    assert read_note(tmp_path) is None


def test_a_note_replaces_what_a_killed_run_left_of_one(tmp_path):
    code = "from paroquant_stream.files.temp_files import name_beside; print(name_beside('{}'))"
    command = [sys.executable, "-c", code.format(NOTE)]
    left = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    (tmp_path / left).touch()
    note(tmp_path, "a" * 64)
    assert read_note(tmp_path) == "a" * 64
    assert sorted(path.name for path in tmp_path.iterdir()) == [NOTE]


@pytest.fixture
def full_disk(monkeypatch):
    """No note can be written."""

    @contextmanager
    def fail(*_):
        raise StoreError("no space")
        yield

    monkeypatch.setattr("paroquant_stream.store.drop_note.new_file_in", fail)


def test_a_note_of_another_drop_goes_when_it_cannot_be_replaced(tmp_path, full_disk):
    (tmp_path / NOTE).write_text(json.dumps({"id": "a" * 64}))
    note(tmp_path, "b" * 64)
    assert read_note(tmp_path) is None


def test_a_note_that_cannot_go_either_is_an_error(tmp_path, full_disk):
    (tmp_path / NOTE).mkdir()  # unlink fails
    with pytest.raises(StoreError, match="names another drop and can be neither replaced"):
        note(tmp_path, "b" * 64)
