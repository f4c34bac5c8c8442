"""Runs the benchmark: conversion beside a copy, repacking beside memcpy, memory by shards.

    python tests/benchmarks/run.py [--layers 8] [--rounds 3] [--work DIR] [--json FILE]

Every figure is a ratio of two things measured in this run, one after the other, the median of the
rounds: machines differ and drift. Needs 4 x the checkpoint in free space (16 GB for 8 layers).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from checkpoint import make_checkpoint

from paroquant_stream.repack import awq_stripes

Row = dict[str, Any]


def timed(function: Callable[[], object]) -> float:
    """Seconds that `function` took."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def repack_rows(shapes: list[tuple[int, int]], rounds: int) -> list[Row]:
    """Repacking of AUTOAWQ weights beside memcpy and beside the public loader's functions."""
    from paroquant.inference.backends.mlx.load import _pack_mlx, _unpack_and_reorder

    rows = []
    for inputs, outputs in shapes:
        words = np.random.default_rng(0).integers(0, 2**32, (inputs, outputs // 8), np.uint32)
        copy = np.ones_like(words)

        def ours(words: np.ndarray = words) -> None:
            for _ in awq_stripes(words):
                pass

        pairs = [
            (timed(lambda w=words, c=copy: np.copyto(c, w)), timed(ours)) for _ in range(3 * rounds)
        ]
        signed = words.view(np.int32)  # whole: on a part its temporaries would fit into the caches
        theirs = median(
            timed(lambda w=signed: _pack_mlx(_unpack_and_reorder(w).T)) for _ in range(rounds)
        )
        mine = median(pair[1] for pair in pairs)
        rows.append(
            {
                "figure": f"repack AUTOAWQ {inputs}x{outputs}, one core",
                "GB/s": words.nbytes / mine / 1e9,
                "of memcpy": median(pair[0] / pair[1] for pair in pairs),
                "x paroquant": theirs / mine,
            }
        )
    return rows


def convert(model: Path, cache: Path, jobs: int) -> Row:
    """A cold conversion in its own process: its JSON with wall, user and system seconds."""
    shutil.rmtree(cache, ignore_errors=True)
    command = [sys.executable, "-m", "paroquant_stream.convert", str(model), "--json"]
    command += ["--jobs", str(jobs), "--cache-dir", str(cache)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, check=True)
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    shutil.rmtree(cache, ignore_errors=True)
    found: Row = json.loads(done.stdout)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    return found | {"wall": wall, "user": user, "system": system}


def copy(model: Path, target: Path) -> Row:
    """`cp -r` and sync of the checkpoint."""
    shutil.rmtree(target, ignore_errors=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(model), str(target)], check=True)
    subprocess.run(["sync", "-f", str(target)], check=True)
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    shutil.rmtree(target, ignore_errors=True)
    return {"wall": wall, "user": after.ru_utime - before.ru_utime,
            "system": after.ru_stime - before.ru_stime}  # fmt: skip


def convert_rows(model: Path, work: Path, rounds: int) -> list[Row]:
    """Cold conversions beside a copy of the same bytes, interleaved."""
    copy(model, work / "copy")  # the first touch of memory and page cache is nobody's figure
    measured: dict[str, list[Row]] = {"copy": [], "jobs 1": [], "jobs 2": []}
    for _ in range(rounds):
        measured["copy"].append(copy(model, work / "copy"))
        measured["jobs 1"].append(convert(model, work / "cache", 1))
        measured["jobs 2"].append(convert(model, work / "cache", 2))
    print_rounds(measured)
    rows = []
    for jobs in (1, 2):
        runs = measured[f"jobs {jobs}"]
        ratios = [run["wall"] / c["wall"] for run, c in zip(runs, measured["copy"], strict=True)]
        rows.append(
            {
                "figure": f"cold convert, --jobs {jobs}",
                "seconds": median(run["wall"] for run in runs),
                "copy seconds": median(run["wall"] for run in measured["copy"]),
                "of copy": median(ratios),
                "peak MB": max(run["peak_rss_bytes"] for run in runs) / 1e6,
            }
        )
    return rows


def print_rounds(measured: dict[str, list[Row]]) -> None:
    """Each round's seconds; a round whose system time is far above the median is marked."""
    usual = {name: median(run["system"] for run in runs) for name, runs in measured.items()}
    for name, runs in measured.items():
        for run in runs:
            mark = (
                "  <- system time far above the median" if run["system"] > 1.5 * usual[name] else ""
            )
            print(
                f"  {name:7} wall {run['wall']:6.2f}  user {run['user']:6.2f}  "
                f"system {run['system']:6.2f}{mark}"
            )


def memory_rows(work: Path, layers: int) -> list[Row]:
    """Peak memory of one worker for the same model in 1, 6 and 30 shards."""
    rows = []
    for shards in (1, 10, 30):
        make_checkpoint(work / "cut", layers=layers, shards=shards)
        run = convert(work / "cut", work / "cache", 1)
        shutil.rmtree(work / "cut")
        rows.append(
            {"figure": f"peak RSS, --jobs 1, {shards} shards", "MB": run["peak_rss_bytes"] / 1e6}
        )
    return rows


def no_op_row(model: Path, work: Path, rounds: int) -> Row:
    """A conversion with nothing to do beside the import of numpy and msgpack."""
    cache = work / "cache"
    command = [sys.executable, "-m", "paroquant_stream.convert", str(model), "--quiet"]
    command += ["--cache-dir", str(cache)]
    subprocess.run(command, check=True)
    imports = [sys.executable, "-c", "import numpy, msgpack"]
    pairs = [
        (timed(lambda: subprocess.run(command, check=True)),
         timed(lambda: subprocess.run(imports, check=True)))
        for _ in range(5 * rounds)
    ]  # fmt: skip
    shutil.rmtree(cache)
    return {
        "figure": "no-op convert",
        "seconds": median(pair[0] for pair in pairs),
        "of importing numpy, msgpack": median(pair[0] / pair[1] for pair in pairs),
    }


def main() -> int:
    """Reads the command line, runs everything, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="where gigabytes may be written")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as made:
        work = Path(made)
        model = work / "model"
        make_checkpoint(model, layers=arguments.layers)
        os.sync()
        rows = repack_rows([(8192, 28_672), (28_672, 8192)], arguments.rounds)
        rows += convert_rows(model, work, arguments.rounds)
        rows.append(no_op_row(model, work, arguments.rounds))
        shutil.rmtree(model)
        rows += memory_rows(work, arguments.layers)
    for row in rows:
        figures = "  ".join(
            f"{name} {value:.3g}" for name, value in row.items() if name != "figure"
        )
        print(f"{row['figure']:44} {figures}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
