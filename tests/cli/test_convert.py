"""The command: its output, its options, its exit codes."""

from __future__ import annotations

import io
import json
import os
import pty
import resource
import subprocess
import sys
import termios

import pytest

from paroquant_stream.cli import convert
from paroquant_stream.cli.convert import main
from tests.helpers.builders import SETTLED, cut_evenly, llama_tensors, write_checkpoint


@pytest.fixture
def arguments(model_dir, tmp_path) -> list[str]:
    return [str(model_dir), "--cache-dir", str(tmp_path / "cache"), "--jobs", "2"]


def test_prints_one_summary_line(arguments, capsys, model_dir):
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{model_dir}: 3 converted (")
    assert ", 0 reused in " in out
    assert out.count("\n") == 1
    assert err.count(" shards, ") == err.count("\n") == 3


def test_peak_memory_is_in_bytes_on_macos_too(monkeypatch):
    class Absent:
        def __init__(self, path):
            assert path == "/proc/self/status"

        def exists(self):
            return False

    monkeypatch.setattr(convert, "Path", Absent)
    used = resource.getrusage(resource.RUSAGE_SELF)
    monkeypatch.setattr(resource, "getrusage", lambda who: used)
    assert convert.peak_rss_bytes() == used.ru_maxrss


def test_json_is_one_object_of_the_documented_form(arguments, capsys, model_dir):
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"model", "manifest", "shards", "seconds", "peak_rss_bytes"}
    assert found["model"] == str(model_dir)
    assert found["peak_rss_bytes"] > 10_000_000
    for shard in found["shards"]:
        assert shard.keys() == {
            "shard", "action", "why", "key", "digest", "bytes_in", "bytes_out", "seconds",
        }  # fmt: skip
        assert (shard["action"], shard["why"]) == ("converted", "never converted")
        assert (len(shard["key"]), len(shard["digest"])) == (64, 37)
        assert shard["bytes_in"] == (model_dir / shard["shard"]).stat().st_size


