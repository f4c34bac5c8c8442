"""The README's examples run as they are written, on a model of the fixtures."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import FIXTURES, ROOT

README = ROOT / "README.md"
MODEL = str(FIXTURES / "llama-awq-adversarial")
PROGRAM = """
import sys
from paroquant.inference.backends.mlx.load import load

model, tokenizer, is_vlm = load(sys.argv[1])
print(type(model.model.layers[0].self_attn.q_proj).__module__)
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def run(command: list[str], directory: Path) -> str:
    binaries = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(README.parent),
    }
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def lines(block: str) -> list[list[str]]:
    return [shlex.split(line.replace("path/to/model", MODEL)) for line in block.splitlines()]


def test_a_model_is_loaded(tmp_path):
    (script,) = blocks("python")
    script = script.replace("path/to/model", MODEL) + "\nprint(type(tokenizer).__name__, is_vlm)"
    assert run([sys.executable, "-c", script], tmp_path) == "TokenizerWrapper False\n"


def test_the_cache_commands_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PAROQUANT_STREAM_CACHE", str(tmp_path / "cache"))
    text = blocks("console")[1].replace("owner/name", MODEL)
    convert, listed, prune, verify = [
        shlex.split(line, comments=True) for line in text.splitlines()
    ]
    run(convert, tmp_path)
    assert "1 model" in run(listed, tmp_path)
    assert "nothing to remove" in run([*prune, "-y"], tmp_path)
    assert "0 differ" in run(verify, tmp_path)


def test_a_program_that_loads_through_paroquant_has_this_loader(tmp_path):
    (command,) = lines(blocks("console")[0])
    (tmp_path / "program.py").write_text(PROGRAM)
    assert run(command, tmp_path) == "paroquant_stream.rotation.layers\n"


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_an_export_runs_in_stock_mlx_lm(tmp_path):
    export, generate = lines(blocks("console")[2])
    assert "contains code" in run(export, tmp_path)
    assert "Generation: " in run(generate, tmp_path)
