"""Tensor parallelism: the ranks of a group together give what one process gives."""

from __future__ import annotations

import os

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.nn.layers.distributed import shard_inplace, shard_linear
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchGLU

from paroquant_stream import load
from paroquant_stream.conversion.converter import convert
from paroquant_stream.conversion.request import make_request
from paroquant_stream.distributed import tensor_parallel as sharding
from paroquant_stream.distributed.slices import read_slice
from paroquant_stream.distributed.tensor_parallel import read_by_layer, split_tensors
from paroquant_stream.errors import SplitError, UnreadableFileError
from paroquant_stream.files.tensor_writer import lay_out
from paroquant_stream.rotation.layers import RotatedLayer, RotateQuantizedLinear, RotateSwitchGLU
from tests.benchmarks.end_to_end.checkpoint import make_checkpoint
from tests.helpers.paths import FIXTURES
from tests.helpers.ranks import Rank, logits_of, run_two_ranks
from tests.helpers.rotations import make_rotation
from tests.helpers.splittable import FAMILIES, splittable

pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture(autouse=True)
def own_sums(monkeypatch):
    """`all_sum` gives back what this rank brings: the tests add up by themselves."""
    monkeypatch.setattr(mx.distributed, "all_sum", lambda array, **_: array)


class Block(nn.Module):
    """Two linears as in an mlx-lm model, `first` split by outputs, `second` by inputs."""

    def __init__(self, make, segments=1) -> None:
        super().__init__()
        self.first, self.second = make(64 * 8, 64 * 12), make(64 * 8, 64 * 12)
        self.heads = 8
        self._segments = segments

    def shard(self, group) -> None:
        options = {"segments": self._segments, "group": group}
        self.first = shard_linear(self.first, "all-to-sharded", **options)
        self.heads //= group.size()
        self.second = shard_linear(self.second, "sharded-to-all", group=group)


def linear(inputs, outputs, *, group=64, krot=4, bits=4, bias=False) -> RotateQuantizedLinear:
    rng = np.random.default_rng(inputs + outputs)
    layer = RotateQuantizedLinear(
        inputs, outputs, bias=bias, group_size=group, bits=bits, krot=krot
    )
    names = ("theta", "pairs", "channel_scales")
    values = dict(zip(names, make_rotation(inputs, group, krot), strict=True))
    values["weight"] = rng.integers(0, 2**32, layer.weight.shape, np.uint32)
    for name in ("scales", "biases", "bias") if bias else ("scales", "biases"):
        values[name] = rng.normal(0, 0.01, layer[name].shape).astype(np.float32)
    layer.update({name: mx.array(array) for name, array in values.items()})
    return layer


