"""Two ranks, started by `mlx.launch` on loopback, compute the logits of the whole model."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from paroquant_stream import convert_checkpoint, load
from paroquant_stream.checkpoint.config import ModelConfig
from paroquant_stream.conversion.request import make_request
from paroquant_stream.distributed.split import Split
from paroquant_stream.model.assemble import needed_entries
from tests.benchmarks.end_to_end.checkpoint import make_checkpoint
from tests.helpers.paths import FIXTURES, ROOT
from tests.helpers.pipeline_rank import logits

# slow: each rank is a process
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("on_the_cpu")]
FAMILIES = [
    *("qwen2-native-adversarial", "qwen3_moe-awq-adversarial", "qwen3_5-awq-adversarial"),
    *("qwen3_5_moe-awq-adversarial", "qwen3_5_text-awq-size", "qwen3_5_moe_text-awq-size"),
]
"""One of each family whose class in mlx-lm 0.32.2 has a pipeline."""
LAUNCH = [sys.executable, "-c", "from mlx._distributed_utils.launch import main; main()"]


def free_ports() -> int:
    """Return the first of two consecutive ports that are free."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


def program(out: Path, what: str, models: list[Path]) -> list[str]:
    out.mkdir(exist_ok=True)
    arguments = [str(out), what, *map(str, models)]
    return [sys.executable, "-m", "tests.helpers.pipeline_rank", *arguments]


def run(command: list[str], seconds: float = 110) -> str:
    """Return what the command and its children print; kill all of them after the time limit."""
    reading, writing = os.pipe()  # mlx.launch spins when its input has ended
    process = subprocess.Popen(
        command,
        stdin=reading,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"not done after {seconds} s: {process.communicate()[0]}")
    finally:
        os.close(reading)
        os.close(writing)


def run_two(command: list[str]) -> str:
    """Run the command as two ranks and return what they print."""
    options = ["-n", "2", "--backend", "ring", "--starting-port", str(free_ports()), "--"]
    return run([*LAUNCH, *options, *command])


def launched(out: Path, what: str, models: list[Path]) -> tuple[str, list[list[Path]]]:
    """Run two ranks; return what they printed, and the files that they write for each model."""
    printed = run_two(program(out, what, models))
    return printed, [[out / f"{n}-{rank}.json" for rank in (0, 1)] for n in range(len(models))]


def found_by_ranks(out: Path, what: str, models: list[Path]) -> list[list[dict]]:
    """Run two ranks; return their results for each model. mlx.launch exits with 0 if they fail."""
    printed, files = launched(out, what, models)
    assert all(path.exists() for paths in files for path in paths), printed
    return [[json.loads(path.read_text()) for path in paths] for paths in files]


@pytest.mark.parametrize(
    "families", [FAMILIES[:1], pytest.param(FAMILIES, marks=pytest.mark.long)], ids=["one", "all"]
)
def test_both_ranks_compute_the_logits_of_the_whole(tmp_path, families):
    models = [FIXTURES / name for name in families]
    correct = [logits(load(model, force_text=True)[0]) for model in models]
    found = found_by_ranks(tmp_path / "out", "run", models)
    for name, ranks, expected in zip(families, found, correct, strict=True):
        assert [(rank["size"], rank["layers"]) for rank in ranks] == [(2, 1), (2, 1)]
        largest = max(np.abs(np.subtract(rank["logits"], expected)).max() for rank in ranks)
        assert largest <= 1e-5 * np.abs(expected).max(), name


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="no count of bytes read")
@pytest.mark.long  # 1.5 GB, and as much again for its entries
def test_each_rank_reads_and_holds_half_of_a_large_model(tmp_path):
    """A small model is loaded first, for the imports of the first load."""
    models = [FIXTURES / FAMILIES[0], tmp_path / "large"]
    shapes = {"hidden": 4096, "intermediate": 14_336, "heads": 32, "kv_heads": 8}
    make_checkpoint(models[1], layers=12, shards=6, model_type="qwen2", **shapes)
    run(program(tmp_path / "first", "load", models))  # converts, and hashes what is new
    run(program(tmp_path / "one", "load", models))
    whole = json.loads((tmp_path / "one" / "1-0.json").read_text())
    ranks = found_by_ranks(tmp_path / "two", "load", models)[1]
    for rank in ranks:
        assert rank["layers"] == whole["layers"] / 2
        for figure in ("read", "grown"):
            assert 0.4 * whole[figure] < rank[figure] < 0.55 * whole[figure], (whole, rank)


@pytest.mark.long  # 8 s of imports
def test_a_rank_that_fails_ends_the_other_one(tmp_path):
    """mlx.launch ends the one that waits at the barrier in load()."""
    directory = tmp_path / "model"
    make_checkpoint(
        directory, layers=4, shards=4, vocab=256, hidden=256, intermediate=512, heads=2,
        kv_heads=1, model_type="qwen2",
    )  # fmt: skip
    manifest, store = convert_checkpoint(directory), make_request(directory).store
    first, second = (
        needed_entries(Split(layers), ModelConfig.read(directory), manifest, True)
        for layers in (range(2), range(2, 4))
    )
    lost = next(record for record in second if record not in first)
    store.entry_path(lost.key).unlink()
    (directory / lost.shard).unlink()
    printed, _ = launched(tmp_path / "out", "load", [directory])
    assert f"absent shards: {lost.shard}" in printed
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.long  # 8 s of imports
def test_the_readmes_program_prints_what_one_process_generates(tmp_path):
    section = (ROOT / "paroquant_stream/distributed/README.md").read_text()
    script = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    script = script.replace("path/to/model", str(FIXTURES / FAMILIES[2]))
    (tmp_path / "ranks.py").write_text(script)
    command = [sys.executable, str(tmp_path / "ranks.py")]
    alone = run(command)
    assert alone.strip()
    assert alone.strip() in run_two(command)
