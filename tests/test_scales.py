"""The six scales: the design tells effects apart, effects are found where they are, verdicts follow the bounds."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cortex_core.config import SleepConfig
from cortex_core.consolidation.unfreezer import Unfreezer
from cortex_core.errors import DataError
from cortex_core.intervals import Interval
from tests.benchmarks import predictions, scales
from tests.benchmarks.continual_runs import Subject
from tests.benchmarks.predictions import PREDICTIONS, Effect, robustness, verdict
from tests.benchmarks.rows import scales as rows
from tests.benchmarks.scale_runs import GRIDS, SCALES, Place, Results, Size, Way, known, reader
from tests.benchmarks.scales import PAIRS, TERMS, analysis, half_fraction
from tests.consolidation import sleepers

SMALL = Size(
    days=2, facts_per_day=2, steps=2, few_steps=1, replayed=2, dreams=2, slots=256, text_rows=2, text_tokens=256, probes=4
)  # fmt: skip
ONE_RATE = {name: (grid[1],) for name, grid in GRIDS.items()}


def subject() -> Subject:
    """The model that ships, and a little text."""
    return Subject(sleepers.corpus(), sleepers.tokenizer())


def silent(line: str) -> None:
    """Say nothing."""


# --- the design and its analysis -------------------------------------------------------------------------------------


def test_the_design_is_a_half_fraction_of_resolution_six() -> None:
    ways = half_fraction()
    assert len(set(ways)) == 32 and ways[0] == (True,) * 6 and (False,) * 6 in ways
    signs = np.where(ways, 1, -1)
    for size in range(1, 6):
        for chosen in itertools.combinations(range(6), size):
            assert signs[:, chosen].prod(1).sum() == 0, chosen
    assert signs.prod(1).tolist() == [1] * 32


def planted(seeds: int = 2, noise: float = 0.05) -> tuple[list[tuple[bool, ...]], list[int], list[float]]:
    """One effect of 0.4, one interaction, a shift between seeds, and noise."""
    random = np.random.default_rng(1)
    ways, of_seed, values = [], [], []
    for seed in range(seeds):
        for on in half_fraction():
            signs = [1 if scale else -1 for scale in on]
            ways.append(on)
            of_seed.append(seed)
            values.append(3.0 * seed + 0.2 * signs[1] - 0.15 * signs[0] * signs[4] + noise * random.standard_normal())
    return ways, of_seed, values


def test_effects_are_found_where_they_are_and_nowhere_else() -> None:
    found = analysis(*planted())
    assert list(found.effects) == list(TERMS) and found.n == 64
    real = {"gradient": 0.4, "parameter x architectural": -0.3}
    for name, (low, high, value) in found.effects.items():
        assert low < value < high
        assert abs(value - real.get(name, 0.0)) < 0.06, name
        assert (low > 0 or high < 0) or name not in real
    assert found.interactions_shown == 1
    assert found.interaction_share == pytest.approx(0.09 / (0.09 + 0.16), abs=0.05)


def test_intervals_hold_what_is_true_as_often_as_they_say() -> None:
    covered, shown = [], 0
    for trial in range(60):
        ways, seeds, values = planted()
        noise = np.random.default_rng(trial).standard_normal(len(values))
        found = analysis(ways, seeds, noise.tolist())
        shown += found.interactions_shown > 0
        covered += [low <= 0 <= high for low, high, _ in found.effects.values()]
    assert 0.93 < sum(covered) / len(covered) < 0.97
    assert shown <= 8, "Bonferroni: an interaction where there is none, in 3 of 60 trials"


def test_where_protections_multiply_the_logarithm_of_failures_has_no_interaction() -> None:
    ways, seeds, _ = planted()
    random = np.random.default_rng(5)
    factors = (0.5, 0.8, 0.3, 0.9, 1.0, 0.7)
    failure = [math.prod(f for f, scale in zip(factors, on, strict=True) if scale) for on in ways]
    noisy = [value * math.exp(0.02 * random.standard_normal()) for value in failure]
    assert analysis(ways, seeds, [math.log(value) for value in noisy]).interactions_shown == 0
    assert analysis(ways, seeds, noisy).interactions_shown > 3


def test_too_few_lives_are_refused() -> None:
    ways, seeds, values = planted()
    with pytest.raises(DataError, match="20 lives do not tell"):
        analysis(ways[:20], seeds[:20], values[:20])


# --- verdicts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "bounds", "expected"),
    [
        (-0.04, 0.1, {"least": -0.05}, "supported"),
        (-0.06, 0.1, {"least": -0.05}, "undecided"),
        (-0.2, -0.06, {"least": -0.05}, "refuted"),
        (0.0, 0.009, {"most": 0.01}, "supported"),
        (0.0, 0.011, {"most": 0.01}, "undecided"),
        (0.02, 0.03, {"most": 0.01}, "refuted"),
        (-0.01, 0.015, {"least": 0.0, "refuted_below": 0.02}, "refuted"),
        (-0.01, 0.03, {"least": 0.0, "refuted_below": 0.02}, "undecided"),
        (0.001, 0.015, {"least": 0.0, "refuted_below": 0.02}, "supported"),
        (0.0, 0.0, {"least": 0.0}, "supported"),
        (0.0, 0.0, {"least": 0.0, "strict": True}, "undecided"),
        (0.1, 0.2, {"least": 0.0, "strict": True}, "supported"),
        (-math.inf, math.inf, {"least": 0.0}, "undecided"),
        (1.0, 2.0, {}, None),
    ],
)
def test_a_criterion_is_judged_by_its_interval(low: float, high: float, bounds: Any, expected: str | None) -> None:
    assert Effect("x", Interval(low, high, (low + high) / 2), 6, **bounds).verdict == expected


def test_a_prediction_needs_all_its_criteria() -> None:
    good = Effect("x", Interval(0.1, 0.2, 0.15), 6, least=0.0)
    open_, bad = (good._replace(interval=Interval(low, high, 0.0)) for low, high in ((-1, 1), (-2, -1)))
    beside = bad._replace(least=None)
    assert verdict([good, beside]) == "supported"
    assert verdict([good, open_]) == "undecided"
    assert verdict([good, open_, bad]) == "refuted"
    assert verdict([beside]) == "undecided"


def test_robustness_is_the_least_of_three_shares() -> None:
    life = {
        "known": {"behind": [True, True, True, False]}, "text_nats": [0.0, -0.2],
        "in_context": [True, False, True, True], "in_context_before": [True] * 4,
    }  # fmt: skip
    assert robustness(life) == pytest.approx(0.75)
    assert robustness(life | {"text_nats": [1.0, 1.0]}) == pytest.approx(math.exp(-1))
    assert robustness(life | {"in_context": [False, False, True, False]}) == pytest.approx(0.25)


# --- lives -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["backbone", "slow_weights"])
def test_switches_become_settings(place: Place) -> None:
    on = reader(Way(place=place), subject(), SMALL, 0.01).config
    off = reader(Way(place=place).alone(None), subject(), SMALL, 0.01).config
    assert (on.optimizer, off.optimizer) == ("apollo_mini", "adamw")
    assert (on.gradient, off.gradient) == ("answer_context_frozen", "all_tokens")
    assert (len(on.questions), len(off.questions), on.mixed_text_weight, off.mixed_text_weight) == (4, 1, 1.0, 0.0)
    assert (on.steps, off.steps) == (2, 1) and off.learning_rate == pytest.approx(0.02)
    assert (on.teacher, off.teacher, on.dream_frac, off.dream_frac) == (True, False, 0.5, 0.0)
    untouched = set(SleepConfig.model_fields) - {
        "optimizer", "gradient", "questions", "mixed_text_weight", "steps", "learning_rate", "teacher", "dream_frac",
        "warmup_steps", "ema_decay",
    }  # fmt: skip
    assert all(getattr(on, name) == getattr(off, name) for name in untouched)
    harsh = reader(Way(place=place, stress="rate"), subject(), SMALL, 0.01).config
    assert harsh.learning_rate == pytest.approx(0.1)


def test_the_backbone_learns_without_any_guard() -> None:
    sleeper = reader(Way(), subject(), SMALL, 0.01)
    assert isinstance(sleeper, Unfreezer) and not sleeper._region and sleeper._anchor is None and sleeper.guard is None
    assert sleeper.unfreezing.learning_rate == 0.01 and sleeper.deltas is not None
    assert len(sleeper.deltas.names) == 42, "all linear modules of six layers"


@pytest.mark.parametrize("place", ["backbone", "slow_weights"])
def test_lives_are_measured_once_and_judged(place: Place, tmp_path: Path) -> None:
    said: list[str] = []
    results = Results(tmp_path, SMALL, subject, said.append, ONE_RATE)
    way = Way(place=place)
    life = results.of(way, 0)
    assert len(said) == 2, "a life to tune by, and the life itself"
    assert {len(right) for right in life["known"].values()} == {4} and len(life["text_nats"]) == 2
    assert sum(life["in_context_before"]) >= 3 and len(life["lessons"]) == 2 and min(life["lessons"]) > 0
    assert any(life["text_nats"]) or place == "slow_weights"
    again = Results(tmp_path, SMALL, lambda: pytest.fail("measured again"), said.append, ONE_RATE)
    assert again.of(way, 0) == life and len(said) == 2
    with pytest.raises(DataError, match="at another size or rate"):
        Results(tmp_path, replace(SMALL, days=3), subject, silent, ONE_RATE).of(way, 0)
    (tmp_path / f"{way.name}-0.json").write_text("{")
    with pytest.raises(DataError, match="is damaged: remove it"):
        again.of(way, 0)


class Imagined(Results):
    """Lives in which every scale adds to what is known, and a high rate harms text."""

    def __init__(self) -> None:
        self.asked: set[tuple[str, int]] = set()

    def of(self, way: Way, seed: int) -> dict[str, Any]:
        self.asked.add((way.name, seed))
        right = [number < 4 + 2 * sum(way.on) for number in range(16)]
        forms = ("at_once", "behind", "novel0", "novel1", "novel2", "learned0", "learned1", "learned2", "learned3")
        text = 0.002 + 0.001 * seed + (0.5 if way.stress == "rate" else 0.0)
        return {
            "known": dict.fromkeys(forms, right), "text_nats": [text], "in_context": [True] * 4,
            "in_context_before": [True] * 4, "size": {"days": 4},
        }  # fmt: skip


def test_predictions_are_judged_on_the_lives_that_they_name() -> None:
    lives = Imagined()
    found = {number: verdict([*judge(lives, "backbone", range(3))]) for number, judge in PREDICTIONS.items()}
    assert found == {1: "refuted", 2: "supported", 3: "supported", 4: "supported", 5: "supported"}
    assert ("backbone-101111-plain", 2) in lives.asked and ("backbone-111110-plain", 0) in lives.asked
    assert sum(name.endswith("noise") for name, _ in lives.asked) == 8 * 3
    for number, judge in PREDICTIONS.items():
        effects = [*judge(lives, "backbone", range(3))]
        assert [row.name for row in predictions.rows_of(number, effects)] == [
            f"prediction_{number}_{letter}" for letter in rows.CRITERIA[number]
        ]
        assert verdict(effects).upper() in predictions.report(number, effects)


def test_the_factorial_becomes_rows() -> None:
    lives = Imagined()
    found = scales.measured(lives, "backbone", range(2))
    assert len(lives.asked) == 64
    made = {row.name: row for row in rows.rows_of(found)}
    assert tuple(made) == rows.ROWS and rows.SCALES == SCALES
    assert made["scales_known_at_once_data"].value == pytest.approx(2 / 16)
    assert made["scales_text_nats_data"].value == pytest.approx(0.0, abs=1e-9)
    assert len(PAIRS) == 15 and "known_at_once (n = 64)" in scales.table(found)


def test_known_is_of_forms_never_learned_unless_others_are_named() -> None:
    life = {
        "known": {f"novel{n}": [False] for n in range(3)} | {"at_once": [True], "behind": [True], "learned0": [True]}
    }
    assert known(life) == pytest.approx(0.4) and known(life, "learned0") == 1.0


def test_the_command_says_what_is_wrong_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        predictions.main(["6"])
    (tmp_path / "backbone-111111-plain-1000-rate0.0003.json").write_text(json.dumps({"schema": "other"}))
    capsys.readouterr()
    assert predictions.main(["2", "--folder", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
