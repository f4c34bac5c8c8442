"""Several models in one call."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from paroquant_stream import convert_checkpoints
from paroquant_stream.api.convert import convert_checkpoint
from paroquant_stream.cli.convert import main
from paroquant_stream.conversion.batch import convert_all
from paroquant_stream.conversion.report import Conversion
from paroquant_stream.conversion.request import make_request
from paroquant_stream.errors import RunCancelledError, SomeModelsFailedError
from paroquant_stream.transform import task_runner as transform
from paroquant_stream.transform import unit_pool
from tests.helpers.builders import cut_evenly, llama_tensors, write_checkpoint
from tests.helpers.units import make_small

pytestmark = pytest.mark.usefixtures("settled")


@pytest.fixture
def models(tmp_path) -> list[str]:
    """Four models with nothing in common, of one to three shards."""
    return [
        str(write_checkpoint(tmp_path / f"m{n}", llama_tensors(n), cut_evenly(1 + n % 3)))
        for n in range(4)
    ]


def damage(model: str) -> None:
    """The shard stays as long as it was and has bytes that no float16 holds."""
    tensors = llama_tensors()
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype("f4") * 1e6
    write_checkpoint(Path(model), tensors, cut_evenly(3))


@pytest.mark.parametrize("jobs", [1, 2, 8])
def test_each_is_what_it_is_alone(models, tmp_path, jobs):
    together = convert_checkpoints(models, cache_dir=tmp_path / "all", jobs=jobs)
    alone = [convert_checkpoint(model, cache_dir=tmp_path / "one") for model in models]
    assert together == alone
    assert convert_checkpoints(models, cache_dir=tmp_path / "all") == alone


def meeting(monkeypatch, parties: int) -> list[int]:
    """The first `parties` units wait for each other; gives how many ran at each begin."""
    real, barrier = unit_pool.run_unit, threading.Barrier(parties, timeout=20)
    running, counts, lock = [], [], threading.Lock()

    def counted(unit, *rest, **options):
        with lock:
            running.append(unit)
            counts.append(len(running))
            first = len(counts) <= parties
        if first:
            barrier.wait()
        try:
            return real(unit, *rest, **options)
        finally:
            with lock:
                running.remove(unit)

    monkeypatch.setattr(unit_pool, "run_unit", counted)
    return counts


def test_all_models_together_have_so_many_units_in_work(models, monkeypatch):
    make_small(monkeypatch)
    counts = meeting(monkeypatch, 3)
    convert_checkpoints(models, jobs=3)
    assert max(counts) == 3
    assert len(counts) > 7


def test_models_of_one_shard_are_converted_beside_each_other(models, monkeypatch):
    assert meeting(monkeypatch, 2) == []
    convert_checkpoints([models[0], models[3]], jobs=2)


def test_the_largest_number_of_jobs_counts_for_all(models, monkeypatch):
    meeting(monkeypatch, 2)
    requests = [make_request(models[index], jobs=jobs) for index, jobs in ((0, 1), (3, 2))]
    assert [type(result) for _, result in convert_all(requests)] == [Conversion] * 2


def test_the_end_of_one_model_frees_its_workers_for_the_next(models):
    requests = [make_request(model, jobs=2) for model in models]
    finished = [request.source.name for request, _ in convert_all(requests)]
    assert sorted(finished) == models


def test_a_failure_lets_the_others_finish_and_is_told_at_the_end(models, capsys):
    damage(models[1])
    absent = f"{models[0]}-absent"
    arguments = [absent, *models, "--dtype", "float16", "--jobs", "2"]
    assert main([*arguments, "--json"]) == 1
    out, err = capsys.readouterr()
    found = {found["model"]: found.get("error") for found in map(json.loads, out.splitlines())}
    assert found == {absent: "CheckpointError", models[1]: "OutOfRangeError"} | dict.fromkeys(
        [models[0], *models[2:]]
    )
    *_, count, first, second = err.splitlines()
    assert count == "error: 2 of 5 models were not converted:"
    assert first.startswith(f"  {absent}: ")
    assert second.startswith(f"  {models[1]}: ")
    assert "model.norm.weight" in second


def test_the_function_raises_once_all_others_are_done(models):
    damage(models[1])
    with pytest.raises(SomeModelsFailedError, match=r"1 of 4 models.*\n.*model\.norm\.weight"):
        convert_checkpoints(models, dtype="float16", jobs=2)
    assert len(convert_checkpoints(models[2:], dtype="float16")) == 2


def test_a_summary_line_for_each_and_shards_under_their_models(models, capsys):
    assert main([*models, "--jobs", "2"]) == 0
    out, err = capsys.readouterr()
    assert sorted(line.partition(":")[0] for line in out.splitlines()) == models
    for model in models:
        assert f"{model}/model-00001-of" in err
    assert "7 of 7 shards, 100 %" in err


def test_one_named_twice_is_converted_once(models, capsys):
    assert main([models[0], models[0], "--json"]) == 0
    assert capsys.readouterr().out.count("\n") == 1


def test_each_is_converted_beside_itself(models, tmp_path):
    assert main([*models, "--in-place", "--quiet"]) == 0
    assert len(list(tmp_path.glob("m?/mlx/v1/manifests/model-*.msgpack"))) == 4


def test_sources_are_dropped_model_after_model(models, tmp_path):
    requests = [make_request(m, drop_source=True, jobs=4) for m in models]
    finished = [request.source.name for request, _ in convert_all(requests)]
    assert finished == models
    assert not list(tmp_path.glob("m?/*.safetensors"))


def test_a_dry_run_surveys_each_and_writes_nothing(models, tmp_path, capsys):
    cache = ["--cache-dir", str(tmp_path / "c")]
    assert main([*models, "--dry-run", "--json", *cache]) == 0
    found = [json.loads(line)["model"] for line in capsys.readouterr().out.splitlines()]
    assert found == models
    assert not (tmp_path / "c").exists()


def test_a_caller_that_stops_listening_stops_every_model(models, monkeypatch):
    real, begun, stopped = transform._convert, threading.Event(), []

    def endless(job, shard, pool, tick, trace):
        if str(job.directory) == models[0]:
            assert begun.wait(20)
            return real(job, shard, pool, tick, trace)
        begun.set()
        try:
            while True:
                tick(0)
                time.sleep(0.005)
        except RunCancelledError:
            stopped.append(job)
            raise

    monkeypatch.setattr(transform, "_convert", endless)
    results = convert_all([make_request(m, jobs=3) for m in models[:2]])  # a place a shard
    request, first = next(results)
    assert (request.source.name, type(first)) == (models[0], Conversion)
    results.close()
    assert stopped


def test_no_model_is_nothing():
    assert convert_checkpoints([]) == []
