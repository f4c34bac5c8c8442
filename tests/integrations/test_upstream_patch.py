"""A patch that teaches paroquant 0.1.16 to load through the cache, tried on a copy of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import paroquant
import pytest

from tests.helpers.paths import FIXTURES, ROOT

PATCH = Path(__file__).parent / "data" / "paroquant-0.1.16-cache.patch"
MODEL = FIXTURES / "llama-awq-adversarial"
ANSWERS = """
import asyncio, json, os, sys
import mlx.core as mx
mx.set_default_device(mx.cpu)
from paroquant.inference.backends.mlx import generator, load, modules
from paroquant.inference.base import GenerationParams
from tests.helpers.paroquant_rotation import rotate_on_the_cpu

def answer():
    writer = generator.MlxGenerator(sys.argv[1])
    text = asyncio.run(writer.generate("w5 w9 w17 w42 w3", GenerationParams(24, 0.0))).output_text
    return type(writer.model.model.layers[0].self_attn.q_proj).__module__, text

modules._apply_rotation = rotate_on_the_cpu  # theirs needs a Mac
package, sys.modules["paroquant_stream"] = sys.modules.pop("paroquant_stream", None), None
answers = [load.__file__, answer()]  # as if the package were not installed
del sys.modules["paroquant_stream"]
answers.append(answer())
os.environ["PAROQUANT_MLX_CACHE"] = "0"
assert load._load_cached(sys.argv[1], False, True) is None
print(json.dumps(answers))
"""


@pytest.fixture
def patched(tmp_path) -> Path:
    """Give the parent of a patched copy of the installed package."""
    if version("paroquant") != "0.1.16" or not shutil.which("patch"):
        pytest.skip("needs paroquant 0.1.16 and the program `patch`")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(paroquant.__file__).parent, tmp_path / "site/paroquant", ignore=ignored)
    command = ["patch", "--batch", "-p1", "-i", str(PATCH)]
    subprocess.run(command, cwd=tmp_path / "site", check=True, capture_output=True)
    return tmp_path / "site"


@pytest.mark.slow  # a process that loads twice, by the public loader once
def test_the_patched_generator_writes_the_same_tokens(patched, tmp_path):
    path = os.pathsep.join([str(patched), str(ROOT)])
    environment = {
        **os.environ, "PYTHONPATH": path, "PAROQUANT_STREAM_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    command = [sys.executable, "-c", ANSWERS, str(MODEL)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    source, theirs, ours = json.loads(done.stdout)
    assert Path(source).is_relative_to(patched)
    assert theirs[0] == "paroquant.inference.backends.mlx.modules"
    assert ours[0] == "paroquant_stream.rotation.layers"
    assert len(ours[1].split()) > 10
    assert ours[1] == theirs[1]
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 4


def test_the_patch_is_small_and_has_little_of_theirs():
    lines = PATCH.read_text().splitlines()
    assert not [line for line in lines if line.startswith("-") and not line.startswith("---")]
    assert sum(line.startswith("+") for line in lines) < 25
    assert sum(line.startswith(" ") for line in lines) < 8
