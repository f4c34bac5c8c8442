"""How a command's process ends."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys

import pytest

from paroquant_stream.cli import main as cli_main
from paroquant_stream.cli.common import NO_READER, print_refusal, run_command


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


CACHE_LS = [sys.executable, "-m", "paroquant_stream", "cache", "ls"]


def in_a_shell(redirection: str, *command: str, **variables: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command whose streams a shell redirects."""
    program = ["sh", "-c", f'"$@" {redirection}', "sh", *command]
    environment = os.environ | variables
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a device that is full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_output_is_one_line(unbuffered):
    code, _, err = in_a_shell(">/dev/full", *CACHE_LS, PYTHONUNBUFFERED=unbuffered)
    assert (code, err) == (1, "error: the output cannot be written: No space left on device\n")


def test_a_closed_output_is_one_line():
    code, _, err = in_a_shell(">&-", *CACHE_LS)
    assert code == 1
    assert err.startswith("error: stdout is closed; redirect it")
    assert err.count("\n") == 1


def test_closed_errors_leave_the_exit_code_and_the_output_alone():
    absent = [sys.executable, "-m", "paroquant_stream", "cache", "rm", "absent"]
    assert in_a_shell("2>&-", *absent) == (1, "", "")
    code, out, _ = in_a_shell("<&- 2>&-", *CACHE_LS)
    assert (code, out.startswith("0 models")) == (0, True)


def test_what_an_encoding_lacks_is_escaped(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    assert run_command(lambda: sys.stdout.write("m-\N{SLIGHTLY SMILING FACE} \xe9\n") * 0, "") == 0
    sys.stdout.flush()
    assert raw.getvalue() == b"m-\\U0001f642 \xe9\n"
    assert sys.stdout.errors == "strict"


def test_a_path_that_is_not_utf_8_is_printed_escaped(model_dir, capsys):
    path = f"{model_dir}-{os.fsdecode(bytes([255]))}"
    model_dir.rename(path)
    assert cli_main.main(["convert", path]) == 0
    assert f"{model_dir}-\\udcff: 3 converted" in capsys.readouterr().out
    assert cli_main.main(["cache", "rm", path, "-y"]) == 0


TOO_MANY = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
NO_LIBRARY = ImportError(f"libx.so: cannot open shared object file: {TOO_MANY.strerror}")


@pytest.mark.parametrize("error", [TOO_MANY, NO_LIBRARY])
def test_an_import_without_descriptors_is_one_line(error, monkeypatch, capsys):
    def refuse(*_):
        raise error

    monkeypatch.setattr(cli_main, "import_module", refuse)
    assert cli_main.main(["cache", "ls"]) == 1
    expected = f"{TOO_MANY.strerror}; raise the limit with `ulimit -n`\n"
    assert run_command(refuse, "") == 1
    first, second = capsys.readouterr().err.splitlines(True)
    assert first == second
    assert first.startswith("error: ")
    assert first.endswith(expected)


def test_a_missing_name_is_a_defect_and_not_a_message():
    with pytest.raises(ImportError, match="cannot import name"):
        print_refusal(ImportError("cannot import name 'x'"))


def test_a_refused_file_is_named(capsys):
    assert print_refusal(PermissionError(errno.EACCES, "Permission denied", "a/b")) == 1
    assert capsys.readouterr().err == "error: a/b: Permission denied\n"


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_command_with_its_own_code(capsys, stop, code):
    before = signal.getsignal(signal.SIGTERM)

    def body() -> int:
        signal.raise_signal(stop)
        return 0

    assert run_command(body, "run again") == code
    assert capsys.readouterr() == ("", "interrupted; run again\n")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_thread_that_cannot_start_is_one_line(capsys):
    def refuse():
        raise RuntimeError("can't start new thread")

    assert run_command(refuse, "") == 1
    assert capsys.readouterr().err == (
        "error: can't start new thread; ask for fewer jobs, or raise the limit with `ulimit -u`\n"
    )


def test_a_system_without_memory_is_one_line(capsys):
    def fail():
        return len(bytearray(1 << 62))

    assert run_command(fail, "") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the system gives no more memory; ask for fewer jobs")


def test_another_runtime_error_is_a_defect():
    def fail():
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        run_command(fail, "")
