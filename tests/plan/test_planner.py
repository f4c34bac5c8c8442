"""The plan: a partition of the checkpoint's tensors, or one error that lists every defect."""

from __future__ import annotations

import time

import numpy as np
import pytest

from paroquant_stream.checkpoint.layout import Layout
from paroquant_stream.checkpoint.quantization import Quantization
from paroquant_stream.errors import PlanError
from paroquant_stream.files.tensor_header import Header, TensorInfo
from paroquant_stream.plan.planner import make_plan
from tests.helpers.builders import awq_linear, cut_apart, cut_evenly, llama_tensors, rotation

QUANTIZATION = Quantization(4, 32)
DTYPES = {"float16": "F16", "int32": "I32", "int16": "I16", "float32": "F32"}


def headers_of(tensors, cut=None) -> dict[str, Header]:
    """The headers that a checkpoint of these tensors would have."""
    homes = cut(sorted(tensors)) if cut else dict.fromkeys(sorted(tensors), "model.safetensors")
    headers = {}
    for shard in sorted(set(homes.values())):
        position, infos = 1000, []
        for name in (name for name, home in homes.items() if home == shard):
            array = tensors[name]
            dtype = DTYPES[str(array.dtype)]
            infos.append(TensorInfo(name, dtype, array.shape, position, position + array.nbytes))
            position += array.nbytes
        headers[shard] = Header(tuple(infos), position, {})
    return headers


def plan_of(tensors, cut=None, experts=None):
    return make_plan(headers_of(tensors, cut), Layout.AUTOAWQ, QUANTIZATION, experts)


@pytest.mark.parametrize("cut", [None, cut_evenly(3), cut_apart(3), cut_apart(7)])
def test_owned_parts_are_a_partition_of_the_tensors(cut):
    tensors = llama_tensors()
    plan = plan_of(tensors, cut)
    owned = [
        (parts[0].name, task.shard, parts[0].shard)
        for task in plan.tasks
        for operation in task.operations
        for parts in operation.slices
    ]
    assert sorted(name for name, *_ in owned) == sorted(tensors)
    assert all(task_shard == part_shard for _, task_shard, part_shard in owned)


def test_every_borrowed_part_is_owned_by_exactly_one_other_task():
    plan = plan_of(llama_tensors(), cut_apart(3))
    owners = {
        parts[0].name: task.shard
        for task in plan.tasks
        for operation in task.operations
        for parts in operation.slices
    }
    borrowed = [
        (task.shard, part)
        for task in plan.tasks
        for parts in task.borrowed.values()
        for part in parts
    ]
    assert borrowed
    for shard, part in borrowed:
        assert owners[part.name] == part.shard != shard
        assert part.name.endswith(".scales")


def test_the_cut_never_changes_what_is_stored():
    tensors = llama_tensors()

    def outputs(cut):
        return sorted(
            (o.name, o.dtype, o.shape) for t in plan_of(tensors, cut).tasks for o in t.outputs
        )

    assert outputs(None) == outputs(cut_evenly(3)) == outputs(cut_apart(5))


def test_a_linear_becomes_weight_scales_and_biases():
    (task,) = plan_of(llama_tensors()).tasks
    shapes = {o.name: (o.dtype, o.shape) for o in task.outputs}
    base = "model.layers.0.mlp.down_proj"
    assert shapes[f"{base}.weight"] == ("U32", (64, 16))
    assert shapes[f"{base}.scales"] == shapes[f"{base}.biases"] == ("F16", (64, 4))
    assert shapes["lm_head.weight"] == ("U32", (64, 8))
    assert shapes["lm_head.scales"] == ("F16", (64, 2))


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    "part", ["qweight", "qzeros", "scales", "theta", "pairs", "channel_scales"]
)
def test_a_missing_part_is_named_with_the_shards_of_the_others(part):
    tensors = llama_tensors()
    del tensors[f"{Q}.{part}"]
    with pytest.raises(PlanError) as caught:
        plan_of(tensors)
    assert f"{Q}.{part}" in str(caught.value)
    assert "model.safetensors" in str(caught.value)


def test_every_defect_is_listed_at_once():
    tensors = llama_tensors()
    del tensors[f"{Q}.theta"], tensors["model.layers.0.mlp.up_proj.qweight"]
    with pytest.raises(PlanError) as caught:
        plan_of(tensors)
    assert f"{Q}.theta" in str(caught.value)
    assert str(caught.value).count("up_proj") >= 4


