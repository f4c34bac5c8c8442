"""Programs of paroquant, mlx-lm and mlx-vlm use `load` while it is installed, not afterwards."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import types
from pathlib import Path

import mlx_lm
import mlx_vlm
import mlx_vlm.utils
import paroquant.inference.backends.mlx.load as home
import pytest
from paroquant.inference.backends.mlx import generator, modules
from paroquant.inference.base import GenerationParams

import paroquant_stream
from paroquant_stream import install, uninstall
from paroquant_stream.errors import MissingExtraError
from paroquant_stream.integrations import import_hook, loader_patch
from paroquant_stream.rotation.layers import RotateQuantizedLinear
from tests.helpers.paroquant_rotation import rotate_on_the_cpu
from tests.helpers.paths import FIXTURES, ROOT
from tests.helpers.stand_in import stand_in

MODEL = FIXTURES / "llama-awq-adversarial"
ORIGINAL = (home.load,)  # in a tuple: a name in this module would be replaced too
PACKAGES = ("paroquant", "mlx_lm", "mlx_vlm")
PROMPT = "w5 w9 w17 w42 w3"


@pytest.fixture(autouse=True)
def _undone():
    yield
    for _ in range(3):
        uninstall()
    assert home.load is generator.load is ORIGINAL[0]


def answer(model) -> str:
    """Return what paroquant's generator writes without sampling."""
    writer = generator.MlxGenerator(str(model))
    params = GenerationParams(max_tokens=24, temperature=0.0)
    return asyncio.run(writer.generate(PROMPT, params)).output_text


def forbidden(name):
    """Make a function that fails when it is called."""

    def called(*_args, **_kwargs):
        raise AssertionError(f"paroquant's {name} was called")

    return called


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.slow  # the public loader converts too
def test_the_generator_writes_the_same_text_from_the_cache(tmp_path, monkeypatch):
    # Private names of paroquant: its rotation needs a Mac, and its conversion must not run.
    monkeypatch.setattr(modules, "_apply_rotation", rotate_on_the_cpu)
    theirs = answer(MODEL)
    for name in ("_convert_autoawq", "_convert_paro_native", "_pack_mlx", "_create_model"):
        monkeypatch.setattr(home, name, forbidden(name))
    monkeypatch.setattr(modules, "_apply_rotation", forbidden("rotation"))
    with pytest.raises(AssertionError, match="_create_model was called"):
        answer(MODEL)  # so a call is noticed
    paroquant_stream.install(cache_dir=tmp_path / "c")
    first = answer(MODEL)
    entries = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(entries) == 4
    assert first == answer(MODEL) == theirs
    assert len(theirs.split()) > 10
    assert entries == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}


@pytest.mark.usefixtures("on_the_cpu")
def test_the_replacement_returns_what_paroquants_loader_returns(tmp_path):
    paroquant_stream.install(cache_dir=tmp_path / "c", jobs=1)
    model, tokenizer, is_vlm = home.load(str(MODEL), lazy=True, force_text=True)
    assert isinstance(model.model.layers[0].self_attn.q_proj, RotateQuantizedLinear)
    assert tokenizer.encode("w5 w9") == [5, 9]
    assert is_vlm is False


def test_a_model_that_cannot_be_used_is_an_error_of_this_package(tmp_path):
    paroquant_stream.install(cache_dir=tmp_path / "c")
    with pytest.raises(paroquant_stream.ParoquantStreamError, match="nothing: neither a model"):
        generator.MlxGenerator(str(tmp_path / "nothing"))


def test_the_loaders_of_the_three_packages_are_replaced_and_restored():
    names = [(home, "load"), (generator, "load"), (mlx_lm, "load"), (mlx_vlm, "load")]
    names += [(mlx_lm.utils, n) for n in ("load", "load_model", "sharded_load")]
    names += [(mlx_vlm.utils, n) for n in ("load", "load_model")]
    before = [(getattr(module, name),) for module, name in names]
    install()
    assert all(hasattr(getattr(module, name), "replaced_by") for module, name in names)
    assert mlx_lm.load is mlx_lm.utils.load
    uninstall()
    assert [(getattr(module, name),) for module, name in names] == before
    assert import_hook._finder not in sys.meta_path


