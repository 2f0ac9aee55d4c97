"""What a sweep's folder has on record: every validation of every trial; who took over whose weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

RESULTS_FILE = "results.jsonl"
"""Every validation of every trial, a line each, as it came."""
EXCHANGES_FILE = "exchanges.jsonl"
"""Of population-based training: a line for each time that all trials had waited for one another."""


class Clone(NamedTuple):
    """One trial that goes on from the weights of another, with settings near the other's."""

    trial: str
    source: str
    sample: dict[str, Any]
    """The settings that it goes on with."""
    attempt: int
    """Of its run: below that, the weights are still its own."""


class Exchange(NamedTuple):
    """What was decided after a validation that all trials had taken."""

    step: int
    clones: tuple[Clone, ...]


def earlier(results: Path, trial: str) -> list[dict[str, Any]]:
    """A trial's validations on record, in order."""
    return [result for result in recorded(results) if result["trial"] == trial]


def recorded(results: Path) -> list[dict[str, Any]]:
    """All validations on record. A last line that was cut off is left out; of a step that was done again, the later."""
    lines: dict[tuple[str, int], dict[str, Any]] = {}
    try:
        text = results.read_text(encoding="utf-8")
    except OSError:
        return []
    for line in text.splitlines():
        try:
            result = json.loads(line)
            lines[result["trial"], result["step"]] = result
        except (ValueError, KeyError, TypeError):
            continue
    return list(lines.values())


def exchanges(folder: Path) -> list[Exchange]:
    """All exchanges of the sweep in `folder`, in order."""
    try:
        lines = (folder / EXCHANGES_FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    found = [json.loads(line) for line in lines]
    return [Exchange(each["step"], tuple(Clone(**clone) for clone in each["clones"])) for each in found]


def write_exchanges(folder: Path, made: Iterable[Exchange]) -> None:
    """All of them, whole or not at all: a trial goes by the last one."""
    lines = [json.dumps({"step": each.step, "clones": [clone._asdict() for clone in each.clones]}) for each in made]
    partial = folder / (EXCHANGES_FILE + ".partial")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    partial.replace(folder / EXCHANGES_FILE)


def clones_of(trial: str, made: Iterable[Exchange]) -> dict[int, Clone]:
    """Whose weights a trial took over, by the step after which it did."""
    return {each.step: clone for each in made for clone in each.clones if clone.trial == trial}


def schedule(trial: str, reports: Iterable[dict[str, Any]], made: list[Exchange]) -> list[dict[str, Any]]:
    """The settings under which a trial's last weights came about: `step` of each validation, `trial` that took those
    steps then, and its `sample`. Before a trial took over another's weights, that is the other's past."""
    by_step = {(report["trial"], report["step"]): report for report in reports}
    found: list[dict[str, Any]] = []
    owner = trial
    for step in sorted({at for _, at in by_step}, reverse=True):
        clone = clones_of(owner, made).get(step)
        owner = clone.source if clone else owner
        if report := by_step.get((owner, step)):
            found.append({"step": step, "trial": owner, "sample": report["sample"]})
    return found[::-1]
