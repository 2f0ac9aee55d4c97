"""`python -m tests.benchmarks.scales FOLDER`: one factorial experiment about six scales of protection.

Half of the 64 ways in which they can be on and off, those with an even number off (2^(6-1), resolution VI): no main effect
and no interaction of two is mixed up with another of these, each only with interactions of four and five. All ways of a
seed share facts and text. Lives that are in the folder already are not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cortex_core.errors import DataError
from cortex_core.intervals import Interval, student_quantile
from tests.benchmarks.scale_runs import SCALES, Place, Results, Way, context_change, known, text_nats

PAIRS = tuple(itertools.combinations(SCALES, 2))
TERMS = (*SCALES, *(f"{one} x {other}" for one, other in PAIRS))
CONFIDENCE = 0.95
ANSWERS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "known_at_once": lambda life: known(dict(life), "at_once"),
    "known_behind_text": lambda life: known(dict(life), "behind"),
    "known_novel_forms": lambda life: known(dict(life)),
    "text_nats": lambda life: text_nats(dict(life)),
    "in_context": lambda life: context_change(dict(life)),
    "log_failure_known": lambda life: _log_failure(life["known"]["behind"]),
    "log_failure_in_context": lambda life: _log_failure(
        [after for before, after in zip(life["in_context_before"], life["in_context"], strict=True) if before]
    ),
    "log_text_nats": lambda life: math.log(max(text_nats(dict(life)), 1e-4)),
}
"""What is asked of each life, as one number. Failures as logarithms: where protections multiply, these add up."""
FAILURES = ("log_failure_known", "log_failure_in_context", "log_text_nats")


def half_fraction() -> list[tuple[bool, ...]]:
    """All on first; of each seed, in this order."""
    every = itertools.product((True, False), repeat=len(SCALES))
    return [on for on in every if (len(SCALES) - sum(on)) % 2 == 0]


class Analysis(NamedTuple):
    """Effects of scales on one answer: mean with the scale on minus mean with it off; of pairs, half the difference
    that one makes to the effect of the other."""

    effects: dict[str, Interval]
    interactions_shown: int
    """Of 15, those whose interval excludes 0 at 95 % for all of them together (Bonferroni)."""
    interaction_share: float
    """Of what scales and pairs explain (sums of squares), the share that is the pairs'."""
    n: int


def analysis(
    ways: Sequence[Sequence[bool]], seeds: Sequence[int], values: Sequence[float], confidence: float = CONFIDENCE
) -> Analysis:
    """Least squares of main effects, pairs and seeds. What remains, three-factor interactions among it, is noise, and
    gives the intervals (Student's t). Raises DataError for too few lives to tell these apart."""
    signs = np.where(np.asarray(ways, dtype=bool), 1.0, -1.0)
    pairs = [signs[:, SCALES.index(one)] * signs[:, SCALES.index(other)] for one, other in PAIRS]
    blocks = [np.equal(seeds, seed).astype(float) for seed in sorted(set(seeds))]
    design = np.column_stack([signs, *pairs, *blocks])
    answers = np.asarray(values, dtype=np.float64)
    freedom = len(answers) - design.shape[1]
    if freedom < 1 or np.linalg.matrix_rank(design) < design.shape[1]:
        raise DataError(
            f"{len(answers)} lives do not tell {design.shape[1]} effects apart: measure whole half fractions"
        )
    found, *_ = np.linalg.lstsq(design, answers, rcond=None)
    variance = float(np.square(answers - design @ found).sum()) / freedom
    errors = np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design)))
    half = student_quantile(freedom, confidence)
    strict = student_quantile(freedom, 1 - (1 - confidence) / len(PAIRS))
    effects, shown = {}, 0
    for place, name in enumerate(TERMS):
        value, error = 2 * float(found[place]), 2 * float(errors[place])
        effects[name] = Interval(value - half * error, value + half * error, value)
        shown += place >= len(SCALES) and abs(value) > strict * error
    squares = np.square(found[: len(TERMS)])
    total = float(squares.sum())
    share = float(squares[len(SCALES) :].sum()) / total if total else 0.0
    return Analysis(effects, shown, share, len(answers))


def measured(results: Results, place: Place, seeds: Sequence[int]) -> dict[str, Analysis]:
    """Of each of `ANSWERS`. Seed by seed, so that what is interrupted has whole half fractions first."""
    ways, of_seed, lives = [], [], []
    for seed in seeds:
        for on in half_fraction():
            lives.append(results.of(Way(on=on, place=place), seed))
            ways.append(on)
            of_seed.append(seed)
    return {name: analysis(ways, of_seed, [answer(life) for life in lives]) for name, answer in ANSWERS.items()}


def table(found: Mapping[str, Analysis]) -> str:
    """For people: main effects whole, of pairs those whose interval excludes 0."""
    return "\n".join(line for name, one in found.items() for line in _lines(name, one))


def _lines(name: str, found: Analysis) -> Iterator[str]:
    yield (
        f"{name} (n = {found.n}): {found.interactions_shown} of {len(PAIRS)} interactions shown, "
        f"{found.interaction_share:.0%} of what is explained"
    )
    for term, (low, high, value) in found.effects.items():
        if term in SCALES or low > 0 or high < 0:
            yield f"  {term:<28} {value:+.4f} ({low:+.4f} to {high:+.4f})"


def _log_failure(right: Sequence[bool]) -> float:
    """Of the share that is wrong, kept from 0 by half an answer."""
    return math.log((len(right) - sum(right) + 0.5) / (len(right) + 1)) if right else 0.0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is not in the folder, print the analysis, and write it there."""
    parser = argparse.ArgumentParser(prog="scales", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where lives are, and go")
    parser.add_argument("--place", choices=("backbone", "slow_weights"), default="backbone", help="[%(default)s]")
    parser.add_argument("--seeds", type=int, default=2, help="so many, from 0 [%(default)s]")
    given = parser.parse_args(argv)
    results = Results(given.folder, say=lambda line: print(line, file=sys.stderr, flush=True))
    try:
        found = measured(results, given.place, range(given.seeds))
    except DataError as error:
        print(f"scales: {error}", file=sys.stderr)
        return 2
    print(table(found))
    document = {name: one._asdict() for name, one in found.items()}
    (given.folder / f"analysis-{given.place}.json").write_text(json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
