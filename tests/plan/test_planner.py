"""The plan: a partition of the checkpoint's tensors, or one error that lists every defect."""

from __future__ import annotations

import contextlib
import gc
import time
from dataclasses import replace

import numpy as np
import pytest

from paroquant_stream.checkpoint.layout import Layout
from paroquant_stream.errors import LayoutError, PlanError
from paroquant_stream.files.tensor_header import Header, TensorInfo
from paroquant_stream.plan import planner
from paroquant_stream.plan.planner import make_plan
from tests.helpers.builders import cut_apart, cut_evenly, llama_tensors
from tests.helpers.plans import QUANTIZATION, headers_of, moe_tensors, plan_of


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


@pytest.mark.parametrize("collecting", [True, False])
@pytest.mark.parametrize("sound", [True, False])
def test_planning_leaves_the_garbage_collector_as_it_was(collecting, sound, monkeypatch):
    """It rests meanwhile: nothing here is cyclic."""
    during, real = [], planner.split_experts
    monkeypatch.setattr(
        planner, "split_experts", lambda *given: during.append(gc.isenabled()) or real(*given)
    )
    tensors = llama_tensors()
    if not sound:
        tensors["lm_head.weight"] = np.zeros((64, 40), np.float16)
    before = gc.isenabled()
    (gc.enable if collecting else gc.disable)()
    try:
        with contextlib.nullcontext() if sound else pytest.raises(PlanError):
            plan_of(tensors)
        assert gc.isenabled() == collecting
    finally:
        (gc.enable if before else gc.disable)()
    assert during == [False]


def test_a_part_that_the_layout_does_not_have_is_left_over():
    stray = {"model.layers.0.mlp.up_proj.scaled_zeros": np.zeros((2, 128), np.float16)}
    with pytest.raises(PlanError, match=r"scaled_zeros .*: not a part that layout \w+ has"):
        plan_of(llama_tensors() | stray)


def test_a_bias_of_a_plain_linear_is_copied():
    plain = {"model.visual.fc.weight": np.zeros((8, 8), np.float16)}
    plain["model.visual.fc.bias"] = np.zeros((8,), np.float16)
    (task,) = plan_of(llama_tensors() | plain).tasks
    assert {"model.visual.fc.weight", "model.visual.fc.bias"} <= {o.name for o in task.outputs}


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("lm_head.weight", np.zeros((64, 64), np.int32)),
        ("lm_head.weight", np.zeros((64,), np.float16)),
        ("model.old_lm_head", np.zeros((64, 64), np.float16)),
    ],
)
def test_only_a_matrix_of_floats_is_quantized_as_a_head(name, array):
    (task,) = plan_of(llama_tensors() | {name: array}).tasks
    (made,) = [o for o in task.operations if name in {p.name for p in o.slices[0]}]
    assert (made.kind, [o.name for o in made.outputs]) == ("copy", [name])


def test_the_operations_of_a_task_follow_the_bytes_of_its_shard():
    for task in plan_of(llama_tensors(), cut_apart(3)).tasks:
        starts = [operation.start for operation in task.operations]
        assert len(starts) > 3
        assert starts == sorted(starts)


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
    """18,480 tensors beside an eighth of them; quadratic time would be 64 times as much."""
    seconds_of_plan(1)  # imports
    assert seconds_of_plan(8) < 8 * 3 * min(seconds_of_plan(1) for _ in range(3))


def test_scales_in_bfloat16_are_one_line():
    headers = headers_of(llama_tensors())
    changed = {
        shard: replace(
            header,
            tensors=tuple(
                replace(tensor, dtype="BF16") if tensor.name.endswith(".scales") else tensor
                for tensor in header.tensors
            ),
        )
        for shard, header in headers.items()
    }
    with pytest.raises(LayoutError, match="scales in bfloat16, as GPTQModel writes them") as caught:
        make_plan(changed, Layout.AUTOAWQ, QUANTIZATION)
    assert "\n" not in str(caught.value)
