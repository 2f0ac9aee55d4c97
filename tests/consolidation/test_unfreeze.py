"""Whatever is learned, the model stays inside its trust region; what left it is undone to the bit."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import Adam

from cortex_core.backbone.low_rank import LowRankDeltas, linear_modules
from cortex_core.backbone.model import Cortex
from cortex_core.backbone.prompts import Prompts
from cortex_core.config import NightConfig, UnfreezeConfig
from cortex_core.consolidation import unfreeze as module
from cortex_core.consolidation.guard import DriftGuard, ProbeGuard
from cortex_core.consolidation.leads import Leads
from cortex_core.consolidation.sleep import distillation_loss
from cortex_core.consolidation.text_anchor import TextAnchor
from cortex_core.consolidation.unfreeze import Unfrozen, measured, trust_region, unfreeze
from cortex_core.errors import ConfigError
from tests.consolidation.unfreeze_scenes import QUICK, evening, facts, probes, scene, share_right, text
from tests.tiny import same, weights


def changed(**updates: object) -> UnfreezeConfig:
    return UnfreezeConfig.model_validate(QUICK.model_dump() | updates)


def taught(config: UnfreezeConfig, family: str = "qwen2") -> tuple[Cortex, LowRankDeltas, Unfrozen]:
    """Without an anchor: nothing but the region holds it."""
    model, deltas = scene(family, config)
    region = trust_region(model, text(), probes(), config)
    return model, deltas, unfreeze(model, deltas, evening(facts()[0], config), region, config)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen3"])
def test_deltas_alone_learn_lessons_inside_the_region(family: str) -> None:
    config = changed(steps=30, max_probe_nats=0.02, text_weight=30.0)
    model, deltas = scene(family, config)
    (lessons, right), region = facts(), trust_region(model, text(), probes(), config)
    backbone, sidecars = weights(model.backbone), weights(model.sidecars)
    assert share_right(model, lessons, right) < 0.3
    out = unfreeze(model, deltas, evening(lessons, config), region, config, TextAnchor(text(16, seed=9), config))
    assert share_right(model, lessons, right) == 1.0
    assert out.metrics["unfreeze/loss_last_nats"] < out.metrics["unfreeze/loss_first_nats"] - 0.3
    assert out.metrics["unfreeze/text_nats"] <= 0.004
    assert same(weights(model.backbone), backbone)
    assert same(weights(model.sidecars), sidecars)
    with deltas.off():
        assert share_right(model, lessons, right) < 0.3


def test_what_is_learned_behind_text_is_known_behind_other_text() -> None:
    """As well as at the beginning of a text. What is learned there alone is known less well elsewhere."""
    config = changed(steps=60, rank=8, learning_rate=0.003)
    lessons, unseen = facts()[0], Leads(text(16, seed=31), 12)
    behind, worse = [unseen(lessons) for _ in range(8)], {}
    for name, lead in (("alone", Leads(text(0), 0)), ("led", Leads(text(16, seed=9), 12))):
        model, deltas = scene(config=config)
        unfreeze(model, deltas, evening(lessons, config), {}, config, lead=lead)
        with torch.no_grad():
            elsewhere = sum(distillation_loss(model, asked, 64) for asked in behind) / len(behind)
            worse[name] = float(elsewhere - distillation_loss(model, lessons, 64))
    assert worse["alone"] > 0.015 and worse["led"] < 0.005


def test_only_deltas_get_gradients_and_none_stay() -> None:
    model, deltas, _ = taught(QUICK)
    assert any(value.requires_grad for value in model.sidecars.parameters())
    everything = [*model.parameters(), *deltas.parameters()]
    assert all(value.grad is None for value in everything)
    assert not any(value.requires_grad for value in deltas.parameters())


@settings(max_examples=15)
@given(
    learning_rate=st.floats(-4, 30).map(lambda power: 10.0**power),
    steps=st.integers(1, 3),
    bound=st.sampled_from([0.002, 0.004, 0.1]),
    backtracks=st.integers(0, 2),
)
def test_at_every_return_the_model_is_inside(learning_rate: float, steps: int, bound: float, backtracks: int) -> None:
    config = changed(
        learning_rate=learning_rate, steps=steps, max_backtracks=backtracks, max_text_nats=bound, max_probe_nats=bound
    )
    model, deltas = scene(config=config)
    region = trust_region(model, text(), probes(), config)
    out = unfreeze(model, deltas, evening(facts()[0], config), region, config)
    assert deltas.is_finite
    found = measured(model, region)
    assert all(drift <= bound for drift in found.values())
    assert found == {name: out.metrics[f"unfreeze/{name}_nats"] for name in region}
    kept = [step for step in out.log if step.kept]
    assert all(drift <= bound for step in kept for drift in step.drift_nats.values())
    assert len(kept) == out.metrics["unfreeze/steps"]
    assert len(out.log) - len(kept) == out.metrics["unfreeze/rollbacks"]
    if not kept:
        assert not any(bool(value.any()) for value in deltas.up)


@pytest.mark.parametrize("learning_rate", [1e3, 1e30])
def test_a_step_that_leaves_is_undone_to_the_bit(learning_rate: float) -> None:
    config = changed(learning_rate=learning_rate, max_backtracks=2)
    _, deltas, out = taught(config)
    assert [(step.number, step.kept) for step in out.log] == [(1, False)] * 3
    assert [step.learning_rate for step in out.log] == [learning_rate / 2**n for n in range(3)]
    assert all(not drift <= 0.004 for step in out.log for drift in [step.drift_nats["text"]])
    assert same(weights(deltas), weights(scene(config=config)[1]))
    assert out.metrics["unfreeze/delta_norm"] == 0.0
    assert out.metrics["unfreeze/rollbacks"] == 3.0


def test_without_a_region_it_goes_further() -> None:
    config = changed(learning_rate=0.03)
    _, _, inside = taught(config)
    model, deltas = scene(config=config)
    lessons, _ = facts()
    watch = trust_region(model, text(), probes(), config)
    out = unfreeze(model, deltas, evening(lessons, config), {}, config)
    assert out.metrics["unfreeze/rollbacks"] == 0.0
    assert inside.metrics["unfreeze/rollbacks"] > 0.0
    assert measured(model, watch)["text"] > 0.004 >= inside.metrics["unfreeze/text_nats"]
    assert out.metrics["unfreeze/loss_last_nats"] < inside.metrics["unfreeze/loss_last_nats"]


def test_without_a_region_numbers_still_have_to_be_numbers() -> None:
    config = changed(learning_rate=1e30, scale=1e30, max_backtracks=1)
    model, deltas = scene(config=config)
    unfreeze(model, deltas, evening(facts()[0], config), {}, config)
    assert deltas.is_finite


class Refusing:
    """Allows what `script` says, call by call; the first call is for the start."""

    def __init__(self, script: list[bool]) -> None:
        self.script, self.asked = script, 0

    def drift(self, model: Cortex) -> float:
        return float(self.asked)

    def allows(self, drift_nats: float) -> bool:
        self.asked += 1
        return self.script[self.asked - 1]


class RecordedAdam(Adam):
    """Notes its moments before each step."""

    seen: list[dict] = []  # noqa: RUF012 (for one test)

    def step(self, closure: object = None) -> None:
        self.seen.append(copy.deepcopy(self.state_dict()["state"]))
        super().step()


def equal_states(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[n][part], other[n][part]) for n in one for part in ("exp_avg", "exp_avg_sq", "step")
    )


def test_moments_are_rolled_back_and_the_same_gradient_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start, one step kept, two refused, the fourth try kept: as if it alone had been made."""
    monkeypatch.setattr(module, "Adam", RecordedAdam)
    RecordedAdam.seen = []
    config = changed(steps=2, learning_rate=0.01)
    model, deltas = scene(config=config)
    guard = Refusing([True, True, False, False, True])
    out = unfreeze(model, deltas, evening(facts()[0], config), {"g": guard}, config)
    assert [(step.number, step.kept) for step in out.log] == [(1, True), (2, False), (2, False), (2, True)]
    assert [step.learning_rate for step in out.log] == [0.01, 0.01, 0.005, 0.0025]
    assert [step.drift_nats["g"] for step in out.log] == [1.0, 2.0, 3.0, 4.0]
    first, *tries = RecordedAdam.seen
    assert first == {}
    assert all(equal_states(tries[0], other) for other in tries)

    plain_model, plain = scene(config=config)
    lessons, _ = facts()
    with module.trained(plain.values()):
        optimizer = Adam(plain.values().values(), lr=0.01, betas=(0.9, 0.98))
        for rate in (0.01, 0.0025):
            module._set_gradients(plain_model, plain, evening(lessons, config), config, None, NightConfig())
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
    assert same(weights(deltas), weights(plain))


