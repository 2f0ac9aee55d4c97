from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cortex_core.config import UpdateConfig
from cortex_core.errors import DataError, IncompatibleError
from cortex_core.training.pretrain import MOMENTS, STATE, Pretraining, rate_at
from cortex_core.training.pretrain_config import PretrainConfig
from cortex_core.training.pretrain_scores import bits_per_byte


def weights(run: Pretraining) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("optimizer", ["adamw", "apollo", "apollo_mini"])
def test_a_resumed_run_is_the_same_to_the_bit(pretrain_config: PretrainConfig, tmp_path: Path, optimizer: str) -> None:
    update = UpdateConfig.model_validate({"name": optimizer, "update_proj_gap": 2})
    config = pretrain_config.model_copy(update={"optimizer": update})
    whole, first, second = (Pretraining.start(config) for _ in range(3))
    whole_metrics = list(whole.run())
    for metrics in first.run():
        if metrics["step"] == 3:
            break
    first.save(tmp_path)
    second.resume(tmp_path)
    assert second.step == 3
    rest = list(second.run())
    assert same(weights(whole), weights(second))
    assert not same(weights(whole), weights(first))
    assert [m["loss/text_nats"] for m in rest] == [m["loss/text_nats"] for m in whole_metrics[3:]]


def test_a_checkpoint_holds_no_pickle(started: Pretraining, tmp_path: Path) -> None:
    started.save(tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors", ".safetensors"]
    assert json.loads((tmp_path / STATE).read_text())["step"] == started.step


def test_checkpoints_do_not_wait_for_reports(
    pretrain_config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    monkeypatch.setattr(Pretraining, "save", lambda run, folder: saved.append(run.step) if folder == tmp_path else None)
    settings = {"steps": 5, "report_every_steps": 3, "checkpoint_every_steps": 2}
    run = Pretraining.start(pretrain_config.model_copy(update=settings))
    assert [metrics["step"] for metrics in run.run(tmp_path)] == [3, 5]
    assert saved == [2, 4, 5]


@pytest.mark.parametrize(("optimizer", "rate"), [("adamw", 2e-3), ("apollo", 8e-3), ("apollo_mini", 8e-3)])
def test_training_lowers_the_losses(pretrain_config: PretrainConfig, optimizer: str, rate: float) -> None:
    settings = {"steps": 40, "report_every_steps": 40, "learning_rate": rate}
    update = UpdateConfig.model_validate({"name": optimizer})
    run = Pretraining.start(pretrain_config.model_copy(update=settings | {"optimizer": update}))
    before = bits_per_byte(run.model, run.corpus, window_tokens=128)["nats_per_token"]
    [metrics] = list(run.run())
    assert bits_per_byte(run.model, run.corpus, window_tokens=128)["nats_per_token"] < 0.9 * before
    assert metrics["step"] == 40
    assert all(np.isfinite(value) for value in metrics.values())


def test_a_checkpoint_of_another_run_is_refused(
    pretrain_config: PretrainConfig, started: Pretraining, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"holds no checkpoint .state.json is missing"):
        started.resume(tmp_path)
    started.save(tmp_path)
    other = Pretraining.start(pretrain_config.model_copy(update={"seed": 1}))
    with pytest.raises(IncompatibleError, match="was trained with seed = 0, this run has 1: use the same value"):
        other.resume(tmp_path)
    assert (tmp_path / MOMENTS).is_file()
    for changed, complaint in (
        ({"learning_rate": 1e-4}, "with learning_rate = 0.002, this run has 0.0001"),
        ({"optimizer": UpdateConfig(name="apollo")}, "with optimizer.name = adamw, this run has apollo"),
        ({"rows": pretrain_config.rows.model_copy(update={"early_steps": 3})}, "rows.early_steps = 2, this run has 3"),
    ):
        with pytest.raises(IncompatibleError, match=complaint):
            Pretraining.start(pretrain_config.model_copy(update=changed)).resume(tmp_path)
    free = {"steps": 9, "report_every_steps": 2, "checkpoint_every_steps": 3, "score_examples": 5}
    Pretraining.start(pretrain_config.model_copy(update=free)).resume(tmp_path)


def test_rate_rises_stays_and_falls() -> None:
    config = PretrainConfig(steps=100, warmup_steps=10, decay_frac=0.4, final_frac=0.1)
    rates = [rate_at(step, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:60] == [1.0] * 50
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[60:]))
    assert rates[100] == pytest.approx(0.1)
    assert rate_at(99, PretrainConfig(steps=100, decay_frac=0.0)) == 1.0
