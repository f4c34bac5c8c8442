"""A program with every public name passes mypy in strict mode, and its mistakes do not."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, files

import pytest

import paroquant_stream
from tests.helpers.paths import ROOT

PROGRAM = '''
"""A program of a user."""

from datetime import timedelta
from pathlib import Path

import paroquant_stream as paro
from paroquant_stream import Dtype, Progress, load


def show(shard: str, done: int, size: int) -> None:
    print(f"{shard}: {done / size:.0%}")


def convert(paths: list[Path], dtype: Dtype, progress: Progress) -> dict[str, paro.Manifest]:
    try:
        first: paro.Manifest = paro.convert_checkpoint(paths[0], dtype=dtype, progress=progress)
        print(first.layout, [entry.size for entry in first.entries])
        found = paro.convert_checkpoints(paths, jobs=2, drop_source=False)
        return {str(path): manifest for path, manifest in zip(paths, found)}
    except paro.SomeModelsFailedError as error:
        for model, reason in error.failures.items():
            if isinstance(reason, (paro.CheckpointError, paro.ModelError)):
                print(model, reason.args)
        return {}


def generate(path: str) -> int:
    model, tokenizer, is_vlm = load(path, lazy=True, layers=range(2), verify="full")
    model.eval()
    loaded: paro.Loaded = load(path, progress=show)
    text: str = tokenizer.decode(model(loaded.tokenizer.encode("Hello")))
    assert is_vlm is loaded.is_vlm
    return len(text)


def tidy(limit: int) -> int:
    cache: paro.CacheListing = paro.list_cache()
    stale: list[paro.CachedModel] = [model for model in cache.models if model.state == "stale"]
    shards: list[paro.ShardState] = [shard for model in stale for shard in model.shards]
    print(cache.root / "v1", sum(shard.bytes_out for shard in shards))
    plans: list[paro.RemovalPlan] = [
        paro.plan_removal(*stale, "owner/name", Path("model")),
        paro.plan_prune(max_size=limit, older_than=timedelta(days=30), keep=["a", *stale]),
    ]
    for plan in plans:
        reasons: list[paro.Removal] = list(plan.removals)
        print(plan.size, [(item.what, item.why, item.files[0].name) for item in reasons])
    return sum(plan.execute() for plan in plans if not plan.is_empty)


def check() -> list[paro.Problem]:
    found: paro.Verification = paro.verify_cache("model", sources=True)
    found.repair(done=print)
    return [problem for problem in found.problems if problem.key is None]


def main() -> None:
    print(paro.__version__, paro.ConvertOptions(jobs=1).dtype)
    try:
        paro.install(cache_dir="cache", jobs=1, dtype="float16", progress=show)
        exported: paro.Export = paro.export_model("model", "out", self_contained=True)
        print(exported)
    except (paro.StoreError, paro.ExecutionError) as error:
        raise SystemExit(str(error)) from error
    except paro.ParoquantStreamError:
        paro.uninstall()
'''

MISTAKES = """
import paroquant_stream as paro

paro.list_cahce()
paro.install(jobz=3)
paro.load("model", dtype="int4")
paro.load("model").tokeniser
paro.plan_prune(max_size="100GB")
paro.plan_removal("model").execute().real.absent
paro.convert_checkpoint("model", progress=lambda shard: None)
paro.verify_cache(source=True)
"""


@pytest.mark.timeout(300)  # without a cache of its own
@pytest.mark.parametrize(
    "packages",
    [
        "--no-site-packages",  # three times as fast
        pytest.param("--no-incremental", marks=pytest.mark.slow),  # numpy's types and MLX's too
    ],
)
def test_a_strict_type_checker_accepts_every_public_name(tmp_path, monkeypatch, packages):
    api = pytest.importorskip("mypy.api")
    assert set(re.findall(r"\w+", PROGRAM)) >= set(paroquant_stream.__all__)
    for name, text in (("program", PROGRAM), ("mistakes", MISTAKES)):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.chdir(tmp_path)  # where no configuration lies
    monkeypatch.setenv("MYPYPATH", str(ROOT))
    # silent: what mypy does with an installed package, whose errors are not the program's
    options = ["--strict", "--follow-imports=silent", "--cache-dir=cache", packages]
    out, err, _ = api.run([*options, "program.py", "mistakes.py"])
    assert err == ""
    wrong = [int(line.split(":")[1]) for line in out.splitlines() if ": error: " in line]
    assert "program.py" not in out, out
    assert sorted(set(wrong)) == list(range(4, 4 + len(MISTAKES.splitlines()) - 3)), out


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "paroquant_stream" / "py.typed").is_file()
    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert built["targets"]["wheel"] == {"packages": ["paroquant_stream"]}  # all files of it


def test_an_installed_wheel_says_that_it_is_typed():
    try:
        installed = {str(path) for path in files("paroquant_stream") or ()}
    except PackageNotFoundError:
        installed = set()
    if "paroquant_stream/__init__.py" not in installed:
        pytest.skip("not installed from a wheel")
    assert "paroquant_stream/py.typed" in installed