def test_the_rate_recovers_up_to_where_it_began() -> None:
    config = changed(steps=5)
    model, deltas = scene(config=config)
    guard = Refusing([True, False, False, True, True, True, True, True])
    out = unfreeze(model, deltas, evening(facts()[0], config), {"g": guard}, config)
    assert [step.learning_rate for step in out.log] == [0.01, 0.005, 0.0025, 0.005, 0.01, 0.01, 0.01]


@contextmanager
def interrupted(guard: Refusing, at: int) -> Iterator[None]:
    def stop(model: Cortex) -> float:
        if guard.asked == at:
            raise KeyboardInterrupt
        return 0.0

    guard.drift = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        yield


def test_an_interrupted_step_is_undone() -> None:
    config = changed(steps=1)
    kept_model, kept = scene(config=config)
    unfreeze(kept_model, kept, evening(facts()[0], config), {}, config)
    model, deltas = scene(config=config)
    guard = Refusing([True] * 9)
    with interrupted(guard, at=2):
        unfreeze(model, deltas, evening(facts()[0], changed(steps=5)), {"g": guard}, config)
    assert same(weights(deltas), weights(kept))
    assert not any(value.requires_grad for value in deltas.parameters())


def test_old_lessons_are_replayed_and_weighed() -> None:
    """Two lessons with one answer each: what is replayed is learned with what is new."""
    config = changed(steps=16, text_weight=0.0)
    old, old_right = facts(4, seed=3)
    among = evening(facts(4)[0], config, old)
    model, deltas = scene(config=config)
    unfreeze(model, deltas, among, {}, config)
    assert share_right(model, old, old_right) == 1.0
    model, deltas = scene(config=config)
    unfreeze(model, deltas, among, {}, changed(replay_weight=0.0))
    assert share_right(model, old, old_right) < 1.0


