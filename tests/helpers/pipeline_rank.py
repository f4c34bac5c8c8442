"""One rank of a pipeline: load its part of each model, perhaps run it, and write the results to
OUT/<number of the model>-<rank>.json.

    mlx.launch -n 2 tests/helpers/pipeline_rank.py OUT load|run MODEL...
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from paroquant_stream import load

PROMPT = [3, 5, 7, 9, 11]


def logits(model) -> list[list[float]]:
    """Compute the logits after the prompt and after one more token, with a cache."""
    cache = make_prompt_cache(model)
    found = [model(mx.array([tokens]), cache=cache)[0, -1] for tokens in (PROMPT, [8])]
    return [array.astype(mx.float32).tolist() for array in found]


def read_bytes() -> int:
    """Return the bytes that this process has read."""
    return int(Path("/proc/self/io").read_text().split()[1])  # rchar


def peak_bytes() -> int:
    """Return the peak memory of this process in bytes."""
    status = Path("/proc/self/status").read_text()  # ru_maxrss begins with that of the parent
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])


def main() -> None:
    """Run one rank."""
    out, what, *models = sys.argv[1:]
    mx.set_default_device(mx.cpu)
    group = mx.distributed.init()
    for number, directory in enumerate(models):
        read, peak = (read_bytes(), peak_bytes()) if what == "load" else (0, 0)
        model, _, _ = load(directory, force_text=True, group=group)
        found = {"layers": len(model.layers), "size": group.size()}
        if what == "load":
            found |= {"read": read_bytes() - read, "grown": peak_bytes() - peak}
        else:
            found["logits"] = logits(model)
        path = Path(out, f"{number}-{group.rank()}.json")
        path.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
