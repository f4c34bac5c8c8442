"""The benchmark runs: once at toy size, so that it cannot rot; its figures are not looked at."""

from __future__ import annotations

import json

import pytest

from tests.benchmarks.end_to_end.measure import stages
from tests.benchmarks.end_to_end.run import main
from tests.benchmarks.end_to_end.trace_picture import rows_of
from tests.benchmarks.simulation import scale
from tests.benchmarks.whole_model import cores
from tests.benchmarks.whole_model import run as whole_model
from tests.benchmarks.whole_model.sweep import Row, Sweep


@pytest.mark.long  # 25 s of imports in subprocesses; CI runs the command itself
def test_every_row_is_measured_at_toy_size(tmp_path, capsys):
    assert main(["--toy", "--work", str(tmp_path), "--json", str(tmp_path / "rows.json")]) == 0
    found = json.loads((tmp_path / "rows.json").read_text())
    whats = [row["what"] for row in found["rows"]]
    for word in ("repack", "quantize", "plan", "cold convert", "not in the page cache", "1 shard",
                 "warm load", "first load", "no-op", "changed", "peak memory"):  # fmt: skip
        assert any(word in what for what in whats), word
    assert all(row["figure"] > 0 for row in found["rows"] if row["unit"] == "x")
    assert {"read", "hash", "write"} <= found["convert"]["convert, jobs 1"][0]["stages"].keys()
    assert "one of 30 shards changed, 1 converted" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_stages_are_summed_without_those_inside_them(tmp_path):
    events = [
        {"ph": "X", "tid": 0, "name": name, "ts": start * 1e6, "dur": seconds * 1e6}
        for name, start, seconds in (("in", 1, 2), ("out", 0, 4), ("in", 3, 0.5), ("out", 5, 1))
    ]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    assert stages(tmp_path / "trace.json") == {"out": 2.5, "in": 2.5}


@pytest.mark.long
@pytest.mark.timeout(600)  # minutes of rates and subprocesses
def test_the_scale_table_has_every_model_site_and_case(tmp_path, capsys):
    assert scale.main(["--toy", "--work", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("predicted" in line and "measured" in line for line in lines) == 11
    rows = [line for line in lines if "limit:" in line]
    assert len(rows) == 2 * 4 * 4
    assert list(tmp_path.iterdir()) == []


def test_a_trace_has_a_row_for_each_thread_in_order_of_start():
    names = [{"ph": "M", "tid": n, "args": {"name": name}} for n, name in enumerate("ab")]
    slices = [
        {"ph": "X", "tid": tid, "name": "hash", "ts": start, "dur": 5e5}
        for tid, start in ((0, 3e6), (1, 1e6), (0, 2e6))
    ]
    rows = rows_of([*names, *slices])
    assert list(rows) == ["b", "a"]
    assert rows["a"] == {"hash": [(2, 0.5), (3, 0.5)]}


def test_a_whole_model_is_converted_at_toy_size(tmp_path, capsys):
    options = "--toy --rounds 1 --jobs 1 2 --executors thread --threads 1"
    assert whole_model.main([*options.split(), "--work", str(tmp_path)]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].removeprefix("| ") for row in rows] == [
        "cp -r",
        "convert 2 of 2 shards, 1 jobs, thread",
        "cp -r",
        "convert 2 of 2 shards, 2 jobs, thread",
        "convert 0 of 2 shards, 2 jobs, thread",
        "cache verify",
        "read by 1 threads",
        "read by 1 processes",
        "convert 1 of 2 shards, 2 jobs, thread",
    ]
    assert rows[1][-1] == rows[3][-1] != rows[4][-1]
    assert all(int(row[4]) >= int(row[5]) > 5 for row in rows if "convert" in row[0])


@pytest.mark.long  # seconds of imports in subprocesses
def test_first_loads_of_a_whole_model_are_measured(tmp_path, capsys):
    options = "--toy --rounds 1 --jobs 1 --threads 1 --loads"
    assert whole_model.main([*options.split(), "--work", str(tmp_path)]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[-3:]]
    found = [row[0].removeprefix("| ") for row in rows]
    assert found[:2] == ["convert 2 of 2 shards, 1 jobs, auto", "imports"]
    assert found[2].startswith("first load; without imports ")


def test_conversions_with_different_entries_are_an_error(tmp_path, capsys, monkeypatch):
    made = [Row("cp -r", 1), Row("convert", 1, entries="a"), Row("convert", 1, entries="b")]
    monkeypatch.setattr(Sweep, "conversions", lambda *_: made)
    monkeypatch.setattr(Sweep, "reruns", lambda *_: [])
    assert whole_model.main(["--toy", "--work", str(tmp_path)]) == 1
    assert "different entries" in capsys.readouterr().err


def test_the_rates_of_several_processes_are_added(tmp_path, capsys):
    options = "--processes 1 2 --seconds 0 --delay 0 --size 32768"
    assert cores.main([*options.split(), "--work", str(tmp_path)]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].removeprefix("| ") for row in rows] == list(cores.KINDS)
    assert all(len(row) == 3 for row in rows)
    assert list(tmp_path.iterdir()) == []
