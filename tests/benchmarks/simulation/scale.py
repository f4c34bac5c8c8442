"""What a 70B and a 397B cost on machines that are not here: by formula and by simulation.

    python -m tests.benchmarks.simulation.scale [--rounds 3] [--work DIR] [--toy]

Sizes come from the plan of made-up headers, rates from this machine in this run. The simulation is
first checked on conversions that fit here: predicted beside measured, medians of the rounds.
`--toy` checks it on a few megabytes, whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil, inf
from pathlib import Path

from paroquant_stream.files.tensor_writer import file_size
from paroquant_stream.plan.task import Task
from paroquant_stream.store.manifest import EntryRecord, Manifest
from tests.benchmarks.end_to_end.measure import Bench, timed
from tests.benchmarks.end_to_end.rates import Machine, machine_text, measure_machine
from tests.benchmarks.end_to_end.run import machine
from tests.benchmarks.simulation.calibrate import calibrate
from tests.benchmarks.simulation.flow import Host, Rates, Reading, convert, load, slices
from tests.benchmarks.simulation.fluid import Shared, Simulation
from tests.benchmarks.simulation.shapes import Model, dense, moe, on_paper

GB = 1e9
SSD_READ, SSD_WRITE, SSD_READER = 6 * GB, 5 * GB, 3.5 * GB  # one reader alone gets less
LINK = 1.17 * GB  # of 10 GbE, after Ethernet, IP and TCP headers
STAT = 0.001  # s, of a file on a server
P_CORES = 8  # of a Mac's 12; its 4 small ones and the jobs beyond 8 are left out


@dataclass(frozen=True)
class Site:
    """Where a conversion runs: hosts, each with its cores and its share of disk or network."""

    name: str
    disk: str
    cores: float
    jobs: int
    read: float
    reader: float
    write: float
    hosts: int = 1
    links: int = 1
    backed: bool = True
    stat: float = 0

    def make(self) -> list[Host]:
        """Its hosts, for one simulation."""
        streams = 1 if self.reader == inf else ceil(self.read / self.reader)
        sources = [Shared(self.read, self.reader, streams) for _ in range(self.links)]
        targets = [Shared(self.write, at_once=1) for _ in range(self.links)]
        return [
            Host(self.jobs, Shared(self.cores, each=1), sources[i % self.links],
                 targets[i % self.links], self.backed)
            for i in range(self.hosts)
        ]  # fmt: skip


def sites(here: Machine) -> list[Site]:
    """Those of the table."""
    mac = Site("Mac", "read", P_CORES, P_CORES, SSD_READ, SSD_READER, SSD_WRITE)
    hosts = [
        Site(
            f"4 hosts, {n} x 10 GbE", "network", P_CORES, P_CORES, LINK, inf, LINK, 4, n, stat=STAT
        )
        for n in (1, 4)
    ]
    own = Site("here", "read", here.cores, 2, here.read, inf, here.writes, backed=False)
    return [mac, *hosts, own]


@dataclass(frozen=True)
class Estimate:
    """One cell of the table."""

    terms: dict[str, float]
    """Seconds, of which the largest counts."""
    always: dict[str, float]
    """Seconds that come before or after."""
    simulated: float

    @property
    def seconds(self) -> float:
        """By formula."""
        return max(self.terms.values()) + sum(self.always.values())

    @property
    def limit(self) -> str:
        """The largest term of all."""
        every = self.terms | self.always
        return max(every, key=every.__getitem__)

    def sum_text(self) -> str:
        """The arithmetic."""
        terms = ", ".join(f"{name} {value:.1f}" for name, value in self.terms.items())
        always = " + ".join(f"{name} {value:.2f}" for name, value in self.always.items())
        return f"max({terms}) + {always}"


def core_seconds(tasks: tuple[Task, ...], rates: Rates, known: bool = False) -> dict[str, float]:
    """Core-seconds of every stage. `known`: each shard is hashed before it is converted."""
    sums: dict[str, float] = defaultdict(float)
    for task in tasks:
        reading = Reading(alone=not known)
        if known:
            sums["read"] += task.size / rates.read
            sums["hash"] += task.size / rates.hash
        for step in slices(task, reading, rates):
            for name, value in (*step.seconds.items(), (step.stage, step.work),
                                ("seal", step.out / rates.seal)):  # fmt: skip
                sums[name] += value
    return sums


def heaviest(sums: dict[str, float]) -> str:
    """The stage that takes most of the cores."""
    name = max(sums, key=sums.__getitem__)
    return f"cores ({name} {100 * sums[name] / sum(sums.values()):.0f} %)"


def cold(model: Model, site: Site, here: Machine) -> Estimate:
    """Everything is converted; task i on host i modulo the hosts."""
    rates, hosts, simulation = here.rates, site.make(), Simulation()
    for index, host in enumerate(hosts):
        part = model.tasks[index :: site.hosts]
        simulation.start(convert(simulation, host, part, rates, model.plan_seconds, known=False))
    sums = core_seconds(model.tasks, rates)
    terms = {
        site.disk: model.size / site.read / site.links,
        "write" if site.disk == "read" else "network, out": model.entries / site.write / site.links,
        heaviest(sums): sum(sums.values()) / site.cores / site.hosts,
    }
    always = {"start": rates.start, "plan": model.plan_seconds, "fsync": rates.fsync}
    return Estimate(terms, always, simulation.run())


def changed(model: Model, site: Site, here: Machine) -> Estimate:
    """The largest shard has other bytes of the same size: hashed, then converted, on one host."""
    rates, host, simulation = here.rates, site.make()[0], Simulation()
    task = max(model.tasks, key=lambda task: task.size)
    simulation.start(convert(simulation, host, [task], rates, model.plan_seconds, known=True))
    sums = core_seconds((task,), rates, known=True)
    first = task.size / min(site.read, site.reader)
    terms = {
        heaviest(sums): sum(sums.values()),
        "write" if site.disk == "read" else "network, out": file_size(task.outputs) / site.write,
    }
    always = {site.disk: first, "start": rates.start, "plan": model.plan_seconds,
              "fsync": rates.fsync}  # fmt: skip
    return Estimate(terms, always, simulation.run())


def nothing(model: Model, site: Site, here: Machine) -> Estimate:
    """A stat for each shard, and the manifest, whose size is the model's."""
    always = {
        "imports": here.nothing,
        "manifest": manifest_seconds(model),
        "stats": site.stat * len(model.tasks),
    }
    return Estimate({"read": 0.0}, always, sum(always.values()))


