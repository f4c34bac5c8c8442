"""`convert_checkpoint` and `convert_checkpoints`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from paroquant_stream import Manifest, convert_checkpoint, convert_checkpoints
from paroquant_stream.api import convert as converting
from paroquant_stream.errors import CheckpointError, MalformedFileError, SomeModelsFailedError
from paroquant_stream.transform import task_runner
from tests.helpers.builders import write_checkpoint

pytestmark = pytest.mark.usefixtures("settled")


def test_the_manifest_is_returned(model_dir):
    manifest = convert_checkpoint(model_dir)
    assert isinstance(manifest, Manifest)
    assert manifest.layout == "AUTOAWQ"
    assert len(manifest.entries) == 3


def test_two_threads_convert_a_model_once(model_dir, monkeypatch):
    real, converted = task_runner._convert, []  # private: the work that a cached entry saves

    def counted(job, *rest):
        converted.append(job.task.shard)
        return real(job, *rest)

    monkeypatch.setattr(task_runner, "_convert", counted)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: convert_checkpoint(model_dir, jobs=1), range(2)))
    assert len(converted) == 3


def test_manifests_are_returned_in_the_order_of_the_models(tmp_path):
    first, second = (write_checkpoint(tmp_path / name) for name in "ab")
    (second / "config.json").write_text((second / "config.json").read_text() + " ")
    manifests = convert_checkpoints([second, first, second], jobs=1)
    assert manifests == [convert_checkpoint(path, jobs=1) for path in (second, first, second)]
    assert manifests[0] != manifests[1]


def test_the_others_are_converted_when_models_fail(tmp_path, monkeypatch):
    good, broken = (write_checkpoint(tmp_path / name) for name in ("good", "broken"))
    absent = tmp_path / "absent"
    next(broken.glob("*.safetensors")).write_bytes(b"no header")
    with pytest.raises(
        SomeModelsFailedError, match=f"2 of 3 models were .*\n  {absent}: "
    ) as found:
        convert_checkpoints([absent, broken, good], jobs=1)
    failures = found.value.failures
    assert list(failures) == [str(absent), str(broken)]
    assert [type(error) for error in failures.values()] == [CheckpointError, MalformedFileError]
    monkeypatch.setattr(task_runner, "_convert", lambda *_: pytest.fail("converted again"))
    assert convert_checkpoint(good)


def test_a_wrong_option_is_an_error_before_any_work(tmp_path):
    good = write_checkpoint(tmp_path / "good")
    with pytest.raises(ValueError, match="jobs is a whole number"):
        convert_checkpoint(good, jobs=0)
    with pytest.raises(ValueError, match="dtype is one of"):
        convert_checkpoints([good], dtype="int4")


def test_progress_and_trace_cover_every_shard(model_dir, tmp_path):
    seen = set()
    convert_checkpoint(
        model_dir, progress=lambda shard, *_: seen.add(shard), trace=tmp_path / "trace.json"
    )
    assert seen == {path.name for path in model_dir.glob("*.safetensors")}
    text = (tmp_path / "trace.json").read_text()
    assert all(shard in text for shard in seen)


def test_a_model_that_is_named_twice_is_requested_once(model_dir, monkeypatch):
    real, requested = converting.convert_all, []

    def record(requests, *rest):
        requested.extend(request.source.name for request in requests)
        return real(requests, *rest)

    monkeypatch.setattr(converting, "convert_all", record)
    assert len(convert_checkpoints([model_dir, str(model_dir)])) == 2
    assert requested == [str(model_dir)]
