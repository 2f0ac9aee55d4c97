"""One panel of curves: accuracy against the gap in tokens, whatever the curves stand for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.transforms import offset_copy

from pipelines.drawing import (
    BAND,
    LINES,
    MARKERS,
    MUTED,
    PAPER,
    Row,
    literal,
    percent,
    plain_axes,
    token_label,
)


class Curve(NamedTuple):
    """One line of the panel."""

    label: str
    end: str
    """The name at its right end."""
    rows: Sequence[Row]
    color: str
    style: int
    """Index of its line style and marker."""
    band: bool = True
    """Whether its intervals are shaded, and it is drawn in full strength."""


def reach_panel(axes: Axes, curves: Sequence[Curve], window: int | None, chance: float | None, *, wide: bool) -> None:
    """Curves, later ones above, intervals, the window and the chance line, at positions log2(gap)."""
    gaps = sorted({int(row["gap_tokens"]) for curve in curves for row in curve.rows})
    edge = [math.log2(window)] if window else []
    marks = [math.log2(gap) for gap in gaps if gap > 0] + edge or [1.0]
    slot = min(marks) - max(1.0, (max(marks) - min(marks)) * (0.12 if wide else 0.2))  # room for its name

    def place(gap: int) -> float:
        return math.log2(gap) if gap > 0 else slot

    used = [place(gap) for gap in gaps] + edge
    left, right = min(used) - 0.4, max(used) + 0.12
    ends: list[tuple[float, float, str, str]] = []
    for label, end, of_curve, color, style, band in curves:
        rows = sorted(of_curve, key=lambda row: row["gap_tokens"])
        x, y = [place(int(row["gap_tokens"])) for row in rows], [float(row["accuracy"]) for row in rows]
        if band:
            low, high = [row["low"] for row in rows], [row["high"] for row in rows]
            axes.fill_between(x, low, high, color=color, alpha=0.14, linewidth=0, zorder=2)
        axes.plot(x, y, color=color, linewidth=1.9 if band else 1.3, linestyle=LINES[style % 4],
                  marker=MARKERS[style % 4], markersize=4.6 if band else 3.6, markeredgewidth=1.3, zorder=3,
                  markerfacecolor=color if style == 0 else PAPER, label=label, clip_on=False)  # fmt: skip
        ends.append((x[-1], y[-1], end, color))
    if window:
        name = f"attention sees {token_label(window)} tokens" if wide else f"window {token_label(window)}"
        axes.axvspan(left, edge[0], color=BAND, zorder=0, linewidth=0)
        axes.axvline(edge[0], color=MUTED, linewidth=1.0, zorder=1.5, label="window")
        axes.annotate(name, (edge[0], 1.0), (-0.5, 4), xycoords=("data", "axes fraction"),
                      textcoords="offset points", color=MUTED)  # fmt: skip
    if chance is not None:
        axes.axhline(chance, color=MUTED, linewidth=1.0, linestyle=(0, (1, 2)), zorder=1.5, label="chance")
        ends.append((right, chance, f"chance {percent(chance, int(chance < 0.1))}", MUTED))
    _reach_axes(axes, gaps, place, wide=wide)
    axes.set_xlim(left, right)
    _end_labels(axes, ends)


def _reach_axes(axes: Axes, gaps: list[int], place: Callable[[int], float], *, wide: bool) -> None:
    """Ticks at the gaps that were measured, thinned until they fit, and accuracy in percent."""
    positive = [gap for gap in gaps if gap > 0]
    shown = positive[::-1][:: max(1, math.ceil(len(positive) / (12 if wide else 5)))][::-1]
    ticks = [(place(gap), token_label(gap)) for gap in shown]
    if gaps[0] == 0:
        ticks.insert(0, (place(0), "in\nwindow"))
        # Gap 0 is not where a logarithm would put it: a slash breaks the axis between it and the first gap.
        axes.plot([place(0) + 0.5], [0], marker=[(-1.0, -2.0), (1.0, 2.0)], markersize=7, color=MUTED,
                  markeredgewidth=0.9, clip_on=False, transform=axes.get_xaxis_transform())  # fmt: skip
    axes.set_xticks([x for x, _ in ticks], [name for _, name in ticks])
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
    axes.set_ylim(-0.02, 1.03)
    plain_axes(axes, grid="y")


def _end_labels(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Names the curves at their right ends (x, y, name, colour), pushed apart until no two names overlap."""
    ends = sorted(ends, key=lambda end: end[1])
    heights = [end[1] for end in ends]
    figure = axes.get_figure(root=True)
    assert figure is not None
    low, top = axes.get_ylim()
    line_height = 12.5 * (top - low) / (axes.get_position().height * figure.get_figheight() * 72)
    highest = max(1.0, line_height * (len(heights) - 1))  # the panel's top, as long as there is room below it
    for _ in range(300):
        for i in range(1, len(heights)):
            overlap = max(0.0, line_height - (heights[i] - heights[i - 1]))
            heights[i - 1] -= overlap / 2
            heights[i] += overlap / 2
        heights[0], heights[-1] = max(0.0, heights[0]), min(highest, heights[-1])
    right = max(end[0] for end in ends)
    beside = offset_copy(axes.transData, figure, x=13, units="points")
    for (x, y, name, color), height in zip(ends, heights, strict=True):
        line = {"arrowstyle": "-", "shrinkA": 1, "shrinkB": 5, "relpos": (0, 0.5), "lw": 0.7, "color": color}
        axes.annotate(literal(name), (x, y), (right, height), textcoords=beside, color=color, va="center",
                      arrowprops=line if abs(height - y) > 0.9 * line_height else None)  # fmt: skip


def sample_note(rows: list[Row]) -> str:
    """What stands behind one point of the curves."""
    counts = sorted({row["n"] for row in rows})
    span = " to ".join(f"{n:,}" for n in counts[:1] + counts[1:][-1:])
    return f"accuracy; {span} examples per point, bands are 95 % intervals"
