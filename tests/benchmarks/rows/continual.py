"""Rows about continual learning: 2,000 facts in 30 tasks, one after the other, by sleep and in other ways."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from cortex_core.intervals import Interval, mean_interval
from tests.benchmarks.row import Row
from tests.benchmarks.rows.demo import Demo

SEEDS = (0, 1, 2)
PEERS = ("naive", "ewc", "replay_only", "lora")
FORGETTING_GOAL_POINTS, OVER_JOINT_GOAL, PERPLEXITY_GOAL_PERCENT, RECALL_GOAL_POINTS = 1.0, 0.98, 0.5, 1.0
FORGETTING, BWT, FWT = "continual_forgetting_points", "continual_bwt_points", "continual_fwt_points"
ACC, OVER_JOINT, PERPLEXITY = "continual_acc", "continual_acc_over_joint", "continual_text_perplexity_percent"
RECALL, ANEW = "continual_recall_loss_points", "continual_told_anew"
ROWS = (
    ACC, OVER_JOINT, FORGETTING, BWT, FWT, PERPLEXITY, RECALL, ANEW,
    *(f"{name}_joint" for name in (ACC, PERPLEXITY, RECALL, ANEW)),
    *(f"{name}_{peer}" for peer in PEERS for name in (ACC, FORGETTING, PERPLEXITY, RECALL, ANEW)),
)  # fmt: skip


def tasks_one_after_the_other(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """2,000 facts in 30 tasks of 8 or 9 days, each fact told once among text, all asked for after every task.

    The model that ships, not the run's; fast weights empty, each question behind 40 tokens of held-out text, as in no
    lesson. ACC, BWT and FWT as of Lopez-Paz and Ranzato (2017), forgetting as of Chaudhry et al. (2018), in points of
    accuracy. Beside sleep: the same without replay (naive), with EWC instead of it, cross-entropy on the text with replay
    and no teacher (replay_only), LoRA on the backbone without replay, and all lessons together after the last day
    (joint). Perplexity with all that was learned over the bare model's, on 64 x 1,024 held-out tokens. Recall:
    what the memory loses of key-value recall over 1,024 tokens, on the same 200 examples before and after. Told anew: of 200
    facts that are told with another value, two windows ago, those that are answered with it. Student's t
    interval over three seeds of facts and text. Results stay in `runs/continual`, and what is there is not measured
    again: 18 runs of some minutes each.
    """
    from tests.benchmarks.continual_runs import Scale, results

    methods = [m for m in ("sleep", "joint", *PEERS) if any(m in needed(name) for name in wanted)]

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    documents = results(demo.folder.parent / "continual", Scale(), methods, SEEDS, say=say)
    yield from (row for row in rows_of(documents) if row.name in wanted)


def needed(name: str) -> set[str]:
    """Methods that a row is about."""
    if name == OVER_JOINT:
        return {"sleep", "joint"}
    return {next((m for m in ("joint", *PEERS) if name.endswith(f"_{m}")), "sleep")}


def rows_of(documents: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """Of results, whichever methods and seeds are there."""
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for document in sorted(documents, key=lambda document: document["seed"]):
        by_method.setdefault(document["method"], []).append(document)
    for method, found in by_method.items():
        ending = "" if method == "sleep" else f"_{method}"
        acc = mean_interval([_acc(document) for document in found], lowest=0.0, highest=1.0)
        yield _row(f"{ACC}{ending}", acc, None, "", len(found))
        if method != "joint":
            yield from _kept(found, ending)
        nats = [sum(document["text_nats"]) / len(document["text_nats"]) for document in found]
        percent = Interval(*(100 * math.expm1(bound) for bound in mean_interval(nats)))
        goal = None if ending else PERPLEXITY_GOAL_PERCENT
        yield _row(f"{PERPLEXITY}{ending}", percent, goal, "%", len(found), higher=False)
        lost = [100 * (_share(before) - _share(after)) for before, after in (d["recalled"] for d in found)]
        goal = None if ending else RECALL_GOAL_POINTS
        yield _row(f"{RECALL}{ending}", mean_interval(lost), goal, "points", len(found), higher=False)
        anew = mean_interval([_share(document["told_anew"]) for document in found], lowest=0.0, highest=1.0)
        yield _row(f"{ANEW}{ending}", anew, None, "", len(found))
    joint = {document["seed"]: _acc(document) for document in by_method.get("joint", ())}
    ratios = [_acc(d) / joint[d["seed"]] for d in by_method.get("sleep", ()) if joint.get(d["seed"])]
    if ratios:
        yield _row(OVER_JOINT, mean_interval(ratios, lowest=0.0), OVER_JOINT_GOAL, "", len(ratios))


def _acc(document: Mapping[str, Any]) -> float:
    """Of joint training there is no matrix, only its last row."""
    return sum(document["after"][-1]) / len(document["after"][-1])


def _share(bits: str) -> float:
    return bits.count("1") / len(bits)


def _kept(found: Sequence[Mapping[str, Any]], ending: str) -> Iterator[Row]:
    from cortex_core.eval.continual import AccuracyMatrix, over_seeds

    measures = over_seeds([AccuracyMatrix.of(document["before"], document["after"]) for document in found])
    points = {name: Interval(*(100 * bound for bound in getattr(measures, name))) for name in measures._fields}
    goal = None if ending else FORGETTING_GOAL_POINTS
    yield _row(f"{FORGETTING}{ending}", points["forgetting"], goal, "points", len(found), higher=False)
    if not ending:
        yield _row(BWT, points["bwt"], None, "points", len(found))
        yield _row(FWT, points["fwt"], None, "points", len(found))


def _row(name: str, found: Interval, goal: float | None, unit: str, n: int, *, higher: bool = True) -> Row:
    return Row(name, found.value, goal, "higher" if higher else "lower", unit, n, found.low, found.high)
