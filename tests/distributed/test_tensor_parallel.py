"""Tensor parallelism: the ranks of a group together compute what one process computes."""

from __future__ import annotations

import os

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from paroquant_stream import load
from paroquant_stream.conversion.converter import convert
from paroquant_stream.conversion.request import make_request
from paroquant_stream.distributed.slices import read_slice
from paroquant_stream.distributed.tensor_parallel import read_by_layer, split_tensors
from paroquant_stream.files.tensor_writer import lay_out
from paroquant_stream.rotation.layers import RotatedLayer
from tests.benchmarks.end_to_end.checkpoint import make_checkpoint
from tests.helpers.ranks import Rank, logits_of, run_two_ranks
from tests.helpers.split_layers import Block, Experts, linear
from tests.helpers.splittable import FAMILIES, splittable

# slow: each rank is a process
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("on_the_cpu")]


@pytest.fixture(autouse=True)
def own_sums(monkeypatch):
    """Make `all_sum` the identity: the tests sum over the ranks themselves."""
    monkeypatch.setattr(mx.distributed, "all_sum", lambda array, **_: array)


def near(found: mx.array, expected: mx.array) -> bool:
    return bool(mx.linalg.norm(found - expected) < 1e-5 * mx.linalg.norm(expected))


def split(make, size: int) -> list:
    models = [make() for _ in range(size)]
    for rank, model in enumerate(models):
        split_tensors(model, Rank(rank, size))
    return models


