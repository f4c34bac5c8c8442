"""A rank reads only its part of every layer, and has the right values."""

from __future__ import annotations

import json
import os

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from paroquant_stream import convert_checkpoint, load
from paroquant_stream.api.export import export_model
from paroquant_stream.conversion.request import make_request
from paroquant_stream.distributed import byte_ranges as ranges
from paroquant_stream.distributed.slices import Slice, read_slice
from paroquant_stream.distributed.tensor_parallel import split_tensors
from paroquant_stream.errors import SplitError
from paroquant_stream.model import assemble as model
from paroquant_stream.model.entries import read_weights
from tests.benchmarks.end_to_end.checkpoint import make_checkpoint
from tests.helpers.builders import cut_apart, write_checkpoint
from tests.helpers.paths import FIXTURES
from tests.helpers.ranks import Rank
from tests.helpers.splittable import FAMILIES, splittable

pytestmark = pytest.mark.usefixtures("on_the_cpu", "alone")


@pytest.fixture
def alone(monkeypatch):
    """Skip the barrier: these ranks are not processes."""
    monkeypatch.setattr(model, "barrier", lambda group: None)


@pytest.fixture
def slices_read(monkeypatch) -> list[Slice]:
    """Record every slice that is read as byte ranges."""
    found: list[Slice] = []

    def read(fd, tensor, part, label):
        found.append(part)
        return read_slice(fd, tensor, part, label)

    monkeypatch.setattr(ranges, "read_slice", read)
    return found


def parameters(loaded) -> dict[str, mx.array]:
    return dict(tree_flatten(loaded.parameters()))


def cut_in_memory(directory, rank) -> dict[str, mx.array]:
    whole, _, _ = load(directory)
    split_tensors(whole, rank)
    return parameters(whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_has_the_bits_of_the_whole_model(family, tmp_path, slices_read):
    directory = splittable(tmp_path / family, family)
    for number in range(2):
        slices_read.clear()
        found, _, _ = load(directory, group=Rank(number, 2), parallel="tensor")
        assert slices_read
        expected = cut_in_memory(directory, Rank(number, 2))
        found = parameters(found)
        assert found.keys() == expected.keys()
        for name, array in found.items():
            assert array.dtype == expected[name].dtype, name
            assert mx.array_equal(array, expected[name]), name


def test_pieces_of_a_stack_are_sliced_and_joined(tmp_path, slices_read):
    directory = splittable(tmp_path / "m", "qwen3_moe")
    tensors = mx.load(str(directory / "model.safetensors"))
    shards = {name: f"{number // 4 % 3}.safetensors" for number, name in enumerate(sorted(tensors))}
    for shard_name in set(shards.values()):
        own = {name: array for name, array in tensors.items() if shards[name] == shard_name}
        mx.save_safetensors(str(directory / shard_name), own)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (directory / "model.safetensors").unlink()
    manifest = convert_checkpoint(directory)
    names = [tensor.name for record in manifest.entries for tensor in record.tensors]
    pieces = [name for name in names if ".experts_" in name and "down_proj.weight" in name]
    assert len(pieces) > 2
    expected = cut_in_memory(directory, Rank(1, 2))
    found, _, _ = load(directory, group=Rank(1, 2), parallel="tensor")
    assert sum(part.axis == 2 for part in slices_read) >= len(pieces)
    assert all(mx.array_equal(a, expected[name]) for name, a in parameters(found).items())


def test_about_half_of_the_bytes_are_read_and_held(tmp_path, monkeypatch, settled):
    sizes = {"hidden": 1024, "intermediate": 3072, "heads": 8, "kv_heads": 2, "vocab": 256}
    make_checkpoint(tmp_path / "m", layers=4, shards=2, **sizes)
    manifest = convert_checkpoint(tmp_path / "m")
    whole = sum(record.size for record in manifest.entries)
    counts, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *a: counts.append(preadv(*a)) or counts[-1])
    mx.clear_cache()  # else a larger buffer of another test is reused
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    loaded, _, _ = load(tmp_path / "m", group=Rank(0, 2), parallel="tensor")
    held = sum(array.nbytes for array in parameters(loaded).values())
    assert 0.5 * whole < held < 0.54 * whole
    assert 0.5 * whole < sum(counts) < 0.72 * whole  # short rows are read whole
    assert mx.get_peak_memory() - before < 1.1 * held


