"""Whether the installed library can run a model, told before anything is imported."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from paroquant_stream.backends import backend
from paroquant_stream.backends.mlx_lm import MlxLm
from paroquant_stream.backends.mlx_vlm import MlxVlm
from paroquant_stream.conversion.converter import convert
from paroquant_stream.conversion.request import make_request
from tests.helpers.builders import CONFIG


@pytest.mark.parametrize("kind", ["llama", "qwen3_5_text", "qwen3_5_moe_text", "gemma4"])
def test_a_type_whose_class_is_there_is_known_without_importing_the_library(kind):
    script = (
        f"import sys\nfrom paroquant_stream.backends.mlx_lm import MlxLm\n"
        f"assert MlxLm().why_unknown({{'model_type': {kind!r}}}) is None\n"
        "assert not {'mlx_lm', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_type_that_the_library_knows_by_another_name_is_known():
    assert MlxLm().why_unknown({"model_type": "mistral"}) is None  # llama's class
    assert MlxVlm().why_unknown({"model_type": "qwen3_5"}) is None


def test_an_unknown_type_names_the_installed_version_and_the_remedy():
    reason = MlxLm().why_unknown({"model_type": "nosuch"})
    assert "mlx-lm 0." in reason
    assert "no class for model_type 'nosuch'" in reason
    assert "pip install -U mlx-lm" in reason


@pytest.mark.parametrize(("library", "extra"), [(MlxLm(), "lm"), (MlxVlm(), "vlm")])
def test_a_library_that_is_not_installed_is_named_with_its_extra(monkeypatch, library, extra):
    monkeypatch.setattr(backend, "find_spec", lambda _: None)
    assert f"paroquant_stream[{extra}]" in library.why_unknown({"model_type": "llama"})


@pytest.mark.usefixtures("settled")
def test_a_conversion_warns_once_and_converts_all_the_same(model_dir, caplog):
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
    assert "mlx-lm is not installed" in caplog.text
