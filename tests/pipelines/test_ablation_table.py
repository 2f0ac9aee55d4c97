"""The comparison of made-up evaluations whose differences are known, and what is drawn and printed of it."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text
from rich.console import Console

from cortex_core.eval.ablations import REFERENCE, VARIANTS
from cortex_core.intervals import wilson
from pipelines.ablation_page import ablation_curves, looks, page
from pipelines.ablation_table import FILES, compare, flat, print_ablations, write_ablations
from tests.pipelines.test_pictures import undrawn_ticks

N = 20
GAPS = (0, 1024, 16384)
EVALUATED = [name for name, variant in VARIANTS.items() if variant.made_by != "nothing"]


def document(right: int, shift: int = 0, **changes: Any) -> dict[str, Any]:
    """With memory `right` of N are right, those from number `shift` on; without, 19 in the window and 2 beyond."""
    rows, outcomes = [], []
    for filler, gap, memory in itertools.product(("text", "random"), GAPS, ("on", "off")):
        count = right if memory == "on" else (19 if gap == 0 else 2)
        low, high, accuracy = wilson(count, N)
        rows.append({"task": "key_value", "filler": filler, "gap_tokens": gap, "memory": memory,
                     "accuracy": accuracy, "n": N, "low": low, "high": high})  # fmt: skip
        ones = ["1"] * count + ["0"] * (N - count)
        outcomes.append("".join(np.roll(ones, shift if memory == "on" else 0)))
    return {
        "rows": rows, "outcomes": outcomes, "drift": {"ratio": 1.0002, "low": 1.0001, "high": 1.0004},
        "usage": [{"layer": 1, "write_frac": 0.01, "gate_surprise_r": 0.5}, {"layer": 2, "write_frac": 0.03, "gate_surprise_r": None}],
        "sidecar_parameters": 21630, "state_bytes": 16384, "window_tokens": 256, "chance": {"key_value": 0.0142},
    } | changes  # fmt: skip


def everything() -> dict[str, Any]:
    """All variants, each a little worse than the one before."""
    documents = {name: document(max(N - 1 - place, 2)) for place, name in enumerate(EVALUATED)}
    return compare(documents, list(VARIANTS)) | {"run": "demo <1>", "created": "2026-03-04T10:11:12Z"}


def row(result: dict[str, Any], variant: str, gap: int = 1024) -> dict[str, Any]:
    (found,) = [r for r in result["rows"] if (r["variant"], r["gap_tokens"], r["filler"]) == (variant, gap, "text")]
    return found


def test_a_difference_is_variant_minus_reference() -> None:
    result = compare({REFERENCE: document(16), "no_gate": document(10)}, [REFERENCE, "baseline", "no_gate"])
    assert row(result, "no_gate")["difference"] == pytest.approx(-0.3)
    assert -0.6 < row(result, "no_gate")["difference_low"] < -0.3 < row(result, "no_gate")["difference_high"] < 0
    assert row(result, "baseline")["difference"] == pytest.approx(2 / N - 16 / N)
    assert row(result, "baseline", gap=0)["difference"] == pytest.approx(19 / N - 16 / N)
    assert row(result, "baseline")["accuracy"] == 2 / N and row(result, REFERENCE)["difference"] is None


def test_answers_to_the_same_questions_narrow_the_interval() -> None:
    """Half right each: once the same half, once the other one."""

    def width(shift: int) -> float:
        result = compare({REFERENCE: document(10), "no_gate": document(10, shift)}, [REFERENCE, "no_gate"])
        found = row(result, "no_gate")
        assert found["difference"] == 0
        return found["difference_high"] - found["difference_low"]

    assert width(0) < 0.6 * width(10)


def test_an_evaluation_that_kept_no_answers_has_no_difference() -> None:
    documents = {REFERENCE: document(16), "no_gate": document(10)}
    del documents["no_gate"]["outcomes"]
    result = compare(documents, [REFERENCE, "baseline", "no_gate"])
    assert row(result, "no_gate")["difference"] is None and row(result, "no_gate")["accuracy"] == 0.5
    assert row(result, "baseline")["difference"] is not None


def test_costs_are_means_over_layers_and_what_was_not_measured_is_none() -> None:
    (cortex, baseline) = compare({REFERENCE: document(16)}, [REFERENCE, "baseline"])["variants"]
    assert cortex["write_frac"] == pytest.approx(0.02) and cortex["gate_surprise_r"] == 0.5
    assert (cortex["drift"], cortex["drift_low"], cortex["drift_high"]) == (1.0002, 1.0001, 1.0004)
    assert (baseline["drift"], baseline["state_bytes"], baseline["gate_surprise_r"]) == (1.0, 0, None)
    (cortex, baseline) = compare({REFERENCE: document(16, drift=None, usage=[])}, [REFERENCE, "baseline"])["variants"]
    assert cortex["drift"] is cortex["write_frac"] is cortex["gate_surprise_r"] is baseline["drift"] is None


def test_all_files_hold_the_same_numbers(tmp_path: Path) -> None:
    result = everything()
    written = write_ablations(result, tmp_path)
    assert sorted(written) == sorted(FILES) == sorted(path.name for path in tmp_path.iterdir())
    assert json.loads(written["ablations.json"].read_text()) == json.loads(json.dumps(result))
    expected = pd.DataFrame(flat(result))
    assert len(expected) == len(VARIANTS) * 2 * len(GAPS)
    for found in (pd.read_csv(written["ablations.csv"]), pd.read_parquet(written["ablations.parquet"])):
        pd.testing.assert_frame_equal(found, expected, check_dtype=False)


def test_a_failure_leaves_the_files_of_an_earlier_result(tmp_path: Path) -> None:
    written = write_ablations(everything(), tmp_path)
    before = {name: path.read_bytes() for name, path in written.items()}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_ablations(
            everything() | {"run": "other", "created": "", "chance": {"key_value": 0.5}, "extra": float("nan")},
            tmp_path,
        )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_every_variant_is_drawn_at_its_place_in_a_look_of_its_own() -> None:
    result = everything()
    figure = ablation_curves(result["rows"], window_tokens=256, chance=result["chance"])
    text, random = figure.axes
    for axes, filler in ((text, "text"), (random, "random")):
        lines = {str(line.get_label()): line for line in axes.get_lines()}
        assert set(VARIANTS) <= set(lines)
        for name in VARIANTS:
            part = [r["accuracy"] for r in result["rows"] if (r["variant"], r["filler"]) == (name, filler)]
            assert list(np.asarray(lines[name].get_ydata(), float)) == part
            assert list(np.asarray(lines[name].get_xdata(), float))[1:] == [10.0, 14.0]
    assert len({looks(name) for name in VARIANTS}) == len(VARIANTS)
    assert len(text.collections) == 2, "bands of the reference and the bare model alone"


@pytest.mark.parametrize("perfect", [False, True])
@pytest.mark.parametrize("names", [list(VARIANTS), [REFERENCE], [REFERENCE, "fast_off"]], ids=["all", "one", "two"])
def test_no_names_overlap_and_none_is_cut_off(names: Sequence[str], perfect: bool) -> None:
    rows = [r | ({"accuracy": 1.0} if perfect else {}) for r in everything()["rows"] if r["variant"] in names]
    figure = ablation_curves(rows, window_tokens=256, chance={"key_value": 0.0142})
    figure.canvas.draw()
    boxes = {
        text: Text.get_window_extent(text)  # without the line from a name to its curve
        for text in set(figure.findobj(Text)) - undrawn_ticks(figure)
        if text.get_visible() and text.get_text().strip()
    }
    assert {name for name in names if name not in {text.get_text() for text in boxes}} == set()
    for text, box in boxes.items():
        assert min(box.x0, box.y0) >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text
    overlapping = [
        (one.get_text(), other.get_text())
        for one, other in itertools.combinations(boxes, 2)
        if boxes[one].overlaps(boxes[other])
    ]
    assert overlapping == []


def test_the_page_is_one_file_with_every_number() -> None:
    result = everything()
    html = page(result, ablation_curves(result["rows"]))
    assert "<script" not in html and "src=" not in html and "demo &lt;1&gt;" in html and "demo <1>" not in html
    assert [
        name
        for name, variant in VARIANTS.items()
        if f"<th scope=row>{name}<td class=range>{escape(variant.without)}" not in html
    ] == []
    found = row(result, "soft_gate", gap=16384)
    low, high = 100 * found["difference_low"], 100 * found["difference_high"]
    cell = f"{100 * found['accuracy']:.1f} %<br><small>{100 * found['difference']:+.1f} ({low:+.1f} to {high:+.1f})</small>"
    assert html.count(cell) >= 1
    assert html.count("1.0001 to 1.0004") == len(EVALUATED)
    assert len(re.findall(r"<table>", html)) == 3


def test_the_summary_fits_80_columns_and_names_the_largest_gap() -> None:
    console = Console(width=80, file=io.StringIO(), color_system=None)
    print_ablations(everything(), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert text.count("at gap 16,384") == 2
    starts = [line.split()[0] for line in text.splitlines() if line.split()]
    assert [name for name in VARIANTS if starts.count(name) != 3] == []
    assert "95.0 %" in text and "21,630" in text and "+0.50" in text
