"""The house: imports point down, one third-party package lives in one room, rooms stay small."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "paroquant_stream"
ROOMS = sorted(path for path in PACKAGE.rglob("*.py") if path.parent.name != "__pycache__")

LEVELS = [
    {
        "cast",
        "errors",
        "exits",
        "kernels",
        "model_kind",
        "repack",
        "rotation",
        "standalone",
        "units",
    },
    {
        "__main__",
        "cache.options",
        "descriptor",
        "hub_watch",
        "layout",
        "stacks",
        "strictjson",
        "trace",
    },
    {"cache.found", "filesystems", "folder", "inside", "tensorfile", "worker"},
    {
        "cache.foreign",
        "config_bounds",
        "executor",
        "hashing",
        "hub",
        "location",
        "lock",
        "manifest",
        "slices",
        "task",
        "temp_files",
    },
    {
        "convert_options",
        "digest_cache",
        "linears",
        "model_class",
        "newfile",
        "processes",
        "proof",
        "report",
        "sharding",
        "tally",
    },
    {"checkpoint", "export_files", "known_class", "newdirectory", "plan", "progress", "store"},
    {"arrival", "cache.running", "dropped", "source"},
    {"damage", "operations", "request"},
    {"cache.models", "find_dropped", "ranges", "transform"},
    {"cache.inventory", "cache.verify", "elsewhere", "single_file", "survey"},
    {"cache.freshness", "cache.prune", "drop", "weights"},
    {"cache.listing", "cache.removal", "exported", "naming", "part", "shards"},
    {"model"},
    {"conversion"},
    {"cache.command", "in_place", "several"},
    {"api", "cache", "cache.__main__", "convert", "mlx_directory", "single_write"},
    {"dropin", "export"},
    {"__init__", "run"},
]
"""Each room imports only from levels above it in this list."""
HOMES = {
    "msgpack": {"manifest"},
    "filelock": {"lock"},
    "xxhash": {"hashing", "digest_cache", "newfile", "single_write", "source"},
    "huggingface_hub": {"hub", "hub_watch", "proof"},
    "tqdm": {"progress"},
    "distributed": {"executor"},
    "dask": set(),
    "mlx_lm": {"model_class"},
    "mlx_vlm": {"model_class"},
    "paroquant": {"kernels"},
    "safetensors": {"cache.verify"},
    "numpy": {"repack", "cast", "operations", "kernels", "slices"},
    "mlx": {
        *("operations", "weights", "model", "model_class", "naming", "part", "rotation", "kernels"),
        *("standalone", "exported", "mlx_directory", "sharding", "slices", "ranges"),
    },
}
"""Third-party package -> the rooms that may import it."""


def room_of(path: Path) -> str:
    """`plan`, `cache.prune`; a kernel counts as `kernels`, whose rooms import each other freely."""
    relative = path.relative_to(PACKAGE).with_suffix("")
    if relative.parts[0] == "kernels":
        return "kernels"
    return ".".join(relative.parts).removesuffix(".__init__")


def imports(path: Path) -> set[tuple[str, bool]]:
    """`(package or room, ours)` of everything that a file imports, anywhere in it."""
    found = set()
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {(alias.name.split(".")[0], False) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(((node.module or "").split(".")[0], False))
        elif isinstance(node, ast.ImportFrom):
            inside = path.relative_to(PACKAGE).parts[0] if node.level < depth else ""
            names = [node.module] if node.module else [alias.name for alias in node.names]
            rooms = {inside} if inside == "kernels" else {f"{inside}.{n}".strip(".") for n in names}
            found |= {(room, True) for room in rooms - {"kernels"}}
    return found


def level(room: str) -> int:
    return next(index for index, rooms in enumerate(LEVELS) if room in rooms)


@pytest.mark.parametrize("path", ROOMS, ids=room_of)
def test_imports_point_down(path):
    room = room_of(path)
    for name, ours in imports(path):
        if ours:
            assert level(name) < level(room), f"{room} imports {name}"


@pytest.mark.parametrize("path", ROOMS, ids=room_of)
def test_a_third_party_package_stays_in_its_room(path):
    for name, ours in imports(path):
        if not ours and name in HOMES:
            assert room_of(path) in HOMES[name], f"{room_of(path)} imports {name}"


def test_no_room_imports_both_mlx_and_msgpack():
    for path in ROOMS:
        names = {name for name, ours in imports(path) if not ours}
        assert not {"mlx", "msgpack"} <= names, path


def test_conversion_never_imports_the_model_side_at_the_top():
    for room in ("conversion", "api", "convert"):
        tree = ast.parse((PACKAGE / f"{room}.py").read_text())
        top = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
        assert not top & {"model", "weights", "rotation", "transform", "operations", "repack"}


def test_every_room_has_a_docstring_and_stays_small():
    for path in ROOMS:
        text = path.read_text()
        assert ast.get_docstring(ast.parse(text)), path
        assert text.count("\n") <= 300, f"{path.name} is two rooms"


def test_no_function_is_longer_than_fifty_lines():
    for path in ROOMS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno < 50, f"{path.name}: {node.name}"


FORBIDDEN = {"pickle", "marshal", "shelve", "yaml", "torch", "dill", "cloudpickle"}


@pytest.mark.parametrize("path", ROOMS, ids=room_of)
def test_nothing_of_a_model_is_executed_or_unpickled(path):
    assert not {name for name, _ in imports(path)} & FORBIDDEN
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"eval", "exec", "compile", "__import__"}
        if isinstance(node, ast.keyword) and node.arg in {
            "trust_remote_code",
            "shell",
            "allow_pickle",
        }:
            assert isinstance(node.value, ast.Constant), path
            assert node.value.value is False, path


def test_every_room_has_its_tests():
    here = Path(__file__).parent
    tests = {
        ".".join(path.relative_to(here).with_suffix("").parts) for path in here.rglob("test_*.py")
    }
    covered_elsewhere = {
        "__init__": "test_convert",
        "__main__": "test_main",
        "cache": "cache.test_command",
        "cache.__main__": "test_exits",
        "cache.options": "cache.test_command",
        "convert_options": "test_convert",
        "elsewhere": "test_executor",
        "request": "test_conversion",
        "shards": "test_conversion",
        "survey": "test_conversion",
        "descriptor": "test_tensorfile",
        "folder": "test_store",
        "location": "test_store",
        "cache.models": "cache.test_inventory",
        "in_place": "test_in_place",
        "lock": "test_store",
        "temp_files": "test_store",
        "find_dropped": "test_dropped",
        "damage": "test_dropped",
    }
    for room in {room_of(path) for path in ROOMS}:
        *folder, name = room.split(".")
        own = ".".join([*folder, f"test_{name}"])
        assert covered_elsewhere.get(room, own) in tests, room
