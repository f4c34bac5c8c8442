"""`paroquant-stream switch on|off|status`."""

from __future__ import annotations

import sys

import pytest

from paroquant_stream.cli.switch import main
from paroquant_stream.integrations import switch


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(switch, "_site_directories", lambda: [tmp_path])
    monkeypatch.setattr(sys, "executable", "true")
    monkeypatch.delenv("PAROQUANT_STREAM_INSTALL", raising=False)
    return tmp_path


def test_on_status_and_off_say_which_file(place, capsys, monkeypatch):
    path = place / switch.NAME
    assert main(["on"]) == main(["status"]) == main(["off"]) == main(["off"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"on: {path}"
    assert "PAROQUANT_STREAM_INSTALL=1" in lines[1]
    assert lines[2:4] == [f"switch: {path}", "PAROQUANT_STREAM_INSTALL: not set here"]
    assert "mlx-lm 0." in lines[5]
    assert lines[6:] == [f"removed {path}", "was off"]


def test_status_shows_the_variable_and_no_file(place, capsys, monkeypatch):
    monkeypatch.setenv("PAROQUANT_STREAM_INSTALL", "1")
    monkeypatch.setattr("paroquant_stream.cli.switch.PACKAGES", ("not-installed-at-all",))
    assert main(["status"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "switch: off",
        "PAROQUANT_STREAM_INSTALL: 1",
        "python: true",
        "loaders: none",
    ]


def test_an_error_is_one_line(place, capsys, monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    assert main(["on"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: paroquant_stream is not installed for false")
    assert error.count("\n") == 1


def test_wrong_usage_ends_with_2(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["maybe"])
    assert ended.value.code == 2
