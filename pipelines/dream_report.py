"""Dreams for the eye: some of them as a table, how the judge did, and the graph that they walk on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.ticker import MaxNLocator
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cortex_core.backbone.load import load_tokenizer
from cortex_core.dreaming import provenance
from cortex_core.dreaming.graph import MemoryGraph
from cortex_core.dreaming.picture import picture
from cortex_core.training.dreams import dreamed_in
from pipelines.config import RunConfig
from pipelines.drawing import HAIRLINE, MUTED, OFF, ON, PAPER, STYLE, add_title, image_bytes, panel_grid, percent
from pipelines.sleep_report import DREAMED

SUMMARY, PICTURE = "dreams.json", "memories.png"
SHOWN = 12
FIGURES = {
    "yield": "Kept of all dreams",
    "precision": "Right among those kept",
    "false_pass": "Kept of those that are wrong",
    "miss": "Rejected of those that are right",
    "good": "Right among all",
}


def write_dreamed(config: RunConfig, finished: Path, folder: Path) -> list[Path]:
    """The dreams that a life has learned from, or not, as lines of JSON in `folder`; no file if there were none.

    Raises DataError.
    """
    rows, path = dreamed_in(finished), folder / DREAMED
    path.unlink(missing_ok=True)  # of a run of this name before
    if not rows:
        return []
    tokenizer = load_tokenizer(config.backbone)
    provenance.append(path, (provenance.with_text(row, lambda ids: str(tokenizer.decode([*ids]))) for row in rows))
    return [path]


def draw(graph: MemoryGraph, walk: Sequence[int]) -> bytes:
    """A PNG of the memory graph with one walk: colours are days, sizes importance, lines links."""
    found = picture(graph, walk)
    at = {node.id: (node.x, node.y) for node in found.nodes}
    with matplotlib.rc_context(STYLE):
        figure, grid = panel_grid(1, 1, panel_in=5.4, top_in=0.55, right_in=0.75, left_in=0.3)
        axes = figure.add_subplot(grid[0, 0])
        weights = np.array([edge.similarity + edge.nearness + edge.together for edge in found.edges])
        widths = 0.3 + 1.2 * weights / weights.max(initial=1e-9)
        axes.add_collection(
            LineCollection([(at[e.one], at[e.other]) for e in found.edges], colors=HAIRLINE, linewidths=widths)
        )
        days = axes.scatter(
            [n.x for n in found.nodes], [n.y for n in found.nodes], c=[n.segment + 1 for n in found.nodes],
            s=[8 + 40 * n.importance for n in found.nodes], cmap="viridis", edgecolors=PAPER, linewidths=0.5, zorder=2,
        )  # fmt: skip
        if found.walk:
            xs, ys = zip(*found.walk, strict=True)
            axes.plot(xs, ys, color=OFF, linewidth=1.6, alpha=0.9, zorder=3)
            axes.scatter(xs[:1], ys[:1], marker="s", s=60, facecolors="none", edgecolors=OFF, linewidths=1.8, zorder=4)
        axes.set_axis_off()
        bar = figure.colorbar(days, ax=axes, fraction=0.03, pad=0.02)
        bar.locator = MaxNLocator(6, integer=True)
        bar.update_ticks()
        bar.set_label("day on which it was read", color=MUTED)
        add_title(
            axes, f"{len(graph):,} memories", "links: alike, near in time, read together; one walk, from the square"
        )
    return image_bytes(figure)


def print_summary(document: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Some dreams to look at, why others were rejected, and how good the judge is."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name, ratio in (("scene and question", 4), ("answer", 1), ("verdict", 1)):
        table.add_column(name, ratio=ratio, overflow="ellipsis", no_wrap=True)
    for row in rows[:SHOWN]:
        prompt = " ".join(row["prompt_text"].split())
        verdict = Text("kept", style="bold") if row["passed"] else Text(", ".join(row["reasons"]), style=OFF)
        table.add_row(
            Text("…" + prompt[-60:] if len(prompt) > 60 else prompt),
            Text(row["answer_text"].strip(), style=ON),
            verdict,
        )
    console.print(table)
    reasons = Counter(reason for row in rows for reason in row["reasons"])
    lines, quality = Table.grid(padding=(0, 2)), document["quality"]
    for name, text in FIGURES.items():
        value, low, high, n = (quality[f"{name}_{part}"] for part in ("value", "low", "high", "n"))
        shown = "none" if value is None else percent(value, 1)
        lines.add_row(
            text, Text(shown, style="bold"), Text(f"{percent(low, 1)} to {percent(high, 1)}, n = {n:,}", style="dim")
        )
    contamination = quality["contamination"]
    if contamination is not None:
        lines.add_row(
            "Wrong among those kept",
            Text(percent(contamination, 1), style="bold"),
            Text("f(1 - p) / (f(1 - p) + (1 - m)p)", style="dim"),
        )
    for reason, count in reasons.most_common():
        lines.add_row(f"Rejected: {reason.replace('_', ' ')}", Text(f"{count:,}", style="bold"), "")
    console.print(lines)
