"""A program that every rank of a group runs, and a function that starts two ranks here.

    mlx.launch -n 2 -- python -m tests.helpers.ranks OUT MODEL...

Each rank loads and splits every model, calls it, and writes OUT/<rank>.npz: `logits<i>`, and in
bytes `memory<i>`, `peak_memory<i>`, `peak_rss<i>` and `bytes_read<i>` of the load.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.paths import ROOT

TOKENS = [[5, 9, 17, 42, 3]]


class Rank:
    """One of `size` ranks of a group that exists only in this process."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def logits_of(model: Any) -> np.ndarray:
    """Compute the logits of a prompt and of each of three greedy tokens, through a cache."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    model.set_dtype(mx.float32)  # so that sums in another order stay near
    cache, found, tokens = make_prompt_cache(model), [], mx.array(TOKENS)
    for _ in range(4):
        found.append(np.array(model(tokens, cache=cache)[0]))
        tokens = mx.array([[int(found[-1][-1].argmax())]])
    return np.concatenate(found)


def main(out: Path, models: list[str]) -> None:
    """Run one rank."""
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    group = mx.distributed.init(strict=True)  # before slow imports: the others wait for it
    from paroquant_stream import load

    results = {}
    for number, name in enumerate(models):
        read = bytes_read()
        mx.reset_peak_memory()
        model, _, _ = load(name, group=group, parallel="tensor")
        results[f"bytes_read{number}"] = np.array(bytes_read() - read)
        results[f"peak_memory{number}"] = np.array(mx.get_peak_memory())
        results[f"memory{number}"] = np.array(mx.get_active_memory())
        results[f"peak_rss{number}"] = np.array(peak_rss())
        results[f"logits{number}"] = logits_of(model)
    np.savez(out / f"{group.rank()}.npz", **results)


def peak_rss() -> int:
    """Return the peak memory of this process in bytes."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def bytes_read() -> int:
    """Return the bytes that this process has read; 0 if the system does not count them."""
    counts = Path("/proc/self/io")
    return int(counts.read_text().split()[1]) if counts.exists() else 0


def run_two_ranks(out: Path, models: list[Path], timeout: float = 110) -> list[dict]:
    """Run two ranks on loopback, with the environment of `mlx.launch`; return their results."""
    sockets = [socket.socket() for _ in range(2)]
    for found in sockets:
        found.bind(("127.0.0.1", 0))
    hosts = [[f"127.0.0.1:{found.getsockname()[1]}"] for found in sockets]
    for found in sockets:
        found.close()
    hostfile = out / "hosts.json"
    hostfile.write_text(json.dumps(hosts))
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.ranks", out, *models],
            cwd=ROOT,
            env={**os.environ, "MLX_HOSTFILE": str(hostfile), "MLX_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    with ThreadPoolExecutor(len(processes)) as pool:
        waiting = {
            pool.submit(process.communicate, timeout=timeout): process for process in processes
        }
        try:
            for done in as_completed(waiting):  # one that failed lets the other wait for ever
                _, error = done.result()
                assert waiting[done].returncode == 0, error
        finally:
            for process in processes:
                process.kill()
    return [dict(np.load(out / f"{rank}.npz")) for rank in range(2)]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