def test_nights_are_held_to_the_original_together() -> None:
    """Each may move by less than the bound; all of them may not go further than it."""
    config = changed(steps=4)
    model, deltas = scene(config=config)
    region = trust_region(model, text(), None, config)
    for night in range(4):
        unfreeze(model, deltas, evening(facts(seed=night)[0], config), region, config)
        assert measured(model, region)["text"] <= 0.004


def test_it_learns_beside_gradient_checkpointing() -> None:
    results = []
    for checkpointed in (False, True):
        model, deltas = scene("llama")
        if checkpointed:
            model.checkpoint_gradients()
        unfreeze(model, deltas, evening(facts()[0], QUICK), {}, QUICK)
        results.append(deltas)
    plain, again = map(weights, results)
    assert all(torch.allclose(plain[name], again[name], atol=1e-4) for name in plain)


@pytest.mark.parametrize("how", ["not attached", "off", "other model", "no lessons", "outside"])
def test_what_cannot_begin_is_refused(how: str) -> None:
    model, deltas = scene()
    lessons, _ = facts()
    region = trust_region(model, text(), probes(), QUICK)
    message = r"the deltas are not on this model, or off; call deltas\.attach"
    match how:
        case "not attached":
            deltas.remove()
        case "other model":
            deltas.remove()
            deltas.attach(scene()[0])
        case "no lessons":
            lessons, message = lessons.at(torch.zeros(8, dtype=torch.bool)), "there are no lessons"
        case "outside":
            message = r"by guard 'text' the model is \S+ nats from the original one already.* raise the guard's bound"
            with torch.no_grad():
                for value in deltas.up:
                    value.fill_(0.2)
    before, switch = weights(deltas), deltas.off() if how == "off" else nullcontext()
    with switch, pytest.raises(ConfigError, match=message) as raised:
        unfreeze(model, deltas, evening(lessons, QUICK), region, QUICK)
    assert "\n" not in str(raised.value)
    assert same(weights(deltas), before)


