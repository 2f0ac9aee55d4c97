"""`python -m tests.benchmarks.predictions N` (`make prediction N=…`): measures one of five predictions, and judges it.

docs/predictions.md says what they are, and fixes the bounds that are judged by. Lives that are in the folder already are
not measured again. Exit codes: 0 measured, whatever the verdict; 2 wrong input (one line says what).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from cortex_core.errors import DataError
from cortex_core.intervals import Interval, mean_interval
from tests.benchmarks.row import Row
from tests.benchmarks.scale_runs import (
    LEARNED,
    SCALES,
    Place,
    Results,
    Stress,
    Way,
    context_change,
    known,
    share,
    text_nats,
)

Verdict = Literal["supported", "refuted", "undecided"]
SEEDS = {1: 6, 2: 6, 3: 6, 4: 6, 5: 3}
MAX_TEXT_NATS, MAX_LOST, MIN_KNOWN, MIN_TRANSFER, MIN_GAIN = 0.01, 0.05, 0.5, 0.9, 0.02
STRESSES: tuple[Stress, ...] = ("plain", "rate", "crowd", "noise")
LEARNED_FORMS = tuple(f"learned{number}" for number in range(len(LEARNED)))


class Effect(NamedTuple):
    """One criterion: a mean over seeds with its interval, what it must reach, and what rules it out."""

    name: str
    interval: Interval
    n: int
    least: float | None = None
    """Supported if the whole interval is at least this, refuted if it is below `refuted_below`."""
    most: float | None = None
    """Likewise, the other way round. Neither: for information."""
    refuted_below: float | None = None
    """`least`, unless something smaller would still matter."""
    strict: bool = False
    """Whether the interval must lie above `least`, not only begin there: where nothing differs, nothing is shown."""

    @property
    def verdict(self) -> Verdict | None:
        """None for information."""
        low, high, _ = self.interval
        if self.most is not None:
            return "supported" if high <= self.most else "refuted" if low > self.most else "undecided"
        if self.least is None:
            return None
        below = self.least if self.refuted_below is None else self.refuted_below
        reached = low > self.least if self.strict else low >= self.least
        return "supported" if reached else "refuted" if high < below else "undecided"


def verdict(effects: Sequence[Effect]) -> Verdict:
    """Of a prediction with several criteria."""
    found = {effect.verdict for effect in effects} - {None}
    return "refuted" if "refuted" in found else "undecided" if "undecided" in found or not found else "supported"


def effect(name: str, values: Sequence[float], **bounds: Any) -> Effect:
    return Effect(name, mean_interval(values), len(values), **bounds)


def first(results: Results, place: Place, seeds: Sequence[int]) -> Iterator[Effect]:
    """A ten times higher learning rate causes no forgetting if the data are diverse."""
    compared: tuple[tuple[Stress, Stress, bool], ...] = (("rate", "plain", True), ("plain", "tenth", False))
    for high, low, bounded in compared:
        ways = (Way(place=place, stress=high), Way(place=place, stress=low))
        pairs = [[results.of(way, seed) for way in ways] for seed in seeds]
        name = "10 x rate" if bounded else "rate over a tenth"

        def differences(of: Callable[[dict[str, Any]], float], pairs: Any = pairs) -> list[float]:
            return [of(one) - of(other) for one, other in pairs]

        yield effect(f"{name}: text nats", differences(text_nats), **({"most": MAX_TEXT_NATS} if bounded else {}))
        bounds = {"least": -MAX_LOST} if bounded else {}
        yield effect(f"{name}: recall in context", differences(context_change), **bounds)
        yield effect(f"{name}: earlier facts", differences(_earlier), **bounds)


def second(results: Results, place: Place, seeds: Sequence[int]) -> Iterator[Effect]:
    """What is learned generalises to novel situations."""
    lives = [results.of(Way(place=place), seed) for seed in seeds]
    learned, never = [known(life, *LEARNED_FORMS) for life in lives], [known(life) for life in lives]
    transfer = [new - MIN_TRANSFER * old for new, old in zip(never, learned, strict=True)]
    yield effect("novel forms - 0.9 x learned forms", transfer, least=0.0)
    yield effect("known in learned forms", learned, least=MIN_KNOWN)
    yield effect("known in novel forms", never)
    yield effect("known at once", [known(life, "at_once") for life in lives])
    yield effect("known behind text", [known(life, "behind") for life in lives])


def third(results: Results, place: Place, seeds: Sequence[int]) -> Iterator[Effect]:
    """A frozen context changes answers without harm to how context is understood."""
    way = Way(place=place)
    frozen, whole = ([results.of(each, seed) for seed in seeds] for each in (way, way.without("gradient")))
    yield effect("known behind text", [known(life, "behind") for life in frozen], least=MIN_KNOWN)
    yield effect("recall in context", [context_change(life) for life in frozen], least=-MAX_LOST)
    yield effect("text nats", [text_nats(life) for life in frozen], most=MAX_TEXT_NATS)
    for name, of in (
        ("known behind text", lambda life: known(life, "behind")), ("recall in context", context_change),
        ("text nats", text_nats),
    ):  # fmt: skip
        both = zip(frozen, whole, strict=True)
        yield effect(f"frozen over all tokens: {name}", [of(one) - of(other) for one, other in both])


def fourth(results: Results, place: Place, seeds: Sequence[int]) -> Iterator[Effect]:
    """Dreams generalise better than real examples alone."""
    way = Way(place=place)
    pairs = [[results.of(each, seed) for each in (way, way.without("generative"))] for seed in seeds]
    gains = [known(dreamed) - known(real) for dreamed, real in pairs]
    yield effect("dreams over real: novel forms", gains, least=0.0, refuted_below=MIN_GAIN, strict=True)
    forms = [known(dreamed, *LEARNED_FORMS) - known(real, *LEARNED_FORMS) for dreamed, real in pairs]
    yield effect("dreams over real: learned forms", forms)
    yield effect("dreams over real: text nats", [text_nats(dreamed) - text_nats(real) for dreamed, real in pairs])


def fifth(results: Results, place: Place, seeds: Sequence[int]) -> Iterator[Effect]:
    """Six scales are more robust than any single one."""
    every = Way(place=place)
    ways = {"all": every, "none": every.alone(None)} | {scale: every.alone(scale) for scale in SCALES}
    # Seed by seed, so that all ways have as many if this is interrupted.
    lives = {
        (name, seed, stress): results.of(replace(way, stress=stress), seed)
        for seed in seeds for stress in STRESSES for name, way in ways.items()
    }  # fmt: skip
    for title, among in (("", STRESSES), (" but for the rate", [stress for stress in STRESSES if stress != "rate"])):
        worst = {n: [min(robustness(lives[n, seed, stress]) for stress in among) for seed in seeds] for n in ways}
        best = max(SCALES, key=lambda scale, worst=worst: float(np.mean(worst[scale])))
        gains = [whole - one for whole, one in zip(worst["all"], worst[best], strict=True)]
        bounds = {} if title else {"least": 0.0, "strict": True}
        yield effect(f"all over the best alone ({best}){title}", gains, **bounds)
        for name, values in worst.items():
            yield effect(f"worst case{title}, {name}", values)


def robustness(life: dict[str, Any]) -> float:
    """The least of three shares: known behind text, recall in context and perplexity as they were."""
    before = share(life["in_context_before"])
    context = min(1.0, share(life["in_context"]) / before) if before else 1.0
    return min(known(life, "behind"), context, float(np.exp(-max(0.0, text_nats(life)))))


def _earlier(life: dict[str, Any]) -> float:
    """Known behind text, of the facts of all days but the last."""
    right = life["known"]["behind"]
    return share(right[: -len(right) // life["size"]["days"]])


PREDICTIONS: dict[int, Callable[[Results, Place, Sequence[int]], Iterator[Effect]]] = {
    1: first, 2: second, 3: third, 4: fourth, 5: fifth,
}  # fmt: skip


def report(number: int, effects: Sequence[Effect]) -> str:
    """For people."""
    title = (PREDICTIONS[number].__doc__ or "").strip()
    lines = [f"{number}. {title} {verdict(effects).upper()}"]
    for name, interval, n, least, most, *_ in effects:
        bound = f", at least {least:g}" if least is not None else f", at most {most:g}" if most is not None else ""
        lines.append(f"   {name}: {interval.value:+.4f} ({interval.low:+.4f} to {interval.high:+.4f}), n = {n}{bound}")
    return "\n".join(lines)


def rows_of(number: int, effects: Sequence[Effect]) -> Iterator[Row]:
    """The criteria as rows of the scoreboard, those that decide with their bounds as goals."""
    deciding = [found for found in effects if found.verdict is not None]
    for place, (_, interval, n, least, most, *_) in enumerate(deciding):
        better: Literal["higher", "lower"] = "higher" if most is None else "lower"
        goal = least if most is None else most
        yield Row(
            f"prediction_{number}_{'abc'[place]}", interval.value, goal, better, "", n, interval.low, interval.high
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, return the exit code."""
    parser = argparse.ArgumentParser(prog="prediction", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("number", type=int, choices=sorted(PREDICTIONS), metavar="N", help="1 to 5")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/predictions"), help="where lives are, and go [%(default)s]"
    )
    parser.add_argument("--seeds", type=int, help="so many, from 0 [6; 3 for prediction 5]")
    parser.add_argument("--place", choices=("backbone", "slow_weights"), default="backbone", help="[%(default)s]")
    given = parser.parse_args(argv)
    seeds = range(given.seeds or SEEDS[given.number])
    results = Results(given.folder, say=lambda line: print(line, file=sys.stderr, flush=True))
    try:
        print(report(given.number, [*PREDICTIONS[given.number](results, given.place, seeds)]))
    except DataError as error:
        print(f"prediction: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
