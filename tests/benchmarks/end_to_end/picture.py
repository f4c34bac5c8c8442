"""The benchmark's picture: where the seconds of a conversion go, beside a copy."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from tests.benchmarks.end_to_end.measure import Run

STAGES = {
    "read": "read the source",
    "hash": "SHA-256 of the source",
    "awq_weight": "repack",
    "awq_biases": "scales and biases",
    "quantize": "quantize embeddings",
    "shard": "XXH3, copy to blocks",
    "write": "write (beside)",
}
SAME = {"group_scales": "awq_biases", "copy": "shard", "plan": "shard", "publish": "write"}
COLORS = ["#9ecae1", "#3182bd", "#e6550d", "#fdae6b", "#31a354", "#bdbdbd", "#756bb1"]


def draw(measured: dict[str, list[Run]], title: str, path: Path) -> None:
    """Draws the stages of one job, stacked, in seconds of all threads, and the wall times
    beside a copy, the public loader and the limit: the SHA-256 of the source, shared by the jobs.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), width_ratios=[1, 1])
    names = ["convert, jobs 1"]  # with workers the threads of shards wait for them, in a stage too
    starts = [0.0] * len(names)
    for (stage, label), color in zip(STAGES.items(), COLORS, strict=True):
        same = [stage, *(name for name, of in SAME.items() if of == stage)]
        widths = [
            median(sum(run.stages.get(name, 0) for name in same) for run in measured[n])
            for n in names
        ]
        left.barh(names, widths, left=starts, label=label, color=color)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    left.set_xlabel("seconds, summed over the threads")
    left.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3)
    left.invert_yaxis()
    walls = {name: median(run.wall for run in runs) for name, runs in measured.items()}
    two = measured["convert, jobs 2"]
    walls["limit, jobs 2"] = median(run.stages["hash"] for run in two) / 2
    bars = right.barh(list(walls), list(walls.values()), color="#636363")
    right.bar_label(bars, fmt="%.3g s", padding=3)
    right.set_xscale("log")
    right.set_xlabel("seconds from start to end")
    right.margins(x=0.2)
    right.invert_yaxis()
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
