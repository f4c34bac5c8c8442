"""A text load of a vision model: the tower is not read, and mlx-vlm is not imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from paroquant_stream import convert_checkpoint, load
from paroquant_stream.backends.selection import TOWER_PREFIXES
from paroquant_stream.model import entries as weights
from tests.helpers.paths import FIXTURES

VISION = ["qwen3_5-awq-adversarial", "gemma4_e2b-awq-adversarial"]

TEXT = """
import sys
from paroquant_stream import load
_, _, is_vlm = load(sys.argv[1], force_text=True)
print(is_vlm, any(name.split(".")[0] == "mlx_vlm" for name in sys.modules))
load(sys.argv[1])
print(any(name.split(".")[0] == "mlx_vlm" for name in sys.modules))
"""


def test_a_text_load_never_imports_mlx_vlm():
    command = [sys.executable, "-c", TEXT, str(FIXTURES / VISION[0])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["False False", "True"]


@pytest.mark.parametrize("name", VISION)
def test_no_tensor_of_a_tower_is_read(name, monkeypatch):
    read = []
    real = weights.read_weights

    def recorded(*arguments, **options):
        found = real(*arguments, **options)
        read.extend(found)
        return found

    monkeypatch.setattr("paroquant_stream.model.assemble.read_weights", recorded)
    load(FIXTURES / name, force_text=True)
    assert read
    assert not [tensor for tensor in read if tensor.startswith(TOWER_PREFIXES)]


def test_text_and_vision_load_from_the_same_entries(monkeypatch):
    before = convert_checkpoint(FIXTURES / VISION[0])
    monkeypatch.setattr(
        "paroquant_stream.transform.task_runner._convert", lambda *_: pytest.fail("converted")
    )
    load(FIXTURES / VISION[0], force_text=True)
    load(FIXTURES / VISION[0])
    assert convert_checkpoint(FIXTURES / VISION[0]) == before


def test_a_vision_model_without_processor_files_gets_its_tokenizer(caplog):
    _, processor, is_vlm = load(FIXTURES / VISION[1])
    assert is_vlm
    assert "its tokenizer alone" in caplog.text
    assert processor.stopping_criteria(1)
    assert not processor.stopping_criteria(5)