@pytest.mark.parametrize(
    ("part", "array"),
    [
        ("scales", np.zeros((2, 32), np.float16)),
        ("scales", np.zeros((2, 64), np.float32)),
        ("qzeros", np.zeros((4, 8), np.int32)),
        ("pairs", np.zeros((3, 32), np.int16)),
        ("pairs", np.zeros((2, 64), np.int16)),
        ("theta", np.zeros((3, 64), np.float16)),
        ("channel_scales", np.zeros((2, 64), np.float16)),
        ("qweight", np.zeros((48, 8), np.int32)),
        ("qweight", np.zeros((64,), np.int32)),
    ],
)
def test_a_shape_that_does_not_fit_is_named_with_both_shapes(part, array):
    tensors = llama_tensors() | {f"{Q}.{part}": array}
    with pytest.raises(PlanError, match=rf"{Q}"):
        plan_of(tensors)


def test_embedding_rows_must_divide_by_the_group_size():
    tensors = llama_tensors() | {"lm_head.weight": np.zeros((64, 40), np.float16)}
    with pytest.raises(PlanError, match="rows of 40 do not divide by group_size 32"):
        plan_of(tensors)


def moe_tensors(layers=1, experts=4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tensors = {}
    for layer in range(layers):
        base = f"model.layers.{layer}.mlp.experts"
        for projection in ("gate_proj", "up_proj", "down_proj"):
            for expert in range(experts):
                linear = awq_linear(rng, f"{base}.{expert}.{projection}", 32, 32)
                tensors |= {
                    n: a for n, a in linear.items() if n.endswith(("qweight", "qzeros", ".scales"))
                }
        for which in ("gate_up_weight", "down_weight"):
            shared = rotation(rng, "x", 32)
            tensors |= {f"{base}.{which}_{name[2:]}": array for name, array in shared.items()}
    return tensors


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


def seconds_of_refusal(tensors, experts, words) -> float:
    started = time.perf_counter()
    with pytest.raises(PlanError, match=words):
        plan_of(tensors, experts=experts)
    return time.perf_counter() - started


def test_an_absurd_number_of_experts_costs_no_more_time():
    """It is a number of the config: 200,000 experts took 16 s, and 10,000,000 no end."""
    small = min(seconds_of_refusal(moe_tensors(), 100, "expert 4 has no") for _ in range(3))
    words = r"1,999,999,999,986 more of its 2,000,000,000,000 experts have no"
    assert min(seconds_of_refusal(moe_tensors(), 2 * 10**12, words) for _ in range(3)) < 5 * small


def test_a_stack_with_gaps_is_refused_in_linear_time():
    """The nearest neighbour of each that is missing was looked for among all."""

    def refusal(count: int) -> float:
        one = moe_tensors(experts=1)
        tensors = {
            name.replace(".experts.0.", f".experts.{2 * i}."): array
            for i in range(count)
            for name, array in one.items()
        }
        return seconds_of_refusal(tensors, None, "expert 1 has no gate_proj")

    assert min(refusal(4000) for _ in range(2)) < 10 * min(refusal(1000) for _ in range(2))


@pytest.mark.parametrize(("absent", "near"), [((3,), 2), ((2, 3), 4), ((3, 4, 5), 2), ((0, 3), 2)])
def test_the_shard_of_the_nearest_neighbour_is_named(absent, near):
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


def headers_of_experts(layers: int) -> dict[str, Header]:
    """Of layers with 256 experts and 9 tensors each, scattered over 30 shards."""
    one = headers_of(moe_tensors(1, 4))["model.safetensors"].tensors
    placed, position = [], 0
    for layer in range(layers):
        for tensor in one:
            if any(f".experts.{expert}." in tensor.name for expert in (1, 2, 3)):
                continue
            for expert in range(256) if ".experts.0." in tensor.name else (0,):
                name = tensor.name.replace("layers.0", f"layers.{layer}")
                name = name.replace("experts.0", f"experts.{expert}")
                stop = position + tensor.nbytes
                placed.append(TensorInfo(name, tensor.dtype, tensor.shape, position, stop))
                position = stop
    return {f"s{i}": Header(tuple(placed[i::30]), position, {}) for i in range(30)}


def seconds_of_plan(layers: int) -> float:
    """Of the processor: those of other programs do not count."""
    headers = headers_of_experts(layers)
    assert sum(len(h.tensors) for h in headers.values()) == layers * (256 * 9 + 6)
    started = time.process_time()
    plan = make_plan(headers, Layout.AUTOAWQ, QUANTIZATION)
    seconds = time.process_time() - started
    assert len(plan.tasks) == 30
    return seconds


def test_planning_takes_time_linear_in_the_tensors():
    """92,400 tensors beside an eighth of them; quadratic time would be 64 times as much."""
    seconds_of_plan(1)  # imports
    assert seconds_of_plan(40) < 8 * 3 * min(seconds_of_plan(5) for _ in range(3))