def manifest_seconds(model: Model) -> float:
    """What decoding a manifest of this model takes here."""
    records = tuple(
        EntryRecord(task.shard, "0" * 64, task.size, (), "0" * 64, "0" * 64, "0" * 32,
                    file_size(task.outputs), tuple(task.outputs)) for task in model.tasks
    )  # fmt: skip
    data = Manifest(model.name, "0" * 64, "", "AUTOAWQ", 4, 128, records).encode()
    return sorted(timed(lambda: Manifest.decode(data)) for _ in range(3))[1]


def warm(model: Model, site: Site, here: Machine) -> Estimate:
    """Every host loads all entries at once."""
    rates, simulation = here.rates, Simulation()
    for host in site.make():
        simulation.start(load(simulation, host, model.entries, rates))
    cost = 1 / rates.read + (0 if site.backed else rates.fresh)
    terms = {
        site.disk: model.entries * site.hosts / site.links / site.read,
        "cores (read)": model.entries * cost / min(site.cores, 4),
    }
    return Estimate(terms, {"imports": rates.load}, simulation.run())


SCENARIOS: dict[str, Callable[[Model, Site, Machine], Estimate]] = {
    "cold": cold, "one shard changed": changed, "no change": nothing, "warm load": warm
}  # fmt: skip


def report(model: Model, here: Machine) -> Iterator[str]:
    """The lines of one model."""
    sums = core_seconds(model.tasks, here.rates)
    sizes = [task.size / GB for task in model.tasks]
    yield (
        f"\n{model.name}: {model.tensors:,} tensors, {model.size / GB:.1f} GB in, "
        f"{model.entries / GB:.1f} GB out, {len(sizes)} shards of {min(sizes):.2f} to "
        f"{max(sizes):.2f} GB, largest linear {model.largest / 1e6:.0f} MB, "
        f"plan {model.plan_seconds:.2f} s"
    )
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in sums.items() if seconds)
    yield f"  core-seconds: {stages}; {sum(sums.values()):.0f} in all"
    for site in sites(here):
        for name, scenario in SCENARIOS.items():
            found = scenario(model, site, here)
            yield (
                f"  {site.name:16} {name:18} {found.seconds:7.1f} s  simulated "
                f"{found.simulated:7.1f} s  limit: {found.limit:24} {found.sum_text()}"
            )


def main(argv: list[str] | None = None) -> int:
    """Reads the command line, measures, checks the simulation, prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pause", type=float, default=5, help="seconds before every process")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--work", type=Path, help="where gigabytes may be written")
    arguments = parser.parse_args(argv)
    models = [on_paper("70B", dense(), 9), on_paper("397B", moe(), 42)]
    with tempfile.TemporaryDirectory(dir=arguments.work) as made:
        pause, rounds = (0, 1) if arguments.toy else (arguments.pause, arguments.rounds)
        bench = Bench(Path(made), pause, rounds)
        print(f"{machine()}; load {Path('/proc/loadavg').read_text().split()[0]}")
        here = measure_machine(bench, [model.plan for model in models])
        print(machine_text(here))
        calibrate(bench, here, arguments.toy)
    for model in models:
        print("\n".join(report(model, here)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
