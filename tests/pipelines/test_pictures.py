from __future__ import annotations

import io
import itertools
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from cortex_core.intervals import wilson
from pipelines.drawing import image_bytes, percent, token_label
from pipelines.pictures import gate_usage, reach_curves, training_curves

GAPS = (0, 256, 1024, 16384, 65536)
USAGE = [
    {"layer": 1, "write_frac": 0.021, "mean_write_on_facts": 0.82, "mean_write_on_filler": 0.0007},
    {"layer": 4, "task": "key_value", "filler": "te$t", "mean_write_on_facts": 0.5},
]


def rows(
    tasks: tuple[str, ...] = ("key_value",),
    fillers: tuple[str, ...] = ("text", "random"),
    gaps: tuple[int, ...] = GAPS,
) -> list[dict[str, Any]]:
    """With memory 190, 189, ... of 200 right; without it all of them in the window and 8, 9, ... beyond."""
    made = []
    for task, (style, filler), (i, gap) in itertools.product(tasks, enumerate(fillers), enumerate(gaps)):
        for memory in ("on", "off"):
            right = 190 - i - style if memory == "on" else (198 if gap == 0 else 8 + i + style)
            low, high, accuracy = wilson(right, 200)
            made.append({"task": task, "filler": filler, "gap_tokens": gap, "memory": memory,
                         "accuracy": accuracy, "n": 200, "low": low, "high": high})  # fmt: skip
    return made


def curve(axes: Axes, label: str) -> tuple[list[float], list[float]]:
    (line,) = [line for line in axes.get_lines() if line.get_label() == label]
    return list(np.asarray(line.get_xdata(), float)), list(np.asarray(line.get_ydata(), float))


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_visible() and text.get_text()]


def undrawn_ticks(figure: Figure) -> set[Any]:
    """Labels of ticks beyond the limits of their axis: they exist, but are not drawn."""
    sides = [(axis, sorted(axis.get_view_interval())) for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    return {
        tick.label1
        for axis, (low, high) in sides
        for tick in axis.get_major_ticks()
        if not low <= tick.get_loc() <= high
    }


def test_labels_of_token_counts_and_shares() -> None:
    assert [token_label(n) for n in (0, 256, 1000, 1024, 1500, 16384, 100_000, 2**20)] == [
        "0", "256", "1,000", "1k", "1,500", "16k", "100,000", "1M",
    ]  # fmt: skip
    assert (percent(0.5), percent(0.0417, 1)) == ("50 %", "4.2 %")


def test_reach_curves_draw_every_row_at_its_place() -> None:
    figure = reach_curves(rows(), window_tokens=256, chance={"key_value": 0.04})
    (axes,) = figure.axes
    for filler, memory in itertools.product(("text", "random"), ("on", "off")):
        x, y = curve(axes, f"memory {memory}, {filler}")
        part = [row for row in rows() if (row["filler"], row["memory"]) == (filler, memory)]
        assert y == [row["accuracy"] for row in part]
        assert x[1:] == [math.log2(row["gap_tokens"]) for row in part[1:]]
        assert x[0] == 7.0  # gap 0 has the slot left of the smallest gap
    assert curve(axes, "window")[0] == [8.0, 8.0]
    assert curve(axes, "chance")[1] == [0.04, 0.04]


def test_reach_curves_shade_the_intervals() -> None:
    (axes,) = reach_curves(rows(fillers=("text",))).axes
    shaded = [np.asarray(area.get_paths()[0].vertices) for area in axes.collections]
    for memory in ("on", "off"):
        part = [row for row in rows(fillers=("text",)) if row["memory"] == memory]
        corners = {(math.log2(row["gap_tokens"] or 128), row[edge]) for row in part for edge in ("low", "high")}
        assert any(corners <= {tuple(point) for point in area} for area in shaded)


def test_reach_curves_name_what_they_show() -> None:
    figure = reach_curves(rows(), window_tokens=256, chance={"key_value": 0.04})
    shown = texts(figure)
    for expected in ("memory on, text", "memory on, random", "memory off, text", "memory off, random", "chance 4.0 %",
                     "attention sees 256 tokens", "Key-value", "in\nwindow", "256", "1k", "16k", "64k", "100 %"):  # fmt: skip
        assert shown.count(expected) == 1, expected
    assert any("200 examples per point" in text and "95 % intervals" in text for text in shown)


def test_fillers_differ_in_line_and_marker_and_memory_in_colour() -> None:
    (axes,) = reach_curves(rows()).axes
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    on, other, off = (lines[name] for name in ("memory on, text", "memory on, random", "memory off, text"))
    assert on.get_color() == other.get_color() != off.get_color()
    assert on.get_marker() == off.get_marker() != other.get_marker()
    assert not on.is_dashed()
    assert other.is_dashed()


def test_one_panel_per_task_with_only_its_own_rows_and_chance() -> None:
    tasks = ("key_value", "copy_reverse", "n_back")
    figure = reach_curves(rows(tasks), window_tokens=256, chance={"n_back": 0.25})
    assert [name for name in texts(figure) if name in ("Key-value", "Copy-reverse", "N-back")] == [
        "Key-value", "Copy-reverse", "N-back",
    ]  # fmt: skip
    assert len(figure.axes) == 3
    assert [any(line.get_label() == "chance" for line in axes.get_lines()) for axes in figure.axes] == [
        False, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "figure",
    [
        reach_curves(rows(), window_tokens=256, chance={"key_value": 0.04}),
        reach_curves(rows(gaps=(0, *(2**i for i in range(8, 21)))), window_tokens=256),
        reach_curves(rows(("key_value", "n_back", "corpus")), window_tokens=256, chance={"n_back": 0.25}),
        gate_usage(USAGE),
        training_curves([{"step": i, "loss": 1 / i, "accuracy": 0.5, "tokens_per_s": 2e4} for i in range(1, 9)]),
    ],
    ids=["one task", "many gaps", "three tasks", "usage", "training"],
)
def test_nothing_is_cut_off_and_no_names_overlap(figure: Figure) -> None:
    figure.canvas.draw()
    boxes = {
        text: text.get_window_extent()
        for text in set(figure.findobj(Text)) - undrawn_ticks(figure)
        if text.get_visible() and text.get_text().strip()
    }
    width, height = figure.bbox.width, figure.bbox.height
    for text, box in boxes.items():
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
        assert inside, f"{text.get_text()!r} reaches out of the figure"
    for (one, a), (two, b) in itertools.combinations(boxes.items(), 2):
        crossing = (min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0))
        assert min(crossing) <= 2, f"{one.get_text()!r} overlaps {two.get_text()!r}"


