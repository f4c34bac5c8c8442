"""`python -m paroquant_stream COMMAND`."""

from __future__ import annotations

import subprocess
import sys
import tomllib

import paroquant_stream
from paroquant_stream.cli.main import COMMANDS, console
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
        (line,) = [line for line in out.splitlines() if line.startswith(f"  {name} ")]
        assert len(line.split()) > 3


def test_the_version_is_the_packages():
    assert run("--version").stdout == f"paroquant-stream {paroquant_stream.__version__}\n"


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
