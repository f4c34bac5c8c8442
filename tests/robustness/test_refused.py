"""A drop whose model could not be loaded afterwards is refused before it removes anything."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest

from tests.helpers.builders import llama_tensors, write_checkpoint
from tests.helpers.paths import FIXTURES
from tests.robustness.cuts import CUTS, write_tiny
from tests.robustness.harness import CONVERT, Model, in_zygote, process, sha256

BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("mlx_lm", "mlx_vlm"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
"""
NEW = pytest.mark.new("a drop looks whether the model could be loaded, before it removes anything")


def model_of(directory, place, in_place=False, **options) -> Model:
    return Model(directory, None if in_place else place / "cache", **options)


def digests(model: Model) -> dict[str, str]:
    return {name: sha256(model.directory / name) for name in model.sources}


def assert_refused(model: Model, *words: str) -> None:
    """The drop fails with one message and keeps every shard."""
    before = digests(model)
    ended = model.drop()
    assert digests(model) == before, f"shards were removed; exit code {ended.code}"
    assert ended.code == 1
    assert "Traceback" not in ended.err
    for word in words:
        assert word in ended.err


@NEW
@pytest.mark.parametrize(
    ("in_place", "converted"), [(False, False), (True, True)], ids=["cold", "in place, converted"]
)
def test_a_model_type_without_a_class_keeps_its_shards(place, in_place, converted):
    model = model_of(write_tiny(place / "model", model_type="nosuch"), place, in_place)
    if converted:
        model.convert()
    assert_refused(model, "nosuch")


@NEW
def test_a_tensor_without_a_place_in_the_class_keeps_the_shards(place):
    tensors = llama_tensors()
    tensors["model.layers.1.self_attn.strange.weight"] = np.zeros((8, 8), np.float16)
    directory = write_checkpoint(place / "model", tensors, CUTS["by size"])
    assert_refused(model_of(directory, place), "strange")


@NEW
def test_a_parameter_without_a_tensor_keeps_the_shards(place):
    tensors = llama_tensors()
    del tensors["model.norm.weight"]
    directory = write_checkpoint(place / "model", tensors, CUTS["by size"])
    assert_refused(model_of(directory, place), "model.norm")


@NEW
def test_a_tensor_of_a_wrong_shape_keeps_the_shards(place):
    directory = write_tiny(place / "model", vocab_size=72)
    assert_refused(model_of(directory, place))


@NEW
def test_a_model_without_a_class_keeps_its_shards(place):
    directory = shutil.copytree(FIXTURES / "qwen3_bias-awq-single", place / "model")
    assert_refused(model_of(directory, place))


@NEW
def test_without_mlx_lm_a_drop_says_how_to_install_it(place):
    model = model_of(write_tiny(place / "model"), place)
    before = digests(model)
    (place / "block").mkdir()
    (place / "block" / "sitecustomize.py").write_text(BLOCK)
    path = f"{place / 'block'}{os.pathsep}{FIXTURES.parent}"
    arguments = model.arguments("--drop-source", "-y")
    ended = process(CONVERT, *arguments, PYTHONPATH=path)
    assert digests(model) == before, f"shards were removed; exit code {ended.code}"
    assert ended.code == 1
    advice = [line for line in ended.err.splitlines() if "install" in line]
    assert len(advice) == 1
    assert "lm" in advice[0]
    assert process(CONVERT, *model.arguments(), PYTHONPATH=path).code == 0  # which needs no class


@pytest.mark.parametrize(
    ("in_place", "jobs"), [(False, 1), (True, 3)], ids=["cache", "in place, 3 jobs"]
)
def test_a_value_out_of_range_in_the_last_shard_keeps_all_shards(place, in_place, jobs):
    tensors = llama_tensors()
    tensors["model.norm.weight"] = np.full(64, 1e6, np.float32)  # float16 ends at 65504
    directory = write_checkpoint(place / "model", tensors, CUTS["between linears"])
    options = ("--dtype", "float16")
    model = model_of(directory, place, in_place, jobs=jobs, options=options)
    assert_refused(model, "model.norm.weight")


def test_a_shard_that_cannot_be_read_to_its_end_keeps_all_shards(place):
    """The last shard has a wrong header: the run must end in an error."""
    model = model_of(write_tiny(place / "model", CUTS["between linears"]), place)
    last = model.directory / model.sources[-1]
    last.write_bytes(last.read_bytes()[:-3])
    assert_refused(model, last.name)


@NEW
def test_a_refused_model_does_not_touch_the_other(place):
    good = model_of(write_tiny(place / "good"), place)
    bad = model_of(write_tiny(place / "bad", model_type="nosuch"), place)
    before = digests(bad)
    ended = in_zygote(CONVERT, good.directory, *bad.arguments("--drop-source", "-y"))
    assert digests(bad) == before
    assert ended.code == 1
    assert good.load().code == 0