@pytest.mark.parametrize("gaps", [(0,), (512,), (0, 512), (300, 1000), tuple(2**i for i in range(4, 20))])
def test_any_set_of_gaps_can_be_drawn(gaps: tuple[int, ...]) -> None:
    only_on = [row for row in rows(gaps=gaps) if row["memory"] == "on"]
    figure = reach_curves(only_on, window_tokens=None if gaps == (0,) else 256)
    assert len(curve(figure.axes[0], "memory on, text")[0]) == len(gaps)
    assert len(figure.axes[0].get_xticks()) <= 13
    assert len(image_bytes(figure)) > 10_000


def test_a_window_between_the_slot_and_the_first_gap_keeps_the_order() -> None:
    (axes,) = reach_curves(rows(gaps=(0, 4096)), window_tokens=512).axes
    zero, first = curve(axes, "memory on, text")[0]
    assert zero < curve(axes, "window")[0][0] < first


def test_training_curves_show_what_the_history_holds() -> None:
    history = [{"step": 10 * i, "loss": 3.0 / i, "accuracy": math.nan if i == 2 else i / 50} for i in range(1, 41)]
    loss, accuracy = training_curves([*history, {"note": "no step"}]).axes
    assert curve(loss, "loss") == ([row["step"] for row in history], [row["loss"] for row in history])
    assert len(curve(accuracy, "accuracy")[0]) == 39
    smooth = curve(loss, "loss, smoothed")[1]
    assert smooth[0] == 3.0
    assert smooth[20] == pytest.approx(np.mean([row["loss"] for row in history[18:23]]))
    assert len(training_curves([]).axes) == 1


def test_gate_usage_shows_each_layer_with_its_numbers() -> None:
    figure = gate_usage(USAGE)
    (axes,) = figure.axes
    points = [line for line in axes.get_lines() if line.get_label() in ("facts", "filler")]
    assert [(line.get_label(), *line.get_xdata(), *line.get_ydata()) for line in points] == [
        ("facts", 0.82, 0), ("filler", 0.0007, 0), ("facts", 0.5, 1),
    ]  # fmt: skip
    assert {"layer 1", "0.8200", "0.0007", "2.10 %", "0.5000", r"layer 4, key_value, te\$t"} <= set(texts(figure))


def test_the_png_is_1600_pixels_wide_white_and_in_colour() -> None:
    image = Image.open(io.BytesIO(image_bytes(reach_curves(rows(), window_tokens=256))))
    pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert image.width == 1600
    assert tuple(pixels[0]) == (255, 255, 255)
    for color in ((0x00, 0x72, 0xB2), (0xC8, 0x50, 0x0A)):
        assert (pixels == color).all(axis=1).sum() > 1000


def test_the_svg_carries_no_date_so_that_equal_data_looks_equal() -> None:
    assert b"<dc:date>" not in image_bytes(gate_usage(USAGE), "svg")


def test_drawing_needs_neither_pyplot_nor_a_display() -> None:
    code = (
        "import sys; from pipelines.drawing import image_bytes; from pipelines.pictures import gate_usage; image_bytes(gate_usage([{'layer': 0}]));"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PATH": ""})
    assert done.stdout == "False\n"
