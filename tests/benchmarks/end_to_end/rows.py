"""The rows of the benchmark's table: what was measured, beside what, and the goal."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median

import mlx.core as mx
import numpy as np

from paroquant_stream.transform.quantize import quantize_rows
from paroquant_stream.transform.repack import awq_stripes
from tests.benchmarks.end_to_end.checkpoint import make_checkpoint
from tests.benchmarks.end_to_end.measure import (
    IMPORTS,
    LOAD,
    PUBLIC,
    RAW,
    Bench,
    Run,
    print_rounds,
    python,
    ratio,
    timed,
)


@dataclass(frozen=True)
class Row:
    """One figure."""

    what: str
    figure: float
    unit: str
    beside: str
    goal: str
    met: bool

    def line(self) -> str:
        """The row as printed."""
        mark = "met" if self.met else "NOT met"
        return (
            f"{self.what:46} {self.figure:8.3g} {self.unit:2} {self.beside:42} {self.goal:9} {mark}"
        )


def at_most(what: str, figure: float, goal: float, beside: str, unit: str = "x") -> Row:
    """A row whose figure should not be above the goal."""
    return Row(what, figure, unit, beside, f"<= {goal:.3g}", figure <= goal)


def at_least(what: str, figure: float, goal: float, beside: str, unit: str = "x") -> Row:
    """A row whose figure should not be below the goal."""
    return Row(what, figure, unit, beside, f">= {goal:.3g}", figure >= goal)


def in_turn(
    bench: Bench, functions: dict[str, Callable[[], Run]], before: Callable[[], None]
) -> dict[str, list[Run]]:
    """Each function in each round, after `before`."""
    measured: dict[str, list[Run]] = {name: [] for name in functions}
    for _ in range(bench.rounds):
        for name, function in functions.items():
            before()
            measured[name].append(function())
    print_rounds(measured)
    return measured


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
            (timed(lambda w=words, c=copy: np.copyto(c, w)), timed(ours)) for _ in range(5 * rounds)
        ]
        signed = words.view(np.int32)  # whole: on a part its temporaries would fit into the caches
        theirs = median(
            timed(lambda w=signed: _pack_mlx(_unpack_and_reorder(w).T)) for _ in range(rounds)
        )
        what = f"repack AUTOAWQ {inputs}x{outputs}, one core"
        mine = median(pair[1] for pair in pairs)
        rate = f"memcpy; {words.nbytes / mine / 1e9:.2f} GB/s"
        rows += [
            at_least(what, median(pair[0] / pair[1] for pair in pairs), 0.22, rate),
            at_least(what, theirs / mine, 100, "the public loader's functions"),
        ]
    return rows


def quantize_row(rows: int, columns: int, rounds: int) -> Row:
    """An embedding quantized beside MLX, which gives the same bits."""
    embedding = np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float16)

    def by_mlx() -> list[mx.array]:
        results = list(mx.quantize(mx.array(embedding), 128, 4, stream=mx.cpu))
        mx.eval(results)
        return results

    ours = quantize_rows(embedding, "F16", 128, 4)
    assert all(np.array_equal(a, b) for a, b in zip(ours, by_mlx(), strict=True))
    seconds = [
        (timed(by_mlx), timed(lambda: quantize_rows(embedding, "F16", 128, 4)))
        for _ in range(rounds)
    ]
    gain = median(theirs / own for theirs, own in seconds)
    return at_least("quantize an embedding, one core", gain, 1.4, "mx.quantize on the CPU")


def convert_rows(bench: Bench, model: Path) -> tuple[list[Row], dict[str, list[Run]]]:
    """Conversions into an empty cache beside a copy of the same bytes."""
    functions = {
        "copy": lambda: bench.copy(model),
        "convert, jobs 1": lambda: bench.convert(model, 1),
        "convert, jobs 2": lambda: bench.convert(model, 2),
    }
    warm = in_turn(bench, functions, lambda: bench.settle(model))
    best = min(run.wall for run in warm["copy"])
    rows = [
        at_most("cold convert, --jobs 2", ratio(warm["convert, jobs 2"], warm["copy"]), 1.5,
                f"copy + sync, median of rounds; best copy {best:.1f} s"),
        at_least("--jobs 2, 6 shards", ratio(warm["convert, jobs 1"], warm["convert, jobs 2"]), 1.7,
                 "--jobs 1"),
    ]  # fmt: skip
    del functions["convert, jobs 1"]
    cold = in_turn(bench, functions, lambda: bench.settle(cold=[model]))
    rows.append(
        at_most("the same, source not in the page cache",
                ratio(cold["convert, jobs 2"], cold["copy"]), 1.2, "copy + sync, also not")
    )  # fmt: skip
    return rows, warm


def shard_rows(bench: Bench, sizes: dict[str, int]) -> list[Row]:
    """The same model in 1 and in 30 shards: threads, memory, one changed shard, nothing to do."""
    rows, peaks = [], {}
    for shards in (1, 6, 30):
        model = bench.work / "cut"
        make_checkpoint(model, shards=shards, **sizes)
        if shards == 1:
            rows.append(one_shard_row(bench, model))
        bench.settle(model)
        cold = bench.convert(model, 1, keep=True)
        peaks[shards] = json.loads(cold.output)["peak_rss_bytes"] / 1e6
        if shards == 30:
            rows += changed_rows(bench, model, cold)
        shutil.rmtree(model)
        shutil.rmtree(bench.cache)
    listed = ", ".join(f"{shards} shards {peak:.0f} MB" for shards, peak in peaks.items())
    spread = max(peaks.values()) / min(peaks.values())
    rows.append(at_most("peak memory, --jobs 1", max(peaks.values()), 260, listed, "MB"))
    rows.append(at_most("peak memory, most beside least", spread, 1.05, "1, 6 and 30 shards"))
    return rows


def one_shard_row(bench: Bench, model: Path) -> Row:
    """What a second thread gains where there is nothing to share but one shard."""
    jobs = {f"one shard, jobs {j}": lambda j=j: bench.convert(model, j) for j in (1, 2)}
    runs = in_turn(bench, jobs, lambda: bench.settle(model))
    gain = ratio(runs["one shard, jobs 1"], runs["one shard, jobs 2"])
    return at_least("--jobs 2, 1 shard", gain, 1.7, "--jobs 1")


def changed_rows(bench: Bench, model: Path, cold: Run) -> list[Row]:
    """Nothing changed, and one of 30 shards changed."""
    command = [sys.executable, "-m", "paroquant_stream.convert", model, "--quiet"]
    command += ["--cache-dir", bench.cache]
    imports = [sys.executable, "-c", "import numpy, msgpack"]
    pairs = [
        (timed(lambda: subprocess.run(command, check=True)),
         timed(lambda: subprocess.run(imports, check=True)))
        for _ in range(5 * bench.rounds)
    ]  # fmt: skip
    nothing = at_most("no-op convert, 30 shards", median(a / b for a, b in pairs), 1,
                      f"import numpy, msgpack; {median(a for a, _ in pairs):.3f} s")  # fmt: skip
    shard = sorted(model.glob("model-*.safetensors"))[15]
    with shard.open("r+b") as file:
        file.seek(-1, 2)
        byte = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([byte ^ 1]))
    bench.settle(model)
    run = bench.reconvert(model, 1)
    made = [s["shard"] for s in json.loads(run.output)["shards"] if s["action"] == "converted"]
    allowed = 1.2 * cold.wall / 30 + 0.3
    what = f"one of 30 shards changed, {len(made)} converted"
    changed = at_most(what, run.wall, allowed, "1.2 x cold convert / 30 + 0.3 s", "s")
    return [nothing, changed]


def plan_row(layers: int = 44) -> Row:
    """The plan of a mixture of 256 experts a layer, cut across 30 shards."""
    from paroquant_stream.checkpoint.layout import Layout
    from paroquant_stream.checkpoint.quantization import Quantization
    from paroquant_stream.files.tensor_header import Header, TensorInfo
    from paroquant_stream.plan.planner import make_plan

    parts = {"qweight": ("I32", (128, 16)), "qzeros": ("I32", (1, 16)), "scales": ("F16", (1, 128))}
    shared = {"theta": ("F16", (8, 64)), "pairs": ("I16", (8, 128)),
              "channel_scales": ("F16", (1, 128))}  # fmt: skip
    specs = []
    for layer in range(layers):
        base = f"model.layers.{layer}.mlp.experts"
        for name, form in shared.items():
            specs += [(f"{base}.{kind}_weight_{name}", *form) for kind in ("gate_up", "down")]
        for expert, linear in product(range(256), ("gate_proj", "up_proj", "down_proj")):
            specs += [(f"{base}.{expert}.{linear}.{n}", *form) for n, form in parts.items()]
    size, placed = 0, []
    for name, dtype, shape in specs:
        stop = size + int(np.prod(shape)) * (4 if dtype == "I32" else 2)
        placed.append(TensorInfo(name, dtype, shape, size, stop))
        size = stop
    headers = {f"s{i}": Header(tuple(placed[i::30]), size, {}) for i in range(30)}
    seconds = timed(lambda: make_plan(headers, Layout.AUTOAWQ, Quantization(4, 128)))
    what = f"plan of {len(placed):,} tensors"
    return at_most(what, seconds, 1, "each in another shard than the one before", "s")


def load_rows(bench: Bench, model: Path, cold: list[Run]) -> tuple[list[Row], list[Run]]:
    """Loading from the cache beside MLX's own loading of the same files, and the public loader.

    `cold`: conversions of the model into an empty cache. The runs are the public loader's.
    """
    bench.settle(model)
    bench.convert(model, 2, keep=True)
    entries = sum(path.stat().st_size for path in bench.cache.rglob("*.safetensors"))
    functions = {
        "mx.load, mx.eval": lambda: python(RAW, model, bench.cache),
        "warm load": lambda: python(LOAD, model, bench.cache),
    }
    warm = in_turn(bench, functions, lambda: bench.settle(bench.cache))
    imported = python(IMPORTS, model)
    imports = int(imported.output)
    peak = max(int(run.output) for run in warm["warm load"])
    bench.settle(model)
    public = python(PUBLIC, model)

    def first() -> Run:
        shutil.rmtree(bench.cache)
        bench.settle(model)
        return python(LOAD, model, bench.cache)

    firsts = in_turn(bench, {"first load": first}, lambda: None)["first load"]
    shutil.rmtree(bench.cache)
    usual, first_wall = (median(run.wall for run in runs) for runs in (warm["warm load"], firsts))
    convert_wall = median(run.wall for run in cold)
    whole = convert_wall + usual
    rows = [
        at_most("warm load", ratio(warm["warm load"], warm["mx.load, mx.eval"]), 1.05,
                "mx.load + mx.eval, the same imports"),
        at_most("peak memory of a warm load", (peak - entries - imports) / 1e6, 150,
                "above entries and imports", "MB"),
        at_least("warm load", public.wall / usual, 20, f"public loader, {public.wall:.0f} s"),
        at_most("first load, nothing cached", first_wall / whole, 1.05,
                f"cold convert, jobs 2, + warm load, {whole:.1f} s"),
        at_most("first load without imports", (first_wall - imported.wall) / convert_wall, 1.2,
                f"cold convert; {first_wall:.1f} s, of it {imported.wall:.1f} s imports"),
    ]  # fmt: skip
    return rows, [public]


def as_json(rows: list[Row], measured: dict[str, list[Run]]) -> str:
    """Everything that was measured."""
    runs = {
        name: [asdict(run) | {"output": ""} for run in found] for name, found in measured.items()
    }
    return json.dumps({"rows": [asdict(row) for row in rows], "convert": runs}, indent=1)
