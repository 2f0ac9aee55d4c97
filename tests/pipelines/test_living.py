"""Training with a life beside it, without Ray: what it keeps as it was, what it leaves, and that it goes on exactly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cortex_core.backbone.load import in_assets
from cortex_core.backbone.sidecar_files import WEIGHTS
from cortex_core.consolidation.sleep import slow_values
from cortex_core.errors import DataError, IncompatibleError
from cortex_core.eval.suite import Suite
from cortex_core.training.checkpoint import step_of
from cortex_core.training.dreams import MEMORIES
from pipelines import worker
from pipelines.away import AWAY
from pipelines.config import EVALUATION, LIFE, SIDECARS_FOLDER
from pipelines.life_history import HISTORY
from pipelines.living import Living
from pipelines.slow_actor import own_model, put
from tests import tiny
from tests.pipelines.living_scenes import SIDECARS, run_config
from tests.pipelines.test_worker import Keeper

DREAMING = {"sleep__dream_frac": 0.5}
FIXED = ("addresses.", "slow.")


def document(keeper: Keeper) -> dict[str, Any]:
    return json.loads((keeper.last / LIFE).read_text())


def begun_with() -> dict[str, Tensor]:
    return load_file(in_assets(SIDECARS) / WEIGHTS)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Keeper:
    """A synchronous run with dreams that nothing interrupts."""
    keeper = Keeper(tmp_path_factory.mktemp("straight"))
    worker.train(run_config(**DREAMING), keeper.edge())
    return keeper


def test_what_is_told_beside_training_is_known_in_the_end(straight: Keeper) -> None:
    found = document(straight)
    known = {(row["when"], row["lead_tokens"]): row["known"] for row in found["rows"]}
    assert known["before", 0] == 0 and known["after", 0] >= 0.7, known
    assert found["nights"] == 3 and found["nights_undone"] == 0 and [len(n) for n in found["known_by_day"]] == [1, 2, 3]
    assert 0.99 < found["drift"]["ratio"] < 1.02


def test_gates_are_trained_and_addresses_stay(straight: Keeper) -> None:
    before, after = begun_with(), straight.sidecars()
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert any("output_gate" in name for name in moved) and any("write_gate" in name for name in moved)
    assert any("addresses." in name for name in before) and not any("addresses." in name for name in moved)
    grown = [value for name, value in after.items() if name.endswith("slow.values")]
    assert grown and all(bool(value.any()) for value in grown)


def test_what_a_checkpoint_holds_and_that_it_is_not_whole_without(straight: Keeper, tmp_path: Path) -> None:
    names = {
        AWAY,
        HISTORY,
        MEMORIES,
        "slow.safetensors",
        "session.safetensors",
        "replay.safetensors",
        "dreamed.safetensors",
    }
    assert [step for step, _ in straight.saved] == [2, 4, 6, 6]
    assert all(names <= set(found) for _, found in straight.saved)
    assert {EVALUATION, LIFE, SIDECARS_FOLDER} <= set(straight.saved[-1][1])
    assert step_of(straight.last) == 6
    for name in (AWAY, "session.safetensors"):
        folder = tmp_path / name
        shutil.copytree(straight.last, folder)
        with (folder / name).open("r+b") as file:
            file.truncate(40)
        assert step_of(folder) is None, name


def test_what_is_reported(straight: Keeper) -> None:
    last = straight.trained()[-1]
    assert last["sleep/merged"] == 3.0 and last["sleep/version"] == 3.0 and last["sleep/away"] == 0.0
    assert last["dream_actors/reissued"] == 0.0 and last["dream/num"] == 12.0
    assert {"dream/accept_frac", "dream_actors/accept_frac"} <= last.keys(), (
        "of the judge, and of what was not too late"
    )
    assert [report["sleep/version"] for report in straight.trained()] == [0.0, 1.0, 1.0, 2.0, 2.0, 3.0]


STOPS: dict[str, Callable[[dict[str, float]], bool]] = {
    "while a checkpoint is written": lambda report: report.get("step") == 4,
    "between checkpoints": lambda report: report.get("step") == 5,
    "during the evaluation": lambda report: report["phase"] == 2.0,
}


@pytest.mark.parametrize(
    "when",
    [
        "while a checkpoint is written",
        *(pytest.param(when, marks=[pytest.mark.slow, pytest.mark.nightly]) for when in [*STOPS][1:]),
    ],
)
def test_a_resumed_run_is_the_same_run_to_the_bit(straight: Keeper, tmp_path: Path, when: str) -> None:
    def stop(report: dict[str, float]) -> None:
        if STOPS[when](report):
            raise KeyboardInterrupt

    first = Keeper(tmp_path, stop)
    with pytest.raises(KeyboardInterrupt):
        worker.train(run_config(**DREAMING), first.edge())
    second = Keeper(tmp_path)
    worker.train(run_config(**DREAMING), second.edge())
    as_straight(second, straight)


def as_straight(found: Keeper, straight: Keeper) -> None:
    assert tiny.same(found.state(), straight.state()) and tiny.same(found.sidecars(), straight.sidecars())
    assert document(found) == document(straight)
    assert tiny.same(load_file(found.last / MEMORIES), load_file(straight.last / MEMORIES))


def test_a_run_in_parts_is_the_same_run(straight: Keeper, tmp_path: Path) -> None:
    keeper = Keeper(tmp_path)
    for until_step in (3, 6):
        worker.train(run_config(**DREAMING), keeper.edge(), until_step)
        assert (LIFE in keeper.saved[-1][1]) == (until_step == 6)
    as_straight(keeper, straight)


def test_nights_that_are_away_when_it_is_interrupted_come_home_in_the_next_part(tmp_path: Path) -> None:
    """Of a run that does not wait for them."""
    settings: dict[str, Any] = {"sleep_actor__synchronous": False, "training__report_every_steps": 1}

    def stop(report: dict[str, float]) -> None:
        if report.get("step") == 5:
            raise KeyboardInterrupt

    first = Keeper(tmp_path, stop)
    with pytest.raises(KeyboardInterrupt):
        worker.train(run_config(**settings), first.edge())
    assert first.trained() == first.reports[1:] and first.trained()[3]["sleep/away"] >= 1.0
    second = Keeper(tmp_path)
    worker.train(run_config(**settings), second.edge())
    found = document(second)
    assert found["nights"] == 3 and found["nights_undone"] == 0
    assert next(row["known"] for row in found["rows"] if row["when"] == "after") >= 0.6


def test_the_last_night_is_over_before_the_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is evaluated is what is exported."""
    happened: list[str] = []
    finish, ask = Living.finish, Suite.run

    def finished(self: Living) -> None:
        assert self.sleeper.num_away >= 1
        finish(self)
        happened.append(f"{self.sleeper.num_away} away")

    def asked(self: Suite, model: Any) -> Any:
        happened.append("asked")
        return ask(self, model)

    monkeypatch.setattr(Living, "finish", finished)
    monkeypatch.setattr(Suite, "run", asked)
    worker.train(run_config(sleep_actor__synchronous=False), Keeper(tmp_path).edge())
    assert happened == ["0 away", "asked"]


