"""How a command's process ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from paroquant_stream.cli.common import NO_READER, run_command


def run_without_reader(*arguments: str, streams: tuple[str, ...] = ("stdout",)) -> tuple[int, str]:
    """The exit code and stderr of a command whose output's reader is gone before it starts."""
    reader, writer = os.pipe()
    os.close(reader)
    pipes = {"stderr": subprocess.PIPE} | dict.fromkeys(streams, writer)
    done = subprocess.run([sys.executable, *arguments], text=True, **pipes)
    os.close(writer)
    return done.returncode, done.stderr or ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "paroquant_stream", "cache", "ls"],
        ["-m", "paroquant_stream.cache", "ls"],
        ["-m", "paroquant_stream", "--help"],
        ["-m", "paroquant_stream", "cache", "ls", "--json"],
    ],
)
def test_a_reader_that_went_away_ends_a_command_quietly(arguments):
    assert run_without_reader(*arguments) == (NO_READER, "")


def test_the_help_of_a_command_is_as_quiet_without_a_reader():
    assert run_without_reader("-m", "paroquant_stream.convert", "--help")[1] == ""


def test_a_conversion_without_a_reader_is_whole_and_quiet(model_dir, tmp_path):
    where = ["--cache-dir", str(tmp_path / "c")]
    command = ["-m", "paroquant_stream.convert", str(model_dir), *where]
    code, err = run_without_reader(*command)
    assert code == NO_READER
    assert "Traceback" not in err
    assert "BrokenPipe" not in err
    assert len(list((tmp_path / "c" / "v1" / "manifests").iterdir())) == 1


def test_more_than_a_pipe_holds_ends_as_quietly(tmp_path):
    code = (
        "from paroquant_stream.cli.common import end_with\n"
        "end_with(lambda: print('x' * 1000000) or 0)"
    )
    assert run_without_reader("-c", code) == (NO_READER, "")


def test_a_message_without_a_reader_ends_quietly_too():
    command = ["-m", "paroquant_stream", "convert", "/no/such/model/anywhere"]
    assert run_without_reader(*command, streams=("stdout", "stderr"))[0] == NO_READER


@pytest.mark.parametrize(
    ("give", "code"), [("0", 0), ("1", 1), ("sys.exit(2)", 2), ("sys.exit()", 0)]
)
def test_the_code_of_the_command_is_that_of_the_process(give, code):
    program = (
        f"import sys\nfrom paroquant_stream.cli.common import end_with\nend_with(lambda: {give})"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == code


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_command_with_its_own_code(capsys, stop, code):
    before = signal.getsignal(signal.SIGTERM)

    def body() -> int:
        signal.raise_signal(stop)
        return 0

    assert run_command(body, "run again") == code
    assert capsys.readouterr() == ("", "interrupted; run again\n")
    assert signal.getsignal(signal.SIGTERM) is before
