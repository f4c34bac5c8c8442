"""`python -m paroquant_stream COMMAND`."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tomllib
from importlib import import_module

import pytest

import paroquant_stream
from paroquant_stream.cli.cache_options import EXAMPLES
from paroquant_stream.cli.main import COMMANDS, console, main, make_parser
from tests.helpers.paths import ROOT


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "paroquant_stream", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_runs_the_command_named(model_dir, tmp_path):
    done = run("convert", str(model_dir), "--cache-dir", str(tmp_path / "c"))
    assert done.returncode == 0, done.stderr
    assert "3 converted" in done.stdout


def test_without_a_command_says_how_it_is_used():
    assert run().returncode == 2
    assert run("nonsense").returncode == 2
    assert run("--help").returncode == 0
    assert "no command 'nonsense'" in run("nonsense").stderr


def test_the_help_lists_every_command_with_what_it_does():
    out = run("--help").stdout
    for name in COMMANDS:
        (line,) = [line for line in out.splitlines() if line.startswith(f"    {name} ")]
        assert len(line.split()) > 3
    for summary in COMMANDS.values():
        assert summary in " ".join(out.split())


def test_the_version_is_the_packages():
    assert run("--version").stdout == f"paroquant-stream {paroquant_stream.__version__}\n"


CALLS = [
    *([command] for command in COMMANDS),
    *(["cache", command] for command in EXAMPLES),
]


def output_of(capsys, *words: str) -> str:
    """What a command prints that ends with exit code 0."""
    try:
        code = main([*words])
    except SystemExit as stop:
        code = stop.code
    assert code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("call", CALLS, ids=" ".join)
def test_every_command_has_the_version(call, capsys):
    version = f"paroquant-stream {paroquant_stream.__version__}\n"
    assert output_of(capsys, *call, "--version") == version


def test_a_module_by_itself_has_the_version():
    command = [sys.executable, "-m", "paroquant_stream.convert", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"paroquant-stream {paroquant_stream.__version__}\n"


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_every_help_fits_the_terminal_and_reads_well(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    for call in ([], *CALLS):
        text = output_of(capsys, *call, "--help")
        assert text.startswith("usage: paroquant-stream")
        assert max(map(len, text.splitlines())) <= min(columns, 100), call
        assert not {"\x1b", "\t"} & set(text)
        assert "\n\n\n" not in text
        _, examples, variables = text.replace("environment:", "examples:").split("\nexamples:\n")
        for line in examples.splitlines():
            assert line.startswith("  paroquant-stream ") or not line
        assert "\n  COLUMNS                 the width of" in variables
        assert "  PAROQUANT_STREAM_CACHE  the cache" in variables


def test_the_examples_of_the_help_are_right():
    parser = make_parser(configured=COMMANDS)
    examples = [line for call in CALLS for line in examples_of(call)]
    assert len(examples) > 15
    for line in examples:
        assert shlex.split(line)[0] == "paroquant-stream"
        parser.parse_args(shlex.split(line)[1:])  # ends the process when it is wrong


def examples_of(call: list[str]) -> list[str]:
    name, *rest = call
    known = import_module(f"paroquant_stream.cli.{name}").EXAMPLES if name != "cache" else EXAMPLES
    return [*known[rest[0]]] if rest else [*known] if name != "cache" else []


def test_the_console_script_is_this_module():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"paroquant-stream": "paroquant_stream.cli.main:console"}
    assert callable(console)


def test_the_module_form_of_a_command_does_not_warn(model_dir, tmp_path):
    command = [sys.executable, "-W", "error", "-m", "paroquant_stream.convert", str(model_dir)]
    done = subprocess.run(
        [*command, "--quiet", "--cache-dir", str(tmp_path / "c")], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
