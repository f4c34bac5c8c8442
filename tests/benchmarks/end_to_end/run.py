"""Runs the whole benchmark: makes its inputs, prints every figure beside its goal.

    python -m tests.benchmarks.end_to_end.run [--layers 8] [--rounds 3] [--work DIR]
        [--json FILE] [--png FILE]

Every figure is a ratio of things measured in this run, in turn, the median of the rounds: machines
differ and drift. 8 layers with the shapes of a 70B are 4.0 GB; that takes 12 minutes and 12 GB of
free space. `--toy` runs every row once on a few megabytes, in seconds; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.end_to_end.checkpoint import TOY, make_checkpoint
from tests.benchmarks.end_to_end.measure import Bench
from tests.benchmarks.end_to_end.picture import draw
from tests.benchmarks.end_to_end.rows import (
    as_json,
    convert_rows,
    load_rows,
    plan_row,
    quantize_row,
    repack_rows,
    shard_rows,
)


def machine() -> str:
    """What the figures were taken on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{os.cpu_count()} cores, {memory:.0f} GB, {platform.system()} {platform.machine()}"


def main(argv: list[str] | None = None) -> int:
    """Reads the command line, runs everything, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pause", type=float, default=5, help="seconds before every process")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--work", type=Path, help="where gigabytes may be written")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--png", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    sizes = TOY if arguments.toy else {"layers": arguments.layers}
    with tempfile.TemporaryDirectory(dir=arguments.work) as made:
        bench = Bench(
            Path(made), *((0, 1) if arguments.toy else (arguments.pause, arguments.rounds))
        )
        model = bench.work / "model"
        make_checkpoint(model, shards=6, **sizes)
        os.sync()
        size = sum(path.stat().st_size for path in model.iterdir()) / 1e9
        title = f"{size:.1f} GB, 6 shards; {machine()}"
        print(title)
        shapes = [(512, 1024)] if arguments.toy else [(8192, 28_672), (28_672, 8192)]
        rows = repack_rows(shapes, bench.rounds)
        rows.append(quantize_row(*(256, 512) if arguments.toy else (12_800, 8192), bench.rounds))
        rows.append(plan_row())
        found, measured = convert_rows(bench, model)
        found_loads, measured["public loader"] = load_rows(
            bench, model, measured["convert, jobs 2"]
        )
        rows += found + found_loads
        rows += shard_rows(bench, sizes)
    for row in rows:
        print(row.line())
    if arguments.json:
        arguments.json.write_text(as_json(rows, measured))
    if arguments.png:
        draw(measured, title, arguments.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