def test_quiet_prints_nothing(arguments, capsys):
    assert main([*arguments, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_a_dry_run_says_what_why_and_how_much_and_writes_nothing(arguments, capsys, tmp_path):
    assert main([*arguments, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["convert"] * 3
    assert all(line.endswith("never converted") for line in lines[:3])
    assert "3 of 3 shards to convert" in lines[3]
    assert " free" in lines[3]
    assert not (tmp_path / "cache").exists()


def test_a_dry_run_in_json(arguments, capsys):
    assert main([*arguments, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes_to_read"] == sum(shard["bytes_in"] for shard in found["shards"])
    assert found["bytes_to_write"] > 0
    assert found["bytes_free"] > 0


def test_a_tree_shows_who_lends_and_writes_nothing(scattered_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    command = [str(scattered_dir), "--dry-run", "--tree", "--cache-dir", str(tmp_path / "cache")]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"{scattered_dir}:", "3 shards, 3 made with tensors of others"]
    assert lines[3].startswith("`-- model-00002-of-00003.safetensors  ")
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"model", "dry_run", "shards"}
    assert len(found["shards"]) == 3
    assert not (tmp_path / "cache").exists()
    assert main([*command, "--quiet"]) == 0
    assert capsys.readouterr().out == ""


def test_in_place_converts_into_the_model_directory(model_dir, capsys):
    assert main([str(model_dir), "--in-place", "--quiet"]) == 0
    assert list((model_dir / "mlx" / "v1" / "manifests").glob("model-*.msgpack"))


@pytest.mark.usefixtures("settled")
def test_force_converts_again(arguments, capsys):
    main(arguments)
    main([*arguments, "--force"])
    assert ": 3 converted" in capsys.readouterr().out.splitlines()[1]


def test_a_failure_is_one_message_and_exit_code_1(tmp_path, capsys):
    assert main([str(tmp_path / "absent" / "deeper"), "--quiet"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_every_defect_of_a_checkpoint_is_on_stderr(tmp_path, capsys):
    tensors = llama_tensors()
    del tensors["model.layers.0.mlp.up_proj.pairs"], tensors["model.layers.1.mlp.up_proj.scales"]
    directory = write_checkpoint(tmp_path / "m", tensors, cut_evenly(3))
    assert main([str(directory), "--cache-dir", str(tmp_path / "cache")]) == 1
    err = capsys.readouterr().err
    assert "2 defects" in err
    assert "layers.0.mlp.up_proj.pairs" in err
    assert "layers.1.mlp.up_proj.scales" in err


def test_a_cache_that_cannot_be_made_is_one_message(model_dir, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([str(model_dir), "--cache-dir", str(tmp_path / "file" / "x")]) == 1
    assert "cannot make the cache" in capsys.readouterr().err


def test_a_bar_by_bytes_is_shown_on_a_terminal_only(arguments):
    command = [sys.executable, "-m", "paroquant_stream.convert", *arguments]
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 80))
    with subprocess.Popen(command, stderr=follower, stdout=subprocess.PIPE) as process:
        out, _ = process.communicate(timeout=30)
    shown = os.read(leader, 10_000)
    os.close(follower)
    os.close(leader)
    assert b"all shards" in shown
    assert b"model-00001-of-00003.safetensors: " in shown
    assert out.count(b"\n") == 1


LIGHT = (
    SETTLED
    + """
import sys
from paroquant_stream.cli import convert
from paroquant_stream.cli.convert import main
code = main(sys.argv[1:])
heavy = {"numpy", "mlx", "transformers", "huggingface_hub", "tqdm", "safetensors", "mlx_lm"}
heavy |= {"distributed", "dask", "multiprocessing", "concurrent"}
# 0.3 to 4 ms each: together a sixth of a run without work
slow = {"logging", "traceback", "textwrap", "shutil", "zlib", "bz2", "lzma", "shlex", "resource"}
slow |= {"random", "tempfile", "subprocess", "socket", "filelock", "asyncio"}
ours = ("checkpoint.hub", "checkpoint.hub_watch", "conversion.in_place", "conversion.progress")
ours += ("store.entry_digest", "store.waiting", "execution", "plan", "transform", "backends")
slow |= {f"paroquant_stream.{name}" for name in ours}
print(sorted(heavy & set(sys.modules)))
print(sorted(slow & set(sys.modules)))
sys.exit(code)
"""
)


def test_a_run_without_work_imports_nothing_heavy(arguments):
    def run():
        command = [sys.executable, "-c", LIGHT, *arguments, "--quiet"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert "numpy" in run()  # the first run works; this shows that the check can fail
    assert run() == "[]\n[]\n"


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, paroquant_stream; print(sorted({m.split('.')[0] for m in sys.modules}))"
    names = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    for heavy in ("numpy", "mlx", "msgpack", "transformers", "huggingface_hub", "tqdm", "filelock"):
        assert f"'{heavy}'" not in names


def test_a_shard_without_an_embedding_is_converted_without_mlx(tmp_path):
    tensors = {
        n: a for n, a in llama_tensors().items() if not n.startswith(("model.embed", "lm_head"))
    }
    directory = write_checkpoint(tmp_path / "m", tensors)
    command = [
        sys.executable,
        "-c",
        LIGHT,
        str(directory),
        "--cache-dir",
        str(tmp_path / "c"),
        "--quiet",
    ]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[0] == "['concurrent', 'numpy']"


class Person:
    """A terminal at which a user answers."""

    def __init__(self, answer: str) -> None:
        self.answer = answer

    def isatty(self) -> bool:
        return True

    def readline(self) -> str:
        return f"{self.answer}\n"


def shards(directory) -> int:
    return len(list(directory.glob("*.safetensors")))


@pytest.mark.parametrize(("answer", "code", "left"), [("y", 0, 0), ("", 1, 3), ("no", 1, 3)])
def test_drop_source_asks_before_it_removes_a_models_own_shards(
    model_dir, capsys, monkeypatch, answer, code, left
):
    monkeypatch.setattr("sys.stdin", Person(answer))
    assert main([str(model_dir), "--drop-source"]) == code
    assert shards(model_dir) == left
    out, err = capsys.readouterr()
    assert f"{model_dir}: remove each shard once it is converted?" in err
    assert "[y/N]" in err
    assert "[y/N]" not in out


def test_drop_source_without_a_terminal_needs_a_yes(model_dir, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert main([str(model_dir), "--drop-source"]) == 1
    assert "There is no terminal to ask on; add -y" in capsys.readouterr().err
    assert shards(model_dir) == 3
    assert main([str(model_dir), "--drop-source", "--dry-run"]) == 0
    assert shards(model_dir) == 3
    assert main([str(model_dir), "--drop-source", "-y"]) == 0
    assert shards(model_dir) == 0


@pytest.mark.parametrize(
    ("options", "notes"),
    [([], 1), (["--in-place"], 0), (["--quiet"], 0), (["--dry-run"], 0)],
)
def test_a_drop_into_the_cache_says_who_misses_the_model(model_dir, capsys, options, notes):
    assert main([str(model_dir), "--drop-source", "-y", *options]) == 0
    assert capsys.readouterr().err.count("will not list it after --drop-source") == notes


def test_a_revision_of_a_directory_is_refused(model_dir, capsys):
    assert main([str(model_dir), "--revision", "main"]) == 1
    assert "--revision is for the Hub" in capsys.readouterr().err
