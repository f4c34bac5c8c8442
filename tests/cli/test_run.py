"""`python -m paroquant_stream.run`: a program with our loader, and otherwise as Python runs it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from importlib.util import MAGIC_NUMBER
from pathlib import Path

import pytest
from mlx_lm import generate

from paroquant_stream import load
from paroquant_stream.cli import run as run_command
from paroquant_stream.cli.run import _other_kind, main
from paroquant_stream.integrations import loader_patch
from tests.helpers.paths import FIXTURES, ROOT
from tests.helpers.server import PROMPT, ask
from tests.helpers.stand_in import stand_in

MODEL = FIXTURES / "llama-awq-adversarial"

OURS = "paroquant_stream.integrations"
REPORT = """
import json, multiprocessing, os, sys
def of_a_child():
    from paroquant.inference.backends.mlx.load import load
    return getattr(load, "replaced_by", load.__module__)
if __name__ == "__main__":
    from paroquant.inference.backends.mlx.load import load
    here = sys.modules["__main__"].of_a_child is of_a_child
    print(json.dumps([sys.argv, sys.path[0], __name__, here, __file__, of_a_child()]))
"""


def environment(*directories: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*directories, ROOT)))}


def run(*arguments: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """The program run with ours, in a directory with a small package named paroquant."""
    command = [sys.executable, "-W", "error", "-m", "paroquant_stream.run", *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment(cwd), capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def here(tmp_path) -> Path:
    """A directory with a paroquant of its own and some programs."""
    stand_in(tmp_path)
    (tmp_path / "script.py").write_text(REPORT)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "__main__.py").write_text(REPORT)
    return tmp_path


def test_a_script_finds_its_arguments_its_path_and_our_loader(here):
    done = run("--jobs", "1", "./script.py", "--help", "-m", "x", "--", "--jobs", cwd=here)
    argv, path, name, is_main, file, loader = json.loads(done.stdout)
    assert argv == ["./script.py", "--help", "-m", "x", "--", "--jobs"]
    assert (path, name, is_main, file) == (str(here), "__main__", True, "./script.py")
    assert loader == OURS
    assert done.stderr == ""


def test_a_script_elsewhere_has_its_own_directory_first(here, tmp_path):
    (inner := here / "below").mkdir()
    (inner / "script.py").write_text("import sys, beside; print(sys.path[0])")
    (inner / "beside.py").touch()
    assert run("below/script.py", cwd=here).stdout.strip() == str(inner)


@pytest.mark.parametrize("name", ["script", "package", "package.__main__"])
@pytest.mark.slow
def test_a_module_runs_as_python_m_runs_it(here, name):
    ours = run("-m", name, "--jobs", "-h", cwd=here).stdout
    command = [sys.executable, "-m", name, "--jobs", "-h"]
    plain = subprocess.run(command, cwd=here, env=environment(), capture_output=True, text=True)
    *correct, loader = json.loads(plain.stdout)
    assert loader == "paroquant.inference.backends.mlx.load"
    assert json.loads(ours) == [*correct, OURS]


def test_the_options_are_those_of_every_load(here):
    (here / "shows.py").write_text(
        "from paroquant_stream.integrations.loader_patch import _installed\n"
        "(loader,) = _installed\n"
        "print({k: loader.keywords[k] for k in ('cache_dir', 'jobs', 'dtype', 'io_bits')})"
    )
    shown = run(
        "--cache-dir",
        "c",
        "--jobs",
        "3",
        "--dtype",
        "bfloat16",
        "--io-bits",
        "8",
        "-m",
        "shows",
        cwd=here,
    )
    expected = {"cache_dir": "c", "jobs": 3, "dtype": "bfloat16", "io_bits": 8}
    assert shown.stdout.strip() == str(expected)


def test_a_directory_with_a_main_runs(here):
    argv, path, *_, loader = json.loads(run("package", cwd=here).stdout)
    assert (argv, loader) == (["package"], OURS)
    assert os.path.basename(path) == "package"


@pytest.mark.parametrize(("end", "code"), [("7", 7), ("None", 0), ("'words'", 1)])
def test_the_programs_exit_code_is_ours(here, end, code):
    (here / "ends.py").write_text(f"import sys; sys.exit({end})")
    assert run("ends.py", cwd=here, code=code).stderr == ("words\n" if end == "'words'" else "")


def test_an_exception_of_the_program_keeps_its_traceback(here):
    (here / "fails.py").write_text("import nowhere_to_be_found")
    error = run("-m", "fails", cwd=here, code=1).stderr
    assert "Traceback" in error
    assert "ModuleNotFoundError: No module named 'nowhere_to_be_found'" in error


def test_an_interrupt_reaches_the_program(here):
    (here / "waits.py").write_text(
        "import time\ntry:\n    print('up', flush=True)\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('interrupted')\n    raise\n"
    )
    command = [sys.executable, "-m", "paroquant_stream.run", "waits.py"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=here, env=environment(), **pipes) as program:
        assert program.stdout.readline() == "up\n"
        program.send_signal(signal.SIGINT)
        out, error = program.communicate(timeout=20)
    assert out == "interrupted\n"
    assert "KeyboardInterrupt" in error
    assert program.returncode == -signal.SIGINT


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing.py"], "error: missing.py: No such file or directory"),
        (["-m", "missing"], "error: -m missing: no such module"),
        (["-m", "missing.below"], "error: -m missing.below: no such module"),
        (["-m", "paroquant"], "error: -m paroquant: no such module, or a package without __main__"),
        (["paroquant"], "error: paroquant/__main__.py: No such file"),
    ],
)
def test_a_program_that_is_not_there_is_one_line(here, arguments, said):
    error = run(*arguments, cwd=here, code=1).stderr
    assert error.startswith(said)
    assert error.count("\n") == 1


def test_an_error_of_our_loader_is_one_line(here):
    (here / "loads.py").write_text(
        "from paroquant.inference.backends.mlx.load import load\nload('nothing')\n"
    )
    error = run("loads.py", cwd=here, code=1).stderr
    assert error.startswith("error: nothing: neither a model directory")
    assert error.count("\n") == 1


def test_another_paroquant_is_a_warning_and_the_program_runs(here):
    (here / "paroquant/inference/backends/mlx/load.py").write_text("def load(path): return 0\n")
    (here / "uses.py").write_text(
        "from paroquant.inference.backends.mlx.load import load\nprint(load('m'))"
    )
    done = run("-m", "uses", cwd=here)
    assert done.stdout == "0\n"
    assert done.stderr.startswith("paroquant")
    assert "load is not replaced: it takes (path)" in done.stderr


def test_a_program_without_a_loader_runs_with_a_note(tmp_path):
    (tmp_path / "script.py").write_text("print('ran')")
    hide = (
        "import sys; sys.modules.update(paroquant=None, mlx_lm=None, mlx_vlm=None); "
        "from paroquant_stream.cli.run import main; "
    )
    command = [sys.executable, "-c", f"{hide}sys.exit(main(['script.py']))"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "ran\n")
    assert done.stderr.startswith("note: neither paroquant nor mlx-lm nor mlx-vlm is installed")


@pytest.mark.slow
def test_processes_that_the_program_starts_have_this_loader(here):
    (here / "children.py").write_text(
        REPORT + "    for kind in ('spawn', 'fork'):\n"
        "        with multiprocessing.get_context(kind).Pool(1) as pool:\n"
        "            print(pool.apply(of_a_child))\n"
    )
    assert run("children.py", cwd=here).stdout.splitlines()[1:] == [OURS, OURS]


def test_the_environment_is_restored(here, monkeypatch):
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["x"])
    monkeypatch.delenv("PAROQUANT_STREAM_JOBS", raising=False)
    (here / "own.py").write_text(
        "import os\nassert os.environ['PAROQUANT_STREAM_JOBS'] == '2'\nos.environ['OWN'] = 'x'"
    )
    before = dict(os.environ)
    assert main(["--jobs", "2", "own.py"]) == 0
    assert os.environ.pop("OWN") == "x"
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"#!/bin/bash\nexec python -m omlx.cli", "a script for bash"),
        (b"#!/usr/bin/env -S zsh -f\n", "a script for zsh"),
        (b"#! /usr/bin/env node", "a script for node"),
        (b"#!", "a script for nothing"),
        (b"\x7fELF\x02\0\0", "a binary program"),
        (b"\xcf\xfa\xed\xfe\0\0", "a binary program"),
        (b"#!/usr/bin/env python3\nimport omlx", None),
        (b"#!/opt/venv/bin/pypy3.11 -E\n", None),
        (b"#!/bin/sh\n'''exec' /a/long/path/python \"$0\" \"$@\"\n' '''", None),
        (b"PK\x03\x04\0\0", None),
        (MAGIC_NUMBER + b"\0\0", None),
        (b"print(1)", None),
        (b"", None),
    ],
)
def test_what_is_no_python_is_known_by_its_start(start, kind):
    assert _other_kind(start) == kind


def test_a_wrapper_is_one_line_that_says_what_to_do(here):
    (here / "omlx").write_text("#!/bin/bash\nexec python -m omlx.cli\n")
    error = run("omlx", cwd=here, code=1).stderr
    assert error.startswith("error: omlx: a script for bash, not Python")
    assert "PAROQUANT_STREAM_INSTALL=1" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "ends"), [("pass", None), ("raise SystemExit(3)", 3), (None, None)]
)
def test_after_the_program_the_loader_is_as_before(here, monkeypatch, script, ends):
    monkeypatch.syspath_prepend(here)
    monkeypatch.setattr(sys, "argv", sys.argv)
    seen, uninstall = [], run_command.uninstall
    monkeypatch.setattr(
        run_command, "uninstall", lambda: seen.append(len(loader_patch._installed)) or uninstall()
    )
    before = [*loader_patch._installed], [*sys.meta_path]
    if script:
        (here / "program.py").write_text(script)
    with pytest.raises(SystemExit, match=str(ends)) if ends else contextlib.nullcontext():
        assert main([str(here / "program.py")]) == (0 if script else 1)
    assert seen == [len(before[0]) + 1]
    assert ([*loader_patch._installed], [*sys.meta_path]) == before


@pytest.mark.parametrize("arguments", [[], ["--jobs", "0", "x.py"], ["--unknown"], ["-m"]])
def test_wrong_usage_ends_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith("see `paroquant-stream run --help`\n")


def test_help_stands_alone(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "-m mlx_lm generate --model MODEL" in text
    assert "--cache-dir DIR" in text


PREPARED = """
import mlx.core as mx
mx.set_default_device(mx.cpu)
import paroquant.inference.base as base
base.detect_backend = lambda: "mlx"
import mlx_lm.server as server
main = server.main
def main_with_config():
    pair = server.load
    config = {"model_type": "llama"}
    server.load = lambda *a, return_config=False, **k: (*pair(*a, **k), *[config] * return_config)
    main()
