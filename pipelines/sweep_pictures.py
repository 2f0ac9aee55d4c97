"""The figures of a sweep: every trial as a line across its values, and the loss against each setting.

`result` is what `sweep_table.sweep_result` returns. Figures have an Agg canvas of their own, as in `pictures`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.drawing import HAIRLINE, INK, MUTED, ON, PAPER, STYLE, Row, add_title, literal, panel_grid, plain_axes

_ON_PAPER = {"boxstyle": "square,pad=0.1", "facecolor": PAPER, "edgecolor": "none", "alpha": 0.8}
"""Behind a text that lines pass."""
BINS = 3
"""Parts that a range is cut into where a table needs values."""


class Axis:
    """Where a setting's values lie between 0 and 1, and what is written there."""

    def __init__(self, name: str, described: Mapping[str, Any]) -> None:
        self.name = name
        self.values: list[Any] | None = list(described["values"]) if described["kind"] == "Choice" else None
        self.log = bool(described.get("log"))
        self.low, self.high = float(described.get("low", 0.0)), float(described.get("high", 1.0))

    def place(self, value: Any) -> float:
        """0 at the lower end of the range, 1 at the upper; values of a choice evenly apart."""
        if self.values is not None:
            return (self.values.index(value) + 0.5) / len(self.values)
        low, high, at = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return (at - low) / (high - low) if high > low else 0.5

    def ticks(self) -> list[tuple[float, str]]:
        """Places and texts."""
        if self.values is not None:
            return [(self.place(value), _text(value)) for value in self.values]
        middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return [(self.place(value), _text(value)) for value in (self.low, middle, self.high)]

    def cell(self, value: Any) -> int:
        """Which row or column of a table a value belongs to."""
        return min(int(self.place(value) * self.cells), self.cells - 1)

    @property
    def cells(self) -> int:
        """Rows or columns that a table of this setting has."""
        return BINS if self.values is None else len(self.values)

    def cell_texts(self) -> list[str]:
        """What stands at each row or column."""
        if self.values is not None:
            return [_text(value) for value in self.values]
        low, high = (math.log(x) if self.log else x for x in (self.low, self.high))
        edges = [low + (high - low) * i / BINS for i in range(BINS + 1)]
        texts = [_text(math.exp(edge) if self.log else edge) for edge in edges]
        return [f"{one} to {other}" for one, other in itertools.pairwise(texts)]


def axes_of(result: Mapping[str, Any]) -> list[Axis]:
    """The settings that the sweep has varied."""
    return [Axis(name, described) for name, described in result["space"].items()]


def parallel_coordinates(result: Mapping[str, Any]) -> Figure:
    """A line per trial across its values to its last validation loss; the best in colour, stopped ones dotted."""
    settings, rows = axes_of(result), [row for row in result["rows"] if row["loss_nats"] is not None]
    with matplotlib.rc_context(STYLE):
        figure, grid = panel_grid(1, 1, panel_in=3.0, top_in=0.66, right_in=0.75, left_in=0.75)
        axes = figure.add_subplot(grid[0, 0])
        losses = [row["loss_nats"] for row in rows] or [1.0]
        scale = Axis("", {"kind": "Real", "low": min(losses), "high": max(losses), "log": min(losses) > 0})
        for place, row in reversed(list(enumerate(rows))):
            heights = [axis.place(row["sample"][axis.name]) for axis in settings]
            heights.append(1 - scale.place(row["loss_nats"]))  # the best end at the top
            best, finished = place == 0 and row["state"] == "finished", row["state"] == "finished"
            axes.plot(range(len(heights)), heights, color=ON if best else MUTED, linewidth=2.4 if best else 1.1,
                      alpha=1.0 if best else 0.75, linestyle="-" if finished else (0, (1.2, 1.6)),
                      marker="o", markersize=5 if best else 2.5, clip_on=False, zorder=3 if best else 2)  # fmt: skip
        for place, axis in enumerate(settings):
            axes.axvline(place, color=HAIRLINE, linewidth=1.2, zorder=1)
            for height, text in axis.ticks():
                axes.annotate(literal(text), (place, height), (-4, 0), textcoords="offset points", ha="right",
                              va="center", fontsize=7.5, color=INK, bbox=_ON_PAPER)  # fmt: skip
        axes.axvline(len(settings), color=HAIRLINE, linewidth=1.2, zorder=1)
        for place, text in scale.ticks():
            axes.annotate(text, (len(settings), 1 - place), (6, 0), textcoords="offset points", va="center",
                          fontsize=7.5, color=INK)  # fmt: skip
        names = [axis.name.rpartition(".")[2].replace("_", "\n", 1) for axis in settings] + ["validation\nloss, nats"]
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks([])
        axes.set_ylim(-0.04, 1.04)
        axes.spines[["top", "left", "right", "bottom"]].set_visible(False)
        axes.tick_params(axis="x", length=0)
        note = f"{len(rows)} trials; the best in blue, those that were stopped early dotted"
        add_title(axes, "Every trial", note, above=22)
    return figure


