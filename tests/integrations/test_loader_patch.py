"""paroquant's own programs use `load` while it is installed, and their own loader afterwards."""

from __future__ import annotations

import asyncio
import functools
import importlib
import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import paroquant.inference.backends.mlx.load as home
import pytest
from paroquant.inference.backends.mlx import generator, modules
from paroquant.inference.base import GenerationParams

import paroquant_stream
from paroquant_stream import install, uninstall
from paroquant_stream.errors import LoaderMovedError, MissingExtraError
from paroquant_stream.integrations import loader_patch
from paroquant_stream.rotation.layers import RotateQuantizedLinear
from tests.helpers.paroquant_rotation import rotate_on_the_cpu
from tests.helpers.paths import FIXTURES, ROOT
from tests.helpers.stand_in import stand_in

MODEL = FIXTURES / "llama-awq-adversarial"
ORIGINAL = (home.load,)  # in a tuple: a name in this module would be replaced too
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


def test_every_name_of_the_loader_is_replaced_and_restored():
    early = types.ModuleType("early")
    early.load = early.under_another_name = ORIGINAL[0]
    early.another = another = functools.partial(ORIGINAL[0])
    sys.modules["early"] = early
    try:
        install()
        assert (
            home.load
            is generator.load
            is early.load
            is early.under_another_name
            is loader_patch.load
        )
        assert loader_patch.load is not ORIGINAL[0]
        assert early.another is another
        late = types.ModuleType("late")
        late.load = home.load
        sys.modules["late"] = late
        uninstall()
        assert home.load is early.load is early.under_another_name is late.load is ORIGINAL[0]
    finally:
        del sys.modules["early"], sys.modules["late"]
    assert loader_patch._finder not in sys.meta_path


def test_installs_nest_and_an_extra_uninstall_does_nothing():
    calls = []

    def loader(*a, jobs=None, cache_dir=None):
        calls.append((a, jobs, cache_dir))

    uninstall()
    loader_patch.install(loader, jobs=1)
    loader_patch.install(loader, cache_dir="c")
    home.load("m", force_text=True)
    uninstall()
    home.load("m")
    uninstall()
    assert loader_patch._finder not in sys.meta_path
    uninstall()
    assert calls == [(("m", False, True), None, "c"), (("m", False, False), 1, None)]
    assert home.load is ORIGINAL[0]


def test_a_function_kept_after_uninstall_calls_paroquants_loader(monkeypatch):
    install()
    kept = home.load
    uninstall()
    monkeypatch.setattr(loader_patch, "_original", lambda *arguments: arguments)
    assert kept("m", lazy=True) == ("m", True, False)


def test_an_option_that_load_does_not_have_is_an_error():
    with pytest.raises(TypeError, match="color"):
        install(color="red")
    with pytest.raises(TypeError, match="lazy"):
        install(lazy=True)  # the caller passes it
    assert home.load is ORIGINAL[0]


def test_a_later_replacement_by_another_program_stays():
    install()
    home.load = other = lambda: None
    uninstall()
    found, home.load = home.load, ORIGINAL[0]
    assert found is other
    assert generator.load is ORIGINAL[0]


def test_a_lazy_module_is_not_imported():
    class Lazy(types.ModuleType):
        def __getattribute__(self, name):
            raise AssertionError(f"asked for {name}")

    lazy = Lazy("lazy")
    sys.modules["lazy"], sys.modules["no module"] = lazy, object()
    try:
        install()
        uninstall()
    finally:
        del sys.modules["lazy"], sys.modules["no module"]


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (lambda model_path, revision: 0, r"takes \(model_path, revision\)"),
        (lambda model_path, lazy, tower: 0, r"takes \(model_path, lazy, tower\)"),
        (None, r"no load\(\)"),
    ],
)
def test_another_loader_is_an_error_with_the_version(found, reason):
    home.load = found
    try:
        with pytest.raises(LoaderMovedError, match=r"paroquant 0\.1\.16 .*" + reason):
            install()
    finally:
        home.load = ORIGINAL[0]
    assert loader_patch._finder not in sys.meta_path


def python(directory: Path, code: str) -> str:
    """Return what `code` prints in a process that finds packages in `directory` first."""
    environment = os.environ | {"PYTHONPATH": f"{directory}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_loader_imported_later_is_replaced(tmp_path):
    code = """
import sys
from paroquant_stream.integrations import loader_patch
from paroquant_stream import install, uninstall
install()
print(*({"paroquant", "mlx", "mlx_lm", "huggingface_hub", "numpy"} & set(sys.modules)))
from paroquant.inference.backends.mlx import load as home
print(home.load is loader_patch.load, type(home.__loader__).__name__, home.__spec__.loader.name)
import importlib
print(importlib.reload(home).load is loader_patch.load)
uninstall()
print(home.load("m"), importlib.reload(home).load("m"), loader_patch._finder in sys.meta_path)
"""
    expected = f"True SourceFileLoader {loader_patch.LOADER_MODULE}\nTrue\ntheirs theirs False"
    assert python(stand_in(tmp_path), code) == expected


def test_a_moved_loader_is_an_error_with_the_version(tmp_path):
    stand_in(tmp_path, "mlx/loading.py")
    info = tmp_path / "paroquant-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: paroquant\nVersion: 9.9\n")
    code = """
from paroquant_stream import errors, install
try:
    install()
except errors.LoaderMovedError as error:
    print(error)
"""
    assert python(tmp_path, code).startswith("paroquant 9.9 does not have its MLX loader at paro")


def test_another_signature_fails_the_import_of_the_module(tmp_path):
    stand_in(tmp_path, text="def load(path, revision): ...\n")
    code = """
from paroquant_stream import errors, install
install()
try:
    import paroquant.inference.backends.mlx.load
except errors.LoaderMovedError as error:
    print(error)
"""
    assert "it takes (path, revision)" in python(tmp_path, code)


def test_without_paroquant_the_error_names_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, loader_patch.LOADER_MODULE)
    monkeypatch.setitem(sys.modules, "paroquant", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'paroquant\[mlx\]'"):
        install()
    assert loader_patch._finder not in sys.meta_path


def test_a_second_import_of_the_module_is_replaced_too(monkeypatch):
    install()
    monkeypatch.delitem(sys.modules, loader_patch.LOADER_MODULE)
    try:
        again = importlib.import_module(loader_patch.LOADER_MODULE)
        assert again is not home
        assert again.load is loader_patch.load
    finally:
        sys.modules[loader_patch.LOADER_MODULE] = home
        uninstall()
        home.load = generator.load = ORIGINAL[0]


def test_an_import_that_ends_after_the_uninstall_is_not_replaced(monkeypatch):
    install()
    folder = [str(Path(home.__file__).parent)]
    spec = loader_patch._finder.find_spec(loader_patch.LOADER_MODULE, folder)
    uninstall()
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, loader_patch.LOADER_MODULE, module)
    spec.loader.exec_module(module)
    assert module.load.__module__ == loader_patch.LOADER_MODULE


def test_a_paroquant_module_without_a_spec_counts_as_absent(monkeypatch):
    monkeypatch.delitem(sys.modules, loader_patch.LOADER_MODULE)
    monkeypatch.setitem(sys.modules, "paroquant", types.ModuleType("paroquant"))
    with pytest.raises(MissingExtraError, match="paroquant is not installed"):
        install()
