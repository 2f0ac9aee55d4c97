"""The training loss against a plain reading of the same batch: values, gradients, where they are cut, what is frozen."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cortex_core.backbone.model import Cortex
from cortex_core.backbone.passes import MemoryPass
from cortex_core.backbone.reading import read_segments
from cortex_core.backbone.segments import Layout
from cortex_core.backbone.shape import decoder_layers
from cortex_core.config import TrainingConfig
from cortex_core.training.objectives import KL_STRIDE, LEAK_FLOOR, SHORT_SEGMENT, Batch, ReadingLoss
from tests import tiny
from tests.tiny import SEGMENT

ROWS, SEGMENTS, WINDOWS = 3, 5, 3


def random_batch(first_answer_segment: int = SEGMENTS - 1, windows: int = 0, seed: int = 1, fillers: int = 0) -> Batch:
    """Random tokens; answers in each segment from `first_answer_segment` on, and in each window but one.

    Rows and windows differ in how many they have: a mean over rows is not a mean over answers.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab = len(tiny.vocabulary().tokenizer)

    def ids(*shape: int) -> Tensor:
        return torch.randint(3, vocab, shape, generator=generator)

    answer = torch.zeros(ROWS, SEGMENTS, SEGMENT, dtype=torch.bool)
    for row in range(ROWS):
        answer[row, first_answer_segment:, 3 + row] = answer[row, first_answer_segment:, SEGMENT - 1] = True
    answer[1, -1, 7] = True
    asked = torch.zeros(windows, SEGMENT, dtype=torch.bool)
    asked[1:, [5, 9]] = True
    asked[2:, 12] = True
    forced = torch.rand(answer.shape, generator=generator) < 0.05
    return Batch(ids(ROWS, SEGMENTS, SEGMENT), answer, forced, ids(windows, SEGMENT), asked, ids(fillers, SEGMENT))


def plain_reading(
    model: Cortex, ids: Tensor, strength: float = 1.0, forced: Tensor | None = None
) -> tuple[Tensor, MemoryPass]:
    """Logits of every token, all segments through the whole backbone in one call."""
    layout = Layout.plain(ids, 0)._replace(forced=None if forced is None else forced.flatten(0, 1))
    logits, memory = read_segments(
        model, ids, layout, model.empty_states(len(ids)), predict=True, read_strength=strength
    )
    assert logits is not None
    return logits, memory


def plain_kl(model: Cortex, batch: Batch, memory: MemoryPass) -> Tensor:
    """KL(bare || with memory) window by window, position by position."""
    total = torch.zeros(())
    for number, (ids, asked) in enumerate(zip(batch.in_window_ids, batch.in_window_answer, strict=True)):
        row = number * ROWS // len(batch.in_window_ids)
        state = {n: s.map(lambda part: part.detach()[row : row + 1]) for n, s in memory.final.items()}  # noqa: B023
        layout = Layout.plain(ids[None, None], SEGMENTS * SEGMENT)
        with_memory, _ = read_segments(model, ids[None, None], layout, state, predict=True)
        with model.memory(False):
            bare = model(input_ids=ids[None]).logits
        assert with_memory is not None and bare is not None
        p, q = bare[0].softmax(-1), with_memory[0].softmax(-1)
        kl = (p * (p.log() - q.log())).sum(-1)
        before = [int(position) - 1 for position in asked.nonzero()]
        total = total + kl[[position for position in range(0, SEGMENT, KL_STRIDE) if position not in before]].mean()
        if before:
            total = total + kl[before].mean()
    return total / len(batch.in_window_ids)


def mean_of_rows(logits: Tensor, ids: Tensor, answer: Tensor) -> Tensor:
    """Cross-entropy of each row's answers, row by row."""
    losses = []
    for row in range(ROWS):
        at = answer[row].nonzero()[:, 0]
        losses.append(functional.cross_entropy(logits[row, at - 1], ids[row, at]))
    return torch.stack(losses).mean()