@torch.no_grad()
def randomised(deltas: LowRankDeltas) -> LowRankDeltas:
    for number, value in enumerate(deltas.up):
        value.normal_(std=0.2, generator=torch.Generator().manual_seed(number))
    return deltas


@torch.no_grad()
def test_guards_measure_against_the_original() -> None:
    model, deltas = scene()
    ids, asked = text(), probes()
    on_text, on_probes = DriftGuard(ids, 0.01), ProbeGuard(model, asked, 0.001)
    assert on_probes.drift(model) == 0.0
    original = [answer(model, asked, row) for row in range(len(asked))]
    randomised(deltas)

    def kl(of: Tensor, to: Tensor) -> float:
        of, to = of.double().log_softmax(-1), to.double().log_softmax(-1)
        return float((of.exp() * (of - to)).sum(-1).mean())

    logits = model(input_ids=ids).logits
    assert logits is not None
    with model.memory(False):
        bare = model(input_ids=ids).logits
    assert bare is not None
    assert on_text.drift(model) == pytest.approx(kl(bare, logits), rel=1e-3)
    now = [answer(model, asked, row) for row in range(len(asked))]
    assert on_probes.drift(model) == pytest.approx(kl(torch.stack(original), torch.stack(now)), rel=1e-3)
    assert not on_probes.allows(on_probes.drift(model))
    assert not on_probes.allows(math.nan)
    assert on_probes.allows(0.001)
    with deltas.off():
        assert on_probes.drift(model) == 0.0


def answer(model: Cortex, asked: Prompts, row: int) -> Tensor:
    """Read by itself, without padding."""
    logits = model(input_ids=asked.input_ids[row : row + 1, : int(asked.lengths[row])]).logits
    assert logits is not None
    return logits[0, -1]


@torch.no_grad()
def test_an_anchor_is_0_for_the_original_and_draws_anew() -> None:
    config = changed(text_windows=2, text_weight=5.0)
    model, deltas = scene(config=config, open_gate=False)
    anchor = TextAnchor(text(8), config)
    assert float(anchor(model)) == 0.0
    randomised(deltas)
    found = [float(anchor(model)) for _ in range(4)]
    assert min(found) > 0
    assert len(set(found)) > 1
    again = TextAnchor(text(8), config)
    assert [float(again(model)) for _ in range(5)][1:] == found
    everything = changed(text_windows=8, text_weight=5.0)
    assert float(TextAnchor(text(8), everything)(model)) == pytest.approx(
        5 * DriftGuard(text(8), 1.0).drift(model), rel=1e-4
    )


def test_guards_and_anchors_need_something_to_watch() -> None:
    model, _ = scene()
    with pytest.raises(ConfigError, match="probe guard: needs at least one prompt"):
        ProbeGuard(model, Prompts.of([]), 0.01)
    with pytest.raises(ConfigError, match="text anchor: needs at least one window"):
        TextAnchor(text(0), QUICK)


def test_modules_can_be_few() -> None:
    """A budget of one module: less is learned than with all, and the others do not exist."""
    model, _, every = taught(changed(max_text_nats=1.0, max_probe_nats=1.0))
    names = linear_modules(model.backbone)[:1]
    model, deltas = scene()
    deltas.remove()
    one = LowRankDeltas(model.backbone, names, QUICK.rank).attach(model)
    out = unfreeze(model, one, evening(facts()[0], QUICK), {}, QUICK)
    assert out.metrics["unfreeze/loss_last_nats"] > every.metrics["unfreeze/loss_last_nats"]
