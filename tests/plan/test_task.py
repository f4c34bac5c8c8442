"""A task's key: whatever changes a byte of the entry is in it, and nothing else is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paroquant_stream.files.tensor_header import TensorSpec
from paroquant_stream.plan.task import Operation, Part, Task
from paroquant_stream.store.format import OPERATION_VERSIONS

SHA, OTHER = "1" * 64, "2" * 64
ZEROS = Part("x.qzeros", "I32", (2, 4), "a.safetensors", 100, 132)
SCALES = Part("x.scales", "F16", (2, 32), "b.safetensors", 200, 328)
BIASES = Operation(
    "awq_biases", ((ZEROS, SCALES),), (TensorSpec("x.biases", "F16", (32, 2)),), (("v", 1),)
)
TASK = Task("a.safetensors", 1000, (BIASES,))


def with_operation(**changes) -> Task:
    return replace(TASK, operations=(replace(BIASES, **changes),))


def with_part(index: int, **changes) -> Task:
    parts = [ZEROS, SCALES]
    parts[index] = replace(parts[index], **changes)
    return with_operation(slices=(tuple(parts),))


DIFFERENT = {
    "operation": with_operation(kind="copy"),
    "output name": with_operation(outputs=(TensorSpec("y.biases", "F16", (32, 2)),)),
    "output dtype": with_operation(outputs=(TensorSpec("x.biases", "F32", (32, 2)),)),
    "output shape": with_operation(outputs=(TensorSpec("x.biases", "F16", (2, 32)),)),
    "value": with_operation(values=(("v", 2),)),
    "part name": with_part(0, name="x.other"),
    "part dtype": with_part(1, dtype="BF16"),
    "part shape": with_part(1, shape=(4, 16)),
    "cast": with_operation(made=("F32",)),
    "own part lent": with_part(1, shard="a.safetensors"),
}
SAME = {
    "lender renamed": with_part(1, shard="c.safetensors"),
    "lender's tensor moved": with_part(1, start=300, stop=428),
    "shard renamed": Task(
        "z.safetensors",
        1000,
        (replace(BIASES, slices=((replace(ZEROS, shard="z.safetensors"), SCALES),)),),
    ),
}


def test_a_new_cast_version_converts_only_what_was_cast(monkeypatch):
    cast = Task("a.safetensors", 1000, (BIASES.cast_to("BF16"),))
    before = [TASK.sha256, cast.sha256]
    monkeypatch.setattr("paroquant_stream.plan.task.CAST_VERSION", 2)
    after = [replace(task).sha256 for task in (TASK, cast)]
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_a_cast_to_the_dtype_at_hand_is_none():
    assert BIASES.cast_to("F16") is BIASES
    assert BIASES.cast_to("BF16").made == ("F16",)


@pytest.mark.parametrize(
    "leaf",
    [
        *("theta", "channel_scales", "A_log", "dt_bias"),
        *("expert_bias", "e_score_correction_bias", "router_bias"),
    ],
)
def test_a_cast_keeps_what_is_computed_in_float32(leaf):
    part = Part(f"l.{leaf}", "F32", (4,), "a.safetensors", 0, 16)
    kept = Operation("copy", ((part,),), (TensorSpec(f"l.{leaf}", "F32", (4,)),))
    assert kept.cast_to("F16") is kept


def test_a_cast_keeps_words_and_indices():
    made = tuple(TensorSpec(f"x.{dtype}", dtype, (2, 4)) for dtype in ("U32", "I16", "F32"))
    cast = replace(BIASES, outputs=made).cast_to("BF16")
    assert [output.dtype for output in cast.outputs] == ["U32", "I16", "BF16"]


def test_an_operation_starts_where_all_its_parts_have_begun():
    far = replace(SCALES, shard="a.safetensors", start=900, stop=1028)
    assert replace(BIASES, slices=((ZEROS, far),)).start == 900
    assert BIASES.start == ZEROS.start  # what another shard lends is read elsewhere


@pytest.mark.parametrize("what", DIFFERENT)
def test_the_key_changes_with_the(what):
    assert DIFFERENT[what].key(SHA, [OTHER]) != TASK.key(SHA, [OTHER])


@pytest.mark.parametrize("what", SAME)
def test_the_key_stays_with_the(what):
    assert SAME[what].key(SHA, [OTHER]) == TASK.key(SHA, [OTHER])


def test_the_key_changes_with_the_shard_and_borrowed_parts(monkeypatch):
    keys = {
        TASK.key(SHA, [OTHER]),
        TASK.key(OTHER, [OTHER]),
        TASK.key(SHA, [SHA]),
        TASK.key(SHA, []),
    }
    assert len(keys) == 4


def test_the_key_changes_with_an_operations_version(monkeypatch):
    before = TASK.key(SHA, [OTHER])
    monkeypatch.setitem(OPERATION_VERSIONS, "awq_biases", 99)
    assert replace(TASK).key(SHA, [OTHER]) != before


def test_the_key_is_pinned():
    """A change here rebuilds every cache of every user; make it on purpose."""
    assert (
        TASK.key(SHA, [OTHER]) == "42e91d40abaa3e8d386be885f4fe6a3ae2b769d30a70d09e1a11f2a3d24c410d"
    )


def test_borrowed_parts_are_listed_once_by_lender():
    twice = replace(TASK, operations=(BIASES, BIASES))
    assert twice.borrowed == {"b.safetensors": (SCALES,)}
    assert len(twice.borrowed_sha256({"x.scales": bytes(32)})) == 1