def plain_leak(model: Cortex, batch: Batch, memory: MemoryPass, limit: float) -> Tensor:
    """Window by window, gate by gate."""
    total = torch.zeros(())
    for number, ids in enumerate(batch.filler_ids):
        row = number * ROWS // len(batch.filler_ids)
        state = {n: s.map(lambda part: part.detach()[row : row + 1]) for n, s in memory.final.items()}  # noqa: B023
        for segments in (ids.view(1, 1, SEGMENT), ids.view(1, -1, SHORT_SEGMENT)):
            layout = Layout.plain(segments, SEGMENTS * SEGMENT)
            silent = layout._replace(silent=torch.ones_like(layout.valid))
            _, read = read_segments(model, segments, silent, state, predict=False)
            gates = torch.cat([reading.activation.flatten() for reading in read.readings.values()])
            above = gates[gates > limit] - limit
            assert 0 < len(above) < len(gates)
            weight = above.detach() ** 2
            total = total - (weight / (weight.sum() + LEAK_FLOOR) * (1.001 - above).log()).sum() / 2
    return total / len(batch.filler_ids)


def plain_loss(model: Cortex, batch: Batch, config: TrainingConfig) -> Tensor:
    """The objective as one would write it down."""
    logits, memory = plain_reading(model, batch.input_ids, config.read_strength, batch.forced)
    answers = mean_of_rows(logits, batch.input_ids.flatten(1), batch.answer.flatten(1))
    gates = torch.cat([reading.activation.flatten() for reading in memory.readings.values()])
    limit = model.fast_weights.dead_zone - config.sparsity_margin
    loss = answers + config.sparsity_weight * (gates - limit).clamp_min(0).mean()
    if len(batch.in_window_ids):
        loss = loss + config.kl_weight * plain_kl(model, batch, memory)
    if len(batch.filler_ids):
        loss = loss + config.sparsity_weight * plain_leak(model, batch, memory, limit)
    return loss


def gradients(loss: Tensor, model: Cortex) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.sidecars.named_parameters() if p.grad is not None}


