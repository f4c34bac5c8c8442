"""`python -m paroquant_stream COMMAND`."""

from __future__ import annotations

import subprocess
import sys


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
    assert "convert" in run("--help").stdout + run("--help").stderr


def test_the_module_form_of_a_command_does_not_warn(model_dir, tmp_path):
    command = [sys.executable, "-W", "error", "-m", "paroquant_stream.convert", str(model_dir)]
    done = subprocess.run(
        [*command, "--cache-dir", str(tmp_path / "c")], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