def test_installs_nest_and_an_extra_uninstall_does_nothing():
    calls = []

    def loader(*a, jobs=None, cache_dir=None, model_config=None, tokenizer=True):
        calls.append((a, jobs, cache_dir))

    uninstall()
    loader_patch.install(loader, jobs=1)
    loader_patch.install(loader, cache_dir="c")
    home.load("m", force_text=True)
    uninstall()
    home.load("m")
    uninstall()
    assert import_hook._finder not in sys.meta_path
    uninstall()
    assert calls == [(("m", False, True), None, "c"), (("m", False, False), 1, None)]
    assert home.load is ORIGINAL[0]


def test_an_option_that_load_does_not_have_is_an_error():
    with pytest.raises(TypeError, match="color"):
        install(color="red")
    for option in ("lazy", "tokenizer", "model_config"):
        with pytest.raises(TypeError, match=option):
            install(**{option: True})  # the replaced functions give it
    assert home.load is ORIGINAL[0]


def run_python(directory: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process that finds packages in `directory` first."""
    environment = os.environ | {"PYTHONPATH": f"{directory}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def python(directory: Path, code: str) -> str:
    return run_python(directory, code).stdout.strip()


def test_a_loader_imported_later_is_replaced(tmp_path):
    code = """
import sys
from paroquant_stream import install, uninstall
install()
print(*({"paroquant", "mlx", "mlx_lm", "huggingface_hub", "numpy"} & set(sys.modules)))
from paroquant.inference.backends.mlx import load as home
print(home.load.replaced_by, type(home.__loader__).__name__, home.__spec__.loader.name)
import importlib
print(importlib.reload(home).load.replaced_by)
uninstall()
print(home.load("m"), importlib.reload(home).load("m"), hasattr(home.load, "replaced_by"))
"""
    ours = "paroquant_stream.integrations"
    expected = f"{ours} SourceFileLoader {loader_patch.PAROQUANT}\n{ours}\ntheirs theirs False"
    assert python(stand_in(tmp_path), code) == expected


def test_a_moved_loader_is_one_warning(tmp_path, monkeypatch, caplog):
    for name in [n for n in sys.modules if n.partition(".")[0] == "paroquant"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(stand_in(tmp_path, "mlx/loading.py"))
    install()
    assert [record.message for record in caplog.records] == [
        f"paroquant has no module {loader_patch.PAROQUANT}, so nothing in it is replaced"
    ]


def test_another_signature_is_one_warning_and_the_import_goes_on(tmp_path):
    stand_in(tmp_path, text="def load(path, revision):\n    return 'theirs'\n")
    code = """
from paroquant_stream import install
install()
import paroquant.inference.backends.mlx.load as home
install()
print(home.load("m", "r"))
"""
    done = run_python(tmp_path, code)
    assert done.stdout == "theirs\n"
    assert done.stderr.count("\n") == 1
    assert "it takes (path, revision), without model_path, lazy, force_text" in done.stderr


def test_without_any_package_the_error_says_what_to_install(monkeypatch):
    for name in [n for n in sys.modules if n in (*import_hook.LOADER_MODULES, *PACKAGES)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "paroquant", types.ModuleType("paroquant"))  # without a spec
    for package in PACKAGES[1:]:
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'paroquant_stream\[lm\]'"):
        install()
    assert import_hook._finder not in sys.meta_path


def test_one_of_the_packages_is_enough(monkeypatch):
    monkeypatch.delitem(sys.modules, loader_patch.PAROQUANT)
    monkeypatch.setitem(sys.modules, "paroquant", None)
    install()
    assert mlx_lm.load.replaced_by
    uninstall()
    sys.modules[loader_patch.PAROQUANT] = home  # before the check that all is restored
