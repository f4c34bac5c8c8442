"""mlx-lm without this package: in a process that can import neither it nor `paroquant`."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

ASKS = "trust_remote_code" in inspect.signature(load_model).parameters
"""Whether the installed mlx-lm runs a model's code only when told to trust it."""
PROMPTS = [[5], [5, 9, 17, 42, 3], [(7 * i) % 200 + 2 for i in range(70)]]
"""One row; a few; more than a tile of the rotation, and routed rows in the order of experts."""

_BLOCKED = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("paroquant_stream", "paroquant"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
blocked = []
for name in ("paroquant_stream", "paroquant"):
    try:
        __import__(name)
    except ImportError as error:
        blocked.append(str(error))
import mlx.core as mx
mx.set_default_device(mx.cpu)
import numpy as np
"""
_COMPARE = """
from pathlib import Path
from mlx_lm import load
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
refused = []
for strict in (True, False):
    try:
        load_model(Path(sys.argv[2]), strict=strict)
    except ValueError as error:
        refused.append(str(error))
results = {"blocked": blocked, "refused": refused}
PROMPTS = json.loads(sys.argv[1])
for directory in sys.argv[2:]:
    results[directory] = answers(load(directory, trust_remote_code=True)[0])
print(json.dumps(results))
"""


def stock(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process in which neither this package nor `paroquant` can be imported."""
    command = [sys.executable, "-c", _BLOCKED + script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd="/")


def stock_answers_of(exports: Sequence[Path]) -> dict:
    """What `answers` gives of each export there, and how the first is refused if not trusted."""
    done = stock(inspect.getsource(answers) + _COMPARE, json.dumps(PROMPTS), *map(str, exports))
    assert done.returncode == 0, done.stderr
    found: dict = json.loads(done.stdout.splitlines()[-1])
    return found


def answers(model) -> list:
    """Dtype and bits of each prompt's logits, and 16 greedy tokens."""
    found: list = []
    for prompt in PROMPTS:
        logits = model(mx.array([prompt]))
        found.append([str(logits.dtype), np.array(logits.astype(mx.float32)).tobytes().hex()])
    cache, step = make_prompt_cache(model), mx.array([[5, 9, 17, 42, 3]])
    for _ in range(16):
        found.append(int(mx.argmax(model(step, cache=cache)[0, -1]).item()))
        step = mx.array([found[-1:]])
    return found
