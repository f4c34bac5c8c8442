"""A drop that is stopped at any call: one more run completes the model, whatever stopped it."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.robustness import cuts, faults, tracer
from tests.robustness.cuts import write_tiny
from tests.robustness.harness import Model, completes, scratch, undisturbed
from tests.robustness.sweep import FAULTS, PLACES, STARTS, Setting, every, reasons, sweep, table

HOW = settings(
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def assert_completed(tallies, least: int) -> None:
    """Every cut point fired, and after each the next run completed the model."""
    fired = sum(tally.fired for tally in tallies)
    assert fired >= least, f"only {fired} faults fired"
    bad = [tally for tally in tallies if tally.incomplete or tally.untidy]
    assert not bad, f"\n{table(tallies)}\n{reasons(bad)}"


@pytest.mark.parametrize(
    ("name", "place"), [("a cycle", "cache"), ("by type, scales first", "in place")]
)
def test_killed_at_a_change_of_the_disk_the_next_run_completes(name, place):
    setting = Setting(name, place=place, start="converted")
    assert_completed([sweep(setting, every(7, first=16))], 5)


def test_killed_while_workers_convert_the_next_run_completes():
    assert_completed([sweep(Setting("a ring", jobs=3), every(20, first=40))], 3)


@pytest.mark.parametrize("fault", ["tear", "SIGTERM", "ENOSPC", "ENOSPC from then on"])
def test_stopped_otherwise_the_next_run_completes(fault):
    first, stride = (4, 3) if fault == "tear" else (36, 30)
    assert_completed([sweep(Setting("a chain", fault=fault), every(stride, first))], 2)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", list(cuts.CUTS))
def test_killed_at_every_call_the_next_run_completes(name, place, start, capsys):
    setting = Setting(name, place=place, start=start, calls=faults.CALLS)
    show([tally := sweep(setting, every())], capsys)
    assert_completed([tally], 60)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("jobs", [1, 2, 4])
@pytest.mark.parametrize("name", cuts.PUBLIC)
def test_every_public_checkpoint_is_completed_after_any_kill(name, jobs, capsys):
    stride = 2 if jobs == 1 else 3
    all_places = [Setting(name, jobs, place) for place in ("cache", "in place")]
    show(tallies := [sweep(setting, every(stride)) for setting in all_places], capsys)
    assert_completed(tallies, 20)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "kill"])
@pytest.mark.parametrize("jobs", [1, 4])
@pytest.mark.parametrize("name", ["a cycle", "a chain", "at random into 8", "one file"])
def test_whatever_stops_it_at_every_call_the_next_run_completes(name, jobs, fault, capsys):
    setting = Setting(name, jobs, fault=fault)
    if fault != "tear":
        setting = replace(setting, calls=faults.CALLS)
    show([tally := sweep(setting, every())], capsys)
    assert_completed([tally], 2)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fault", ["kill", "SIGTERM", "workers killed"])
def test_with_workers_in_other_processes_the_next_run_completes(fault, capsys):
    setting = Setting("a chain", 2, fault=fault, options=("--executor", "process"))
    show([tally := sweep(setting, every(3))], capsys)
    assert_completed([tally], 10)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("between", ["load", "convert", "prune", "kill"])
@pytest.mark.parametrize("name", ["a cycle", "a chain", "by size", "at random"])
def test_whatever_comes_between_the_next_run_completes(name, between, capsys):
    show([tally := sweep(Setting(name, between=between), every())], capsys)
    assert_completed([tally], 20)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["by size", "a cycle"])
def test_killed_twice_at_any_calls_the_next_run_completes(name):
    """First at a removal, then at each call of the next run."""
    setting, wrong, fired = Setting(name), [], 0
    with scratch() as place:
        right = undisturbed(setting.model(place / "whole"))
        model, log = setting.model(place / "log"), place / "log.txt"
        assert model.drop(model.watched(do="log", log=log)).code == 0
        calls = [line.split("\t")[1:3] for line in log.read_text().splitlines()]
        removals = [n for n, (call, path) in enumerate(calls, 1) if removes(call, path)]
        assert len(removals) >= 3
        for first in removals[:3]:
            for second in every():
                model = setting.model(place / f"{first} {second}")
                assert model.drop(model.watched(do="kill", at=first)).fired
                if not model.drop(model.watched(do="kill", at=second)).fired:
                    break
                fired += 1
                if not (verdict := completes(model, right)):
                    wrong.append(f"{first}, {second}: {verdict.why}")
                shutil.rmtree(model.directory.parent)
    assert fired > 100
    assert not wrong, f"{len(wrong)} of {fired}:\n" + "\n".join(wrong[:10])


def removes(call: str, path: str) -> bool:
    """Whether a call takes a shard's name away."""
    return call in ("rename", "unlink") and ".safetensors" in path and "/model/" in path


