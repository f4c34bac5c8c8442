"""A model that cannot be split is left unchanged."""

from __future__ import annotations

import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from paroquant_stream import load
from paroquant_stream.distributed import tensor_parallel as sharding
from paroquant_stream.distributed.tensor_parallel import split_tensors
from paroquant_stream.errors import SplitError, UnreadableFileError
from tests.helpers.paths import FIXTURES
from tests.helpers.ranks import Rank
from tests.helpers.split_layers import Block, linear
from tests.helpers.splittable import splittable

pytestmark = pytest.mark.usefixtures("on_the_cpu")


def state(model) -> dict:
    """Return what a failure must not change: the modules, arrays and integer attributes."""
    found = {"": dict(tree_flatten(model.parameters()))}
    for path, module in model.named_modules():
        numbers = {name: value for name, value in vars(module).items() if type(value) is int}
        found[f"{path} "] = (id(module), numbers, getattr(module, "ranks", None))
    return found


def unchanged(model, before) -> bool:
    after = state(model)
    same = all(after[""].pop(name) is array for name, array in before.pop("").items())
    return same and not after.pop("") and after == before


def test_a_class_without_shard_is_refused(tmp_path):
    model, _, _ = load(FIXTURES / "gemma3_text-awq-adversarial", lazy=True)
    before = state(model)
    with pytest.raises(SplitError, match=r"gemma3_text\.Model: expected a model class that has"):
        split_tensors(model, Rank(0, 2))
    assert unchanged(model, before)


def test_the_text_part_of_a_vision_model_can_be_split(tmp_path):
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
def test_sizes_that_do_not_divide_are_refused(fixture, size, why):
    model, _, _ = load(FIXTURES / fixture, lazy=True)
    before = state(model)
    with pytest.raises(SplitError, match=why):
        split_tensors(model, Rank(0, size))
    assert unchanged(model, before)


def test_an_error_of_the_class_leaves_the_model_unchanged():
    class Broken(Block):
        def shard(self, group):
            super().shard(group)
            assert self.heads % 3 == 0, "heads and ranks"

    model = Broken(linear)
    before = state(model)
    with pytest.raises(SplitError, match="2 ranks: heads and ranks"):
        split_tensors(model, Rank(0, 2))
    assert unchanged(model, before)


def test_an_interrupt_leaves_the_model_unchanged():
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


class Heads(nn.Module):
    """Divides its number of heads over the ranks, as the classes of mlx-lm do."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def shard(self, group) -> None:
        self.heads = max(1, self.heads // group.size())


@pytest.mark.parametrize(("heads", "ranks"), [(3, 2), (5, 4), (6, 4), (2, 3)])
def test_heads_that_do_not_divide_are_refused(heads, ranks):
    model = Heads(heads)
    with pytest.raises(SplitError, match=f"heads of {heads} does not divide over {ranks} ranks"):
        split_tensors(model, Rank(0, ranks))
    assert model.heads == heads


@pytest.mark.parametrize(("heads", "ranks"), [(4, 2), (2, 4), (1, 2)])
def test_heads_that_divide_or_are_repeated_are_accepted(heads, ranks):
    model = Heads(heads)
    split_tensors(model, Rank(0, ranks))
    assert model.heads == max(1, heads // ranks)


def test_only_one_model_is_split_at_a_time():
    locked = []

    class Watched(Block):
        def shard(self, group):
            locked.append(sharding._lock.locked())  # private: guards the patched functions of mlx
            super().shard(group)

    split_tensors(Watched(linear), Rank(0, 2))
    assert locked == [True]
    assert not sharding._lock.locked()


def test_mlx_is_restored_afterwards():
    original = sharding.distributed._shard  # private: what split_tensors replaces
    split_tensors(Block(linear), Rank(0, 2))
    with pytest.raises(SplitError):
        split_tensors(load(FIXTURES / "llama-awq-adversarial", lazy=True)[0], Rank(0, 2))
    assert sharding.distributed._shard is original


def test_nothing_is_read_of_an_unsplittable_model():
    """The numbers of heads are checked before the first read, too."""
    model, _, _ = load(FIXTURES / "qwen3-awq-size", lazy=True)
    before = state(model)
    with pytest.raises(SplitError, match="n_kv_heads"):
        split_tensors(model, Rank(0, 2), reader=lambda *_: pytest.fail("read"))
    assert unchanged(model, before)


def test_a_failed_read_leaves_the_model_unchanged():
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