def test_training_begins_with_the_sidecars_that_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Tensor]] = []
    learner = worker.Learner

    def watched(model: Any, *arguments: Any, **named: Any) -> Any:
        seen.append({n: v.detach().clone() for n, v in model.sidecars.state_dict().items()})
        return learner(model, *arguments, **named)

    def never(*_: Any) -> None:
        raise AssertionError("their addresses are fitted already")

    monkeypatch.setattr(worker, "Learner", watched)
    monkeypatch.setattr(worker, "calibrate", never)
    alone = run_config(life__beside_training=False, training__checkpoint_every_steps=9)
    keeper = Keeper(tmp_path)
    worker.train(alone, keeper.edge(), 1)
    assert tiny.same(seen[0], begun_with())
    weights = {n.removeprefix("weights."): v for n, v in keeper.state().items() if n.startswith("weights.")}
    assert any("addresses." in n and not torch.equal(v, begun_with()[n]) for n, v in weights.items()), "it moves them"


def test_a_memory_that_has_slept_keeps_its_addresses_in_any_training(straight: Keeper, tmp_path: Path) -> None:
    slept = tmp_path / "slept"
    shutil.copytree(straight.last / SIDECARS_FOLDER, slept)
    memory = json.loads((slept / "cortex.json").read_text())["fast_weights"]
    keeper = Keeper(tmp_path)
    changes = {"sidecars": str(slept), "fast_weights": memory, "life__beside_training": False}
    worker.train(run_config(**changes), keeper.edge())
    before, after = straight.sidecars(), keeper.sidecars()
    for name, value in before.items():
        if any(part in name for part in FIXED):
            assert torch.equal(value, after[name]), name
    assert not tiny.same(before, after)


def test_sidecars_of_another_memory_are_refused(tmp_path: Path) -> None:
    config = run_config()
    other = config.model_copy(update={"fast_weights": config.fast_weights.model_copy(update={"rank": 8})})
    with pytest.raises(IncompatibleError, match=r"^sidecars = builtin:stdlib-1m/sidecars: were trained with other"):
        worker.train(other, Keeper(tmp_path).edge())


def test_a_checkpoint_whose_life_is_damaged_is_not_gone_on_from(straight: Keeper, tmp_path: Path) -> None:
    keeper = Keeper(tmp_path)
    shutil.copytree(straight.last, keeper.last)
    (keeper.last / HISTORY).write_text('{"before": []}')
    with pytest.raises(DataError, match=r"history\.json: not readable \('days'\); it is damaged"):
        worker.train(run_config(**DREAMING), keeper.edge())


def test_the_model_of_an_actor() -> None:
    """Built without a trace in the random numbers of the process; takes what it is given, refuses what does not fit."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model = own_model(run_config())
    assert torch.equal(torch.rand(3), expected)
    name, value = next(iter(slow_values(model).items()))
    put(model, {name: torch.full_like(value, 2.0)})
    assert bool((slow_values(model)[name] == 2.0).all())
    with pytest.raises(IncompatibleError, match=r"^sidecars: other has no place in those of the actor\. Every node"):
        put(model, {"other": value})
    with pytest.raises(IncompatibleError, match=r"^sidecars: size mismatch for .*Every node has to see the same"):
        put(model, {name: torch.zeros(3)})
