"""The result of an evaluation as files: numbers to compute with, pictures, and one page to read.

`evaluation.json` is the result, in the form of `Evaluation` below; everything else is drawn from it. Unknown
keys are kept, so that a later version may add some; a change that an older reader would misunderstand raises
`SCHEMA`.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cortex_core.config import Fraction, NonNegative, PositiveInt
from cortex_core.errors import DataError
from pipelines.drawing import Row, image_bytes, percent
from pipelines.pictures import gate_usage, reach_curves, training_curves
from pipelines.report_page import conditions, findings, interval, page

SCHEMA = 1
Count = Annotated[int, Field(ge=0)]


class _Open(BaseModel):
    """Checked where we read it, open to keys that we do not know."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)


class Score(_Open):
    """Accuracy on one task, filler and gap with memory on or off, over n examples, with its 95 % interval."""

    task: str
    filler: str
    gap_tokens: Count
    memory: Literal["on", "off"]
    accuracy: Fraction
    n: PositiveInt
    low: Fraction
    high: Fraction

    @model_validator(mode="after")
    def interval_holds_the_accuracy(self) -> Score:
        """Bounds lie on both sides of the accuracy, up to rounding."""
        if not self.low - 1e-9 <= self.accuracy <= self.high + 1e-9:
            raise ValueError(f"accuracy {self.accuracy} lies outside its interval {self.low} to {self.high}")
        return self


class Drift(_Open):
    """What the memory costs on held-out text: perplexity on and off, and their ratio with its interval."""

    perplexity_off: NonNegative | None = None
    perplexity_on: NonNegative | None = None
    ratio: NonNegative | None = None
    low: NonNegative | None = None
    high: NonNegative | None = None
    n_tokens: Count | None = None
    bits_per_byte_off: NonNegative | None = None
    bits_per_byte_on: NonNegative | None = None


class GateUse(_Open):
    """Where one layer's gate opens: share of tokens written, mean write strength on facts and on filler."""

    layer: Count
    task: str | None = None
    filler: str | None = None
    write_frac: Fraction | None = None
    mean_write_on_facts: Fraction | None = None
    mean_write_on_filler: Fraction | None = None
    gate_surprise_r: Annotated[float, Field(ge=-1.000001, le=1.000001)] | None = None
    """Pearson's r of the controller's gate and surprise; None where either is constant, or there is no controller."""


class Throughput(_Open):
    """Tokens read per second, with memory and without."""

    tokens_per_s_on: NonNegative | None = None
    tokens_per_s_off: NonNegative | None = None


class Evaluation(_Open):
    """One evaluation of one trained memory. Only `schema` and `rows` must be there."""

    version: Annotated[Literal[1], Field(alias="schema")]
    rows: Annotated[tuple[Score, ...], Field(min_length=1)]
    run: str | None = None
    created: str | None = None
    config: dict[str, Any] | None = None
    versions: dict[str, Any] | None = None
    drift: Drift | None = None
    usage: tuple[GateUse, ...] | None = None
    throughput: Throughput | None = None
    outcomes: tuple[Annotated[str, Field(pattern="^[01]+$")], ...] | None = None
    """Per row, "1" for each example that was right and "0" for the others, in their order."""
    state_bytes: Count | None = None
    sidecar_parameters: Count | None = None
    backbone_parameters: Count | None = None
    chance: dict[str, Fraction] | None = None
    window_tokens: PositiveInt | None = None

    @model_validator(mode="after")
    def a_condition_appears_once(self) -> Evaluation:
        """Two rows for one point of a curve would leave open which one holds."""
        seen: set[tuple[str, str, int, str]] = set()
        for row in self.rows:
            key = (row.task, row.filler, row.gap_tokens, row.memory)
            if key in seen:
                raise ValueError(f"two rows for task, filler, gap_tokens, memory = {key}")
            seen.add(key)
        return self

    @model_validator(mode="after")
    def outcomes_are_those_of_the_rows(self) -> Evaluation:
        """As many as examples, and as many right."""
        counts = [(row.n, round(row.accuracy * row.n)) for row in self.rows]
        if self.outcomes is not None and [(len(one), one.count("1")) for one in self.outcomes] != counts:
            raise ValueError("outcomes are not those of the rows: their numbers of examples or of right ones differ")
        return self


def load_evaluation(path: Path | str) -> dict[str, Any]:
    """The evaluation at `path`, a JSON file or a folder that holds `evaluation.json`.

    Raises:
        DataError: no file, truncated or malformed JSON, another schema, a missing key, a value out of bounds.
    """
    path = Path(path)
    path = path / "evaluation.json" if path.is_dir() else path
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: no evaluation there. Run `cortex evaluate` on its run folder") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check its permissions") from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not valid JSON, truncated or edited by hand ({error}). Run `cortex evaluate` again"
        ) from None
    document = _plain(document)
    _check(document, str(path))
    return document


