"""One optimizer step and what survives a restart: rates, clipping, accumulation, skipped steps, averages, resuming."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cortex_core.backbone.model import Cortex
from cortex_core.config import OptimizerConfig
from cortex_core.training.loop import Learner, parameter_groups
from cortex_core.training.objectives import Batch, ReadingLoss
from cortex_core.training.schedules import learning_rate_factor, sparsity_factor
from tests import tiny

RATES = OptimizerConfig(learning_rate=0.001, gate_learning_rate=0.002, output_learning_rate=0.003, warmup_steps=4)


@pytest.mark.parametrize("controller", [True, False])
def test_every_parameter_has_the_rate_of_its_kind(controller: bool) -> None:
    memory = tiny.MEMORY.model_copy(update={"layers": (0, 1), "controller": controller, "adapter_rank": 4})
    parameters = dict(tiny.model(memory).sidecars.named_parameters())
    groups = parameter_groups(parameters, RATES)
    owner: dict[int, float] = {}
    for group in groups:
        assert group["lr"] == group["peak_lr"]
        for parameter in group["params"]:
            assert id(parameter) not in owner, "in two groups"
            owner[id(parameter)] = group["peak_lr"]
    found = {name: owner.pop(id(parameter)) for name, parameter in parameters.items()}
    assert not owner, "not a parameter of the sidecars"
    kinds = {"output_gate": 0.003, "write_gate": 0.002, "read_gate": 0.002, "controller": 0.002}
    kinds |= {"addresses": 0.001, "adapters": 0.001}
    assert {name.split(".")[1] for name in found} == kinds.keys() - (set() if controller else {"controller"})
    shares = {name: 0.003 for name in parameters if name.endswith("attention_share")}
    assert len(shares) == 2 and found == {name: kinds[name.split(".")[1]] for name in parameters} | shares


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.1), (1, 0.2), (8, 0.9), (9, 1.0), (10, 1.0), (50, 1.0),
        (51, 0.2 + 0.8 * 49 / 50), (75, 0.2 + 0.8 * 0.5), (99, 0.2 + 0.8 / 50),
    ],
)  # fmt: skip
def test_rates_warm_up_hold_and_decay(step: int, expected: float) -> None:
    settings = OptimizerConfig(warmup_steps=10, final_frac=0.2)
    assert learning_rate_factor(step, 100, settings) == pytest.approx(expected)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 50), (3, 1), (2, 2)])
def test_short_runs_have_rates_above_zero(steps: int, warmup: int) -> None:
    settings = OptimizerConfig(warmup_steps=warmup, final_frac=0.0)
    factors = [learning_rate_factor(step, steps, settings) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)


def test_a_step_uses_the_rates_of_its_number() -> None:
    of = tiny.learner(tiny.training(steps=8), optimizer=RATES)
    source = tiny.batches(of.training)
    for step in range(8):
        (metrics,) = tiny.train(of, source, 1)
        factor = learning_rate_factor(step, 8, RATES)
        assert metrics["learning_rate_factor"] == factor
        assert sorted(group["lr"] for group in of.optimizer.param_groups) == pytest.approx(
            [0.001 * factor, 0.002 * factor, 0.003 * factor]
        )
    assert of.step_number == 8


def gradient_norm(of: Learner) -> float:
    return float(torch.stack([p.grad.norm() for p in of.parameters.values() if p.grad is not None]).norm())


def test_gradients_are_clipped_by_their_global_norm() -> None:
    norms = []
    for clip in (1e6, 1e-3):
        of = tiny.learner(tiny.training(), tiny.model(open_gates=True), RATES.model_copy(update={"clip_norm": clip}))
        (metrics,) = tiny.train(of, tiny.batches(of.training), 1)
        norms.append((metrics["gradient_norm"], gradient_norm(of)))
    (free, unclipped), (before, clipped) = norms
    assert free == pytest.approx(unclipped, rel=1e-5) and before == pytest.approx(free, rel=1e-5)
    assert before > 1e-3 and clipped == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(("windows", "fillers"), [(0, 0), (4, 3)])
def test_two_halves_are_one_batch(windows: int, fillers: int) -> None:
    found = []
    for parts in (1, 2):
        config = tiny.training(
            batch_size=4, accumulation_steps=parts, in_window_batch_size=windows, filler_windows=fillers,
            sparsity_span=(0.0, 0.0),
        )  # fmt: skip
        of = tiny.learner(config, tiny.model(open_gates=True))
        metrics = tiny.train(of, tiny.batches(config), 1)
        found.append((tiny.weights(of.model.sidecars), {n: p.grad.clone() for n, p in of.parameters.items()}, metrics))
    (weights, gradients, metrics), (other_weights, other_gradients, other_metrics) = found
    assert tiny.furthest(gradients, other_gradients) < 1e-5
    assert tiny.furthest(weights, other_weights) < 1e-5
    assert other_metrics[0] == pytest.approx(metrics[0], rel=1e-4, abs=1e-5)


class Watched(nn.Module):
    """The objective as DDP would wrap it: notes which micro-batches are not synchronised, and can spoil losses."""

    def __init__(self, model: Cortex, config: Any, spoil: dict[int, float] | None = None) -> None:
        super().__init__()
        self.inner, self.spoil = ReadingLoss(model, config), spoil or {}
        self.calls: list[str] = []
        self._synced = "synced"

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        self._synced = "alone"
        yield
        self._synced = "synced"

    def forward(self, batch: Batch, sparsity: float) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = self.inner(batch, sparsity)
        loss = loss * self.spoil.get(len([call for call in self.calls if call != "released"]), 1.0)
        self.calls.append(self._synced)
        return loss, metrics


def watched(
    spoil: dict[int, float] | None = None, optimizer: str = "adamw", **training: object
) -> tuple[Learner, Watched]:
    config, model = tiny.training(**training), tiny.model(open_gates=True)
    objective = Watched(model, config, spoil)
    released = lambda: objective.calls.append("released")  # noqa: E731
    settings = tiny.FAST.model_copy(update={"name": optimizer})
    return Learner(model, objective, config, settings, after_backward=released), objective


def test_workers_wait_for_each_other_once_a_step() -> None:
    of, objective = watched(accumulation_steps=4)
    tiny.train(of, tiny.batches(of.training), 2)
    assert objective.calls == ["alone", "released", "alone", "released", "alone", "released", "synced", "released"] * 2


@pytest.mark.parametrize("optimizer", ["adamw", "apollo", "apollo_mini"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_left_out(bad: float, optimizer: str) -> None:
    of, _ = watched({1: bad}, optimizer, ema_decay=0.9, max_nonfinite_steps=1)
    source = tiny.batches(of.training)
    tiny.train(of, source, 1)
    weights, average, moments = tiny.weights(of.model.sidecars), copied(of.average), copied(of.state()[0])
    (metrics,) = tiny.train(of, source, 1)
    assert metrics["nonfinite_steps"] == of.nonfinite_steps == 1 and of.step_number == 2
    assert tiny.same(tiny.weights(of.model.sidecars), weights) and tiny.same(of.average, average)
    assert tiny.same(of.state()[0], moments)
    (metrics,) = tiny.train(of, source, 1)
    assert metrics["nonfinite_steps"] == 1 and not tiny.same(tiny.weights(of.model.sidecars), weights)


def test_too_many_such_steps_end_the_run() -> None:
    of, _ = watched(dict.fromkeys(range(9), float("nan")), max_nonfinite_steps=2)
    source, before = tiny.batches(of.training), tiny.weights(of.model.sidecars)
    tiny.train(of, source, 2)
    with pytest.raises(
        FloatingPointError, match=r"3 steps .*max_nonfinite_steps = 2\).*optimizer\.learning_rate"
    ) as error:
        tiny.train(of, source, 1)
    assert "\n" not in str(error.value)
    assert tiny.same(tiny.weights(of.model.sidecars), before)


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in tensors.items()}


def test_the_average_forgets_where_it_started() -> None:
    """Without correction the fresh weights would keep .98 ** 12 = .78 of it; with it, next to nothing."""
    of = tiny.learner(tiny.training(steps=12, ema_decay=0.98))
    source, expected, start_share = tiny.batches(of.training), copied(of.average), 1.0
    for step in range(12):
        tiny.train(of, source, 1)
        decay = min(0.98, (1 + step) / (10 + step))
        start_share *= decay
        expected = {n: decay * value + (1 - decay) * of.parameters[n].detach() for n, value in expected.items()}
    assert start_share < 1e-5
    assert tiny.furthest(of.average, expected) < 1e-5
    assert tiny.furthest(of.average, tiny.weights(of.model.sidecars)) > 1e-3


def test_averaging_can_be_turned_off() -> None:
    of = tiny.learner(tiny.training(ema_decay=0.0))
    tiny.train(of, tiny.batches(of.training), 3)
    assert tiny.same(of.average, tiny.weights(of.model.sidecars))


def test_the_average_is_lent_to_the_model_and_taken_back() -> None:
    of = tiny.learner(tiny.training(ema_decay=0.9))
    tiny.train(of, tiny.batches(of.training), 3)
    own = tiny.weights(of.model.sidecars)
    with of.averaged():
        assert tiny.same(tiny.weights(of.model.sidecars), of.average) and not tiny.same(of.average, own)
    assert tiny.same(tiny.weights(of.model.sidecars), own)
    with pytest.raises(RuntimeError, match="broke"), of.averaged():
        raise RuntimeError("the evaluation broke")
    assert tiny.same(tiny.weights(of.model.sidecars), own)


OPTIMIZERS = [
    tiny.FAST.model_copy(update={"name": name, "update_proj_gap": 2}) for name in ("adamw", "apollo", "apollo_mini")
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda settings: settings.name)
def test_a_restored_run_goes_on_bit_for_bit(optimizer: OptimizerConfig) -> None:
    config = tiny.training(ema_decay=0.9, in_window_batch_size=4, accumulation_steps=2)
    source = tiny.batches(config)
    straight = tiny.learner(config, optimizer=optimizer)
    expected = tiny.train(straight, source, 6)
    first = tiny.learner(config, optimizer=optimizer)
    tiny.train(first, source, 3)
    tensors, counters = first.state()
    tensors = copied(tensors)
    tiny.train(first, source, 1)  # what happens afterwards does not leak into the state
    second = tiny.learner(config, tiny.model(open_gates=True), optimizer)
    second.restore(tensors, counters)
    assert second.step_number == 3
    assert tiny.train(second, source, 3) == expected[3:]
    assert tiny.same(second.state()[0], straight.state()[0]) and second.state()[1] == straight.state()[1]
    assert any(name.startswith("optimizer.exp_avg_sq.") for name in second.state()[0])
    projected = [name for name in second.state()[0] if name.startswith("optimizer.norm.")]
    assert bool(projected) is (optimizer.name != "adamw")


def test_projections_hang_on_the_seed_of_the_run() -> None:
    config, found = tiny.training(), []
    for seed in (0, 0, 1):
        attached = tiny.model(open_gates=True)
        of = Learner(attached, ReadingLoss(attached, config), config, OPTIMIZERS[2], seed=seed)
        tiny.train(of, tiny.batches(config), 3)
        found.append(tiny.weights(attached.sidecars))
    assert tiny.same(found[0], found[1]) and not tiny.same(found[0], found[2])


def test_a_run_can_be_restored_before_its_first_step() -> None:
    config = tiny.training()
    first, second = tiny.learner(config), tiny.learner(config, tiny.model(open_gates=True))
    second.restore(*first.state())
    source = tiny.batches(config)
    assert tiny.train(second, source, 2) == tiny.train(first, source, 2)


def test_skipped_steps_are_remembered() -> None:
    of, _ = watched({0: float("nan")})
    tiny.train(of, tiny.batches(of.training), 1)
    other = tiny.learner(of.training)
    other.restore(*of.state())
    assert other.nonfinite_steps == 1


# --- learning ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def answer_loss(model: Cortex, *, forget: bool = False) -> tuple[float, float]:
    """Loss in nats and accuracy on new facts, asked a segment later; with `forget` nothing is carried over."""
    config = tiny.training(batch_size=32, max_segments=2, short_frac=0.0)
    questions = tiny.batches(config, seed=5)
    (batch,) = questions.micro_batches(0, 0, 1)
    if forget:
        batch = batch._replace(input_ids=batch.input_ids[:, 1:], answer=batch.answer[:, 1:])
    _, metrics = ReadingLoss(model, config)(batch)
    return float(metrics["loss/answer_nats"]), float(metrics["accuracy"])


def test_training_teaches_the_memory_to_answer() -> None:
    """Against the same model with its fast weights off, and against itself without what it has read."""
    config = tiny.training(steps=40, batch_size=12, max_segments=2, short_frac=0.3)
    of = tiny.learner(config)
    fast_off, off_accuracy = answer_loss(of.model)
    losses = [metrics["loss/answer_nats"] for metrics in tiny.train(of, tiny.batches(config), config.steps)]
    trained, accuracy = answer_loss(of.model)
    forgotten, forgotten_accuracy = answer_loss(of.model, forget=True)
    assert all(later < earlier for earlier, later in itertools.pairwise([losses[0], losses[10], losses[-1]]))
    assert off_accuracy <= 0.1 and forgotten_accuracy <= 0.2
    assert accuracy > 0.8
    assert trained < fast_off - 2.0 and trained < forgotten - 2.0


def test_training_with_frozen_sidecars_teaches_nothing() -> None:
    config = tiny.training(steps=3, batch_size=12, max_segments=2)
    off = OptimizerConfig(learning_rate=1e-12, gate_learning_rate=1e-12, output_learning_rate=1e-12)
    of = tiny.learner(config, optimizer=off)
    before = answer_loss(of.model)
    tiny.train(of, tiny.batches(config), 3)
    assert answer_loss(of.model) == pytest.approx(before, abs=1e-6)


def test_gates_are_pushed_shut_only_after_they_have_found_what_to_write() -> None:
    for span, steps in (((0.2, 0.4), (0, 20, 30, 40, 99)), ((0.5, 0.9), (0, 50, 70, 90, 99))):
        training = tiny.training(steps=100, sparsity_span=span)
        assert [sparsity_factor(step, training) for step in steps] == pytest.approx([0.0, 0.0, 0.5, 1.0, 1.0])
    at_once = tiny.training(steps=100, sparsity_span=(0.5, 0.5))
    assert [sparsity_factor(step, at_once) for step in (0, 49, 50)] == [0.0, 0.0, 1.0]
    assert sparsity_factor(0, tiny.training(steps=100, sparsity_span=(0.0, 0.0))) == 1.0
