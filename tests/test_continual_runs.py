"""What sleep is compared with: every way learns, results can be gone on with, and rows are made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cortex_core.config import SleepConfig
from cortex_core.errors import DataError
from cortex_core.eval.continual import AccuracyMatrix
from tests.benchmarks import continual_runs
from tests.benchmarks.continual_peers import Elastic
from tests.benchmarks.continual_runs import METHODS, Rates, Scale, Subject, results, run, way
from tests.benchmarks.rows import continual
from tests.consolidation import sleepers

SMALL = Scale(
    num_tasks=2, num_facts=6, facts_per_day=3, day_tokens=256, slots=512, text_rows=2, text_tokens=256, examples=4
)
RATES = Rates(low_rank_steps=4, joint_steps_per_night=20)
CROWDED = Scale(
    num_tasks=2, num_facts=16, facts_per_day=8, day_tokens=256, slots=48, text_rows=1, text_tokens=256, examples=1
)
"""So few slots that almost all of them answer every question: what is learned tonight moves what was learned before."""


def silent(line: str) -> None:
    """Say nothing."""


@pytest.fixture(scope="module")
def subject() -> Subject:
    """The model that ships, and a little text."""
    return Subject(sleepers.corpus(), sleepers.tokenizer())


@pytest.mark.parametrize("method", METHODS)
def test_every_way_learns_and_leaves_a_matrix(method: str, subject: Subject) -> None:
    said: list[str] = []
    found = json.loads(json.dumps(run(method, 1, SMALL, subject, RATES, said.append)))
    assert (found["method"], found["seed"], found["nights"]) == (method, 1, 2)
    assert len(found["text_nats"]) == 2 and found["seconds"] > 0 and said
    assert len(found["before"]) == 2 and sum(found["before"]) <= 0.5
    assert [len(bits) for bits in (*found["recalled"], found["told_anew"])] == [4] * 3
    assert found["recalled"][0] == "1111" and (method == "lora" or found["told_anew"].count("1") >= 3)
    if method == "joint":
        assert len(found["after"]) == 1 and sum(found["after"][0]) / 2 >= 0.6
    else:
        matrix = AccuracyMatrix.of(found["before"], found["after"])
        assert matrix.learned > 0.6 or method in ("replay_only", "lora"), "these two take more than six facts' time"
        assert any(found["text_nats"]) or method != "lora", "where nothing was learned, something was changed"


def test_in_a_crowded_memory_who_does_not_replay_forgets(subject: Subject) -> None:
    matrices = {}
    for method in ("sleep", "naive"):
        found = run(method, 0, CROWDED, subject, say=silent)
        matrices[method] = AccuracyMatrix.of(found["before"], found["after"])
    assert matrices["sleep"].forgetting == 0 and matrices["sleep"].acc > 0.8
    assert matrices["naive"].forgetting >= 0.5 and matrices["naive"].learned > 0.8


def test_ewc_holds_what_the_task_before_has_learned(subject: Subject) -> None:
    reader = way("ewc", subject, SMALL, Rates(elastic_weight=1e3)).sleeper
    assert isinstance(reader, Elastic)
    reader.read(sleepers.stream(1))
    assert reader._held.fisher.num_epochs == 0 and reader._held.fisher.trace == 0
    reader.task_over()
    assert reader._held.fisher.num_epochs == 1 and reader._held.fisher.trace > 0
    (name,) = reader._held.fisher.anchors
    anchor = reader._held.fisher.anchors[name]
    held = reader._held.held()
    assert held is not None
    assert float(held.penalty({name: anchor})) == 0 < float(held.penalty({name: anchor + 1}))
    untouched = reader._held.fisher.values[name].sum(1) == 0
    assert untouched.any() and bool((anchor[untouched] == 0).any())


def test_rehearsal_is_of_the_lines_that_tell(subject: Subject) -> None:
    reader = way("replay_only", subject, SMALL, RATES).sleeper
    reader._day = sleepers.stream(1)
    lessons = reader.lessons()
    facts = sleepers.book().facts[: sleepers.PER_DAY]
    asked = {
        tuple(row[:n].tolist()): int(t) for row, n, t in zip(*lessons.prompts, lessons.taught.top_ids, strict=True)
    }
    remember, end = subject.encode(" remember")[0], subject.encode(";")[0]
    assert asked == {(remember, f.key): f.value for f in facts} | {(remember, f.key, f.value): end for f in facts}
    logits = torch.randn(len(lessons), len(subject.tokenizer))
    expected = torch.nn.functional.cross_entropy(logits, lessons.taught.top_ids[:, 0], reduction="none")
    torch.testing.assert_close(lessons.taught.kl(logits), expected)


def test_only_sleep_and_what_it_lacks_differ(subject: Subject) -> None:
    ways = {method: way(method, subject, SMALL, RATES).sleeper for method in METHODS}
    assert {method for method, reader in ways.items() if reader.config.replayed} == {"sleep", "replay_only", "joint"}
    assert {method for method, reader in ways.items() if reader.guard} == {"sleep", "naive"}
    assert ways["lora"].config.steps == RATES.low_rank_steps != ways["naive"].config.steps
    default = SleepConfig(slots=512, every_tokens=256)
    assert ways["sleep"].config == default == ways["naive"].config.model_copy(update={"replayed": default.replayed})


# --- results and rows ------------------------------------------------------------------------------------------------


def document(method: str, seed: int, acc: float = 0.96, lost: float = 0.01, scale: Scale = SMALL) -> dict[str, Any]:
    """Two tasks: the first falls by `lost`, to `acc` as the second one is."""
    after = [[acc, acc]] if method == "joint" else [[acc + lost, 0.0], [acc, acc]]
    return {
        "schema": continual_runs.SCHEMA, "method": method, "seed": seed, "scale": vars(scale), "rates": Rates().of(method), "before": [0.0, 0.0],
        "after": after, "text_nats": [0.001, 0.003],
        "recalled": ["1111", "1101"], "told_anew": "1011",
    }  # fmt: skip


def test_what_was_interrupted_goes_on(tmp_path: Path, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[str, int]] = []

    def counted(method: str, seed: int, scale: Scale, subject: Subject, say: Any) -> dict[str, Any]:
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append((method, seed))
        return document(method, seed)

    monkeypatch.setattr(continual_runs, "run", counted)
    asked = (tmp_path / "new", SMALL, ("sleep", "joint"), (0, 1), lambda: subject)
    with pytest.raises(KeyboardInterrupt):
        results(*asked)
    assert [path.name for path in sorted((tmp_path / "new").iterdir())] == [
        "joint-0.json",
        "sleep-0.json",
        "sleep-1.json",
    ]
    monkeypatch.setattr(continual_runs, "run", lambda method, seed, *_, **__: document(method, seed, 0.5))
    found = results(*asked)
    assert [(d["method"], d["seed"]) for d in found] == [("sleep", 0), ("joint", 0), ("sleep", 1), ("joint", 1)]
    assert [d["after"][-1][0] for d in found] == [0.96, 0.96, 0.96, 0.5], "only the last one was missing"
    with pytest.raises(
        DataError, match=r"sleep-0\.json was measured at another scale or with other rates: name another folder"
    ):
        results(tmp_path / "new", Scale(), ("sleep",), (0,))
    (tmp_path / "new/sleep-0.json").write_text('{"sch')
    with pytest.raises(DataError, match="is damaged: remove it"):
        results(*asked)


def test_rows_are_made_of_all_seeds() -> None:
    documents = [document(method, seed, 0.9 + 0.01 * seed) for seed in (2, 0, 1) for method in METHODS]
    found = {row.name: row for row in continual.rows_of(documents)}
    assert set(found) == set(continual.ROWS) and {row.n for row in found.values()} == {3}
    acc = found[continual.ACC]
    assert acc.value == pytest.approx(0.91) and acc.low is not None and acc.low < 0.9
    assert found[continual.OVER_JOINT].value == pytest.approx(1.0) and found[continual.OVER_JOINT].met
    forgetting = found[continual.FORGETTING]
    assert forgetting.value == pytest.approx(1.0) == -found[continual.BWT].value and forgetting.goal == 1.0
    assert found[f"{continual.FORGETTING}_ewc"].goal is None
    assert found[continual.RECALL].value == 25.0 and not found[continual.RECALL].met
    assert found[continual.ANEW].value == 0.75 and found[f"{continual.ANEW}_joint"].goal is None
    assert found[continual.PERPLEXITY].value == pytest.approx(0.2002, abs=1e-4) and found[continual.PERPLEXITY].met


def test_only_the_runs_that_a_row_is_about_are_needed() -> None:
    assert continual.needed(continual.FORGETTING) == {"sleep"} == continual.needed(continual.ACC)
    assert continual.needed(continual.OVER_JOINT) == {"sleep", "joint"}
    assert continual.needed(f"{continual.ACC}_joint") == {"joint"}
    assert continual.needed(f"{continual.FORGETTING}_replay_only") == {"replay_only"}
    assert [row.name for row in continual.rows_of([document("lora", 0)])] == [
        f"{name}_lora"
        for name in (continual.ACC, continual.FORGETTING, continual.PERPLEXITY, continual.RECALL, continual.ANEW)
    ]
