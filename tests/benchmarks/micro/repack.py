"""Prints how fast each repack function is, beside memcpy and beside the public loader's functions.

    python -m tests.benchmarks.micro.repack [--rounds 7] [--json FILE]

Speeds of a shared machine drift, so every round runs memcpy of the packed words, then every
function, and the table gives medians of ratios within a round. The loader's functions take seconds
and gigabytes a matrix, so they run once.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from paroquant.inference.backends.mlx import load as public

from paroquant_stream.transform import repack

SHAPES = ((8192, 28_672), (28_672, 8192))  # inputs and outputs of a 70B's gate_proj and down_proj
GROUP = 128
Functions = dict[str, Callable[[], object]]


def drain(qweight: np.ndarray, first: int = 0, last: int | None = None) -> None:
    """Repacks and drops every stripe."""
    for _ in repack.awq_stripes(qweight, first, last):
        pass


def drain_in_threads(qweight: np.ndarray) -> None:
    """Repacks the two halves of the rows in a thread each."""
    middle = qweight.shape[1] // 2 * 8
    halves = [(0, middle), (middle, None)]
    threads = [threading.Thread(target=drain, args=(qweight, *half)) for half in halves]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def weights(words: np.ndarray, inputs: int, outputs: int) -> Functions:
    """What is timed on the packed weight, by name; each handles all of `words`."""
    copy = np.empty_like(words)
    whole = np.empty_like(words).reshape(inputs, outputs // 8)
    awq = words.reshape(inputs, outputs // 8)
    native = words.view(np.int16).reshape(outputs // 4, inputs)

    def awq_into_an_array() -> None:
        row, target = 0, whole.reshape(outputs, inputs // 8)
        for stripe in repack.awq_stripes(awq):
            target[row : row + len(stripe)] = stripe
            row += len(stripe)

    return {
        "memcpy": lambda: np.copyto(copy, words),
        "awq_stripes": lambda: drain(awq),
        "awq_stripes, 2 threads": lambda: drain_in_threads(awq),
        "awq_stripes into an array": awq_into_an_array,
        "native_weight": lambda: repack.native_weight(native),
        "legacy_weight": lambda: repack.legacy_weight(native),
    }


def groups(rng: np.random.Generator, inputs: int, outputs: int) -> tuple[Functions, Functions]:
    """What is timed on scales and zeros, ours and the loader's."""
    scales = rng.uniform(0.001, 0.02, (inputs // GROUP, outputs)).astype(np.float16)
    qzeros = rng.integers(0, 2**32, (inputs // GROUP, outputs // 8), np.uint32)
    ours: Functions = {
        "awq_biases": lambda: repack.awq_biases(scales, qzeros),
        "group_scales": lambda: repack.group_scales(scales),
    }

    def loader() -> np.ndarray:
        product = -scales.astype(np.float32) * public._unpack_and_reorder(qzeros).astype(np.float32)
        return product.astype(np.float16).T.copy()

    return ours, {"awq_biases": loader, "group_scales": scales.T.copy}


def seconds(function: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(inputs: int, outputs: int, rounds: int) -> list[dict[str, object]]:
    """A row for each function on one shape."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, inputs * outputs // 8, np.uint32)
    ours, loaders = groups(rng, inputs, outputs)
    timed = weights(words, inputs, outputs) | ours
    runs = [{name: seconds(function) for name, function in timed.items()} for _ in range(rounds)]
    awq = words.reshape(inputs, outputs // 8)
    native = words.view(np.int16).reshape(outputs // 4, inputs)
    public_seconds = {
        "awq_stripes": seconds(lambda: public._pack_mlx(public._unpack_and_reorder(awq).T)),
        "native_weight": seconds(lambda: public._pack_mlx(public._unpack_int16_nibbles(native))),
    }
    for name, function in loaders.items():
        public_seconds[name] = median(seconds(function) for _ in range(rounds))
    return [
        {
            "inputs": inputs,
            "outputs": outputs,
            "function": name,
            "milliseconds": 1e3 * median(run[name] for run in runs),
            "of_memcpy": median(run["memcpy"] / run[name] for run in runs),
            "times_public": public_seconds[kind] / median(run[name] for run in runs)
            if (kind := name.split(",")[0]) in public_seconds
            else None,
        }
        for name in timed
    ]


def main() -> int:
    """Reads the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    arguments = parser.parse_args()
    rows = [row for shape in SHAPES for row in measure(*shape, arguments.rounds)]
    print(f"{'inputs x outputs':18}{'function':28}{'ms':>9}{'of memcpy':>11}{'x public':>10}")
    for row in rows:
        shape = f"{row['inputs']} x {row['outputs']}"
        times = f"{row['times_public']:10.1f}" if row["times_public"] else f"{'':10}"
        print(
            f"{shape:18}{row['function']:28}{row['milliseconds']:9.3f}{row['of_memcpy']:11.3f}"
            + times
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
