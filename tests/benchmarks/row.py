"""One line of the scoreboard, and all of them as a table."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

Better = Literal["higher", "lower"]
HEADINGS = ("row", "value", "goal", "n", "interval", "seconds", "")


@dataclass(frozen=True)
class Row:
    """A figure that the project claims, as it was measured just now."""

    name: str
    value: float
    goal: float | None
    """Bound that `value` must reach; None where the figure only informs."""
    better: Better
    unit: str
    n: int
    """Independent examples, pairs or repeats behind `value`."""
    low: float | None = None
    """Lower end of the 95 % interval, or the smallest of a few repeats; None after a single measurement."""
    high: float | None = None
    """The upper end, likewise."""
    seconds: float = 0.0
    """What measuring it took. Rows that are measured together share their seconds out, or the first one bears them."""

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None without a goal."""
        if self.goal is None:
            return None
        return self.value >= self.goal if self.better == "higher" else self.value <= self.goal

    def json(self) -> str:
        """One line, keys in the order of the fields. An interval that is not known is null."""
        fields = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}
        return json.dumps(fields | {"seconds": round(self.seconds, 1)})


def table(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table that a terminal shows aligned, and a last line that counts."""
    rows = list(rows)
    cells = [HEADINGS, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADINGS))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    judged = [row.met for row in rows if row.met is not None]
    lines.append(f"\n{sum(judged)} of {len(judged)} goals met, {len(rows) - len(judged)} rows without a goal.")
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    sign = "≥" if row.better == "higher" else "≤"
    goal = "" if row.goal is None else f"{sign} {_number(row.goal)}"
    known = row.low is not None and row.high is not None
    interval = f"{_number(row.low)} to {_number(row.high)}" if known else ""  # type: ignore[arg-type]
    verdict = {True: "met", False: "missed", None: ""}[row.met]
    value = f"{_number(row.value)} {row.unit}".rstrip()
    return row.name, value, goal, str(row.n), interval, f"{row.seconds:.0f}", verdict


def _number(value: float) -> str:
    return f"{value:.4g}"