def test_a_truncated_entry_is_converted_again(tmp_path, monkeypatch):
    directory = splittable(tmp_path / "m", "llama")
    expected = cut_in_memory(directory, Rank(0, 2))
    fired = []

    def cut_short(fd, tensor, part, label):
        if not fired:
            fired.append(label)
            os.truncate(label, 20_000)
        return read_slice(fd, tensor, part, label)

    monkeypatch.setattr(ranges, "read_slice", cut_short)
    found, _, _ = load(directory, group=Rank(0, 2), parallel="tensor")
    assert fired
    assert all(mx.array_equal(a, expected[name]) for name, a in parameters(found).items())


@pytest.mark.parametrize("form", ["export", "single file"])
def test_exports_and_single_files_are_split_too(form, tmp_path, slices_read):
    directory = splittable(tmp_path / "m", "qwen3_moe")
    expected = cut_in_memory(directory, Rank(1, 2))
    if form == "export":
        export_model(directory, tmp_path / "out")
    else:
        from paroquant_stream.cli.export import main

        assert main([str(directory), "--single-file", "--beside-shards"]) == 0
    source = tmp_path / "out" if form == "export" else directory
    found, _, _ = load(source, group=Rank(1, 2), parallel="tensor")
    assert not slices_read
    assert all(mx.array_equal(a, expected[name]) for name, a in parameters(found).items())


def test_a_lazy_part_has_the_right_values(tmp_path):
    directory = splittable(tmp_path / "m", "llama")
    expected = cut_in_memory(directory, Rank(0, 2))
    found, _, _ = load(directory, lazy=True, group=Rank(0, 2), parallel="tensor")
    assert all(mx.array_equal(a, expected[name]) for name, a in parameters(found).items())


def test_an_unsplittable_class_is_refused_before_any_read(slices_read):
    with pytest.raises(SplitError, match="has none"):
        load(FIXTURES / "gemma3_text-awq-adversarial", group=Rank(0, 2), parallel="tensor")
    with pytest.raises(SplitError, match="divide"):
        load(FIXTURES / "qwen3-awq-size", group=Rank(0, 2), parallel="tensor")
    assert not slices_read


def test_an_unknown_way_to_split_is_refused(model_dir):
    with pytest.raises(ValueError, match="one of pipeline, tensor, not 'data'"):
        load(model_dir, group=Rank(0, 2), parallel="data")


@pytest.fixture
def stack():
    """Provide slices of a model with a stack of experts in pieces, the stack and its name."""
    directory = FIXTURES / "qwen3_moe-awq-adversarial"
    manifest, store = convert_checkpoint(directory), make_request(directory).store
    weights = read_weights(manifest, store, lambda _: True)
    stored = {tensor.name for record in manifest.entries for tensor in record.tensors}
    name = next(n for n in weights if n.endswith("down_proj.scales") and n not in stored)
    with ranges.entry_slices(manifest.entries, store, weights) as slices:
        yield slices, name, weights[name]


def test_experts_divided_among_ranks_are_sliced_as_a_whole(stack, slices_read):
    slices, name, array = stack
    half = Slice(0, ((1, array.shape[0]),))
    assert mx.array_equal(slices(name, array, half), array[1:])
    assert not slices_read


def test_a_joined_stack_is_evaluated_at_once(stack, slices_read, monkeypatch):
    """Else the pieces of every stack would be in memory together."""
    slices, name, array = stack
    evaluated, real = [], mx.eval
    monkeypatch.setattr(mx, "eval", lambda *a: evaluated.append(a) or real(*a))
    found = slices(name, array, Slice(1, ((0, 1),)))
    assert any(a[0][0] is found for a in evaluated if isinstance(a[0], list))
    assert mx.array_equal(found, array[:, :1])
    assert len(slices_read) > 1


def test_an_array_that_is_not_as_stored_is_sliced_in_memory(stack, slices_read):
    slices, name, array = stack
    assert mx.array_equal(slices(name, array + 1, Slice(1, ((0, 1),))), (array + 1)[:, :1])
    assert not slices_read


def test_no_descriptor_stays_open(tmp_path):
    directory = write_checkpoint(tmp_path / "m", cut=cut_apart(3))
    request = make_request(directory)
    manifest = convert_checkpoint(directory)
    before = len(os.listdir("/dev/fd"))
    with ranges.entry_slices(manifest.entries, request.store, {}) as slices:
        for record in manifest.entries:
            slices._fd(record.key)
        assert len(os.listdir("/dev/fd")) == before + 3
    assert len(os.listdir("/dev/fd")) == before
