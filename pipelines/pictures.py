"""The figures of a report: reach curves, training curves, and where the write gate opens.

Every function takes plain rows and returns a matplotlib `Figure` with an Agg canvas of its own: no pyplot, no
display, no state shared between calls. `drawing.image_bytes` turns a figure into a PNG or an SVG.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pipelines.drawing import (
    HAIRLINE,
    INK,
    OFF,
    ON,
    STYLE,
    Row,
    add_title,
    finite,
    literal,
    panel_grid,
    percent,
    plain_axes,
)
from pipelines.reach_panel import Curve, reach_panel, sample_note


def reach_curves(
    rows: Sequence[Row], *, window_tokens: int | None = None, chance: Mapping[str, float] | None = None
) -> Figure:
    """Accuracy against the gap in tokens, memory on and off: a panel per task, a line style per filler.

    `rows` are evaluation rows (task, filler, gap_tokens, memory, accuracy, low, high, n), accuracies as
    fractions. The axis is logarithmic, and gap 0 has a slot of its own at the left. `window_tokens` is what
    attention sees at once; `chance` is the accuracy of guessing, per task.
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    fillers = list(dict.fromkeys(row["filler"] for row in rows))
    wide = len(tasks) == 1
    columns = 1 if wide else 2
    with matplotlib.rc_context(STYLE):
        figure, grid = panel_grid(math.ceil(len(tasks) / columns), columns, panel_in=3.2 if wide else 2.4,
                                   top_in=0.66, right_in=1.52 if wide else 1.05)  # fmt: skip
        for place, task in enumerate(tasks):
            axes = figure.add_subplot(grid[place // columns, place % columns])
            part = [row for row in rows if row["task"] == task]
            reach_panel(axes, _on_and_off(part, fillers, wide), window_tokens, (chance or {}).get(task), wide=wide)
            note = sample_note(part) if wide else "accuracy"
            add_title(axes, task.replace("_", "-").capitalize(), note, above=22)
            if place + columns >= len(tasks):
                name = "tokens between the facts and the question" if wide else "gap in tokens"
                axes.set_xlabel(name, labelpad=-4)
    return figure


def _on_and_off(rows: Sequence[Row], fillers: Sequence[str], wide: bool) -> list[Curve]:
    """One task's curves: memory on over memory off, each filler in a style of its own."""
    curves = []
    for memory, color in (("off", OFF), ("on", ON)):
        for style, filler in enumerate(fillers):
            part = [row for row in rows if row["filler"] == filler and row["memory"] == memory]
            name = (f"memory {memory}" if wide else memory) + (f", {filler}" if len(fillers) > 1 else "")
            curves.append(Curve(f"memory {memory}, {filler}", name, part, color, style))
    return [curve for curve in curves if curve.rows]


def training_curves(history: Sequence[Row]) -> Figure:
    """Loss, accuracy and speed against the optimizer step; what the history does not hold has no panel.

    `history` rows hold "step" and any of "loss" (nats per token), "accuracy" (fraction) and "tokens_per_s".
    """
    panels = [("loss", "Loss", "nats per token"), ("accuracy", "Accuracy", "in training"),
              ("tokens_per_s", "Speed", "tokens per second")]  # fmt: skip
    panels = [panel for panel in panels if any(finite(row.get(panel[0])) for row in history)] or panels[:1]
    with matplotlib.rc_context(STYLE):
        figure, grid = panel_grid(1, len(panels), panel_in=2.1, top_in=0.4, right_in=0.12)
        for place, (key, title, unit) in enumerate(panels):
            axes = figure.add_subplot(grid[0, place])
            rows = [row for row in history if finite(row.get("step")) and finite(row.get(key))]
            points = [(row["step"], row[key]) for row in rows]
            x, y = np.array(points, dtype=float).reshape(-1, 2).T
            axes.plot(x, y, color=ON, linewidth=1.0, alpha=0.4, label=key)
            axes.plot(x, _smooth(y), color=ON, linewidth=1.9, label=f"{key}, smoothed")
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
            top = 1.03 if key == "accuracy" else max(1.08 * y.max(initial=0.0), 1e-9)
            axes.set_ylim(y.min(initial=0.0), top)
            form = {"loss": "{:g}".format, "accuracy": percent, "tokens_per_s": "{:,.0f}".format}[key]
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _, form=form: form(value)))
            axes.set_xlabel("step")
            plain_axes(axes, grid="y")
            add_title(axes, title, unit)
    return figure


def gate_usage(usage: Sequence[Row]) -> Figure:
    """Mean write strength on facts and on filler, a line per layer (and task, filler), its numbers beside it.

    `usage` rows hold "layer" and any of "task", "filler", "write_frac", "mean_write_on_facts" and
    "mean_write_on_filler", all three as fractions of 1.
    """
    columns = [("mean_write_on_facts", "facts", ON, 1.18), ("mean_write_on_filler", "filler", OFF, 1.37),
               ("write_frac", "gate open", INK, 1.63)]  # fmt: skip
    height = 1.1 + 0.3 * max(len(usage), 1)
    with matplotlib.rc_context(STYLE):
        figure, grid = panel_grid(1, 1, panel_in=height - 1.08, top_in=0.5, right_in=2.5, left_in=2.0)
        axes = figure.add_subplot(grid[0, 0])
        beside = axes.get_yaxis_transform()
        names = []
        for y, row in enumerate(usage):
            where = [str(row[key]) for key in ("task", "filler") if row.get(key)]
            names.append(literal(", ".join([f"layer {row['layer']}", *where])))
            spots = [float(row[key]) for key, *_ in columns[:2] if finite(row.get(key))]
            axes.plot(spots, [y] * len(spots), color=HAIRLINE, linewidth=5, zorder=1)
            for key, name, color, x in columns:
                if not finite(value := row.get(key)):
                    continue
                shown = percent(value, 2) if key == "write_frac" else f"{value:.4f}"
                axes.text(x, y, shown, color=color, ha="right", va="center", transform=beside)
                if key != "write_frac":
                    axes.plot([value], [y], "o", color=color, markersize=7, label=name, clip_on=False)
        for _, name, color, x in columns:
            axes.text(x, -1, name, color=color, ha="right", va="center", transform=beside)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(max(len(usage), 1) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        axes.set_xlabel("mean write strength: 0 writes nothing, 1 replaces")
        axes.tick_params(axis="y", pad=9)
        plain_axes(axes, grid="x")
        add_title(axes, "Write strength", "on facts and on filler", above=16)
    return figure


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean [n] over a tenth of the points, centred; over fewer at the start, where curves dive."""
    index = np.arange(len(values))
    half = np.minimum(index, len(values) // 20)
    low, high = index - half, np.minimum(index + half + 1, len(values))
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[high] - total[low]) / (high - low)
