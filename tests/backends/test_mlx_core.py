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
from paroquant_stream.conversion import pipeline
from paroquant_stream.conversion.converter import convert as run_conversion
from paroquant_stream.conversion.request import make_request
from paroquant_stream.errors import MissingExtraError
from paroquant_stream.execution.processes import processes


@pytest.fixture
def without_backend(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    monkeypatch.setattr(sys, "platform", "linux")


def forbid_work(monkeypatch):
    monkeypatch.setattr(pipeline, "run_all", lambda *_: pytest.fail("a shard was begun"))


@pytest.mark.usefixtures("without_backend")
@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_the_message_says_what_to_install(monkeypatch, platform):
    monkeypatch.setattr(sys, "platform", platform)
    expected = {"linux": r"pip install 'mlx\[cpu\]' \(the extra `cpu`", "darwin": "reinstall mlx$"}
    with pytest.raises(MissingExtraError, match=expected[platform]) as error:
        check_mlx()
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("without_backend")
def test_a_conversion_ends_before_its_first_shard(model_dir, monkeypatch, capsys, tmp_path):
    forbid_work(monkeypatch)
    assert convert.main([str(model_dir), "--cache-dir", str(tmp_path / "cache")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: MLX cannot be used here")
    assert err.count("\n") == 1


@pytest.mark.usefixtures("without_backend")
def test_the_check_holds_for_processes_too(model_dir, monkeypatch):
    forbid_work(monkeypatch)
    with processes(1) as pool, pytest.raises(MissingExtraError):
        run_conversion(make_request(model_dir, executor=pool))


@pytest.mark.usefixtures("without_backend")
def test_a_cluster_has_an_mlx_of_its_own(model_dir, monkeypatch):
    monkeypatch.setattr(pipeline, "client_of", lambda executor: executor)
    begun = []
    monkeypatch.setattr(pipeline, "run_all", lambda *_: begun.append(True) or iter(()))
    with processes(1) as pool, pytest.raises(KeyError):
        run_conversion(make_request(model_dir, executor=pool))
    assert begun


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
@pytest.mark.parametrize("option", ["--self-contained", "--single-file"])
def test_the_export_command_prints_one_line(model_dir, tmp_path, capsys, option):
    assert export.main([str(model_dir), str(tmp_path / "out"), option]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: MLX cannot be used here")
    assert err.count("\n") == 1
    assert not os.path.lexists(tmp_path / "out")


@pytest.mark.usefixtures("settled")
def test_without_an_embedding_to_convert_no_mlx_is_needed(model_dir, monkeypatch):
    run_conversion(make_request(model_dir))
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    moved = model_dir.rename(model_dir.parent / "moved")
    reports = run_conversion(make_request(moved)).shards
    assert {report.action for report in reports} == {"reused"}
