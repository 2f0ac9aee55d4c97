"""`python -m tests.benchmarks.rank_picture FILE ... --out docs/ranks.png`: what a rank brings, and what it costs.

FILE is what `make scoreboard ROW=ranks,overhead ARGS="--out FILE"` wrote; of rows that are in several files, the last
counts.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.drawing import INK, MUTED, OFF, ON, STYLE, add_title, image_bytes, panel_grid, plain_axes

Rows = Mapping[str, Mapping[str, Any]]
"""Of the scoreboard, by name."""


class Point(NamedTuple):
    """A figure at one rank, with its interval."""

    rank: int
    value: float
    low: float
    high: float


def points(rows: Rows, pattern: str) -> list[Point]:
    """What was measured by rank, ascending; the group of `pattern` is the rank."""
    found = [(re.fullmatch(pattern, name), row) for name, row in rows.items()]
    return sorted(Point(int(match[1]), row["value"], row["low"], row["high"]) for match, row in found if match)


def draw(rows: Rows) -> Figure:
    """Recall by rank beside the time of reading, relative to the bare model."""
    with matplotlib.rc_context(STYLE):
        figure, grid = panel_grid(1, 2, panel_in=2.3, top_in=0.5, right_in=0.25)
        recall = figure.add_subplot(grid[0, 0])
        _panel(recall, points(rows, r"rank_(\d+)_recall"), ON)
        recall.set_yticks([tick for tick in recall.get_yticks() if tick <= 1.0])
        add_title(recall, "Key-value recall", "gaps of 1,024 and 16,384")
        cost = figure.add_subplot(grid[0, 1])
        _panel(cost, points(rows, r"large_forward_overhead_rank_(\d+)"), OFF)
        cost.axhline(1.0, color=MUTED, linewidth=0.8)
        add_title(cost, "Reading, time", "124 M parameters, bare = 1")
    return figure


def _panel(axes: Axes, found: Sequence[Point], color: str) -> None:
    places = range(len(found))
    spread = [[p.value - p.low for p in found], [p.high - p.value for p in found]]
    axes.errorbar(places, [p.value for p in found], yerr=spread, color=color, marker="o", capsize=3, linewidth=1.6)
    for place, point in zip(places, found, strict=True):
        axes.annotate(f"{point.value:.3f}", (place, point.high), (0, 5), textcoords="offset points", ha="center",
                      color=INK)  # fmt: skip
    axes.set_xticks(places, [str(point.rank) for point in found])
    axes.set_xlabel("rank")
    axes.margins(x=0.12, y=0.22)
    plain_axes(axes, grid="y")


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, write, return the exit code."""
    parser = argparse.ArgumentParser(prog="rank_picture", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("files", nargs="+", metavar="FILE", help="rows, as `make scoreboard` writes them with --out")
    parser.add_argument("--out", required=True, metavar="FILE.png", help="where the picture goes")
    given = parser.parse_args(argv)
    rows = {row["name"]: row for file in given.files for row in json.loads(Path(file).read_text())["rows"]}
    Path(given.out).write_bytes(image_bytes(draw(rows)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
