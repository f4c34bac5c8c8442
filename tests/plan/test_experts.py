"""Experts of a layer: stacks, the runs that shards hold of them, and what is missing."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest

from paroquant_stream.errors import PlanError
from tests.helpers.builders import awq_linear
from tests.helpers.plans import moe_tensors, plan_of


def test_experts_in_one_shard_become_full_stacks():
    (task,) = plan_of(moe_tensors()).tasks
    shapes = {o.name: o.shape for o in task.outputs}
    assert shapes["model.layers.0.mlp.switch_mlp.gate_proj.weight"] == (4, 32, 4)
    assert shapes["model.layers.0.mlp.switch_mlp.down_rot_theta"] == (3, 16)


def test_experts_spread_over_shards_become_runs():
    def cut(names):
        return {n: "b" if ".experts.2." in n and n.endswith("qweight") else "a" for n in names}

    tasks = {task.shard: task for task in plan_of(moe_tensors(), cut).tasks}
    base = "model.layers.0.mlp.switch_mlp.up_proj"
    assert {o.name for o in tasks["b"].outputs if "up_proj" in o.name} == {
        f"{base}.weight.experts_2_2"
    }
    assert {o.name for o in tasks["a"].outputs if "up_proj" in o.name} == {
        f"{base}.weight.experts_0_1",
        f"{base}.weight.experts_3_3",
        f"{base}.scales",
        f"{base}.biases",
    }


def test_a_missing_expert_is_named_with_layer_and_shard():
    tensors = {n: a for n, a in moe_tensors().items() if ".experts.1.up_proj." not in n}
    with pytest.raises(PlanError, match=r"layers\.0\.mlp: expert 1 has no up_proj.*lies in model"):
        plan_of(tensors)


def test_a_missing_last_expert_is_noticed_by_the_config():
    tensors = {n: a for n, a in moe_tensors().items() if ".experts.3." not in n}
    with pytest.raises(PlanError, match="expert 3 has no"):
        plan_of(tensors, experts=4)


@pytest.mark.parametrize("experts", [2, 3])
def test_an_expert_beyond_the_configs_number_is_an_error(experts):
    with pytest.raises(PlanError, match=f"or more than {experts} of them"):
        plan_of(moe_tensors(experts=4), experts=experts)
    assert plan_of(moe_tensors(experts=4), experts=4).tasks


def test_experts_of_unlike_shapes_are_an_error():
    rng = np.random.default_rng(0)
    odd = "model.layers.0.mlp.experts.2.up_proj"
    wider = {n: a for n, a in awq_linear(rng, odd, 64, 32).items() if n in moe_tensors()}
    with pytest.raises(PlanError, match=r"experts of unlike shapes \[\(32, 4\), \(64, 4\)\]"):
        plan_of(moe_tensors() | wider)


def test_an_absurd_number_of_experts_costs_no_more_time():
    """It is a number of the config: 200,000 experts took 16 s, and 10,000,000 no end."""
    small = min(seconds_of_refusal(moe_tensors(), 100, "expert 4 has no") for _ in range(3))
    words = r"1,999,999,999,986 more of its 2,000,000,000,000 experts have no"
    assert min(seconds_of_refusal(moe_tensors(), 2 * 10**12, words) for _ in range(3)) < 5 * small


def test_only_experts_beyond_the_first_ten_are_counted():
    with pytest.raises(PlanError, match="expert 13 has no gate_proj") as caught:
        plan_of(moe_tensors(experts=4), experts=14)
    assert "more of its" not in str(caught.value)
    with pytest.raises(PlanError, match="1 more of its 15 experts have no gate_proj"):
        plan_of(moe_tensors(experts=4), experts=15)


def test_a_stack_with_gaps_is_refused_in_linear_time():
    """The nearest expert of each that is missing was looked for among all."""

    def refusal(count: int) -> float:
        one = moe_tensors(experts=1)
        tensors = {
            name.replace(".experts.0.", f".experts.{2 * i}."): array
            for i in range(count)
            for name, array in one.items()
        }
        return seconds_of_refusal(tensors, None, "expert 1 has no gate_proj")

    assert min(refusal(1600) for _ in range(2)) < 10 * min(refusal(400) for _ in range(3))


@pytest.mark.parametrize(("absent", "near"), [((3,), 2), ((2, 3), 4), ((3, 4, 5), 2), ((0, 3), 2)])
def test_the_shard_of_the_nearest_expert_is_named(absent, near):
    gone = tuple(f".experts.{expert}.up_proj." for expert in absent)
    tensors = {n: a for n, a in moe_tensors(experts=7).items() if not any(g in n for g in gone)}
    homes = {name: "near" if f".experts.{near}." in name else "far" for name in tensors}
    with pytest.raises(PlanError, match=r"expert 3 has no up_proj\.weight; .* lies in near"):
        plan_of(tensors, lambda _: homes)


def test_a_missing_shared_rotation_is_an_error():
    tensors = moe_tensors()
    del tensors["model.layers.0.mlp.experts.down_weight_pairs"]
    with pytest.raises(PlanError, match="down_weight_pairs: in no shard"):
        plan_of(tensors)


@pytest.mark.parametrize("shape", [(3, 24), (32,), (1, 3, 16)])
def test_a_shared_rotation_of_another_shape_is_an_error(shape):
    theta = "model.layers.0.mlp.experts.down_weight_theta"
    words = rf"down_weight_theta in model.*: expected \(krot, 16\), found {re.escape(str(shape))}"
    with pytest.raises(PlanError, match=words):
        plan_of(moe_tensors() | {theta: np.zeros(shape, np.float16)})


def test_a_shared_rotation_without_experts_is_an_error():
    stray = {
        n.replace("layers.0", "layers.7"): a for n, a in moe_tensors().items() if "_pairs" in n
    }
    with pytest.raises(PlanError, match=r"layers\.7\..*a layer without quantized experts"):
        plan_of(moe_tensors() | stray)


def seconds_of_refusal(tensors, experts, words) -> float:
    """Of the processor: those of other programs do not count."""
    started = time.process_time()
    with pytest.raises(PlanError, match=words):
        plan_of(tensors, experts=experts)
    return time.process_time() - started
