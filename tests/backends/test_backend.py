"""The interface to mlx-lm and mlx-vlm: their errors, and models that they cannot load."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError

import mlx.nn as nn
import pytest

from paroquant_stream.backends import backend
from paroquant_stream.backends.backend import keep_pipeline_layers
from paroquant_stream.backends.mlx_lm import MlxLm
from paroquant_stream.backends.mlx_vlm import MlxVlm
from paroquant_stream.conversion.converter import convert
from paroquant_stream.conversion.request import make_request
from paroquant_stream.errors import (
    AssemblyError,
    CheckpointError,
    MissingExtraError,
    MissingPartError,
)
from tests.helpers.builders import CONFIG
from tests.helpers.ranks import Rank


@pytest.mark.parametrize(
    "change",
    [{"num_attention_heads": 0}, {"vocab_size": -1}, {"vocab_size": 2**40}, {"hidden_size": "x"},
     {"model_type": "base"}, {"model_type": None}, {"rope_scaling": 7}],
)  # fmt: skip
def test_a_config_that_a_class_cannot_use_is_one_error(change):
    config = {**CONFIG, **change}
    with pytest.raises(AssemblyError, match=f"model_type {config['model_type']!r}: ") as error:
        MlxLm().build(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [("tokenizer.json", "{"), ("tokenizer.json", "[" * 100_000), ("tokenizer.json", "{}"),
     ("special_tokens_map.json", "[" * 100_000), ("tokenizer_config.json", "[" * 100_000)],
)  # fmt: skip
def test_a_tokenizer_that_transformers_cannot_load_is_one_error(model_dir, name, text):
    (model_dir / name).write_text(text)
    with pytest.raises(CheckpointError, match="transformers cannot load the tokenizer: ") as error:
        MlxLm().load_tokenizer(model_dir, CONFIG)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


def test_a_type_that_the_library_renames_is_known():
    assert MlxLm().why_unknown({"model_type": "mistral"}) is None  # llama's class
    assert MlxVlm().why_unknown({"model_type": "qwen3_5"}) is None


def test_an_unknown_type_names_the_version_and_the_remedy():
    reason = MlxLm().why_unknown({"model_type": "nosuch"})
    assert "mlx-lm 0." in reason
    assert "no class for model_type 'nosuch'" in reason
    assert "pip install -U mlx-lm" in reason


@pytest.mark.parametrize(
    ("library", "packages", "extra"),
    [(MlxLm(), ["mlx-lm"], "lm"), (MlxVlm(), ["mlx-lm", "mlx-vlm"], "vlm")],
)
def test_what_is_not_installed_is_named(monkeypatch, library, packages, extra):
    monkeypatch.setattr(backend, "find_spec", lambda _: None)
    reason = library.why_unknown({"model_type": "llama"})
    assert f"pip install {' '.join(packages)} (the extra `{extra}` of" in reason
    with pytest.raises(MissingExtraError) as error:
        library.check_installed()
    assert str(error.value) == reason


def test_the_class_of_a_model_is_imported_before_it_is_needed():
    script = """
import sys
from paroquant_stream.backends.mlx_lm import MlxLm
MlxLm().import_class({"model_type": "qwen3_5_text"})
print("mlx_lm.models.qwen3_5" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert done.stdout == b"True\n"


def test_a_class_that_cannot_be_imported_early_is_an_error_as_later():
    with pytest.raises(ValueError, match="nosuch"):
        MlxLm().import_class({"model_type": "nosuch"})


def test_an_installed_library_is_no_error():
    MlxLm().check_installed()
    MlxVlm().check_installed()


def test_a_vision_model_needs_mlx_lm_for_its_config(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(backend, "find_spec", lambda n: None if n == "mlx_lm" else real(n))
    reason = MlxVlm().why_missing()
    assert "needs mlx-lm (not installed): pip install mlx-lm (the extra `vlm`" in reason
    assert "force_text" not in reason  # which needs it too


@pytest.mark.usefixtures("settled")
def test_a_conversion_warns_once_and_converts_anyway(model_dir, caplog):
    (model_dir / "config.json").write_text(json.dumps(CONFIG | {"model_type": "nosuch"}))
    convert(make_request(model_dir, jobs=1))
    warnings = [record.message for record in caplog.records if "nosuch" in record.message]
    assert len(warnings) == 1
    caplog.clear()
    convert(make_request(model_dir, jobs=1))  # without work
    assert "nosuch" not in caplog.text


def test_the_warning_needs_no_library(model_dir, caplog, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(backend, "find_spec", lambda n: None if n == "mlx_lm" else real(n))
    convert(make_request(model_dir, jobs=1))
    assert "needs mlx-lm (not installed)" in caplog.text


class Pipelined(nn.Module):
    """A model whose class splits four layers into two pipeline ranks."""

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.pipeline = self._pipeline

    def _pipeline(self, group):
        if group.size() > 4:
            raise ValueError("more ranks than layers")
        self.model.start_idx, self.model.end_idx = 2, 4


def test_a_pipeline_rank_has_the_layers_that_the_class_says():
    assert keep_pipeline_layers(Pipelined(), Rank(0, 2)) == range(2, 4)


def test_more_pipeline_ranks_than_layers_are_an_error():
    with pytest.raises(MissingPartError, match="over 5 ranks: more ranks than layers"):
        keep_pipeline_layers(Pipelined(), Rank(0, 5))


def test_without_a_pipeline_the_error_names_alternatives():
    model = nn.Module()
    with pytest.raises(MissingPartError) as caught:
        keep_pipeline_layers(model, Rank(0, 2))
    assert "Module has no pipeline; alternatives: layers=range" in str(caught.value)
    assert "parallel=" not in str(caught.value)
    model.shard = lambda group: None
    with pytest.raises(MissingPartError, match='parallel="tensor"'):
        keep_pipeline_layers(model, Rank(0, 2))


@pytest.mark.parametrize("error", [ImportError, ValueError])
def test_a_library_that_cannot_be_found_counts_as_not_installed(monkeypatch, error):
    def fail(_name):
        raise error

    monkeypatch.setattr(backend, "find_spec", fail)
    assert "mlx-lm (not installed)" in MlxLm().why_unknown({"model_type": "llama"})


def test_a_library_without_metadata_is_named_without_its_version(monkeypatch):
    def fail(_name):
        raise PackageNotFoundError

    monkeypatch.setattr(backend, "version", fail)
    assert "mlx-lm (of unknown version)" in MlxLm().why_unknown({"model_type": "nosuch"})


def test_a_type_in_a_package_of_its_own_is_known(tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "mine" / "__init__.py").touch()
    spec = ModuleSpec("mlx_lm", None)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(backend, "find_spec", lambda _: spec)
    assert MlxLm().why_unknown({"model_type": "mine"}) is None
    assert "no class for model_type 'other'" in MlxLm().why_unknown({"model_type": "other"})