server.main = main_with_config
"""
"""paroquant's serve command takes its MLX backend on a Mac alone, and in 0.1.16 hands its server a
pair where mlx-lm 0.32.2 asks for the config as a third: without this, and with either loader, every
request fails with `not enough values to unpack (expected 3, got 2)`.
"""


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.slow
def test_paroquants_serve_command_answers_from_our_cache(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(PREPARED)
    cache = tmp_path / "c"
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    ours = [sys.executable, "-m", "paroquant_stream.run", "--cache-dir", str(cache)]
    serve = ["-m", "paroquant.cli.serve", "--model", str(MODEL), "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            ours + serve, cwd=ROOT, env=environment(tmp_path / "site"), stdout=log, stderr=log
        )
        try:
            body = {"model": str(MODEL), "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
            answer = ask(port, body)
        finally:
            server.terminate()
            server.wait(20)
    assert answer is not None, (tmp_path / "log").read_text()
    assert len(list(cache.rglob("*.safetensors"))) == 4
    stamp = time.time()
    model, tokenizer, _ = load(MODEL, cache_dir=cache)
    assert all(path.stat().st_mtime < stamp for path in cache.rglob("*.safetensors"))
    assert answer.split() == generate(model, tokenizer, PROMPT, max_tokens=8).split()
