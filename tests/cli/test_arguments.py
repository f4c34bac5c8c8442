"""Errors of a command line: one line, with the nearest word."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from types import SimpleNamespace

import pytest

from paroquant_stream.cli import arguments
from paroquant_stream.cli.arguments import Parser, near, option_type, typed, usage_error


@pytest.fixture
def parser() -> Parser:
    parser = Parser("program")
    parser.add_argument("kind", choices=["thread", "process"])
    parser.add_argument("--jobs", type=option_type(int))
    return parser


def refused(parser: Parser, capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(words)
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["thraed"], "kind: 'thraed' is none of thread, process; did you mean thread? See"),
        (["thread", "--job"], "--jobs: expected one argument; see"),
        (["thread", "--jbos=2"], "no option '--jbos'; did you mean --jobs? See"),
        (
            ["thread", "more"],
            "unexpected word 'more'; options stand before or after",
        ),
    ],
)
def test_a_wrong_command_line_is_one_line(parser, capsys, words, line):
    message = refused(parser, capsys, *words)
    assert message.removeprefix("error: ").removeprefix("argument ").startswith(line)
    assert message.endswith(" `program --help`\n")
    assert message.count("\n") == 1


def test_only_a_similar_word_is_suggested():
    assert near("convrt", ["convert", "cache"]) == "; did you mean convert?"
    assert near("xyz", ["convert", "cache"]) == ""


def test_a_usage_error_shows_no_control_characters():
    assert "\x1b" not in usage_error("no command '\x1b[31m'", "program")


@pytest.mark.parametrize(
    ("module", "shown"),
    [
        ("paroquant_stream.__main__", "python -m paroquant_stream convert"),
        ("paroquant_stream.convert", "python -m paroquant_stream.convert"),
        (None, "paroquant-stream convert"),
        ("pytest.__main__", "paroquant-stream convert"),
    ],
)
def test_a_command_is_shown_as_it_was_typed(monkeypatch, module, shown):
    spec = SimpleNamespace(name=module) if module else None
    monkeypatch.setattr(sys, "orig_argv", ["python"])
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=spec))
    assert typed("convert") == shown


@pytest.mark.parametrize("columns", ["120", "0", "-1", "many", "", None])
@pytest.mark.parametrize("terminal", [os.terminal_size((70, 20)), os.terminal_size((0, 0)), None])
def test_the_width_of_help_is_that_of_shutil(monkeypatch, columns, terminal):
    def ask(_fd):
        if terminal is None:
            raise OSError
        return terminal

    monkeypatch.setattr(os, "get_terminal_size", ask)
    monkeypatch.setattr(sys, "__stdout__", SimpleNamespace(fileno=lambda: 1))
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    expected = shutil.get_terminal_size().columns
    assert arguments._columns() == expected  # private: help cuts at 100


@pytest.mark.parametrize("closed", [None, SimpleNamespace(fileno=lambda: -1)])
def test_without_a_terminal_help_is_80_columns_wide(monkeypatch, closed):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "__stdout__", closed)
    assert arguments._columns() == 80  # private, as above


@pytest.mark.parametrize("path", ["python", "/usr/bin/python3.11", "/a b/python", "/$x/py", "/ä/p"])
def test_a_python_is_shown_quoted_for_a_shell(monkeypatch, path):
    main = SimpleNamespace(__spec__=SimpleNamespace(name="paroquant_stream.convert"))
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "orig_argv", [path])
    assert typed("convert") == f"{shlex.quote(path)} -m paroquant_stream.convert"