def write_report(
    evaluation: Mapping[str, Any], out_dir: Path | str, history: Sequence[Row] | None = None
) -> dict[str, Path]:
    """Writes the report of an evaluation into `out_dir` and returns its files by name.

    Always `evaluation.json`, `.csv`, `.parquet`, `reach.png`, `report.html`; `usage.png` and `training.png`
    where there is something to draw. All are made in a folder of their own and then renamed, the JSON last:
    after an error the files of an earlier report stand as they were. `history` is the training history, in
    the form that `pictures.training_curves` describes.

    Raises:
        DataError: `evaluation` is not of the form `Evaluation`; nothing is written.
    """
    document = _plain(evaluation)
    _check(document, "evaluation")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    written: dict[str, Path] = {}
    with tempfile.TemporaryDirectory(prefix=".report-", dir=out_dir) as folder:
        _make(document, _plain(history or []), Path(folder))
        for name in _FILES:
            if (made := Path(folder) / name).exists():
                os.replace(made, out_dir / name)
                written[name] = out_dir / name
            else:
                (out_dir / name).unlink(missing_ok=True)  # a picture of an earlier evaluation would mislead
    return written


_FILES = ("report.html", "reach.png", "usage.png", "training.png",
          "evaluation.csv", "evaluation.parquet", "evaluation.json")  # fmt: skip


def _make(document: dict[str, Any], history: list[dict[str, Any]], folder: Path) -> None:
    """Every file of the report, in `folder`."""
    rows = document["rows"]
    window, chance = document.get("window_tokens"), document.get("chance")
    figures = {"reach": reach_curves(rows, window_tokens=window, chance=chance)}
    if document.get("usage"):
        figures["usage"] = gate_usage(document["usage"])
    if history:
        figures["training"] = training_curves(history)
    for name, figure in figures.items():
        (folder / f"{name}.png").write_bytes(image_bytes(figure))
    (folder / "report.html").write_text(page(document, figures), encoding="utf-8")
    frame = pd.DataFrame(rows)
    frame = frame[[*Score.model_fields, *(name for name in frame.columns if name not in Score.model_fields)]]
    frame.to_csv(folder / "evaluation.csv", index=False)
    frame.to_parquet(folder / "evaluation.parquet", index=False)
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "evaluation.json").write_text(text + "\n", encoding="utf-8")


def print_summary(evaluation: Mapping[str, Any], console: Console | None = None) -> None:
    """Accuracy by gap, a table per task and filler, and one line per headline; 80 columns suffice."""
    console = console or Console()
    for (task, filler), gaps in conditions(evaluation["rows"]).items():
        console.print(Text(f"{task}, filler: {filler}", style="bold"))
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in ("gap, tokens", "memory on", "95 % interval", "memory off", "95 % interval"):
            table.add_column(name, justify="right", no_wrap=True, min_width=12)
        for gap, pair in gaps.items():
            on, off = (
                (percent(row["accuracy"], 1), interval(row)) if (row := pair.get(memory)) else ("", "")
                for memory in ("on", "off")
            )
            table.add_row(f"{gap:,}" if gap else "in window", Text(on[0], style="bold"), on[1], *off)
        console.print(table)
    lines = Table.grid(padding=(0, 2))
    for name, value, notes in findings(evaluation):
        lines.add_row(Text(name), Text(value, style="bold"), Text(notes[0] if notes else "", style="dim"))
    console.print(lines)


def _check(document: Any, origin: str) -> None:
    """Raises DataError, one line that names the first wrong value, unless `document` is an `Evaluation`."""
    if not isinstance(document, dict):
        kind = type(document).__name__
        raise DataError(f"{origin}: a JSON object is expected, got {kind}. Run `cortex evaluate` again")
    if document.get("schema") != SCHEMA:
        raise DataError(
            f"{origin}: schema = {document.get('schema')!r}, this version reads {SCHEMA}. "
            "Use the version that wrote it, or run `cortex evaluate` again"
        )
    try:
        Evaluation.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "rows"
        raise DataError(f"{origin}: {place}: {first['msg']}. Run `cortex evaluate` again") from None


def _plain(value: Any) -> Any:
    """`value` in JSON's own types: no numpy, no tuples; a number that is not finite becomes None."""
    match value:
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case str():  # JSON may hold half a surrogate pair, a UTF-8 file may not
            return value.encode("utf-8", "replace").decode()
        case list() | tuple() | set() | frozenset():
            return [_plain(item) for item in value]
        case np.ndarray() | np.generic():
            return _plain(value.tolist())
        case float():
            return value if math.isfinite(value) else None
        case bool() | int() | None:
            return value
        case _:
            return str(value)
