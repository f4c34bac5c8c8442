"""What there is to do, found before any of it is done."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from paroquant_stream.conversion import planning
from paroquant_stream.conversion.converter import convert
from paroquant_stream.conversion.planning import plan_model, survey, work_of
from paroquant_stream.conversion.request import make_request, read_manifest
from paroquant_stream.errors import (
    CheckpointError,
    MalformedFileError,
    PlanError,
    SourceDroppedError,
)
from paroquant_stream.store.drop_record import DropRecord
from tests.helpers.builders import CONFIG, cut_apart, llama_tensors, write_checkpoint
from tests.helpers.conversions import flip_byte, run

pytestmark = pytest.mark.usefixtures("settled")


def test_nothing_is_written_for_a_defective_checkpoint(tmp_path):
    tensors = llama_tensors()
    del tensors["model.layers.0.mlp.up_proj.pairs"]
    directory = write_checkpoint(tmp_path / "m", tensors, cut_apart(2))
    with pytest.raises(PlanError):
        run(directory, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_an_absent_shard_is_named(model_dir):
    (model_dir / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00003"):
        run(model_dir)


def test_a_survey_tells_the_same_as_the_run_and_writes_nothing(model_dir, tmp_path):
    request = make_request(model_dir, cache_dir=tmp_path / "cache", jobs=1)
    assert {r.action for r in survey(request)} == {"converted"}
    assert not (tmp_path / "cache").exists()
    convert(request)
    flip_byte(model_dir, 1, "lm_head.weight")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")}
    foretold = survey(request)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")}
    done = convert(request).shards
    assert [(r.action, r.why, r.bytes_in, r.bytes_out) for r in foretold] == [
        (r.action, r.why, r.bytes_in, r.bytes_out) for r in done
    ]


def test_a_read_only_survey_survives_a_store_that_is_not_there(model_dir, tmp_path):
    request = make_request(model_dir, cache_dir=tmp_path / "nowhere" / "deep")
    assert request.store.free_bytes() > 0
    assert read_manifest(request) is None
    assert replace(request.store, read_only=True).digest_cache.read_only


@pytest.mark.parametrize(
    ("config", "experts"),
    [
        ({}, None),
        ({"num_experts": 4}, 4),
        ({"text_config": {"num_local_experts": 5}}, 5),
        ({"text_config": {"n_routed_experts": 6}, "num_experts": None}, 6),
        ({"num_experts": True}, None),  # an int to Python
    ],
)
def test_the_number_of_experts_is_the_configs(tmp_path, monkeypatch, config, experts):
    directory = write_checkpoint(tmp_path / "m", config=CONFIG | config)
    given, real = [], planning.make_plan
    monkeypatch.setattr(planning, "make_plan", lambda *a, **k: given.append(a[3]) or real(*a, **k))
    plan_model(make_request(directory))
    assert given == [experts]


def test_a_kept_header_that_this_version_refuses_names_its_shard(model_dir, monkeypatch):
    run(model_dir, drop_source=True)
    real = DropRecord.header

    def refuse(self, shard):
        if "00002" in shard:
            raise MalformedFileError("a dtype of a newer version")
        return real(self, shard)

    monkeypatch.setattr(DropRecord, "header", refuse)
    with pytest.raises(SourceDroppedError, match=r"1 shard .*\n.*00002-of.*kept is damaged"):
        plan_model(make_request(model_dir))


@pytest.mark.parametrize("changed", ["lender", "borrower"])
def test_a_shard_that_changes_after_the_plan_completes_nothing(scattered_dir, tmp_path, changed):
    """All others were removed; it lends to one of them, or needs what one of them lent."""
    backup = shutil.copytree(scattered_dir, tmp_path / "backup")
    request = make_request(scattered_dir, jobs=1)
    run(scattered_dir, drop_source=True)
    shard = "model-00003-of-00003.safetensors"
    shutil.copy(backup / shard, scattered_dir / shard)
    model = plan_model(request)
    assert not work_of(request, model).tasks
    tasks = {task.shard: task for task in model.plan.tasks}
    lent = {p.name for task in tasks.values() for p in task.borrowed.get(shard, ())}
    assert lent
    assert tasks[shard].borrowed
    if changed == "lender":
        flip_byte(scattered_dir, 1, min(lent))
        words = "a part that it borrows changed"
    else:
        own = {p.name for op in tasks[shard].operations for s in op.slices for p in s[:1]}
        flip_byte(scattered_dir, 1, min(own - lent))
        words = f"lends parts to {shard}"
    with pytest.raises(SourceDroppedError, match=words):
        work_of(request, model)
