"""Completion in a shell, by the protocol with which the shell asks argcomplete."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from paroquant_stream.api.convert import convert_checkpoint
from tests.helpers.builders import cut_evenly, write_checkpoint

needs_argcomplete = pytest.mark.skipif(
    find_spec("argcomplete") is None, reason="argcomplete is not installed"
)
PROGRAM = ["-m", "paroquant_stream"]


def ask(line: str, directory: Path, program: list[str] = PROGRAM) -> tuple[int, str, list[str]]:
    """Exit code, output and completions when Tab is pressed at the end of a line."""
    answer = directory / "answer"
    answer.write_text("")
    environment = os.environ | {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_SHELL": "bash",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
    }
    command = [sys.executable, *program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr, answer.read_text().split("\n")


def completed(line: str, tmp_path: Path) -> set[str]:
    code, output, words = ask(line, tmp_path)
    assert (code, output) == (0, "")
    return {word.strip() for word in words}


@needs_argcomplete
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("paroquant-stream c", {"cache", "convert"}),
        ("paroquant-stream cache p", {"path", "prune"}),
        ("paroquant-stream convert --dr", {"--drop-source", "--dry-run"}),
        ("paroquant-stream convert --executor ", {"auto", "thread", "process", "dask"}),
        ("paroquant-stream convert --jobs ", {""}),  # not the files that lie here
        ("paroquant-stream cache ls --sort s", {"size", "state"}),
        ("paroquant-stream cache ls --filter a", {"age="}),
    ],
)
def test_commands_options_and_their_values_are_completed(line, words, tmp_path):
    assert completed(line, tmp_path) == words


@needs_argcomplete
def test_models_are_completed_as_ls_shows_them(tmp_path):
    """All in one test, as its conversions take longer than it does."""
    cache = tmp_path / "other-cache"
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("a" * 40)
    names = [str(tmp_path / "first"), str(tmp_path / "second")]
    for directory in (*map(Path, names), snapshot):
        convert_checkpoint(write_checkpoint(directory, cut=cut_evenly(1)), cache_dir=cache, jobs=1)
    where = f"--cache-dir {cache}"
    hub = "owner/name@aaaaaaaa"
    assert completed(f"paroquant-stream cache rm {where} ", tmp_path) == {*names, hub}
    assert completed(f"paroquant-stream cache prune {where} --keep o", tmp_path) == {hub}
    assert completed(f"paroquant-stream cache ls {where} {names[1][:-3]}", tmp_path) == {names[1]}
    found = completed(f"paroquant-stream convert {where} ", tmp_path)
    assert {*names, "owner/name", "tests/"} <= found  # and directories, to be converted first


@needs_argcomplete
def test_a_cache_that_cannot_be_read_has_no_models(tmp_path):
    cache = tmp_path / "cache"
    (cache / "v1" / "manifests").mkdir(parents=True)
    cache.chmod(0o777)
    assert completed(f"paroquant-stream cache ls --cache-dir {cache} x", tmp_path) == {""}


NOTHING = """
import sys
{before}
from paroquant_stream.cli.main import console
try:
    console()
finally:
    assert not {{"argcomplete", "paroquant_stream.cli.completion"}} & {{*sys.modules}}
"""


def test_nothing_is_imported_unless_the_shell_asks():
    code = NOTHING.format(before="sys.argv = ['paroquant-stream', '--version']")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_argcomplete_the_shell_gets_nothing_and_no_command_runs(tmp_path):
    code = "import sys; sys.modules['argcomplete'] = None\n"
    code += "from paroquant_stream.cli.main import console; console()"
    answer = ask("paroquant-stream c", tmp_path, ["-c", code])
    assert answer == (1, "", [""])
