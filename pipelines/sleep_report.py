"""What a life with sleep has left: numbers, a picture of what was known when, and a summary for the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.drawing import MUTED, ON, STYLE, add_title, image_bytes, panel_grid, percent, plain_axes

DOCUMENT, PICTURE, DREAMED = "sleep.json", "sleep.png", "dreamed.jsonl"


def write(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """`document` and its picture into `folder`; returns both paths."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / DOCUMENT).write_text(text + "\n", encoding="utf-8")
    (folder / PICTURE).write_bytes(image_bytes(known_by_day(document)))
    return [folder / DOCUMENT, folder / PICTURE]


def headline(document: Mapping[str, Any]) -> dict[str, float]:
    """The numbers by which two runs are compared in MLflow."""
    numbers = {f"known/{row['when']}/lead_{row['lead_tokens']:05d}": row["known"] for row in document["rows"]}
    return numbers | {
        "drift/ppl_ratio": document["drift"]["ratio"],
        "sleep/nights_undone": float(document["nights_undone"]),
        "memory/slow_bytes": float(document["slow_bytes"]),
    }


def known_by_day(document: Mapping[str, Any]) -> Figure:
    """Which days' facts are known after which night, fast weights empty; and beside it the share of all told so far."""
    known = document["known_by_day"]
    days = len(known)
    grid_of = np.full((days, days), np.nan)
    for night, shares in enumerate(known):
        grid_of[: len(shares), night] = shares
    with matplotlib.rc_context(STYLE):
        figure, grid = panel_grid(1, 2, panel_in=3.0, top_in=0.6, right_in=0.5, left_in=0.6)
        left, right = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
        edges = np.arange(days + 1) + 0.5
        mesh = left.pcolormesh(edges, edges, grid_of, vmin=0.0, vmax=1.0, cmap="Blues", rasterized=True)
        left.set_xlabel("night")
        left.set_ylabel("day on which the facts were told")
        left.invert_yaxis()
        bar = figure.colorbar(mesh, ax=left, fraction=0.05, pad=0.03)
        bar.ax.yaxis.set_major_formatter(lambda value, _: percent(value))
        add_title(left, "Known after each night", "by day")
        right.plot(range(1, days + 1), [day["sleep/known_frac"] for day in document["days"]], color=ON, linewidth=2.0)
        before = document["rows"][0]["known"]
        right.axhline(before, color=MUTED, linewidth=1.0, linestyle=(0, (4.5, 2)))
        right.annotate("before the first day", (1, before), (0, 4), textcoords="offset points", color=MUTED,
                       xycoords=("axes fraction", "data"), ha="right")  # fmt: skip
        right.set_ylim(-0.02, 1.04)
        right.set_xlabel("night")
        right.yaxis.set_major_formatter(lambda value, _: percent(value))
        add_title(right, "Of all told so far", "fast weights empty")
        plain_axes(right, grid="y")
        for axes in (left, right):
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        left.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure


def print_summary(document: Mapping[str, Any], console: Console) -> None:
    """What was known before and after, and at what price."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("asked after, tokens", "before", "after sleep", "95 % interval"):
        table.add_column(name, justify="right", no_wrap=True)
    rows = {(row["when"], row["lead_tokens"]): row for row in document["rows"]}
    for (when, lead), row in rows.items():
        if when == "after":
            before, between = (
                percent(rows["before", lead]["known"], 1),
                f"{percent(row['low'], 1)} to {percent(row['high'], 1)}",
            )
            table.add_row(f"{lead:,}", before, Text(percent(row["known"], 1), style="bold"), between)
    told, days = document["rows"][0]["n"], len(document["days"])
    console.print(f"{told:,} facts told in {days:,} days, asked with empty fast weights", highlight=False)
    console.print(table)
    drift, lines = document["drift"], Table.grid(padding=(0, 2))
    change = [f"{100 * (drift[name] - 1):+.2f}" for name in ("ratio", "low", "high")]
    lines.add_row(
        "Text perplexity",
        Text(f"{change[0]} %", style="bold"),
        Text(f"{change[1]} to {change[2]} %, over the bare model's", style="dim"),
    )
    nights, undone = document["nights"], document["nights_undone"]
    lines.add_row(
        "Nights undone", Text(f"{undone} of {nights}", style="bold"), Text("by the guard on held-out text", style="dim")
    )
    lines.add_row(
        "Slow weights" if document["place"] == "slow_weights" else "Backbone deltas",
        Text(f"{document['slow_bytes'] / 1e6:.1f} MB", style="bold"),
        Text("float32", style="dim"),
    )
    console.print(lines)