def sensitivity(result: Mapping[str, Any]) -> Figure:
    """The loss at the step that all trials have reached against each setting, and a table of the first two."""
    settings = axes_of(result)
    rows = [row for row in result["rows"] if row["loss_nats_at_common_step"] is not None]
    table = len(settings) > 1
    panels, columns = len(settings) + table, 2
    with matplotlib.rc_context(STYLE):
        figure, grid = panel_grid(
            math.ceil(panels / columns), columns, panel_in=2.2, top_in=0.55, right_in=0.35, left_in=0.75
        )
        first = figure.add_subplot(grid[0, 0])
        if table:
            _table(first, settings[0], settings[1], rows)
        for place, axis in enumerate(settings, start=int(table)):
            axes = figure.add_subplot(grid[place // columns, place % columns]) if place else first
            _against(axes, axis, rows)
            if place % columns == 0 or place == 1:
                axes.set_ylabel(f"loss at step {result['common_step']}, nats")
    return figure


def _against(axes: Axes, axis: Axis, rows: Sequence[Row]) -> None:
    """A dot per trial; filled if it has taken all steps. Choices have a line at their mean as well."""
    for finished in (False, True):
        part = [row for row in rows if (row["state"] == "finished") is finished]
        axes.plot([axis.place(row["sample"][axis.name]) for row in part],
                  [row["loss_nats_at_common_step"] for row in part], linestyle="", marker="o", markersize=5,
                  markeredgecolor=ON, markerfacecolor=ON if finished else PAPER, zorder=3)  # fmt: skip
    for value in axis.values or ():
        losses = [row["loss_nats_at_common_step"] for row in rows if row["sample"][axis.name] == value]
        if losses:
            half = 0.32 / len(axis.values or ())
            axes.plot([axis.place(value) - half, axis.place(value) + half], [np.mean(losses)] * 2, color=INK,
                      linewidth=1.6, zorder=2)  # fmt: skip
    ticks = axis.ticks()
    axes.set_xticks([place for place, _ in ticks], [literal(text) for _, text in ticks])
    axes.set_xlim(-0.04, 1.04)
    plain_axes(axes, grid="y")
    add_title(axes, axis.name.rpartition(".")[2], "")


def _table(axes: Axes, across: Axis, down: Axis, rows: Sequence[Row]) -> None:
    """Mean loss per pair of values; darker is lower, empty where no trial was."""
    sums, counts = np.zeros((down.cells, across.cells)), np.zeros((down.cells, across.cells))
    for row in rows:
        at = down.cell(row["sample"][down.name]), across.cell(row["sample"][across.name])
        sums[at] += row["loss_nats_at_common_step"]
        counts[at] += 1
    means = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    axes.imshow(means, cmap="Blues_r", aspect="auto", origin="lower", alpha=0.8)
    middle = np.nanmean(means) if rows else 0.0
    for (y, x), mean in np.ndenumerate(means):
        if counts[y, x]:
            text = f"{mean:.2f}" + (f"\nn = {counts[y, x]:.0f}" if counts[y, x] > 1 else "")
            axes.annotate(text, (x, y), ha="center", va="center", fontsize=8, color=PAPER if mean < middle else INK)
    axes.set_xticks(range(across.cells), [literal(text) for text in across.cell_texts()])
    axes.set_yticks(range(down.cells), [literal(text) for text in down.cell_texts()])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_ylabel(down.name.rpartition(".")[2])
    names = [axis.name.rpartition(".")[2] for axis in (across, down)]
    add_title(axes, f"{names[0]} and {names[1]}", "mean loss")


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.3g}" if isinstance(value, float) else str(value)
