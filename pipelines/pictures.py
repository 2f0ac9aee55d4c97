"""The figures of a report: reach curves, training curves, and where the write gate opens.

Every function takes plain rows and returns a matplotlib `Figure` with an Agg canvas of its own: no pyplot, no
display, no state shared between calls. `image_bytes` turns a figure into a PNG or an SVG.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeGuard

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import offset_copy

Row = Mapping[str, Any]

# Blue and vermillion after Okabe & Ito (2008): apart in hue and in lightness, for any kind of colour vision
# and in a greyscale print. The greys are text, secondary text, hairlines, and the background of the window.
ON, OFF = "#0072b2", "#c8500a"
INK, MUTED, HAIRLINE, BAND, PAPER = "#1f2328", "#656d76", "#e3e6ea", "#f4f6f8", "#ffffff"
LINES = ("-", (0, (4.5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)))
MARKERS = ("o", "s", "^", "D")
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same picture on every machine
    "font.size": 9.0,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9.0,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "grid.color": HAIRLINE,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "svg.fonttype": "path",
}
WIDTH_IN = 8.0
DPI = 200  # 1600 pixels wide: sharp at 800 on a dense screen


def token_label(count: int) -> str:
    """A token count as a tick shows it: 256, 16k and 1M for multiples of 1024; anything else in full."""
    for unit, name in ((1024**2, "M"), (1024, "k")):
        if count >= unit and count % unit == 0:
            return f"{count // unit}{name}"
    return f"{count:,}"


def percent(share: float, digits: int = 0) -> str:
    """A fraction as figures and tables show it: 0.5 is "50 %"."""
    return f"{100 * share:.{digits}f} %"


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
        figure, grid = _panels(math.ceil(len(tasks) / columns), columns, panel_in=3.2 if wide else 2.4,
                               top_in=0.66, right_in=1.52 if wide else 1.05)  # fmt: skip
        for place, task in enumerate(tasks):
            axes = figure.add_subplot(grid[place // columns, place % columns])
            part = [row for row in rows if row["task"] == task]
            _reach_panel(axes, part, fillers, window_tokens, (chance or {}).get(task), wide=wide)
            note = _sample_note(part) if wide else "accuracy"
            _title(axes, task.replace("_", "-").capitalize(), note, above=22)
            if place + columns >= len(tasks):
                name = "tokens between the facts and the question" if wide else "gap in tokens"
                axes.set_xlabel(name, labelpad=-4)
    return figure


def _reach_panel(
    axes: Axes, rows: list[Row], fillers: list[str], window: int | None, chance: float | None, *, wide: bool
) -> None:
    """Curves, intervals, the window and the chance line of one task, at positions log2(gap)."""
    gaps = sorted({int(row["gap_tokens"]) for row in rows})
    edge = [math.log2(window)] if window else []
    marks = [math.log2(gap) for gap in gaps if gap > 0] + edge or [1.0]
    slot = min(marks) - max(1.0, (max(marks) - min(marks)) * (0.12 if wide else 0.2))  # room for its name

    def place(gap: int) -> float:
        return math.log2(gap) if gap > 0 else slot

    used = [place(gap) for gap in gaps] + edge
    left, right = min(used) - 0.4, max(used) + 0.12
    ends: list[tuple[float, float, str, str]] = []
    for memory, color in (("off", OFF), ("on", ON)):
        for style, filler in enumerate(fillers):
            curve = [row for row in rows if row["filler"] == filler and row["memory"] == memory]
            curve.sort(key=lambda row: row["gap_tokens"])
            if not curve:
                continue
            x, y = [place(int(row["gap_tokens"])) for row in curve], [float(row["accuracy"]) for row in curve]
            low, high = [row["low"] for row in curve], [row["high"] for row in curve]
            axes.fill_between(x, low, high, color=color, alpha=0.14, linewidth=0, zorder=2)
            axes.plot(x, y, color=color, linewidth=1.9, linestyle=LINES[style % 4], marker=MARKERS[style % 4],
                      markersize=4.6, markeredgewidth=1.3, markerfacecolor=color if style == 0 else PAPER,
                      zorder=3, label=f"memory {memory}, {filler}", clip_on=False)  # fmt: skip
            name = (f"memory {memory}" if wide else memory) + (f", {filler}" if len(fillers) > 1 else "")
            ends.append((x[-1], y[-1], name, color))
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
    _plain(axes, grid="y")


def _end_labels(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Names the curves at their right ends (x, y, name, colour), pushed apart until no two names overlap."""
    ends = sorted(ends, key=lambda end: end[1])
    heights = [end[1] for end in ends]
    figure = axes.get_figure(root=True)
    assert figure is not None
    line_height = 12.5 / (axes.get_position().height * figure.get_figheight() * 72)
    for _ in range(100):
        for i in range(1, len(heights)):
            overlap = max(0.0, line_height - (heights[i] - heights[i - 1]))
            heights[i - 1] -= overlap / 2
            heights[i] += overlap / 2
        heights = [height - min(0.0, heights[0]) for height in heights]
    right = max(end[0] for end in ends)
    beside = offset_copy(axes.transData, figure, x=13, units="points")
    for (x, y, name, color), height in zip(ends, heights, strict=True):
        line = {"arrowstyle": "-", "shrinkA": 1, "shrinkB": 5, "relpos": (0, 0.5), "lw": 0.7, "color": color}
        axes.annotate(_literal(name), (x, y), (right, height), textcoords=beside, color=color, va="center",
                      arrowprops=line if abs(height - y) > 0.9 * line_height else None)  # fmt: skip


