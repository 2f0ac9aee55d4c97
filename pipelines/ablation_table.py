"""The result of an ablation: the variants' evaluations side by side, and differences over the same examples.

`ablations.json` is the result: `variants` says what each is and costs, `rows` holds the accuracies. `.csv` and
`.parquet` hold both in one flat table, a row per variant, task, filler and gap.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cortex_core.eval.ablations import REFERENCE, VARIANTS
from cortex_core.intervals import paired_difference
from pipelines.ablation_page import ablation_curves, costs_in_words, gained, page
from pipelines.drawing import Row, image_bytes, percent
from pipelines.report_page import interval

SCHEMA = 1
FILES = ("ablations.html", "ablations.png", "ablations.csv", "ablations.parquet", "ablations.json")
COSTS = ("drift", "drift_low", "drift_high", "write_frac", "gate_surprise_r", "sidecar_parameters", "state_bytes")
"""What is measured of a variant as a whole; in the flat table it stands in each of its rows."""
Documents = Mapping[str, Mapping[str, Any]]
Condition = tuple[str, str, int]


def compare(documents: Documents, names: Sequence[str]) -> dict[str, Any]:
    """The result, from one evaluation document per variant in `names`; of the bare model, `REFERENCE` has the answers.

    A difference is the variant's accuracy minus the reference's, over the same examples, with Newcombe's interval for
    paired data; None for the reference itself, and where an evaluation has not kept its answers.
    """
    reference = documents[REFERENCE]
    return {
        "schema": SCHEMA,
        "variants": [_costs(name, documents) for name in names],
        "rows": [row for name in names for row in _rows(name, documents)],
    } | {key: reference[key] for key in ("window_tokens", "chance", "versions") if key in reference}


def _costs(name: str, documents: Documents) -> dict[str, Any]:
    variant = VARIANTS[name]
    known = {
        "variant": name,
        "without": variant.without,
        "made_by": variant.made_by,
        "overrides": dict(variant.overrides),
    }
    if variant.made_by == "nothing":
        measured = documents[REFERENCE].get("drift") is not None
        ratio = 1.0 if measured else None
        return known | dict(zip(COSTS, (ratio, ratio, ratio, 0.0, None, 0, 0), strict=True))
    document = documents[name]
    drift, usage = document.get("drift") or {}, document.get("usage") or []
    return known | {
        "drift": drift.get("ratio"), "drift_low": drift.get("low"), "drift_high": drift.get("high"),
        "write_frac": _mean(usage, "write_frac"), "gate_surprise_r": _mean(usage, "gate_surprise_r"),
        "sidecar_parameters": document.get("sidecar_parameters"), "state_bytes": document.get("state_bytes"),
    }  # fmt: skip


def _mean(usage: Sequence[Row], key: str) -> float | None:
    """Over the layers in which it was measured."""
    values = [row[key] for row in usage if row.get(key) is not None]
    return sum(values) / len(values) if values else None


def _rows(name: str, documents: Documents) -> list[dict[str, Any]]:
    bare = VARIANTS[name].made_by == "nothing"
    answers = _answers(documents[REFERENCE if bare else name], "off" if bare else "on")
    others = _answers(documents[REFERENCE], "on")
    rows = []
    for condition, (row, outcomes) in answers.items():
        found = [row[key] for key in ("task", "filler", "gap_tokens", "accuracy", "n", "low", "high")]
        keys = ("variant", "task", "filler", "gap_tokens", "accuracy", "n", "low", "high")
        difference: tuple[float | None, ...] = (None, None, None)
        other = others[condition][1]
        if name != REFERENCE and outcomes is not None and other is not None:
            low, high, value = paired_difference(*([one == "1" for one in both] for both in (outcomes, other)))
            difference = (value, low, high)
        differences = dict(zip(("difference", "difference_low", "difference_high"), difference, strict=True))
        rows.append(dict(zip(keys, (name, *found), strict=True)) | differences)
    return rows


def _answers(document: Mapping[str, Any], memory: str) -> dict[Condition, tuple[Row, str | None]]:
    """Rows with memory on or off, each with the outcomes of its examples."""
    outcomes = document.get("outcomes") or repeat(None)
    return {
        (row["task"], row["filler"], row["gap_tokens"]): (row, right)
        for row, right in zip(document["rows"], outcomes, strict=False)
        if row["memory"] == memory
    }


def write_ablations(result: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Write FILES into `folder`, the JSON last; files of an earlier result stand until all are made."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".ablations-", dir=folder) as scratch:
        made = Path(scratch)
        figure = ablation_curves(result["rows"], window_tokens=result.get("window_tokens"), chance=result.get("chance"))
        (made / "ablations.png").write_bytes(image_bytes(figure))
        (made / "ablations.html").write_text(page(result, figure), encoding="utf-8")
        frame = pd.DataFrame(flat(result))
        frame.to_csv(made / "ablations.csv", index=False)
        frame.to_parquet(made / "ablations.parquet", index=False)
        text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False)
        (made / "ablations.json").write_text(text + "\n", encoding="utf-8")
        for name in FILES:
            os.replace(made / name, folder / name)
    return {name: folder / name for name in FILES}


def flat(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows with what their variant costs."""
    costs = {variant["variant"]: {key: variant[key] for key in COSTS} for variant in result["variants"]}
    return [row | costs[row["variant"]] for row in result["rows"]]


def print_ablations(result: Mapping[str, Any], console: Console) -> None:
    """Per task and filler the accuracy at the largest gap and its difference; then the costs. 80 columns suffice."""
    for (task, filler), gap in _largest_gaps(result["rows"]).items():
        where = f"at gap {gap:,}" if gap else "in the window"
        console.print(Text(f"{task}, filler: {filler}, {where}", style="bold"))
        heads = ("accuracy", "95 % interval", f"minus {REFERENCE}", "95 % interval")
        rows = [row for row in result["rows"] if (row["task"], row["filler"], row["gap_tokens"]) == (task, filler, gap)]
        console.print(
            _table(heads, [(row["variant"], percent(row["accuracy"], 1), interval(row), *gained(row)) for row in rows])
        )
    heads = ("perplexity", "written", "gate r", "parameters", "state bytes")
    console.print(_table(heads, [(variant["variant"], *costs_in_words(variant)) for variant in result["variants"]]))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("variant", no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for name, *cells in rows:
        table.add_row(Text(name, style="bold" if name == REFERENCE else ""), *cells)
    return table


def _largest_gaps(rows: Sequence[Row]) -> dict[tuple[str, str], int]:
    largest: dict[tuple[str, str], int] = {}
    for row in rows:
        condition = (row["task"], row["filler"])
        largest[condition] = max(row["gap_tokens"], largest.get(condition, 0))
    return largest
