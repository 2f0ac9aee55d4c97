"""The figure of population-based training: what each setting was on the way to each trial's last weights.

`result` is what `sweep_table.sweep_result` returns. Apart from `sweep_pictures`, where settings do not change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from pipelines.drawing import MUTED, ON, STYLE, add_title, literal, panel_grid, plain_axes
from pipelines.sweep_pictures import axes_of


def schedules(result: Mapping[str, Any]) -> Figure:
    """A panel per setting, a line per trial: of the weights that it ended with, so lines that meet share their past."""
    settings = axes_of(result)
    columns = min(2, len(settings))
    rows = [(place, row) for place, row in enumerate(result["rows"]) if row.get("schedule")]
    with matplotlib.rc_context(STYLE):
        figure, grid = panel_grid(
            math.ceil(len(settings) / columns), columns, panel_in=2.2, top_in=0.55, right_in=0.35, left_in=0.75
        )
        for number, axis in enumerate(settings):
            axes = figure.add_subplot(grid[number // columns, number % columns])
            for place, row in reversed(rows):
                best, parts = place == 0 and row["state"] == "finished", row["schedule"]
                heights = [axis.place(part["sample"][axis.name]) for part in parts]
                axes.step([0, *(part["step"] for part in parts)], [heights[0], *heights], where="pre",
                          color=ON if best else MUTED, linewidth=2.4 if best else 1.1, alpha=1.0 if best else 0.75,
                          zorder=3 if best else 2)  # fmt: skip
            axes.set_yticks([at for at, _ in axis.ticks()], [literal(text) for _, text in axis.ticks()])
            axes.set_ylim(-0.04, 1.04)
            axes.set_xlim(0, result["steps"])
            axes.set_xlabel("step")
            plain_axes(axes, grid="y")
            add_title(axes, axis.name.rpartition(".")[2], "the best in blue" if number == 0 else "")
    return figure
