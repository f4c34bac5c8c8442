"""Traces: stages are summed without nested ones, and a browser can show them."""

from __future__ import annotations

import json
import threading
import time

import pytest

from paroquant_stream.api.convert import convert_checkpoint
from paroquant_stream.api.load import load
from paroquant_stream.errors import UnwritableFileError
from paroquant_stream.trace import NO_TRACE, Trace, written_to


@pytest.fixture
def clock(monkeypatch) -> list[int]:
    """Make every reading of the clock return the next of these times, in ns."""
    times: list[int] = []
    monkeypatch.setattr(time, "perf_counter_ns", lambda: times.pop(0))
    return times


def test_a_stage_is_summed_without_nested_stages(clock):
    second = 10**9
    clock += [0, 0, 2 * second, 5 * second, 6 * second, 7 * second, 10 * second]
    trace = Trace()
    with trace.span("outer"):
        with trace.span("inner", "x"):
            pass
        with trace.span("inner", "y"):
            pass
    assert trace.seconds() == {"inner": 3 + 1, "outer": 10 - 3 - 1}
    assert [span.detail for span in trace.spans] == ["x", "y", ""]


def test_a_stage_that_fails_is_kept():
    trace = Trace()
    with pytest.raises(KeyError), trace.span("stage"):
        raise KeyError
    assert [span.stage for span in trace.spans] == ["stage"]


def test_a_trace_has_a_row_per_thread_and_a_slice_per_stage(tmp_path):
    trace = Trace()

    def in_another_thread():
        with trace.span("there"):
            pass

    with trace.span("here", "of this"):
        thread = threading.Thread(target=in_another_thread, name="other")
        thread.start()
        thread.join()
        with trace.span("below"):
            pass
    trace.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    slices = {event["name"]: event for event in events if event["ph"] == "X"}
    assert slices.keys() == {"here", "below", "there"}
    here, below = slices["here"], slices["below"]
    assert here["args"] == {"of": "of this"}
    assert here["ts"] <= below["ts"] <= below["ts"] + below["dur"] <= here["ts"] + here["dur"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert names[here["tid"]] == names[below["tid"]] == "MainThread"
    assert names[slices["there"]["tid"]] == "other"


@pytest.mark.parametrize("jobs", [1, 2, 9])
def test_a_conversion_shows_every_stage_of_every_shard(model_dir, tmp_path, jobs):
    convert_checkpoint(model_dir, jobs=jobs, trace=tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    stages = {event["name"] for event in events if event["ph"] == "X"}
    assert {"plan", "shard", "read", "hash", "awq_weight", "write", "publish"} <= stages
    shards = [event["args"]["of"] for event in events if event["name"] == "shard"]
    assert len(shards) == len(set(shards)) == 3


def test_a_trace_is_written_when_the_run_fails_too(tmp_path):
    with pytest.raises(KeyError), written_to(tmp_path / "t.json") as trace, trace.span("x"):
        raise KeyError
    assert "x" in (tmp_path / "t.json").read_text()


def test_no_path_is_no_trace():
    with written_to(None) as trace, trace.span("x"):
        assert trace is NO_TRACE
    assert not NO_TRACE.spans


def test_a_trace_that_cannot_be_written_names_the_file(tmp_path):
    with pytest.raises(UnwritableFileError, match=r"absent/t\.json: the trace cannot be written"):
        Trace().write(tmp_path / "absent" / "t.json")


def test_a_load_shows_its_stages(model_dir, tmp_path):
    load(model_dir, trace=tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    stages = {event["name"] for event in events if event["ph"] == "X"}
    assert {"open the entries", "build the model", "tokenizer", "place the weights"} <= stages
