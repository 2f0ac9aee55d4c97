"""What the figures share: colours, lines, labels, panels. No pyplot, no display, no state shared between calls."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any, Literal, TypeGuard

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec

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


def image_bytes(figure: Figure, form: Literal["png", "svg"] = "png") -> bytes:
    """The figure as a PNG of 1600 pixels width, or as SVG with its letters drawn as paths."""
    with io.BytesIO() as buffer, matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format=form, dpi=DPI, metadata={"Date": None} if form == "svg" else None)
        return buffer.getvalue()


def panel_grid(
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


def add_title(axes: Axes, title: str, note: str = "", *, above: float = 9) -> None:
    """A bold title flush left, `above` points over the panel, and a note in grey after it."""
    label = axes.annotate(literal(title), (0, 1), (0, above), xycoords="axes fraction", fontweight="bold",
                          textcoords="offset points", fontsize=11.5)  # fmt: skip
    axes.annotate(note, (1, 1), (8, above), xycoords=(label, "axes fraction"), textcoords="offset points",
                  color=MUTED)  # fmt: skip


def plain_axes(axes: Axes, *, grid: Literal["x", "y"]) -> None:
    """Hairlines along one axis, and only the bottom spine; the data is the darkest thing in the panel."""
    axes.grid(axis=grid)
    axes.set_axisbelow(True)
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def literal(text: str) -> str:
    """Text that matplotlib draws as it is: a dollar sign would start a formula."""
    return text.replace("$", r"\$")


def finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value)
