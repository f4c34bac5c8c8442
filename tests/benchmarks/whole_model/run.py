"""Converts a checkpoint with the shapes and the size of a 70B, by numbers of jobs and executors.

    python -m tests.benchmarks.whole_model.run --work DIR [--jobs 16 8 4 2] [--executors auto]
        [--layers 80] [--rounds 3] [--stages] [--loads]

It makes the checkpoint in DIR/model unless that is there: 39.9 GB in 9 shards, as the safetensors
library saves them. DIR needs three times that; in a tmpfs, disks play no part. `cp -r` of the
checkpoint runs before every conversion. After the last one: no change, full verification beside
reading all, and a byte of one shard changed. It fails if two conversions made different entries.
`--loads` loads it with an empty cache too, with the last number of jobs, which needs mlx-lm and as
much memory again. `--toy` takes seconds; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.benchmarks.end_to_end.checkpoint import TOY, as_saved, make_checkpoint
from tests.benchmarks.end_to_end.measure import Bench
from tests.benchmarks.whole_model.sweep import HEAD, Sweep

SHARDS, VOCAB = 9, 128_256
PROCESSES = 8  # that make the checkpoint, a shard each


@contextmanager
def workplace(given: Path | None) -> Iterator[Path]:
    """The directory, or a temporary one."""
    if given:
        yield given
    else:
        with tempfile.TemporaryDirectory() as made:
            yield Path(made)


def main(argv: list[str] | None = None) -> int:
    """Reads the command line, runs everything, prints the table."""
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="where gigabytes may be written")
    parser.add_argument("--jobs", type=int, nargs="+", default=[min(16, cores)])
    parser.add_argument("--executors", nargs="+", default=["auto"])
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pause", type=float, default=0, help="seconds before every process")
    parser.add_argument("--threads", type=int, default=cores, help="that read all entries")
    parser.add_argument("--stages", action="store_true", help="print those of every conversion")
    parser.add_argument("--loads", action="store_true", help="measure first loads too")
    parser.add_argument("--toy", action="store_true")
    arguments = parser.parse_args(argv)
    sizes = TOY if arguments.toy else {"layers": arguments.layers, "vocab": VOCAB}
    with workplace(arguments.work) as work:
        model = work / "model"
        if not (model / "config.json").exists():
            shards = 2 if arguments.toy else SHARDS
            make_checkpoint(model, shards=shards, order=as_saved, processes=PROCESSES, **sizes)
        bench = Bench(work, arguments.pause, arguments.rounds)
        sweep = Sweep(bench, model, arguments.threads, arguments.stages)
        print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|")
        found = set()
        for row in sweep.conversions(arguments.jobs, arguments.executors):
            print(row.line(), flush=True)
            found.add(row.entries)
        for row in sweep.reruns(arguments.jobs[-1], arguments.executors[-1]):
            print(row.line(), flush=True)
        for row in sweep.loads(arguments.jobs[-1]) if arguments.loads else ():
            print(row.line(), flush=True)
    if len(found - {""}) > 1:
        print("the conversions made different entries", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
