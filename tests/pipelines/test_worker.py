"""The worker function without Ray: what it reports, what its checkpoints hold, and that a resumed run is the same run."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cortex_core.backbone.model import Cortex
from cortex_core.backbone.sidecar_files import WEIGHTS
from cortex_core.errors import DataError, IncompatibleError
from cortex_core.eval.metric_names import LOSS, RECALL
from cortex_core.training.checkpoint import COUNTERS, TENSORS
from pipelines import worker
from pipelines.config import EVALUATION, SIDECARS_FOLDER, RunConfig
from pipelines.worker import Edge
from tests import tiny

STEPS, EVERY = 6, 2


def config(**overrides: object) -> RunConfig:
    """Nothing is written but through the edge."""
    return tiny.run_config(Path("nowhere"), **overrides)


class Keeper:
    """The other side of the edge: keeps reports and the last checkpoint, as Ray Train does."""

    def __init__(self, folder: Path, on_report: Callable[[dict[str, float]], None] = lambda metrics: None) -> None:
        self.reports: list[dict[str, float]] = []
        self.saved: list[tuple[float, list[str]]] = []
        self.last, self._on_report = folder / "last", on_report

    def report(self, metrics: dict[str, float], folder: Path | None) -> None:
        self._on_report(metrics)
        self.reports.append(metrics)
        if folder is not None:
            shutil.rmtree(self.last, ignore_errors=True)
            shutil.copytree(folder, self.last)
            self.saved.append((metrics["step"], sorted(path.name for path in folder.iterdir())))

    def edge(self) -> Edge:
        return Edge(0, 1, self.report, lambda: nullcontext(self.last if self.last.is_dir() else None))

    def sidecars(self) -> dict[str, Tensor]:
        return load_file(self.last / SIDECARS_FOLDER / WEIGHTS)

    def state(self) -> dict[str, Tensor]:
        return load_file(self.last / TENSORS)

    def document(self) -> dict[str, Any]:
        return json.loads((self.last / EVALUATION).read_text())

    def trained(self) -> list[dict[str, float]]:
        return [report for report in self.reports if report["phase"] == 1.0]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Keeper:
    """A run that nothing interrupts."""
    keeper = Keeper(tmp_path_factory.mktemp("straight"))
    worker.train(config(), keeper.edge())
    return keeper


def test_reports_come_in_the_order_of_the_phases(straight: Keeper) -> None:
    phases = [phase for phase, _ in itertools.groupby(report["phase"] for report in straight.reports)]
    assert phases == [0.0, 1.0, 2.0, 3.0]
    assert [report["step"] for report in straight.trained()] == list(range(1, STEPS + 1))
    done = [report["evaluated_frac"] for report in straight.reports if report["phase"] == 2.0]
    assert done == sorted(done) and done[-1] == 1.0
    for report in straight.trained():
        assert report["loss"] > 0 and report["throughput/tokens_per_s"] > 0
        assert {"accuracy", "gradient_norm", "memory/write_frac", "loss/in_window_kl_nats"} <= report.keys()
        assert all(isinstance(value, (int, float)) for value in report.values())


def test_checkpoints_come_when_due_and_the_last_one_holds_the_evaluation(straight: Keeper) -> None:
    whole = sorted([COUNTERS, TENSORS])
    assert straight.saved == [(2, whole), (4, whole), (6, whole), (6, sorted([*whole, SIDECARS_FOLDER, EVALUATION]))]


def test_the_last_step_is_saved_even_when_nothing_is_due(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path)
    worker.train(config(training__checkpoint_every_steps=4, training__report_every_steps=5), keeper.edge())
    assert [step for step, _ in keeper.saved] == [4, 6, 6]
    assert [report["step"] for report in keeper.trained()] == [4, 5, 6]


def test_reports_are_means_since_the_last_one(straight: Keeper, tmp_path: Path) -> None:
    keeper = Keeper(tmp_path)
    worker.train(config(training__report_every_steps=3, training__checkpoint_every_steps=6), keeper.edge())
    single = straight.trained()
    for number, report in enumerate(keeper.trained()):
        of_these = single[3 * number : 3 * number + 3]
        assert report["step"] == of_these[-1]["step"]
        for name in ("loss", "accuracy", "gradient_norm", "memory/state_norm"):
            assert report[name] == pytest.approx(sum(each[name] for each in of_these) / 3, rel=1e-6)
    assert tiny.same(keeper.state(), straight.state()), "when it is reported decides what is learned"


def test_exported_are_the_averages_and_they_load_for_users(straight: Keeper) -> None:
    state = straight.state()
    average = {name.removeprefix("average."): value for name, value in state.items() if name.startswith("average.")}
    saved = straight.sidecars()
    masks = {name: saved.pop(name) for name in [*saved] if name.endswith(".live")}
    assert tiny.same(saved, average) and all(mask.eq(1).all() for mask in masks.values())
    own = {name: state[f"weights.{name}"] for name in average}
    assert not tiny.same(average, own)
    model = Cortex.from_pretrained(config().backbone.name, sidecars=straight.last / SIDECARS_FOLDER)
    assert tiny.same(tiny.weights(model.sidecars), average) and model.segment_tokens == tiny.SEGMENT


STOPS: dict[str, Callable[[dict[str, float]], bool]] = {
    "before the first checkpoint": lambda report: report.get("step") == 1,
    "while a checkpoint is written": lambda report: report.get("step") == 4,
    "between checkpoints": lambda report: report.get("step") == 5,
    "while the last checkpoint is written": lambda report: report.get("step") == 6,
    "during the evaluation": lambda report: report["phase"] == 2.0,
    "while the result is handed over": lambda report: report["phase"] == 3.0,
}


@pytest.mark.parametrize("when", STOPS)
def test_a_resumed_run_is_the_same_run_to_the_bit(straight: Keeper, tmp_path: Path, when: str) -> None:
    def stop(report: dict[str, float]) -> None:
        if STOPS[when](report):
            raise KeyboardInterrupt

    first = Keeper(tmp_path, stop)
    with pytest.raises(KeyboardInterrupt):
        worker.train(config(), first.edge())
    done = first.saved[-1][0] if first.saved else 0
    second = Keeper(tmp_path)
    worker.train(config(), second.edge())
    assert [report["step"] for report in second.trained()] == list(range(int(done) + 1, STEPS + 1))
    assert tiny.same(second.state(), straight.state()) and tiny.same(second.sidecars(), straight.sidecars())
    assert second.document()["rows"] == straight.document()["rows"]
    timeless = ("loss", "accuracy", "gradient_norm", "learning_rate_factor")
    for report, other in zip(second.trained(), straight.trained()[int(done) :], strict=True):
        assert [report[name] for name in timeless] == [other[name] for name in timeless]


def test_a_run_in_parts_is_the_same_run_and_only_the_last_one_is_evaluated(tmp_path: Path) -> None:
    asked = {"tasks__num_pairs": 3, "validation__gaps_tokens": [20], "validation__num_examples": 4}
    asked |= {"validation__every_steps": 5}
    keeper = Keeper(tmp_path)
    for until_step, saved in ((1, [1]), (5, [1, 2, 4, 5]), (STEPS, [1, 2, 4, 5, 6, 6])):
        worker.train(config(**asked), keeper.edge(), until_step)
        assert [step for step, _ in keeper.saved] == saved and (EVALUATION in keeper.saved[-1][1]) == (
            saved[-1:] == [6]
        )
    validated = [report["step"] for report in keeper.trained() if "validation/loss_nats" in report]
    assert validated == [1, 5, 6], "each part ends with a validation"
    again = Keeper(tmp_path / "whole")
    worker.train(config(**asked), again.edge())
    assert tiny.same(keeper.state(), again.state())


def test_the_seed_decides_the_run(straight: Keeper, tmp_path: Path) -> None:
    torch.rand(3)  # what happened before in this process does not
    for seed, equal in ((0, True), (1, False)):
        keeper = Keeper(tmp_path / str(seed))
        worker.train(config(seed=seed), keeper.edge())
        assert tiny.same(keeper.sidecars(), straight.sidecars()) is equal


def test_a_saved_memory_is_evaluated_as_at_the_end_of_its_training(straight: Keeper, tmp_path: Path) -> None:
    keeper = Keeper(tmp_path)
    reported: list[str] = []

    def report(metrics: dict[str, float], folder: Path | None) -> None:
        if folder is not None:
            reported.extend(path.name for path in folder.iterdir())
        keeper.report(metrics | {"step": 0.0}, folder)

    worker.evaluate(config(), Edge(0, 1, report, nullcontext), straight.last / SIDECARS_FOLDER)
    assert reported == [EVALUATION]
    document, before = keeper.document(), straight.document()
    assert document.keys() == before.keys()
    assert document["rows"] == before["rows"] and document["usage"] == before["usage"]
    assert document["drift"] == pytest.approx(before["drift"])
    assert document["backbone_parameters"] == sum(p.numel() for p in tiny.model().backbone.parameters())


def test_sidecars_of_another_backbone_are_refused(straight: Keeper, tmp_path: Path) -> None:
    folder = tmp_path / SIDECARS_FOLDER
    shutil.copytree(straight.last / SIDECARS_FOLDER, folder)
    settings = json.loads((folder / "cortex.json").read_text())
    (folder / "cortex.json").write_text(json.dumps(settings | {"backbone_fingerprint": "0123456789abcdef"}))
    with pytest.raises(IncompatibleError, match="trained on another backbone"):
        worker.evaluate(config(), Keeper(tmp_path).edge(), folder)


def test_workers_that_find_different_checkpoints_do_not_train_on() -> None:
    worker._check_same([4, 4])
    with pytest.raises(DataError, match=r"workers found checkpoints of steps 4, 0 \(by rank\): not every node"):
        worker._check_same([4, 0])


def test_gradient_checkpointing_and_accumulation_learn_the_same(tmp_path: Path) -> None:
    found = []
    variants = ({}, {"training__gradient_checkpointing": True}, {"training__accumulation_steps": 2})
    for number, changed in enumerate(variants):
        keeper = Keeper(tmp_path / str(number))
        # Without KL: it is a mean over positions, and halves of a batch differ in how many of them are answers.
        worker.train(config(training__kl_weight=0.0, training__steps=3, **changed), keeper.edge())
        found.append(keeper.sidecars())
    for other in found[1:]:
        assert tiny.furthest(found[0], other) < 1e-4


def test_validations_come_when_due_and_disturb_nothing(tmp_path: Path) -> None:
    """After every third step, or every fifth, and the last: the same run, asked at other times."""
    found = {}
    for every in (3, 5):
        (folder := tmp_path / str(every)).mkdir()
        keeper = Keeper(folder)
        settings = {"tasks__num_pairs": 3, "validation__gaps_tokens": [20], "validation__num_examples": 4}
        worker.train(config(**settings, validation__every_steps=every), keeper.edge())
        found[every] = keeper
        said = [report for report in keeper.reports if LOSS in report]
        assert [report["step"] for report in said] == [
            step for step in range(1, STEPS + 1) if step % every == 0 or step == STEPS
        ]
        assert all(0 < report[LOSS] < 20 and 0 <= report[RECALL] <= 1 for report in said)
    assert tiny.same(found[3].state(), found[5].state())
    (one, other) = ([report[LOSS] for report in keeper.reports if LOSS in report][-1] for keeper in found.values())
    assert one == other
