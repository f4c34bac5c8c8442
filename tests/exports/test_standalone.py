"""The file of a self-contained export: mlx-lm runs it, and gets our bits."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.nn.layers import distributed
from mlx_lm import generate
from mlx_lm.utils import load_model

from paroquant_stream import load
from paroquant_stream.api.export import export_model
from paroquant_stream.checkpoint.config import EXPORTED
from paroquant_stream.exports import standalone
from tests.helpers.builders import CONFIG, awq_linear, llama_tensors, write_checkpoint
from tests.helpers.paths import FIXTURES
from tests.helpers.stock import answers, stock, stock_answers_of
from tests.helpers.variants import variant

# slow: stock mlx-lm runs in processes of its own
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("on_the_cpu")]
FAMILIES = [
    "llama-awq-adversarial",
    "qwen2-awq-size",  # biases
    "qwen3_moe-awq-adversarial",  # tied head
    "qwen3_5_text-awq-size",  # a model type that mlx-lm does not know by this name
    "gemma4_moe-awq-adversarial",  # the text part of a vision model
]
TIED = "gemma3_text-awq-adversarial"
"""Without its head, which mlx-lm's class then removes in `sanitize`, and not by the config."""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    tied = variant(TIED, root / TIED, layout="PARO_NATIVE", tied=True)
    return {name: FIXTURES / name for name in FAMILIES} | {TIED: tied}


@pytest.fixture(scope="module")
def exports(tmp_path_factory, models) -> dict[str, Path]:
    """Self-contained exports of every family."""
    root = tmp_path_factory.mktemp("exports")
    for name, model in models.items():
        export_model(model, root / name, self_contained=True, cache_dir=root / "cache")
    return {name: root / name for name in models}


@pytest.fixture(scope="module")
def stock_answers(exports) -> dict:
    return stock_answers_of(list(exports.values()))


def test_neither_package_could_be_imported(stock_answers):
    assert stock_answers["blocked"] == ["paroquant_stream is blocked", "paroquant is blocked"]


def test_mlx_lm_does_not_run_the_code_unless_it_is_trusted(stock_answers):
    """Whether or not weights and parameters have to match."""
    assert ["trust_remote_code=True" in error for error in stock_answers["refused"]] == [True] * 2


@pytest.mark.parametrize("name", [*FAMILIES, TIED])
def test_stock_mlx_lm_gives_our_logits_and_tokens_bit_for_bit(name, models, exports, stock_answers):
    ours, _, _ = load(models[name], force_text=True)
    assert stock_answers[str(exports[name])] == answers(ours)


def test_weights_are_not_changed_again_on_their_way_in(exports):
    """mlx-lm's own class would, for one, drop this name."""
    weights = {"model.layers.0.self_attn.rotary_emb.inv_freq": mx.ones(1)}
    assert loaded(exports["llama-awq-adversarial"]).sanitize(weights) == weights


GENERATE = """
import runpy, sys
sys.argv[:1] = ["mlx_lm", "generate"]
runpy.run_module("mlx_lm", run_name="__main__")
"""


def test_the_generate_command_of_mlx_lm_runs_it(exports):
    name = "llama-awq-adversarial"
    command = ["--model", str(exports[name]), "--prompt", "w5 w9 w17", "--ignore-chat-template"]
    done = stock(GENERATE, *command, "--max-tokens", "8", "--trust-remote-code", "--verbose", "F")
    model, tokenizer, _ = load(FIXTURES / name)
    text = generate(model, tokenizer, "w5 w9 w17", max_tokens=8)
    assert done.stdout.split() == text.split() != [], done.stderr


def test_tables_are_made_anew_after_the_parameters_were_replaced(exports):
    layer = standalone.RotatedLinear(64, 32, False, group_size=32, bits=4, krot=2)
    layer.weight = mx.array(np.random.default_rng(1).integers(0, 2**32, (32, 8), np.uint32))
    layer.scales = mx.ones((32, 2))
    x = mx.arange(64).astype(mx.float32)
    before = layer(x)
    layer.theta = mx.ones((2, 32))
    assert not mx.array_equal(layer(x), before)


def test_its_names_for_the_config_are_those_of_the_package():
    assert standalone.MARK == EXPORTED