def worst(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference of any gradient, relative to that gradient's norm."""
    assert one.keys() == other.keys() and len(one) > 8
    return max(float((one[n] - other[n]).norm() / one[n].norm().clamp_min(1e-12)) for n in one)


@pytest.mark.parametrize("first_answer_segment", [0, 2, SEGMENTS - 1])
@pytest.mark.parametrize(("windows", "fillers"), [(0, 0), (WINDOWS, 0), (0, 2 * ROWS), (WINDOWS, ROWS)])
def test_loss_and_gradients_are_those_of_a_plain_reading(first_answer_segment: int, windows: int, fillers: int) -> None:
    """So reading the leading segments without the upper layers, and logits at answers alone, change nothing."""
    model, config = tiny.model(open_gates=True), tiny.training(kl_weight=0.7, sparsity_weight=0.3)
    batch = random_batch(first_answer_segment, windows, fillers=fillers)
    loss, metrics = ReadingLoss(model, config)(batch)
    expected = plain_loss(model, batch, config)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert float(metrics["loss"]) == loss.item() and not metrics["loss"].requires_grad
    assert worst(gradients(expected, model), gradients(loss, model)) < 1e-4


def test_metrics_are_those_of_a_plain_reading() -> None:
    model, batch, config = tiny.model(open_gates=True), random_batch(3, WINDOWS), tiny.training()
    ids, positions = batch.input_ids.flatten(1), batch.answer.flatten(1).nonzero().tolist()
    with torch.no_grad():
        row, at = positions[-1]  # the last one is made right, so that accuracy is not 0
        first, _ = plain_reading(model, batch.input_ids, config.read_strength, batch.forced)
        ids[row, at] = first[row, at - 1].argmax()
        _, metrics = ReadingLoss(model, config)(batch)
        logits, memory = plain_reading(model, batch.input_ids, config.read_strength, batch.forced)
    right = [int(logits[row, at - 1].argmax()) == int(ids[row, at]) for row, at in positions]
    assert 0 < sum(right) < len(right)
    assert float(metrics["accuracy"]) == pytest.approx(sum(right) / len(right))
    (reading,) = memory.readings.values()
    chosen = (reading.write > 0) & ~batch.forced.flatten(1)[:, None]
    assert float(metrics["memory/write_frac"]) == pytest.approx(float(chosen.float().mean()))
    assert 0.05 < float(metrics["memory/write_frac"]) < 0.95
    norms = reading.final_state.up.norm(dim=(-2, -1))
    assert float(metrics["memory/state_norm"]) == pytest.approx(float(norms.mean()), rel=1e-5)
    penalty = config.sparsity_weight * metrics["loss/sparsity"]
    parts = metrics["loss/answer_nats"] + penalty + config.kl_weight * metrics["loss/in_window_kl_nats"]
    assert float(metrics["loss"]) == pytest.approx(float(parts), rel=1e-6)


class Embeddings:
    """Every embedding that the backbone computes within the block, as a leaf that collects its gradient."""

    def __init__(self, model: Cortex) -> None:
        self.leaves: list[Tensor] = []
        self._module = model.backbone.get_input_embeddings()

    def __enter__(self) -> Embeddings:
        self._handle = self._module.register_forward_hook(self._keep)
        return self

    def __exit__(self, *exit_: object) -> None:
        self._handle.remove()

    def _keep(self, module: object, args: object, out: Tensor) -> Tensor:
        self.leaves.append(out.detach().requires_grad_())
        return self.leaves[-1]

    def reached(self, rows: int) -> list[bool]:
        """For each segment in order, whether any gradient came back to it."""
        found = []
        for leaf in self.leaves:
            of_segments = leaf.unflatten(0, (rows, -1)).transpose(0, 1)
            grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            by_segment = grad.unflatten(0, (rows, -1)).transpose(0, 1)
            found += [bool(segment.abs().sum() > 0) for segment in by_segment[: len(of_segments)]]
        return found


@pytest.mark.parametrize(
    ("first_answer_segment", "keep", "expected"),
    [
        (4, 0, "11111"), (4, 1, "00011"), (4, 2, "00111"), (4, 3, "01111"), (4, 4, "11111"), (4, 9, "11111"),
        (2, 1, "01111"), (2, 2, "11111"), (0, 1, "11111"),
    ],
)  # fmt: skip
def test_truncation_cuts_gradients_exactly_there_and_no_values(
    first_answer_segment: int, keep: int, expected: str
) -> None:
    """`keep` segments of carried state before the first answer; what is older gets no gradient at all."""
    model, batch = tiny.model(open_gates=True), random_batch(first_answer_segment)
    config = tiny.training(sparsity_weight=0.0, truncate_segments=keep)
    with Embeddings(model) as seen:
        loss, _ = ReadingLoss(model, config)(batch)
        loss.backward()
    assert "".join("01"[reached] for reached in seen.reached(ROWS)) == expected
    whole, _ = ReadingLoss(model, tiny.training(sparsity_weight=0.0))(batch)
    assert loss.item() == pytest.approx(whole.item(), abs=1e-6)


def test_truncated_gradients_are_those_of_a_reading_that_starts_from_a_constant() -> None:
    model, batch = tiny.model(open_gates=True), random_batch()
    config = tiny.training(sparsity_weight=0.0, truncate_segments=2)
    loss, _ = ReadingLoss(model, config)(batch)
    truncated = gradients(loss, model)
    old, new = batch.input_ids[:, : SEGMENTS - 3], batch.input_ids[:, SEGMENTS - 3 :]
    with torch.no_grad():
        _, memory = plain_reading(model, old, forced=batch.forced[:, : SEGMENTS - 3])
    start = memory.final
    layout = Layout.plain(new, old[0].numel())._replace(forced=batch.forced[:, SEGMENTS - 3 :].flatten(0, 1))
    logits, _ = read_segments(model, new, layout, start, predict=True, read_strength=config.read_strength)
    assert logits is not None
    expected = mean_of_rows(logits, new.flatten(1), batch.answer[:, SEGMENTS - 3 :].flatten(1))
    assert worst(gradients(expected, model), truncated) < 1e-4
    full, _ = ReadingLoss(model, tiny.training(sparsity_weight=0.0))(batch)
    assert worst(gradients(full, model), truncated) > 1e-2, "truncation makes no difference here"


def test_sparsity_reaches_every_segment_whatever_is_truncated() -> None:
    model, batch = tiny.model(open_gates=True), random_batch()
    config = tiny.training(truncate_segments=1)
    with Embeddings(model) as seen:
        ReadingLoss(model, config)(batch)[0].backward()
    assert seen.reached(ROWS) == [True] * SEGMENTS


def test_an_untrained_memory_changes_nothing_in_the_window() -> None:
    _, metrics = ReadingLoss(tiny.model(), tiny.training())(random_batch(windows=WINDOWS))
    assert float(metrics["loss/in_window_kl_nats"]) == 0.0
    _, metrics = ReadingLoss(tiny.model(open_gates=True), tiny.training())(random_batch(windows=WINDOWS))
    assert float(metrics["loss/in_window_kl_nats"]) > 1e-3


def without_windows(batch: Batch) -> Batch:
    return batch._replace(in_window_ids=batch.in_window_ids[:0], in_window_answer=batch.in_window_answer[:0])


def without_filler(batch: Batch) -> Batch:
    return batch._replace(filler_ids=batch.filler_ids[:0])


def test_windows_see_what_the_sequences_wrote_and_do_not_train_it() -> None:
    """The memory is full of other facts while windows are read; KL may not make it write less of them."""
    model, batch = tiny.model(open_gates=True), random_batch(windows=WINDOWS)
    objective = ReadingLoss(model, tiny.training(sparsity_weight=0.0))
    found = []
    for each in (batch, without_windows(batch)):
        with Embeddings(model) as seen:
            objective(each)[0].backward()
        found.append([leaf.grad for leaf in seen.leaves[:2]])  # of the two passes over the sequences
    for with_windows, alone in zip(*found, strict=True):
        assert with_windows is not None and torch.equal(with_windows, alone)
    other = batch._replace(input_ids=batch.input_ids.flip(1))
    kl = [float(objective(each)[1]["loss/in_window_kl_nats"]) for each in (batch, other)]
    assert abs(kl[0] - kl[1]) > 1e-5


def test_a_batch_without_windows_has_no_kl() -> None:
    batch = without_windows(random_batch(windows=WINDOWS))
    _, metrics = ReadingLoss(tiny.model(open_gates=True), tiny.training())(batch)
    assert "loss/in_window_kl_nats" not in metrics


def test_answers_come_from_a_share_of_the_reading_and_windows_from_all_of_it() -> None:
    """As if the output gates were so much smaller, for the answers alone."""
    batch = random_batch(windows=WINDOWS)
    _, whole = ReadingLoss(tiny.model(open_gates=True), tiny.training(read_strength=1.0))(batch)
    _, share = ReadingLoss(tiny.model(open_gates=True), tiny.training(read_strength=0.25))(batch)
    smaller = tiny.model(open_gates=True)
    for sidecar in smaller.sidecars.values():
        sidecar.output_gate.data *= 0.25
    _, expected = ReadingLoss(smaller, tiny.training(read_strength=1.0))(batch)
    assert share["loss/answer_nats"].item() == pytest.approx(expected["loss/answer_nats"].item(), rel=1e-5)
    assert abs(share["loss/answer_nats"] - whole["loss/answer_nats"]) > 1e-3
    assert share["loss/in_window_kl_nats"].item() == pytest.approx(whole["loss/in_window_kl_nats"].item(), rel=1e-5)


def test_gates_that_filler_opens_wide_are_pushed_shut_from_any_dead_zone() -> None:
    """Also where the margin is wider than the dead zone, and the gate as open as float32 can tell."""
    for dead_zone, bias in itertools.product((0.0, 0.1, 0.5), (0.0, 9.0, 40.0)):
        memory = tiny.MEMORY.model_copy(update={"dead_zone": dead_zone, "controller": False})
        model, batch = tiny.model(memory), random_batch(fillers=ROWS)
        (sidecar,) = model.sidecars.values()
        torch.nn.init.constant_(sidecar.write_gate.bias, bias)
        _, metrics = ReadingLoss(model, tiny.training(sparsity_margin=0.4))(batch)
        assert 0.1 < float(metrics["loss/filler"]) < 7.0


def test_filler_trains_the_gates_and_nothing_else() -> None:
    model, config = tiny.model(open_gates=True), tiny.training()
    batch = random_batch(fillers=2 * ROWS)
    found = [gradients(ReadingLoss(model, config)(each)[0], model) for each in (batch, without_filler(batch))]
    changed = {name.split(".")[1] for name in found[0] if not torch.equal(found[0][name], found[1][name])}
    assert changed == {"write_gate", "controller"}


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_weights_scale_their_parts(weight: float) -> None:
    model, batch = tiny.model(open_gates=True), random_batch(windows=WINDOWS, fillers=ROWS)
    loss, metrics = ReadingLoss(model, tiny.training(kl_weight=weight, sparsity_weight=weight))(batch)
    others = weight * (metrics["loss/sparsity"] + metrics["loss/filler"] + metrics["loss/in_window_kl_nats"])
    assert loss.item() == pytest.approx((metrics["loss/answer_nats"] + others).item(), rel=1e-6)


def parts_of(batch: Batch, number: int) -> list[Batch]:
    """Equal shares of a batch, in order, as workers or accumulation steps get them."""
    chunks: list[Any] = [part.chunk(number) for part in batch]
    return [Batch(*part) for part in zip(*chunks, strict=True)]


@pytest.mark.parametrize(("number", "rows", "windows"), [(2, 8, 0), (4, 8, 0), (2, 8, 8), (2, 8, 4), (2, 4, 8)])
@pytest.mark.parametrize("fillers", [0, 3])
def test_the_loss_is_the_mean_over_equal_shares(number: int, rows: int, windows: int, fillers: int) -> None:
    """Or a run would learn something else on another number of workers."""
    config = tiny.training(batch_size=rows, in_window_batch_size=windows, filler_windows=fillers)
    (batch,) = tiny.batches(config).micro_batches(3, 0, 1)
    objective = ReadingLoss(tiny.model(open_gates=True), config)
    whole, _ = objective(batch)
    shares = torch.stack([objective(part)[0] for part in parts_of(batch, number)])
    assert shares.mean().item() == pytest.approx(whole.item(), abs=1e-5)


def digest(model: Cortex) -> str:
    """Every bit of the backbone: parameters and buffers."""
    sha = hashlib.sha256()
    for name, value in sorted(model.backbone.state_dict().items()):
        sha.update(name.encode() + value.numpy().tobytes())
    return sha.hexdigest()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_never_touches_the_backbone(checkpointing: bool) -> None:
    model = tiny.model(open_gates=True)
    if checkpointing:
        model.checkpoint_gradients()
    config = tiny.training(in_window_batch_size=4)
    before, sidecars = digest(model), tiny.weights(model.sidecars)
    tiny.train(tiny.learner(config, model), tiny.batches(config), 3)
    assert digest(model) == before
    assert all(p.grad is None and not p.requires_grad for p in model.backbone.parameters())
    changed = {name for name, p in model.sidecars.named_parameters() if not torch.equal(p, sidecars[name])}
    assert changed == sidecars.keys()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_below_the_memory_compute_once(checkpointing: bool) -> None:
    """No gradient goes through them, so nothing of theirs is needed again; the memory's own layer is computed again."""
    model = tiny.model(tiny.MEMORY.model_copy(update={"layers": (1,)}), open_gates=True)
    if checkpointing:
        model.checkpoint_gradients()
    calls = [0, 0]
    for number, layer in enumerate(decoder_layers(model.backbone)):
        layer.self_attn.register_forward_pre_hook(lambda *_, at=number: calls.__setitem__(at, calls[at] + 1))  # type: ignore[union-attr]
    config = tiny.training(in_window_batch_size=4)
    tiny.train(tiny.learner(config, model), tiny.batches(config), 1)
    assert calls[1] - calls[0] == (2 if checkpointing else 0)


@torch.no_grad()
def test_logits_at_wanted_positions_are_the_full_ones_there() -> None:
    model, batch = tiny.model(open_gates=True), random_batch()
    wanted = torch.rand(batch.answer.shape, generator=torch.Generator().manual_seed(3)) < 0.2
    full, _ = plain_reading(model, batch.input_ids)
    states, layout = model.empty_states(ROWS), Layout.plain(batch.input_ids, 0)
    some, _ = read_segments(model, batch.input_ids, layout, states, predict=wanted)
    assert some is not None
    assert torch.allclose(some, full[wanted.flatten(1)], atol=1e-6)
    again, _ = plain_reading(model, batch.input_ids)
    assert torch.equal(again, full), "the selection outlives its block"
