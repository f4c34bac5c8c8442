"""MLX without a backend: one line that says what to install, before any work."""

from __future__ import annotations

import os
import sys

import pytest

from paroquant_stream import export_model, load
from paroquant_stream.api import export as exporting
from paroquant_stream.api import load as loading
from paroquant_stream.backends.mlx_core import check_mlx
from paroquant_stream.cli import convert, export
from paroquant_stream.conversion.converter import convert as run_conversion
from paroquant_stream.conversion.request import make_request
from paroquant_stream.errors import MissingExtraError
from tests.helpers.cache_files import entries


@pytest.fixture
def without_backend(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    monkeypatch.setattr(sys, "platform", "linux")


@pytest.mark.usefixtures("without_backend")
@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_the_message_says_what_to_install(monkeypatch, platform):
    monkeypatch.setattr(sys, "platform", platform)
    expected = {"linux": r"pip install 'mlx\[cpu\]' \(the extra `cpu`", "darwin": "reinstall mlx$"}
    with pytest.raises(MissingExtraError, match=expected[platform]) as error:
        check_mlx()
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("without_backend")
def test_a_conversion_needs_no_mlx(model_dir, tmp_path, monkeypatch):
    assert convert.main([str(model_dir), "--cache-dir", str(tmp_path / "a"), "--quiet"]) == 0
    monkeypatch.undo()
    assert convert.main([str(model_dir), "--cache-dir", str(tmp_path / "b"), "--quiet"]) == 0
    assert entries(tmp_path / "a") == entries(tmp_path / "b")
    assert len(entries(tmp_path / "a")) == 3


@pytest.mark.usefixtures("without_backend")
def test_nothing_is_dropped_without_a_backend(model_dir):
    with pytest.raises(MissingExtraError):
        run_conversion(make_request(model_dir, drop_source=True))
    assert len(list(model_dir.glob("*.safetensors"))) == 3


@pytest.mark.usefixtures("without_backend")
def test_load_and_export_end_before_anything_is_read(monkeypatch, tmp_path):
    for module in (loading, exporting):
        monkeypatch.setattr(module, "request_for", lambda *_, **__: pytest.fail("looked up"))
    with pytest.raises(MissingExtraError):
        load("owner/name")
    with pytest.raises(MissingExtraError):
        export_model("owner/name", tmp_path / "out")


@pytest.mark.usefixtures("without_backend")
def test_the_export_command_prints_one_line(model_dir, tmp_path, capsys):
    assert export.main([str(model_dir), str(tmp_path / "out"), "--self-contained"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: MLX cannot be used here")
    assert err.count("\n") == 1
    assert not os.path.lexists(tmp_path / "out")
