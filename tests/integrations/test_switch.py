"""The file of the switch: written, found and removed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from paroquant_stream.errors import MissingExtraError, UnwritableFileError
from paroquant_stream.integrations import switch


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Two site-packages, and an interpreter that can import the package."""
    found = [tmp_path / "site", tmp_path / "user"]
    for place in found:
        place.mkdir()
    monkeypatch.setattr(switch, "_site_directories", lambda: found)
    monkeypatch.setattr(sys, "executable", "true")
    return found


def test_the_file_is_one_line_that_site_runs(places):
    assert switch.turn_on() == places[0] / switch.NAME
    assert switch.turn_on() == places[0] / switch.NAME
    assert [path.name for path in places[0].iterdir()] == [switch.NAME]
    (line,) = (places[0] / switch.NAME).read_text().splitlines()
    assert line.startswith("import ")
    assert switch.entries() == [places[0] / switch.NAME]


def test_it_goes_where_the_package_is_installed(places, monkeypatch):
    home = places[1] / "paroquant_stream" / "integrations" / "switch.py"
    monkeypatch.setattr(switch, "__file__", str(home))
    assert switch.turn_on() == places[1] / switch.NAME


def test_all_files_are_removed(places):
    for place in places:
        (place / switch.NAME).touch()
    assert switch.turn_off() == [place / switch.NAME for place in places]
    assert switch.entries() == switch.turn_off() == []


def test_an_interpreter_without_the_package_is_an_error(places, monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(MissingExtraError, match="false -m pip install paroquant_stream"):
        switch.turn_on()
    assert switch.entries() == []


def test_a_place_that_cannot_be_written_is_an_error(places):
    (places[0] / switch.NAME).mkdir()
    with pytest.raises(UnwritableFileError, match=rf"{switch.NAME}: "):
        switch.turn_on()


def test_a_file_that_cannot_be_removed_is_an_error(places, monkeypatch):
    switch.turn_on()

    def refuse(_path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(UnwritableFileError, match="cannot be removed: Permission denied"):
        switch.turn_off()


def test_the_places_are_those_of_pip_and_site():
    places = switch._site_directories()
    assert str(places[0]) in sys.path
    assert len(places) == len(set(places))


def test_children_get_the_options_and_keep_their_path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "a")
    found = switch.child_environment("c", 2, "float16", 8)
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    assert found["PYTHONPATH"] == f"{switch.CHILDREN}{os.pathsep}a"
    assert found["PAROQUANT_STREAM_CACHE"] == os.path.abspath("c")
    assert switch.options_from_environment() == {"jobs": 2, "dtype": "float16", "io_bits": 8}
    monkeypatch.delenv("PYTHONPATH")
    assert switch.child_environment(None, None, "source", 4) == {
        "PAROQUANT_STREAM_INSTALL": "1",
        "PAROQUANT_STREAM_DTYPE": "source",
        "PAROQUANT_STREAM_IO_BITS": "4",
        "PYTHONPATH": str(switch.CHILDREN),
    }


def test_a_value_that_is_no_number_is_left_to_load(monkeypatch):
    monkeypatch.setenv("PAROQUANT_STREAM_JOBS", "many")
    assert switch.options_from_environment()["jobs"] == "many"
