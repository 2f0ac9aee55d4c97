"""Answers on disk: what survives a kill, what is refused, and the means with their intervals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cortex_core.errors import ConfigError, DataError
from cortex_core.eval.benchmarks import results
from cortex_core.intervals import mean_interval, paired_difference, wilson


def row(key: str, task: str = "qa1", length: str = "4k", **scores: tuple[float, float]) -> dict[str, Any]:
    pairs = {name: {"memory": float(memory), "bare": float(bare)} for name, (memory, bare) in scores.items()}
    return {
        "key": key,
        "id": key,
        "task": task,
        "length": length,
        "memory": f" {key} é\n",
        "bare": "b",
        "scores": pairs,
    }


SETTINGS = {"benchmark": "babilong", "window": 32, "backbone": "aa", "sidecars": "bb"}


def test_answers_come_back_as_they_were_written(tmp_path: Path) -> None:
    assert results.read_answers(tmp_path) == {}
    rows = [row("a", label=(1, 0)), row("b\u2028", label=(0, 0))]
    for one in rows:
        results.add_answer(tmp_path, one)
    assert results.read_answers(tmp_path) == {one["key"]: one for one in rows}


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_line_cut_off_by_a_kill_is_removed_and_nothing_else(tmp_path: Path, cut: int) -> None:
    path = tmp_path / results.ANSWERS
    for key in ("a", "b"):
        results.add_answer(tmp_path, row(key, label=(1, 0)))
    first = path.read_bytes().splitlines(keepends=True)[0]
    path.write_bytes(path.read_bytes()[:-cut])
    assert list(results.read_answers(tmp_path)) == ["a"]
    assert path.read_bytes() == first, "so that the next line starts on its own"
    path.write_bytes(first[:10])
    assert results.read_answers(tmp_path) == {}
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    "line", ["{", "[]", "{}", '{"key": 1}', '{"key": "a", "scores": 3}', '{"key": "a", "scores": {"f1": 1}}']
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    results.add_answer(tmp_path, row("a", label=(1, 0)))
    with (tmp_path / results.ANSWERS).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=r"answers\.jsonl line 2 is damaged: remove the line"):
        results.read_answers(tmp_path)


def test_answers_of_different_models_are_not_mixed(tmp_path: Path) -> None:
    folder = tmp_path / "new/out"
    results.check_settings(folder, SETTINGS)
    results.check_settings(folder, dict(reversed(SETTINGS.items())))
    with pytest.raises(ConfigError, match=r"holds answers with sidecars = bb, not cc: give another --out"):
        results.check_settings(folder, SETTINGS | {"sidecars": "cc"})
    for damaged in ("{", "[]", "{}"):
        (folder / results.SETTINGS).write_text(damaged)
        with pytest.raises(DataError, match=r"run\.json is damaged"):
            results.check_settings(folder, SETTINGS)


def test_means_of_yes_or_no_have_score_intervals() -> None:
    (one,) = results.summarize([row(str(n), label=(n < 3, n < 1)) for n in range(4)])
    assert (one["task"], one["length"], one["measure"], one["n"]) == ("qa1", "4k", "label", 4)
    for name, expected in (
        ("memory", wilson(3, 4)),
        ("bare", wilson(1, 4)),
        ("difference", paired_difference([True, True, True, False], [True, False, False, False])),
    ):
        assert one[name] == {"value": expected.value, "low": expected.low, "high": expected.high}
    assert one["memory"]["value"] == 0.75 and one["difference"]["value"] == 0.5


def test_other_means_have_t_intervals_within_the_limits() -> None:
    memory, bare = (0.2, 0.5, 0.9), (0.1, 0.6, 0.0)
    (one,) = results.summarize([row(str(n), f1=pair) for n, pair in enumerate(zip(memory, bare, strict=True))])
    expected = mean_interval(memory, lowest=0.0, highest=1.0)
    assert one["memory"] == {"value": expected.value, "low": expected.low, "high": expected.high}
    assert one["difference"]["value"] == pytest.approx((0.1 - 0.1 + 0.9) / 3)
    (single,) = results.summarize([row("a", f1=(0.4, 0.4))])
    assert single["memory"] == {"value": 0.4, "low": 0, "high": 1}, "one example says nothing about spread"


def groups(rows: list[dict[str, Any]]) -> list[tuple[str, str, str, int]]:
    return [(one["task"], one["length"], one["measure"], one["n"]) for one in results.summarize(rows)]


def test_every_task_and_length_and_what_they_come_to() -> None:
    rows = [row(f"{t}{k}{n}", t, k, label=(1, 0)) for t in ("qa10", "qa2") for k in ("16k", "4k") for n in range(2)]
    assert groups(rows) == [
        ("qa2", "4k", "label", 2), ("qa2", "16k", "label", 2), ("qa10", "4k", "label", 2), ("qa10", "16k", "label", 2),
        ("qa2", "all", "label", 4), ("qa10", "all", "label", 4),
        ("all", "4k", "label", 4), ("all", "16k", "label", 4), ("all", "all", "label", 8),
    ]  # fmt: skip
    assert groups(rows[:1]) == [("qa10", "16k", "label", 1)]
    assert groups([]) == []


def test_tasks_of_different_measures_are_joined_by_their_scores() -> None:
    rows = [
        row("a", "hotpotqa", f1=(0.5, 0.25)),
        row("b", "gov_report", rouge_l=(0.1, 0.25)),
    ]
    assert groups(rows)[-1] == ("all", "all", "score", 2)
    assert results.summarize(rows)[-1]["memory"]["value"] == pytest.approx(0.3)
    rows = [row("a", "multi-session", "s", contains=(1, 0), f1=(0.5, 0)), row("b", "abstention", "s", abstains=(0, 0))]
    last = results.summarize(rows)[-1]
    assert (last["measure"], last["n"]) == ("score", 2)
    assert last["memory"] == dict(zip(("value", "low", "high"), (0.5, *wilson(1, 2)[:2]), strict=True))
    assert groups(rows)[:3] == [
        ("abstention", "s", "abstains", 1),
        ("multi-session", "s", "contains", 1),
        ("multi-session", "s", "f1", 1),
    ]
    rows[1] = row("b", "single-session-preference", "s", f1=(0.5, 0))
    assert groups(rows)[-1] == ("all", "all", "score", 2)


def test_the_official_judge_of_longmemeval_gets_its_format(tmp_path: Path) -> None:
    rows = [
        row("q1", length="s", contains=(1, 0)),
        row("q2_abs", length="s", abstains=(1, 0)),
        row("q1", length="m", contains=(1, 0)),
    ]
    paths = results.write_hypotheses(tmp_path, rows)
    assert [path.name for path in paths] == [
        "hypotheses-s.jsonl",
        "hypotheses-s-bare.jsonl",
        "hypotheses-m.jsonl",
        "hypotheses-m-bare.jsonl",
    ]
    lines = [json.loads(line) for line in paths[0].read_text(encoding="utf-8").splitlines()]
    assert lines == [{"question_id": "q1", "hypothesis": "q1 é"}, {"question_id": "q2_abs", "hypothesis": "q2_abs é"}]
    assert json.loads(paths[3].read_text()) == {"question_id": "q1", "hypothesis": "b"}