SIZES = [
    {},
    {"bias": True},
    {"group": 32, "krot": 1},
    {"group": 128, "krot": 8, "bias": True},
    {"bits": 8},
    {"bits": 3, "bias": True},
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("size", [2, 4])
def test_outputs_of_all_ranks_have_the_bits_of_the_whole(size, sizes):
    x = mx.random.normal((3, 64 * 8))
    expected = linear(64 * 8, 64 * 12, **sizes)(x)
    parts = [m.first for m in split(lambda: Block(lambda i, o: linear(i, o, **sizes)), size)]
    assert mx.array_equal(mx.concatenate([part(x) for part in parts], axis=-1), expected)
    assert all(part.weight.shape[0] == 64 * 12 // size for part in parts)
    assert all(part.pairs.shape[1] == 64 * 8 for part in parts)
    assert all(part.ranks is None for part in parts)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_with_part_of_the_inputs_sum_to_the_whole(size, sizes):
    x = mx.random.normal((3, 64 * 8))
    whole = linear(64 * 8, 64 * 12, **sizes)
    models = split(lambda: Block(lambda i, o: linear(i, o, **sizes)), size)
    parts = [model.second for model in models]
    inputs = mx.split(x, size, axis=-1)
    total = sum(part(own) for part, own in zip(parts, inputs, strict=True))
    if sizes.get("bias"):  # every rank adds it once, after the sum
        total = total - (size - 1) * whole.bias
    assert near(total, whole(x))
    assert all(part.pairs.shape[1] == 64 * 8 // size for part in parts)
    assert all(part.theta.shape[1] == 32 * 8 // size for part in parts)
    assert [part.ranks.rank() for part in parts] == list(range(size))


@pytest.mark.parametrize("segments", [3, [64, 256], [1 / 3, 2 / 3]], ids=str)
def test_a_fused_layer_is_split_in_every_segment(segments):
    x = mx.random.normal((3, 64 * 8))
    expected = linear(64 * 8, 64 * 12, bias=True)(x)
    models = split(lambda: Block(lambda i, o: linear(i, o, bias=True), segments), 2)
    bounds = {3: [256, 512], (64, 256): [64, 256]}.get(
        segments if isinstance(segments, int) else tuple(segments), [256, 512]
    )
    halves = [mx.split(m.first(x), [b // 2 for b in bounds], axis=-1) for m in models]
    found = [piece for pair in zip(*halves, strict=True) for piece in pair]
    assert mx.array_equal(mx.concatenate(found, axis=-1), expected)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("size", [2, 4])
def test_experts_of_all_ranks_sum_to_the_whole(size, tokens):
    x, experts = mx.random.normal((1, tokens, 256)), mx.array([[[0, 5]] * tokens])
    expected = Experts().switch_mlp(x, experts)
    layers = [model.switch_mlp for model in split(Experts, size)]
    found = [layer(x, experts) for layer in layers]
    assert near(sum(found), expected)
    assert not near(found[0], expected)
    assert {layer.gate_up_rot_pairs.shape for layer in layers} == {(4, 256)}
    assert {layer.down_rot_pairs.shape for layer in layers} == {(4, 512 // size)}
    assert {layer.down_proj.weight.shape for layer in layers} == {(6, 256, 64 // size)}


def test_tables_are_computed_again_for_the_part():
    model, x = Block(linear), mx.random.normal((2, 64 * 8))
    expected = model.second(x)
    others = Block(linear)
    for rank, block in enumerate((model, others)):
        split_tensors(block, Rank(rank, 2))
    halves = mx.split(x, 2, axis=-1)
    assert near(model.second(halves[0]) + others.second(halves[1]), expected)


def test_a_group_of_one_changes_nothing():
    model = Block(linear)
    before = dict(tree_flatten(model.parameters()))
    split_tensors(model, Rank(0, 1))
    after = dict(tree_flatten(model.parameters()))
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Write a llama of 26 MB, most of it linears."""
    directory = tmp_path_factory.mktemp("large")
    make_checkpoint(
        directory / "model",
        layers=4,
        shards=2,
        vocab=256,
        hidden=1024,
        intermediate=3072,
        heads=8,
        kv_heads=2,
    )
    return directory / "model"


def test_memory_holds_the_part_and_one_layer(large):
    model, _, _ = load(large, lazy=True)
    total = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    mx.clear_cache()  # else a larger buffer of another test is reused
    start = mx.get_active_memory()
    mx.reset_peak_memory()
    split_tensors(model, Rank(0, 2))
    read_by_layer(model)
    held = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    assert 0.5 * total < held < 0.54 * total
    assert mx.get_active_memory() - start < 1.02 * held  # small arrays keep up to 16 KiB more
    largest = 3072 * 1024 // 2
    assert mx.get_peak_memory() - start < held + 1.3 * largest


def test_a_reader_is_called_for_every_slice(large, monkeypatch):
    """What the reader returns is used."""
    request = make_request(large, jobs=1)
    manifest = convert(request).manifest
    stored = {
        tensor.name: (request.store.entry_path(record.key), tensor)
        for record in manifest.entries
        for tensor in lay_out(record.tensors)[1]
    }
    counts, preadv = [], os.preadv

    def reader(name, array, part):
        path, tensor = stored[name]
        assert tensor.shape == array.shape
        with path.open("rb") as file:
            return read_slice(file.fileno(), tensor, part, str(path))

    found, expected = load(large, lazy=True)[0], load(large, lazy=True)[0]
    monkeypatch.setattr(os, "preadv", lambda *a: counts.append(preadv(*a)) or counts[-1])
    split_tensors(found, Rank(1, 2), reader=reader)
    split_tensors(expected, Rank(1, 2))
    expected = dict(tree_flatten(expected.parameters()))
    for name, array in tree_flatten(found.parameters()):
        assert mx.array_equal(array, expected[name])
    outputs = sum(
        tensor.nbytes
        for name, (_, tensor) in stored.items()
        if name.endswith((".weight", ".scales", ".biases"))
        and any(f".{linear}." in name for linear in ("q_proj", "k_proj", "v_proj"))
    )
    assert sum(counts) > outputs // 2
    whole = sum(tensor.nbytes for _, tensor in stored.values())
    assert sum(counts) < 0.72 * whole  # slices of inputs are read in whole rows


def test_what_the_class_computes_from_a_slice_is_not_replaced():
    class Scaling(Block):
        def shard(self, group):
            super().shard(group)
            self.first.scales = self.first.scales * 2

    read = []

    def reader(name, array, part):
        read.append(name)
        return part.of(array)

    found, expected = Scaling(linear), Scaling(linear)
    split_tensors(found, Rank(0, 2), reader=reader)
    split_tensors(expected, Rank(0, 2))
    assert "first.weight" in read
    assert "first.scales" not in read
    assert mx.array_equal(found.first.scales, expected.first.scales)


@pytest.mark.parametrize(
    "families", [["llama"], pytest.param(FAMILIES, marks=pytest.mark.long)], ids=["llama", "all"]
)
def test_two_processes_have_the_logits_of_one(tmp_path, families):
    """Through a cache, over the ring backend."""
    models = [splittable(tmp_path / family, family) for family in families]
    expected = []
    for directory in models:
        model, _, _ = load(directory)
        assert any(isinstance(module, RotatedLayer) for module in model.modules())
        expected.append(logits_of(model))
    for results in run_two_ranks(tmp_path, models):
        for number, (directory, logits) in enumerate(zip(models, expected, strict=True)):
            found = results[f"logits{number}"]
            assert np.abs(found - logits).max() < 2e-5 * np.abs(logits).max(), directory.name
