"""`export_model`: what is checked before any work."""

from __future__ import annotations

import importlib.util
import os

import pytest

from paroquant_stream import export_model
from paroquant_stream.api import export as exporting
from paroquant_stream.backends import backend
from paroquant_stream.errors import CheckpointError, MissingExtraError, MissingTokenizerError
from tests.helpers.paths import FIXTURES


def test_a_missing_mlx_lm_ends_an_export_before_work(monkeypatch, model_dir, tmp_path):
    real = importlib.util.find_spec
    monkeypatch.setattr(backend, "find_spec", lambda n: None if n == "mlx_lm" else real(n))
    monkeypatch.setattr(exporting, "request_for", lambda *_, **__: pytest.fail("looked up"))
    with pytest.raises(MissingExtraError, match="pip install mlx-lm"):
        export_model(model_dir, tmp_path / "out")
    assert not os.path.lexists(tmp_path / "out")


def test_the_text_part_of_a_vision_model_needs_no_mlx_vlm(monkeypatch, tmp_path):
    real = importlib.util.find_spec
    monkeypatch.setattr(backend, "find_spec", lambda n: None if n == "mlx_vlm" else real(n))
    assert export_model(FIXTURES / "qwen3_5-awq-adversarial", tmp_path / "out").text_only


def test_the_target_is_checked_before_the_model(tmp_path):
    with pytest.raises(CheckpointError, match="exists"):
        export_model(tmp_path / "absent", tmp_path)


def test_a_function_is_told_of_shards_and_of_written_files(model_dir, tmp_path):
    told = {}
    out = tmp_path / "out"

    def tell(name, done, size):
        told[name] = (done, size)

    export = export_model(model_dir, out, shard_size=20_000, progress=tell)
    files = {f"out/{path.name}" for path in out.glob("*.safetensors")}
    assert told.keys() == files | {path.name for path in model_dir.glob("*.safetensors")}
    assert all(done == size for done, size in told.values())
    assert sum(size for name, (_, size) in told.items() if name in files) == export.nbytes


def test_without_a_tokenizer_nothing_is_exported(model_dir, tmp_path):
    (model_dir / "tokenizer.json").unlink()
    with pytest.raises(MissingTokenizerError):
        export_model(model_dir, tmp_path / "out", cache_dir=tmp_path / "cache")
    assert not os.path.lexists(tmp_path / "cache")