class Rank:
    """One of two ranks that run as threads of this process; `all_sum` adds up what both bring."""

    def __init__(self, rank: int, barrier: threading.Barrier, brought: dict) -> None:
        self._rank, self._barrier, self._brought = rank, barrier, brought

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return 2

    def all_sum(self, array: mx.array) -> mx.array:
        self._brought[self._rank] = np.array(array.astype(mx.float32))
        self._barrier.wait(30)
        total = self._brought[0] + self._brought[1]
        self._barrier.wait(30)
        return mx.array(total).astype(array.dtype)


@pytest.fixture
def ranks(monkeypatch) -> list[Rank]:
    barrier, brought = threading.Barrier(2), {}
    monkeypatch.setattr(mx.distributed, "all_sum", lambda array, *, group: group.all_sum(array))
    return [Rank(rank, barrier, brought) for rank in (0, 1)]


def on_both(ranks: list[Rank], work) -> list:
    """What `work(rank)` gives on each."""

    def on_one(rank: Rank):
        mx.set_default_device(mx.cpu)
        return work(rank)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(on_one, ranks))


def near(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected))


def test_two_ranks_have_the_logits_of_one(tmp_path, ranks):
    """Tensor parallelism through mlx-lm's own `shard` of a llama."""
    model = write_checkpoint(
        tmp_path / "model", two_heads(), config={**CONFIG, "num_key_value_heads": 2}
    )
    out = export_model(model, tmp_path / "out", self_contained=True).directory
    whole = loaded(out)
    tokens = mx.array([[5, 9, 17, 42, 3]])

    def work(rank: Rank) -> tuple:
        part = loaded(out)
        part.shard(rank)
        layer = part.model.layers[0]
        shapes = [layer.mlp.up_proj.weight.shape, layer.mlp.down_proj.weight.shape]
        shapes += [layer.mlp.up_proj.pairs.shape, layer.mlp.down_proj.pairs.shape]
        return np.array(part(tokens)), shapes

    expected = np.array(whole(tokens))
    for logits, shapes in on_both(ranks, work):
        assert near(logits, expected)
        assert shapes == [(64, 8), (64, 8), (3, 64), (3, 64)]


def two_heads() -> dict:
    """The llama of the builders with two key heads."""
    rng, tensors = np.random.default_rng(1), llama_tensors()
    for layer in (0, 1):
        for name in ("k_proj", "v_proj"):
            tensors |= awq_linear(rng, f"model.layers.{layer}.self_attn.{name}", 64, 64)
    return tensors


def loaded(directory: Path):
    """The model as mlx-lm loads it, in float32, so that sums in another order stay near."""
    model, _ = load_model(directory, trust_remote_code=True)
    model.set_dtype(mx.float32)
    return model


def test_each_rank_has_its_part_of_the_experts(exports, ranks):
    """Their sum is left to mlx-lm's MoE block, so here it is taken by hand."""
    x, experts = mx.random.normal((1, 40, 64)), mx.array([[[0, 3]] * 40])
    whole = loaded(exports["qwen3_moe-awq-adversarial"]).model.layers[0].mlp.switch_mlp
    expected = np.array(whole(x, experts))
    parts = []
    for rank in ranks:
        layer = loaded(exports["qwen3_moe-awq-adversarial"]).model.layers[0].mlp.switch_mlp
        standalone_shard(layer, rank)
        assert layer.down_rot_pairs.shape == (4, 32)
        assert layer.gate_up_rot_pairs.shape == (4, 64)
        parts.append(np.array(layer(x, experts)))
    assert near(parts[0] + parts[1], expected)
    assert not near(parts[0], expected)


def standalone_shard(layer, rank: Rank) -> None:
    """What mlx-lm's `shard` of a MoE model does to the experts of one layer."""
    distributed.shard_inplace(layer.gate_proj, "all-to-sharded", group=rank)
    distributed.shard_inplace(layer.up_proj, "all-to-sharded", group=rank)
    distributed.shard_inplace(layer.down_proj, "sharded-to-all", group=rank)
    layer.keep_part(rank)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("llama-awq-adversarial", "equal size"),  # 3 groups of inputs
        ("qwen3_5_text-awq-size", "cannot be split over 2 ranks"),  # one key head, repeated
    ],
)
def test_what_cannot_be_split_is_refused(exports, ranks, name, why):
    with pytest.raises(ValueError, match=why):
        loaded(exports[name]).shard(ranks[0])


def test_a_model_that_mlx_lm_cannot_split_has_no_shard(exports):
    assert not hasattr(loaded(exports["gemma4_moe-awq-adversarial"]), "shard")
