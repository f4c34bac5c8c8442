"""Whether the simulation is right: conversions that fit on this machine, predicted and measured."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

from paroquant_stream.checkpoint.checkpoint import open_checkpoint
from paroquant_stream.checkpoint.config import ModelConfig
from paroquant_stream.plan.task import Task
from tests.benchmarks.end_to_end.checkpoint import Spec, as_saved, tensors, write_checkpoint
from tests.benchmarks.end_to_end.measure import LOAD, Bench, Run, python
from tests.benchmarks.end_to_end.rates import Machine, busy_seconds, wait_for_quiet
from tests.benchmarks.simulation.flow import Host, convert, load
from tests.benchmarks.simulation.fluid import Shared, Simulation
from tests.benchmarks.simulation.shapes import Model, moe, planned

LLAMA = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 12_800,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
OTHERS = "cores that others took"
Check = tuple[str, float, list[Run]]


def calibrate(bench: Bench, here: Machine, toy: bool) -> list[float]:
    """Prints predicted beside measured; returns the errors, predicted over measured less one."""
    layers = 1 if toy else 4
    vocab, hidden, inner, kv = (256, 512, 1024, 256) if toy else (12_800, 8192, 28_672, 1024)
    specs = list(tensors(layers, "AUTOAWQ", vocab, hidden, inner, kv))
    config = LLAMA | {"num_hidden_layers": layers, "vocab_size": vocab, "hidden_size": hidden}
    config |= {"intermediate_size": inner} | ({"num_attention_heads": 4} if toy else {})
    config |= {"num_key_value_heads": 2} if toy else {}
    experts = moe(1, 4 if toy else 256, vocab)
    count = {"num_experts": 4 if toy else 256}
    errors = []
    for what, predicted, runs in checks(bench, here, specs, config, experts, count):
        measured = median(run.wall for run in runs)
        errors.append(predicted / measured - 1)
        walls = " ".join(f"{run.wall:.2f}" for run in runs)
        others = max(run.stages[OTHERS] for run in runs)
        print(
            f"  {what:36} predicted {predicted:6.2f} s, measured {measured:6.2f} s, "
            f"{100 * errors[-1]:+.0f} % ({walls}; others took up to {others:.1f} cores)",
            flush=True,
        )
    return errors


def checks(
    bench: Bench, here: Machine, specs: Sequence[Spec], config: dict[str, object],
    experts: Sequence[Spec], count: dict[str, object],
) -> Iterator[Check]:  # fmt: skip
    """What is checked: shards, jobs, a cold source, the usual order, experts, a load."""
    for shards, order, of in ((6, None, "6 shards"), (1, None, "1 shard"),
                              (6, as_saved, "6 shards, saved by type")):  # fmt: skip
        path = bench.work / "model"
        write_checkpoint(path, list(specs), config, shards=shards, order=order)
        model = read_plan(path)
        for jobs in (1, 2):
            yield cold(bench, here, path, model, f"{of}, jobs {jobs}", jobs)
        if of == "6 shards":
            yield cold(bench, here, path, model, "6 shards, jobs 2, source not cached", 2, False)
            yield changed(bench, here, path, model)
            yield warm(bench, here, path, model)
        shutil.rmtree(path)
    write_checkpoint(path, list(experts), count, shards=2, order=as_saved)
    model = read_plan(path)
    for jobs in (1, 2):
        yield cold(bench, here, path, model, f"experts, 2 shards, jobs {jobs}", jobs)
    shutil.rmtree(path)


def read_plan(path: Path) -> Model:
    """The plan of a checkpoint that is there."""
    return planned(path.name, open_checkpoint(ModelConfig.read(path), lambda _: False).headers())


def quietly(bench: Bench, before: Callable[[], None], run: Callable[[], Run]) -> Run:
    """A run after `before`; what others took of the cores meanwhile is in its stages."""
    before()
    if bench.pause:
        wait_for_quiet()
    busy = busy_seconds()
    one = run()
    one.stages[OTHERS] = (busy_seconds() - busy - one.user - one.system) / one.wall
    return one


def cold(
    bench: Bench, here: Machine, path: Path, model: Model, what: str, jobs: int, cached: bool = True
) -> Check:
    """A conversion into an empty cache."""
    runs = []
    warm, away = ([path], []) if cached else ([], [path])
    for _ in range(bench.rounds):
        runs.append(
            quietly(
                bench, lambda: bench.settle(*warm, cold=away), lambda: bench.convert(path, jobs)
            )
        )
    return what, simulate(here, model.tasks, jobs, model.plan_seconds, cached=cached), runs


def changed(bench: Bench, here: Machine, path: Path, model: Model) -> Check:
    """One shard has other bytes."""
    task, runs = model.tasks[2], []
    bench.convert(path, 2, keep=True)

    def change() -> None:
        with (path / task.shard).open("r+b") as file:
            file.seek(-1, 2)
            byte = file.read(1)[0]
            file.seek(-1, 2)
            file.write(bytes([(byte + 1) % 256]))  # each time content that is not in the store
        bench.settle(path)

    for _ in range(bench.rounds):
        runs.append(quietly(bench, change, lambda: bench.reconvert(path, 2)))
    seconds = simulate(here, [task], 2, model.plan_seconds, known=True)
    return "6 shards, one changed, jobs 2", seconds, runs


def warm(bench: Bench, here: Machine, path: Path, model: Model) -> Check:
    """A load from the cache that `changed` left; removes it."""
    runs = []
    for _ in range(bench.rounds):
        runs.append(
            quietly(
                bench, lambda: bench.settle(bench.cache), lambda: python(LOAD, path, bench.cache)
            )
        )
    shutil.rmtree(bench.cache)
    simulation = Simulation()
    simulation.start(load(simulation, host_of(here, 2), model.entries, here.rates))
    return "6 shards, warm load", simulation.run(), runs


def host_of(here: Machine, jobs: int, cached: bool = True) -> Host:
    """This machine, for one simulation."""
    source = None if cached else Shared(here.read, at_once=1)
    return Host(jobs, Shared(here.cores, each=1), source, Shared(here.writes, here.write))


def simulate(
    here: Machine, tasks: Sequence[Task], jobs: int, plan: float, cached: bool = True,
    known: bool = False,
) -> float:  # fmt: skip
    """Seconds of a conversion on this machine."""
    simulation = Simulation()
    host = host_of(here, jobs, cached)
    simulation.start(convert(simulation, host, tasks, here.rates, plan, known))
    return simulation.run()
