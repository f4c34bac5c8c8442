"""A picture of a trace: one row a thread or process, one slice a stage, as Perfetto shows it.

python -m tests.benchmarks.end_to_end.trace_picture TRACE.json OUT.png
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

COLORS = {  # what contains others comes first, so that those are drawn over it
    "awq_weight": "#e6550d",
    "awq_biases": "#fdae6b",
    "quantize": "#31a354",
    "read": "#9ecae1",
    "hash": "#3182bd",
    "write": "#756bb1",
    "publish": "#c51b8a",
}
OTHER = "#d9d9d9"


def rows_of(events: list[dict[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Thread -> stage -> (start, duration) in seconds, in the order of the first slices."""
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    rows: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for event in sorted((e for e in events if e["ph"] == "X"), key=lambda e: e["ts"]):
        stages = rows.setdefault(names[event["tid"]], defaultdict(list))
        stages[event["name"]].append((event["ts"] / 1e6, event["dur"] / 1e6))
    return rows


def draw(rows: dict[str, dict[str, list[tuple[float, float]]]], path: Path) -> None:
    """Draw the slices of the stages that are coloured over those that contain them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 0.4 * len(rows) + 1.2))
    for place, stages in enumerate(rows.values()):
        axes.broken_barh(stages.get("shard", []), (place - 0.4, 0.8), facecolors=OTHER)
        for stage, color in COLORS.items():
            axes.broken_barh(stages.get(stage, []), (place - 0.4, 0.8), facecolors=color)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    legend = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in (*COLORS.values(), OTHER)]
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0)}
    axes.legend(legend, [*COLORS, "the rest of a shard"], ncols=8, fontsize=7, **place)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    trace = json.loads(Path(sys.argv[1]).read_text())
    draw(rows_of(trace["traceEvents"]), Path(sys.argv[2]))
