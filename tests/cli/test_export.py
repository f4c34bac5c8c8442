"""The export command."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest

from paroquant_stream.cli import convert, export
from paroquant_stream.exports import mlx_directory_writer as mlx_directory
from paroquant_stream.files.tensor_header import read_header
from tests.helpers.paths import FIXTURES


@pytest.fixture
def command(model_dir, tmp_path) -> list[str]:
    """The arguments for a model that is converted already."""
    where = ["--cache-dir", str(tmp_path / "cache")]
    assert convert.main([str(model_dir), *where, "--quiet"]) == 0
    return [str(model_dir), str(tmp_path / "out"), *where]


def listing(directory) -> dict[str, int]:
    """Every path under a directory and when it last changed."""
    return {str(path): path.lstat().st_mtime_ns for path in directory.rglob("*")}


def test_says_what_it_wrote(command, tmp_path, capsys):
    assert export.main(command) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path / 'out'}: 1 file, ")
    assert out.count("\n") == 1


def test_says_that_there_is_code_and_how_it_runs(command, capsys):
    assert export.main([*command, "--self-contained"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == (
        "it contains code, paroquant_model.py, that mlx-lm runs only with --trust-remote-code"
    )


def test_says_that_a_vision_model_loses_its_tower(tmp_path, capsys):
    assert export.main([str(FIXTURES / "qwen3_5-awq-adversarial"), str(tmp_path / "out")]) == 0
    assert "its text part only" in capsys.readouterr().out


def test_a_vision_model_keeps_its_tower_on_demand(tmp_path, capsys):
    model = str(FIXTURES / "qwen3_5-awq-adversarial")
    assert export.main([model, str(tmp_path / "out"), "--vision"]) == 0
    out = capsys.readouterr().out
    assert "text part" not in out
    assert out.splitlines()[1] == (
        "it contains code, paroquant_vision_model.py and paroquant_model.py, that mlx-vlm runs "
        "without asking"
    )


def test_quiet_prints_nothing(command, capsys):
    assert export.main([*command, "--quiet", "--self-contained"]) == 0
    assert capsys.readouterr() == ("", "")


def test_converts_what_is_missing_first(model_dir, tmp_path, capsys):
    assert export.main([str(model_dir), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(("size", "files"), [("20kB", 4), ("0.1 MB", 1)])
def test_files_hold_what_they_are_allowed_to(command, tmp_path, size, files):
    assert export.main([*command, "--shard-size", size]) == 0
    shards = list((tmp_path / "out").glob("model*.safetensors"))
    assert len(shards) == files


@pytest.mark.parametrize(
    "wrong", [["--shard-size", "5XB"], ["--shard-size", "-1GB"], ["--jobs", "0"], ["--nonsense"]]
)
def test_wrong_usage_exits_with_2(command, wrong, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        export.main([*command, *wrong])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def one_line(capsys) -> str:
    """The error message, which is one line."""
    errors = "".join(
        line for line in capsys.readouterr().err.splitlines(True) if " done: " not in line
    )
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    return errors


@pytest.mark.parametrize("make", ["mkdir", "touch"])
def test_what_exists_is_left_alone(command, tmp_path, make, capsys):
    getattr(tmp_path / "out", make)()
    before = listing(tmp_path)
    assert export.main(command) == 1
    assert "exists; remove it or name another" in one_line(capsys)
    assert listing(tmp_path) == before


def test_an_unknown_model_is_one_line(tmp_path, capsys):
    assert export.main([str(tmp_path / "absent"), str(tmp_path / "out")]) == 1
    assert "neither a model directory" in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_an_absent_parent_is_reported_before_any_work(model_dir, tmp_path, capsys):
    before = listing(tmp_path)
    assert export.main([str(model_dir), str(tmp_path / "absent" / "out")]) == 1
    assert f"there is no directory {tmp_path / 'absent'}; make it first" in one_line(capsys)
    assert listing(tmp_path) == before


def test_a_disk_that_is_read_only_is_one_line(command, tmp_path, monkeypatch, capsys):
    real = os.mkdir

    def mkdir(path, *mode, **options):
        if "/.out." in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        real(path, *mode, **options)

    monkeypatch.setattr(os, "mkdir", mkdir)
    assert export.main(command) == 1
    message = one_line(capsys)
    assert "out: cannot be written: Read-only file system; name a directory that can be" in message


def test_an_export_is_not_exported_again(command, tmp_path, capsys):
    assert export.main(command) == 0
    assert export.main([command[1], str(tmp_path / "again")]) == 1
    assert "export its original" in one_line(capsys)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_between_two_tensors_leaves_nothing(
    command, tmp_path, number, code, monkeypatch, capsys
):
    before, written = listing(tmp_path), []
    real = mlx_directory._write_tensor

    def interrupted(*arguments):
        written.append(1)
        if len(written) == 20:
            os.kill(os.getpid(), number)
        real(*arguments)

    monkeypatch.setattr(mlx_directory, "_write_tensor", interrupted)
    assert export.main([*command, "--shard-size", "20kB"]) == code
    assert len(written) == 20
    assert capsys.readouterr().err.endswith("interrupted; nothing was exported, run again\n")
    assert listing(tmp_path).keys() == before.keys()


def test_ctrl_c_during_the_conversion_sweeps_its_temps(model_dir, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    swept = []
    monkeypatch.setattr(mlx_directory, "converted", interrupted)
    monkeypatch.setattr(
        "paroquant_stream.store.store.Store.sweep", lambda _, own: swept.append(own)
    )
    assert export.main([str(model_dir), str(tmp_path / "out")]) == 130
    assert swept == [True]
    assert not (tmp_path / "out").exists()


def test_beside_shards_is_for_a_single_file(model_dir, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        export.main([str(model_dir), str(tmp_path / "out"), "--beside-shards"])
    assert ended.value.code == 2
    assert "--beside-shards is for --single-file" in capsys.readouterr().err


def test_the_module_form_does_not_warn(command):
    program = [sys.executable, "-W", "error", "-m", "paroquant_stream.export", "--help"]
    done = subprocess.run(program, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--trust-remote-code" in done.stdout


def dtype_of(out) -> str:
    """The dtype of the last norm in an export."""
    with (out / "model.safetensors").open("rb") as file:
        header = read_header(file.fileno(), str(out))
    return next(tensor.dtype for tensor in header.tensors if tensor.name == "model.norm.weight")


@pytest.mark.usefixtures("settled")
def test_the_one_conversion_that_there_is_is_written(model_dir, tmp_path, capsys):
    where = ["--cache-dir", str(tmp_path / "cache")]
    assert convert.main([str(model_dir), *where, "--quiet", "--dtype", "bfloat16"]) == 0
    assert export.main([str(model_dir), str(tmp_path / "out"), *where]) == 0
    assert capsys.readouterr().err.startswith(
        "note: writes its one conversion, --dtype bfloat16; --dtype source makes another\n"
    )
    assert dtype_of(tmp_path / "out") == "BF16"
    assert len(list((tmp_path / "cache").glob("v1/manifests/*.msgpack"))) == 1


def test_a_dtype_is_written_as_asked_for(command, tmp_path, capsys):
    assert export.main([*command, "--dtype", "bfloat16"]) == 0
    assert dtype_of(tmp_path / "out") == "BF16"
    command[1] += "-again"
    assert export.main(command) == 0  # of two, the one that is bit-identical
    assert "note" not in capsys.readouterr().err
    assert dtype_of(tmp_path / "out-again") == "F16"


def test_a_single_file_takes_no_dtype(model_dir, capsys):
    with pytest.raises(SystemExit):
        export.main([str(model_dir), "--single-file", "--dtype", "float16"])
    assert "--single-file takes no --dtype" in capsys.readouterr().err
