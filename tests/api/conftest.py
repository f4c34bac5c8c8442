"""A cache of three models."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from paroquant_stream import (
    convert_checkpoint,
)
from tests.helpers.builders import cut_evenly, llama_tensors, write_checkpoint


@pytest.fixture
def three(tmp_path) -> list[Path]:
    """Models a, b and c of two shards each; b shares every entry with a."""
    a = write_checkpoint(tmp_path / "a", cut=cut_evenly(2))
    b = Path(shutil.copytree(a, tmp_path / "b"))
    c = write_checkpoint(tmp_path / "c", llama_tensors(1), cut_evenly(2))
    for path in (a, b, c):
        convert_checkpoint(path, jobs=1)
    return [a, b, c]
