"""Answers on disk, one JSON line each as soon as it is there, and what they come to."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cortex_core.errors import ConfigError, DataError
from cortex_core.eval.benchmarks.example import by_size
from cortex_core.eval.benchmarks.measures import YES_OR_NO
from cortex_core.intervals import Interval, mean_interval, paired_difference, wilson

ANSWERS, SETTINGS, SUMMARY = "answers.jsonl", "run.json", "summary.json"
TABLES = (".csv", ".parquet")
"""Endings of the other forms of the summary."""
SCHEMA = "cortex-bench/1"
ALL = "all"
"""Task or length of a row that several are joined in."""


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Note what the answers in `folder` come from, or compare with what is noted there.

    Raises ConfigError if they come from something else: they would be mixed.
    """
    settings, path = {"schema": SCHEMA} | settings, folder / SETTINGS
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        different = [name for name in settings if found[name] != settings[name]]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} is damaged: give another --out, or remove the folder") from None
    if different:
        name = different[0]
        raise ConfigError(
            f"--out {folder} holds answers with {name} = {found[name]}, not {settings[name]}: give another --out"
        )


def read_answers(folder: Path) -> dict[str, dict[str, Any]]:
    """Answers of earlier calls, by key. A line that a kill has cut off is removed. Raises DataError."""
    path = folder / ANSWERS
    if not path.is_file():
        return {}
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    rows = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
            pairs = {name: {k: float(pair[k]) for k in ("memory", "bare")} for name, pair in row["scores"].items()}
            rows[row["key"]] = row | {"scores": pairs}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(
                f"{path} line {number} is damaged: remove the line, and its example is asked again"
            ) from None
    return rows


def add_answer(folder: Path, row: dict[str, Any]) -> None:
    """Append one line, whole or not at all as far as the operating system goes."""
    with (folder / ANSWERS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_hypotheses(folder: Path, answers: Iterable[dict[str, Any]]) -> list[Path]:
    """LongMemEval's own format, a file per length for the memory and one for the bare model: what its judge reads."""
    lines: dict[Path, list[str]] = {}
    for row in answers:
        for name, ending in (("memory", ""), ("bare", "-bare")):
            line = json.dumps({"question_id": row["id"], "hypothesis": row[name].strip()}, ensure_ascii=False)
            lines.setdefault(folder / f"hypotheses-{row['length']}{ending}.jsonl", []).append(line)
    for path, found in lines.items():
        path.write_text("\n".join(found) + "\n", encoding="utf-8")
    return list(lines)


def summarize(answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means with 95 % intervals: by task and length, by task, by length, and of everything.

    Each row has task, length, measure, n, and for `memory`, `bare` and their `difference` value, low and high. Where
    tasks of different measures are joined the measure is `score`, the first of each; every example counts once.
    """
    pairs = {(row["task"], row["length"]) for row in answers}
    tasks = sorted({task for task, _ in pairs}, key=by_size)
    lengths = sorted({length for _, length in pairs}, key=by_size)
    groups = sorted(pairs, key=lambda pair: [by_size(name) for name in pair])
    if len(lengths) > 1:
        groups += [(task, ALL) for task in tasks if sum(task == other for other, _ in pairs) > 1]
    if len(tasks) > 1:
        groups += [(ALL, length) for length in lengths] if len(lengths) > 1 else []
        groups.append((ALL, ALL))
    rows = []
    for task, length in groups:
        group = [row for row in answers if task in (ALL, row["task"]) and length in (ALL, row["length"])]
        rows += [{"task": task, "length": length} | row for row in _means(group)]
    return rows


def write_summary(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write what `summarize` gives as JSON, and flat as CSV and parquet. Returns the path of the first.

    In the flat ones a column is a number: memory, memory_low, memory_high, the same of bare and of difference.
    """
    import pyarrow as arrow  # slow to import, and only this needs it
    from pyarrow import csv, parquet

    path = folder / SUMMARY
    table = arrow.Table.from_pylist([_flat(row) for row in rows])
    csv.write_csv(table, path.with_suffix(".csv"))
    parquet.write_table(table, path.with_suffix(".parquet"))
    path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return path


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    flat = {}
    for name, value in row.items():
        parts = value if isinstance(value, dict) else {"value": value}
        flat |= {name if part == "value" else f"{name}_{part}": number for part, number in parts.items()}
    return flat


def _means(group: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = {tuple(row["scores"]) for row in group}
    if len(names) == 1:
        columns = {name: [row["scores"][name] for row in group] for name in names.pop()}
        return [_row(name, name in YES_OR_NO, pairs) for name, pairs in columns.items()]
    firsts = [next(iter(row["scores"])) for row in group]
    pairs = [row["scores"][name] for row, name in zip(group, firsts, strict=True)]
    return [_row(firsts[0] if len(set(firsts)) == 1 else "score", YES_OR_NO.issuperset(firsts), pairs)]


def _row(measure: str, yes_or_no: bool, pairs: list[dict[str, float]]) -> dict[str, Any]:
    return {"measure": measure, "n": len(pairs)} | _compared(pairs, yes_or_no)


def _compared(pairs: list[dict[str, float]], yes_or_no: bool) -> dict[str, dict[str, float]]:
    on, off = np.array([pair["memory"] for pair in pairs]), np.array([pair["bare"] for pair in pairs])
    if yes_or_no:
        found = [wilson(int(on.sum()), len(on)), wilson(int(off.sum()), len(off)), paired_difference(on > 0, off > 0)]
    else:
        found = [mean_interval(on, lowest=0.0, highest=1.0), mean_interval(off, lowest=0.0, highest=1.0)]
        found.append(mean_interval(on - off, lowest=-1.0, highest=1.0))
    return {name: _numbers(interval) for name, interval in zip(("memory", "bare", "difference"), found, strict=True)}


def _numbers(interval: Interval) -> dict[str, float]:
    assert all(math.isfinite(bound) for bound in interval)
    return {"value": interval.value, "low": interval.low, "high": interval.high}
