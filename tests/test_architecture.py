"""The architecture: packages import down only, one third-party package has one place, files are
short.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

PACKAGE = ROOT / "paroquant_stream"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent.name != "__pycache__")

TABLE = {
    "version": "",
    "text": "",
    "log": "",
    "options": "",
    "progress_bar": "text",
    "errors": "",
    "trace": "errors",
    "rotation": "",
    "backends": "errors text",
    "files": "errors text trace",
    "execution": "errors text trace",
    "store": "errors log trace files",
    "checkpoint": "errors log text files",
    "plan": "errors text checkpoint store files",
    "distributed": "errors options rotation backends store checkpoint files",
    "transform": "errors trace backends plan checkpoint store execution files",
    "model": "errors trace text distributed backends rotation plan store checkpoint files",
    "conversion": "errors log text trace options transform plan store checkpoint execution files"
    " model backends",
    "maintenance": "errors text conversion plan checkpoint store files",
    "exports": "errors trace text version progress_bar conversion model distributed backends"
    " rotation plan store checkpoint files",
    "integrations": "errors text checkpoint files",
    "api": "errors trace options progress_bar integrations exports maintenance conversion model"
    " distributed backends plan store checkpoint files execution",
    "startup": "integrations api",
    "cli": "errors trace text version progress_bar api integrations exports maintenance conversion"
    " backends"
    " plan store checkpoint execution",
    "convert": "cli",
    "cache": "cli",
    "export": "cli",
    "run": "cli",
    "switch": "cli",
    "__main__": "cli",
    "__init__": "errors version api exports maintenance conversion store",
}
"""Package or module -> what of ours it may import; everything stands below what it imports."""

LATE = {("conversion", "model"), ("conversion", "backends"), ("transform", "backends")}
"""Imported inside functions alone: most runs need no model class, and a run without work nothing
of them."""

HOMES = {
    "msgpack": {"store/manifest.py"},
    "filelock": {"store/lock.py"},
    "xxhash": {
        *("files/hashing.py", "files/digest_cache.py", "files/new_file.py"),
        *("transform/source.py", "transform/source_shard.py", "store/entry_digest.py"),
    },
    "huggingface_hub": {"checkpoint/hub.py", "checkpoint/hub_watch.py", "checkpoint/hub_cache.py"},
    "argcomplete": {"cli/completion.py"},
    "tqdm": {"progress_bar.py"},
    "distributed": {"execution/dask.py"},
    "mlx_lm": {"backends/mlx_lm.py"},
    "mlx_vlm": {"backends/mlx_vlm.py"},
    "paroquant": set(),
    "safetensors": {"maintenance/verify.py"},
    "numpy": {"rotation", "transform", "distributed/slices.py", "model/entry_arrays.py"},
    "mlx": {"rotation", "backends", "model", "distributed", "exports", "transform/operations.py"},
}
"""Third-party package -> the only packages or files that import it."""


def package_of(path: Path) -> str:
    """The package that a module belongs to, or its own name at the top."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path, *, late: bool = True) -> Iterator[tuple[str, bool]]:
    """`(package, whether it is ours)` of what a module imports; `late`: inside functions too."""
    tree = parsed(path)
    for node in ast.walk(tree) if late else tree.body:
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").split(".")[0], False
        elif isinstance(node, ast.ImportFrom):
            parents = path.relative_to(PACKAGE).parts[:-1]
            base = parents[: len(parents) - node.level + 1]
            for name in [node.module] if node.module else [alias.name for alias in node.names]:
                yield ([*base, *name.split(".")])[0], True


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_the_table_names_every_package_and_has_no_cycle():
    assert {package_of(path) for path in MODULES} == set(TABLE)
    below: set[str] = set()
    for package, allowed in TABLE.items():
        assert set(allowed.split()) <= below, package
        below.add(package)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path):
    package = package_of(path)
    found = {name for name, ours in imports(path) if ours} - {package}
    assert found <= set(TABLE[package].split())


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_third_party_package_has_one_place(path):
    for name, ours in imports(path):
        if not ours and name in HOMES:
            assert {package_of(path), name_of(path)} & HOMES[name], name


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_what_is_imported_late_is_not_imported_at_the_top(path):
    top = {name for name, ours in imports(path, late=False) if ours}
    assert not {(package_of(path), name) for name in top} & LATE


def test_packages_have_a_docstring_and_about_ten_files():
    count = Counter(package_of(path) for path in MODULES if path.parent != PACKAGE)
    assert max(count.values()) <= 15  # with __init__
    for path in PACKAGE.glob("*/__init__.py"):
        tree = parsed(path)
        assert ast.get_docstring(tree), path
        assert len(tree.body) == 1, f"{path}: the public names are those of the top package"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_and_functions_are_short(path):
    text = path.read_text()
    tree = parsed(path)
    assert ast.get_docstring(tree)
    assert text.count("\n") <= 300
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 50, node.name


FORBIDDEN = {"pickle", "marshal", "shelve", "yaml", "torch", "dill", "cloudpickle"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_of_a_model_is_executed_or_unpickled(path):
    assert not {name for name, _ in imports(path)} & FORBIDDEN
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"eval", "exec", "compile", "__import__"}
        if isinstance(node, ast.keyword) and node.arg in {
            *("trust_remote_code", "shell", "allow_pickle")
        }:
            assert isinstance(node.value, ast.Constant)
            assert node.value.value is False


TESTED_BY = {
    "conversion/find_dropped": "store/test_dropped_models",
    "store/entry_store": "store/test_store",
    "model/tensor_source": "model/test_assemble",  # a record of functions, called by `assemble`
}
"""Modules whose tests have another name than theirs."""


def test_tests_mirror_the_packages():
    tests = ROOT / "tests"
    entries = {name for name, allowed in TABLE.items() if allowed == "cli"}
    for path in MODULES:
        module = name_of(path).removesuffix(".py")
        if path.name != "__init__.py" and module not in entries:
            folder, _, name = module.rpartition("/")
            own = f"{folder}/test_{name}".lstrip("/")
            assert (tests / f"{TESTED_BY.get(module, own)}.py").exists(), module


def test_no_test_imports_a_test():
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ImportFrom):
                last = (node.module or "").rpartition(".")[2]
                assert not last.startswith(("test_", "conftest")), path