def near(found: mx.array, wanted: mx.array) -> bool:
    return bool(mx.linalg.norm(found - wanted) < 1e-5 * mx.linalg.norm(wanted))


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
def test_ranks_side_by_side_have_the_outputs_of_the_whole_to_the_bit(size, sizes):
    x = mx.random.normal((3, 64 * 8))
    wanted = linear(64 * 8, 64 * 12, **sizes)(x)
    parts = [m.first for m in split(lambda: Block(lambda i, o: linear(i, o, **sizes)), size)]
    assert mx.array_equal(mx.concatenate([part(x) for part in parts], axis=-1), wanted)
    assert all(part.weight.shape[0] == 64 * 12 // size for part in parts)
    assert all(part.pairs.shape[1] == 64 * 8 for part in parts)
    assert all(part.ranks is None for part in parts)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_that_have_part_of_the_inputs_add_up_to_the_whole(size, sizes):
    x = mx.random.normal((3, 64 * 8))
    whole = linear(64 * 8, 64 * 12, **sizes)
    models = split(lambda: Block(lambda i, o: linear(i, o, **sizes)), size)
    parts = [model.second for model in models]
    inputs = mx.split(x, size, axis=-1)
    total = sum(part(own) for part, own in zip(parts, inputs, strict=True))
    if sizes.get("bias"):  # each of them adds it once, after the sum
        total = total - (size - 1) * whole.bias
    assert near(total, whole(x))
    assert all(part.pairs.shape[1] == 64 * 8 // size for part in parts)
    assert all(part.theta.shape[1] == 32 * 8 // size for part in parts)
    assert [part.ranks.rank() for part in parts] == list(range(size))


@pytest.mark.parametrize("segments", [3, [64, 256], [1 / 3, 2 / 3]], ids=str)
def test_of_a_fused_layer_each_rank_has_its_part_of_every_segment(segments):
    x = mx.random.normal((3, 64 * 8))
    wanted = linear(64 * 8, 64 * 12, bias=True)(x)
    models = split(lambda: Block(lambda i, o: linear(i, o, bias=True), segments), 2)
    bounds = {3: [256, 512], (64, 256): [64, 256]}.get(
        segments if isinstance(segments, int) else tuple(segments), [256, 512]
    )
    halves = [mx.split(m.first(x), [b // 2 for b in bounds], axis=-1) for m in models]
    found = [piece for pair in zip(*halves, strict=True) for piece in pair]
    assert mx.array_equal(mx.concatenate(found, axis=-1), wanted)


class Experts(nn.Module):
    """The experts of an mlx-lm model, which adds up what the ranks give by itself."""

    def __init__(self) -> None:
        super().__init__()
        glu = RotateSwitchGLU.from_switch_glu(SwitchGLU(256, 512, 6), 64, 4, 4)
        rng = np.random.default_rng(0)
        for name, array in tree_flatten(glu.parameters()):
            module = glu[name.split(".")[0]] if "." in name else glu
            leaf = name.rpartition(".")[2]
            if leaf == "weight":
                module[leaf] = mx.array(rng.integers(0, 2**32, array.shape, np.uint32))
            elif leaf in ("scales", "biases"):
                module[leaf] = mx.array(rng.normal(0, 0.01, array.shape).astype(np.float32))
        for prefix, dims in (("gate_up_rot_", 256), ("down_rot_", 512)):
            names = ("theta", "pairs", "channel_scales")
            for name, value in zip(names, make_rotation(dims, 64, 4), strict=True):
                glu[prefix + name] = mx.array(value)
        self.switch_mlp = glu

    def shard(self, group) -> None:
        for name, how in (
            ("gate_proj", "all-to-sharded"),
            ("up_proj", "all-to-sharded"),
            ("down_proj", "sharded-to-all"),
        ):
            shard_inplace(self.switch_mlp[name], how, group=group)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("size", [2, 4])
def test_experts_of_all_ranks_add_up_to_the_whole(size, tokens):
    x, experts = mx.random.normal((1, tokens, 256)), mx.array([[[0, 5]] * tokens])
    wanted = Experts().switch_mlp(x, experts)
    layers = [model.switch_mlp for model in split(Experts, size)]
    found = [layer(x, experts) for layer in layers]
    assert near(sum(found), wanted)
    assert not near(found[0], wanted)
    assert {layer.gate_up_rot_pairs.shape for layer in layers} == {(4, 256)}
    assert {layer.down_rot_pairs.shape for layer in layers} == {(4, 512 // size)}
    assert {layer.down_proj.weight.shape for layer in layers} == {(6, 256, 64 // size)}


def test_tables_are_made_anew_for_the_part():
    model, x = Block(linear), mx.random.normal((2, 64 * 8))
    wanted = model.second(x)
    others = Block(linear)
    for rank, block in enumerate((model, others)):
        split_tensors(block, Rank(rank, 2))
    halves = mx.split(x, 2, axis=-1)
    assert near(model.second(halves[0]) + others.second(halves[1]), wanted)


def test_a_group_of_one_changes_nothing():
    model = Block(linear)
    before = dict(tree_flatten(model.parameters()))
    split_tensors(model, Rank(0, 1))
    after = dict(tree_flatten(model.parameters()))
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


def state(model) -> dict:
    """What a failure must leave as it is: which modules and arrays there are, and their numbers."""
    found = {"": dict(tree_flatten(model.parameters()))}
    for path, module in model.named_modules():
        numbers = {name: value for name, value in vars(module).items() if type(value) is int}
        found[f"{path} "] = (id(module), numbers, getattr(module, "ranks", None))
    return found


def unchanged(model, before) -> bool:
    after = state(model)
    same = all(after[""].pop(name) is array for name, array in before.pop("").items())
    return same and not after.pop("") and after == before


def test_a_class_that_cannot_be_split_is_refused(tmp_path):
    model, _, _ = load(FIXTURES / "gemma3_text-awq-adversarial", lazy=True)
    before = state(model)
    with pytest.raises(SplitError, match=r"gemma3_text\.Model: expected a model class that has"):
        split_tensors(model, Rank(0, 2))
    assert unchanged(model, before)


def test_of_a_vision_model_the_text_part_can_be_split(tmp_path):
    directory = splittable(tmp_path / "vision", "vision")
    with pytest.raises(SplitError, match=r"mlx_vlm.*force_text=True"):
        split_tensors(load(directory, lazy=True)[0], Rank(0, 2))
    model, _, _ = load(directory, lazy=True, force_text=True)
    split_tensors(model, Rank(0, 2))
    assert model.layers[1].self_attn.o_proj.pairs.shape == (4, 32)


@pytest.mark.parametrize(
    ("fixture", "size", "why"),
    [
        ("llama-awq-adversarial", 2, r"layers.0.mlp.down_proj.scales, shape \(128, 3\): 3 along"),
        ("llama-awq-adversarial", 3, r"layers.0.self_attn.q_proj.weight, .*128 along axis 0"),
        ("qwen3-awq-size", 2, r"layers.1.self_attn: its n_kv_heads of 1 does not divide over 2"),
        ("qwen3_5_text-awq-size", 2, r"layers.0.linear_attn: its num_k_heads of 1 does not"),
    ],
)
def test_what_does_not_divide_is_refused_and_the_model_left_whole(fixture, size, why):
    model, _, _ = load(FIXTURES / fixture, lazy=True)
    before = state(model)
    with pytest.raises(SplitError, match=why):
        split_tensors(model, Rank(0, size))
    assert unchanged(model, before)


def test_whatever_a_class_raises_leaves_the_model_whole():
    class Broken(Block):
        def shard(self, group):
            super().shard(group)
            assert self.heads % 3 == 0, "heads and ranks"

    model = Broken(linear)
    before = state(model)
    with pytest.raises(SplitError, match="2 ranks: heads and ranks"):
        split_tensors(model, Rank(0, 2))
    assert unchanged(model, before)


def test_an_interrupt_leaves_the_model_whole_too():
    class Interrupted(Block):
        def shard(self, group):
            super().shard(group)
            raise KeyboardInterrupt

    model = Interrupted(linear)
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        split_tensors(model, Rank(0, 2))
    assert unchanged(model, before)


def test_a_model_is_not_split_twice():
    model = Block(linear)
    split_tensors(model, Rank(0, 2))
    before = state(model)
    with pytest.raises(SplitError, match="is already split"):
        split_tensors(model, Rank(0, 2))
    assert unchanged(model, before)


def test_mlx_cuts_by_itself_again_afterwards():
    cut = sharding.distributed._shard
    split_tensors(Block(linear), Rank(0, 2))
    with pytest.raises(SplitError):
        split_tensors(load(FIXTURES / "llama-awq-adversarial", lazy=True)[0], Rank(0, 2))
    assert sharding.distributed._shard is cut


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A llama of 26 MB: linears large beside everything else."""
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


def test_no_more_than_one_layer_is_in_memory_beside_the_part(large):
    model, _, _ = load(large, lazy=True)
    total = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    mx.clear_cache()  # a buffer that another test left may be larger than what is put into it
    start = mx.get_active_memory()
    mx.reset_peak_memory()
    split_tensors(model, Rank(0, 2))
    read_by_layer(model)
    held = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    assert 0.5 * total < held < 0.54 * total
    assert mx.get_active_memory() - start < 1.02 * held  # small arrays keep up to 16 KiB more
    largest = 3072 * 1024 // 2
    assert mx.get_peak_memory() - start < held + 1.3 * largest


def test_parts_can_come_from_byte_ranges_of_the_entries(large, monkeypatch):
    """`reader` is asked for every parameter that is cut, and what it gives is used."""
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

    found, wanted = load(large, lazy=True)[0], load(large, lazy=True)[0]
    monkeypatch.setattr(os, "preadv", lambda *a: counts.append(preadv(*a)) or counts[-1])
    split_tensors(found, Rank(1, 2), reader=reader)
    split_tensors(wanted, Rank(1, 2))
    wanted = dict(tree_flatten(wanted.parameters()))
    for name, array in tree_flatten(found.parameters()):
        assert mx.array_equal(array, wanted[name])
    outputs = sum(
        tensor.nbytes
        for name, (_, tensor) in stored.items()
        if name.endswith((".weight", ".scales", ".biases"))
        and any(f".{linear}." in name for linear in ("q_proj", "k_proj", "v_proj"))
    )
    assert sum(counts) > outputs // 2
    whole = sum(tensor.nbytes for _, tensor in stored.values())
    assert sum(counts) < 0.72 * whole  # inputs are cut from whole lines, a third of all bytes


def test_nothing_is_taken_of_a_model_that_cannot_be_split():
    """The numbers of heads, which come last, are looked at before the first byte is read."""
    model, _, _ = load(FIXTURES / "qwen3-awq-size", lazy=True)
    before = state(model)
    with pytest.raises(SplitError, match="n_kv_heads"):
        split_tensors(model, Rank(0, 2), reader=lambda *_: pytest.fail("read"))
    assert unchanged(model, before)


def test_a_part_that_cannot_be_taken_leaves_the_model_whole():
    taken = []

    def reader(name, array, part):
        if len(taken) == 3:
            raise UnreadableFileError("entry: cannot be read")
        taken.append(name)
        return part.of(array)

    model = Block(linear)
    before = state(model)
    with pytest.raises(UnreadableFileError):
        split_tensors(model, Rank(0, 2), reader=reader)
    assert len(taken) == 3
    assert unchanged(model, before)


def test_two_processes_have_the_logits_of_one(tmp_path):
    """Of every family that mlx-lm can split, through a cache, over the ring backend."""
    models = [splittable(tmp_path / family, family) for family in FAMILIES]
    wanted = []
    for directory in models:
        model, _, _ = load(directory)
        assert any(isinstance(module, RotatedLayer) for module in model.modules())
        wanted.append(logits_of(model))
    for results in run_two_ranks(tmp_path, models):
        for number, (directory, logits) in enumerate(zip(models, wanted, strict=True)):
            found = results[f"logits{number}"]
            assert np.abs(found - logits).max() < 2e-5 * np.abs(logits).max(), directory.name