def show(tallies, capsys) -> None:
    """Prints the table also where the test passes."""
    with capsys.disabled():
        print("\n" + table(tallies), flush=True)


def generated(homes, jobs, in_place, fractions) -> list[str]:
    """What went wrong with a checkpoint of this cut, killed at these parts of its run."""
    wrong = []
    with scratch() as place:

        def made(name) -> Model:
            directory = write_tiny(place / name / "model", cuts.cut_at_random(homes))
            return Model(directory, None if in_place else place / name / "cache", jobs)

        whole = made("whole")
        right = undisturbed(whole)
        log = place / "log"
        assert whole.drop(whole.watched(do="log", log=log)).code == 0
        calls = len(log.read_text().splitlines())
        for number, fraction in enumerate(fractions):
            model = made(str(number))
            ended = model.drop(model.watched(do="kill", at=1 + int(fraction * calls)))
            if jobs == 1:
                assert ended.code == -9, "the kill did not fire"
            if not (verdict := completes(model, right)):
                wrong.append(f"{ended.fired}: {verdict.why}")
    return wrong


CASES = {
    "homes": st.lists(st.integers(0, 4), min_size=2, max_size=33),
    "jobs": st.sampled_from([1, 1, 2, 4]),
    "in_place": st.booleans(),
}


@settings(HOW, max_examples=2, phases=[Phase.generate])
@given(**CASES, fractions=st.lists(st.floats(0.5, 0.99), min_size=2, max_size=2))
def test_any_cut_is_completed_after_a_kill(homes, jobs, in_place, fractions):
    assert generated(homes, jobs, in_place, fractions) == []


@pytest.mark.long
@pytest.mark.timeout(3600)
@settings(HOW, max_examples=200)
@given(**CASES, fractions=st.lists(st.floats(0, 0.999), min_size=6, max_size=6))
def test_two_hundred_cuts_are_completed_after_a_kill(homes, jobs, in_place, fractions):
    assert generated(homes, jobs, in_place, fractions) == []


def traced(name: str, calls, error: str = "") -> tuple[int, list[str]]:
    """How many faults by strace fired, and what went wrong then."""
    fired, wrong = 0, []
    with scratch() as place:
        right = undisturbed(Setting(name).model(place / "right"))
        for call in calls:
            found = tracer.points(Setting(name).model(place / f"log {call}"), place / call, call)
            for point in found:
                run = place / f"{call} {point.number}"
                model = Setting(name).model(run)
                if error:
                    ended = tracer.failed(model, run / "log", point, error)
                    assert ended, f"did not fire: {point}"
                    if ended.code not in (0, 1) or "Traceback" in ended.err:
                        wrong.append(f"{point}: untidy, {ended.message}")
                else:
                    assert tracer.killed(model, run / "log", point), f"did not fire: {point}"
                fired += 1
                if not (verdict := completes(model, right)):
                    wrong.append(f"{point}: {verdict.why}")
                shutil.rmtree(run)
    return fired, wrong


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("strace")
@pytest.mark.parametrize("call", list(tracer.CALLS))
@pytest.mark.parametrize("name", ["a cycle", "by size", "by type, scales first"])
def test_killed_inside_every_system_call_the_next_run_completes(name, call):
    fired, wrong = traced(name, [call])
    if not fired:
        pytest.skip(f"a drop makes no {call} on its files")
    assert not wrong, f"{len(wrong)} of {fired}:\n" + "\n".join(wrong)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("strace")
@pytest.mark.parametrize("error", ["ENOSPC", "EIO", "EROFS"])
@pytest.mark.parametrize("call", ["pwrite", "fsync", "rename", "openat", "fallocate", "unlink"])
def test_after_a_failed_system_call_the_next_run_completes(call, error):
    fired, wrong = traced("a cycle", [call], error=error)
    assert fired
    assert not wrong, f"{len(wrong)} of {fired}:\n" + "\n".join(wrong)


@pytest.mark.long
@pytest.mark.usefixtures("strace")
def test_the_hooks_see_every_change_that_strace_sees(place):
    """That a kill at every call of `os` is a kill at every change of a name."""
    model = Setting("a chain").model(place / "hooked")
    log = place / "log"
    assert model.drop(model.watched(do="log", log=log)).code == 0
    seen = [line.split("\t")[1] for line in log.read_text().splitlines()]
    for call, names in {"rename": {"rename", "replace"}, "unlink": {"unlink", "remove"}}.items():
        traced = Setting("a chain").model(place / call)
        tracer.points(traced, place / f"{call} log", call)
        made = sum(
            line.startswith(tuple(tracer.CALLS[call].split("|"))) and str(place / call) in line
            for file in tracer.logs(place / f"{call} log")
            for line in file.read_text().splitlines()
        )
        assert made
        assert made == sum(name in names for name in seen), call