def training_curves(history: Sequence[Row]) -> Figure:
    """Loss, accuracy and speed against the optimizer step; what the history does not hold has no panel.

    `history` rows hold "step" and any of "loss" (nats per token), "accuracy" (fraction) and "tokens_per_s".
    """
    panels = [("loss", "Loss", "nats per token"), ("accuracy", "Accuracy", "in training"),
              ("tokens_per_s", "Speed", "tokens per second")]  # fmt: skip
    panels = [panel for panel in panels if any(_finite(row.get(panel[0])) for row in history)] or panels[:1]
    with matplotlib.rc_context(STYLE):
        figure, grid = _panels(1, len(panels), panel_in=2.1, top_in=0.4, right_in=0.12)
        for place, (key, title, unit) in enumerate(panels):
            axes = figure.add_subplot(grid[0, place])
            rows = [row for row in history if _finite(row.get("step")) and _finite(row.get(key))]
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
            _plain(axes, grid="y")
            _title(axes, title, unit)
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
        figure, grid = _panels(1, 1, panel_in=height - 1.08, top_in=0.5, right_in=2.5, left_in=2.0)
        axes = figure.add_subplot(grid[0, 0])
        beside = axes.get_yaxis_transform()
        names = []
        for y, row in enumerate(usage):
            where = [str(row[key]) for key in ("task", "filler") if row.get(key)]
            names.append(_literal(", ".join([f"layer {row['layer']}", *where])))
            spots = [float(row[key]) for key, *_ in columns[:2] if _finite(row.get(key))]
            axes.plot(spots, [y] * len(spots), color=HAIRLINE, linewidth=5, zorder=1)
            for key, name, color, x in columns:
                if not _finite(value := row.get(key)):
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
        _plain(axes, grid="x")
        _title(axes, "Write strength", "on facts and on filler", above=16)
    return figure


def image_bytes(figure: Figure, form: Literal["png", "svg"] = "png") -> bytes:
    """The figure as a PNG of 1600 pixels width, or as SVG with its letters drawn as paths."""
    with io.BytesIO() as buffer, matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format=form, dpi=DPI, metadata={"Date": None} if form == "svg" else None)
        return buffer.getvalue()


def _panels(
    rows: int, columns: int, *, panel_in: float, top_in: float, right_in: float, left_in: float = 0.55
) -> tuple[Figure, GridSpec]:
    """An empty figure and the grid of its panels, with margins around every panel, all in inches."""
    below_in = 0.58
    height = rows * (panel_in + top_in + below_in)
    figure = Figure(figsize=(WIDTH_IN, height), dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        rows, columns,
        wspace=(left_in + right_in) / (WIDTH_IN / columns - left_in - right_in),
        hspace=(top_in + below_in) / panel_in,
        left=left_in / WIDTH_IN, right=1 - right_in / WIDTH_IN,
        bottom=below_in / height, top=1 - top_in / height,
    )  # fmt: skip
    return figure, grid


def _title(axes: Axes, title: str, note: str = "", *, above: float = 9) -> None:
    """A bold title flush left, `above` points over the panel, and a note in grey after it."""
    label = axes.annotate(_literal(title), (0, 1), (0, above), xycoords="axes fraction", fontweight="bold",
                          textcoords="offset points", fontsize=11.5)  # fmt: skip
    axes.annotate(note, (1, 1), (8, above), xycoords=(label, "axes fraction"), textcoords="offset points",
                  color=MUTED)  # fmt: skip


def _plain(axes: Axes, *, grid: Literal["x", "y"]) -> None:
    """Hairlines along one axis, and only the bottom spine; the data is the darkest thing in the panel."""
    axes.grid(axis=grid)
    axes.set_axisbelow(True)
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _sample_note(rows: list[Row]) -> str:
    """What stands behind one point of the curves."""
    counts = sorted({row["n"] for row in rows})
    span = " to ".join(f"{n:,}" for n in counts[:1] + counts[1:][-1:])
    return f"accuracy; {span} examples per point, bands are 95 % intervals"


def _literal(text: str) -> str:
    """Text that matplotlib draws as it is: a dollar sign would start a formula."""
    return text.replace("$", r"\$")


def _finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean [n] over a tenth of the points, centred; over fewer at the start, where curves dive."""
    index = np.arange(len(values))
    half = np.minimum(index, len(values) // 20)
    low, high = index - half, np.minimum(index + half + 1, len(values))
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[high] - total[low]) / (high - low)
