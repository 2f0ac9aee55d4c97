"""The Fisher diagonal against models whose Fisher matrix is known, and what the penalty holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor, nn

from cortex_core.config import FisherConfig
from cortex_core.consolidation.fisher import FisherDiagonal
from cortex_core.consolidation.per_example import (
    IGNORED,
    Example,
    module_logits,
    nll,
    sampled_labels,
    squared_gradients,
)
from cortex_core.errors import ConfigError, DataError, IncompatibleError

VMAP, LOOP = FisherConfig(chunk_examples=7), FisherConfig(chunk_examples=7, per_example="loop")
WEIGHTS = torch.tensor([0.7, -1.1, 0.0])


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def inputs(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, generator=seeded(seed)) * torch.tensor([1.0, 2.0, 0.5])


def gaussian(parameters: dict[str, Tensor], example: Example) -> Tensor:
    """−log p(y | x) of y = w·x + noise of variance 1, without its constant."""
    return 0.5 * (example["y"] - parameters["w"] @ example["x"]).square()


def logistic(parameters: dict[str, Tensor], example: Example) -> Tensor:
    """Logits of two classes that differ by w·x."""
    score = parameters["w"] @ example["x"]
    return torch.stack([torch.zeros_like(score), score])


def drawn(count: int, seed: int = 0) -> dict[str, Tensor]:
    """Examples of the Gaussian model itself."""
    x = inputs(count, seed)
    return {"x": x, "y": x @ WEIGHTS + torch.randn(count, generator=seeded(seed + 1))}


@pytest.mark.parametrize("config", [VMAP, LOOP], ids=["vmap", "loop"])
def test_each_example_has_its_own_gradient(config: FisherConfig) -> None:
    examples = drawn(20)
    sums, count = squared_gradients(gaussian, {"w": WEIGHTS}, examples, config)
    wrong = examples["y"] - examples["x"] @ WEIGHTS
    assert count == 20
    assert torch.allclose(sums["w"], (wrong[:, None] * examples["x"]).square().sum(0), rtol=1e-5)


@given(st.integers(1, 23))
def test_chunks_do_not_matter(chunk: int) -> None:
    whole, _ = squared_gradients(gaussian, {"w": WEIGHTS}, drawn(20), FisherConfig(chunk_examples=64))
    parts, _ = squared_gradients(gaussian, {"w": WEIGHTS}, drawn(20), FisherConfig(chunk_examples=chunk))
    assert torch.allclose(whole["w"], parts["w"], rtol=1e-5)


def observed(examples: dict[str, Tensor], **settings: object) -> FisherDiagonal:
    config = FisherConfig(chunk_examples=4096, **settings)  # type: ignore[arg-type]
    fisher = FisherDiagonal.empty({"w": WEIGHTS})
    return fisher.observe(gaussian, {"w": WEIGHTS}, examples, config).anchor({"w": WEIGHTS}, config)


def test_it_is_the_fisher_matrix_of_a_gaussian_model() -> None:
    """F = E[x²] / σ²; the squares have a deviation of sqrt(8) F around it (E[e⁴] E[x⁴] = 9)."""
    count = 40_000
    found = observed(drawn(count)).values["w"]
    expected = torch.tensor([1.0, 4.0, 0.25])
    assert torch.allclose(found, expected, rtol=5 * 8**0.5 / count**0.5)


def test_it_is_the_fisher_matrix_of_a_logistic_model() -> None:
    """F = E[p (1 − p) x²], with labels sampled from the model, whatever labels the examples came with."""
    x, config = inputs(40_000), FisherConfig(labels="sampled", chunk_examples=4096)
    p = torch.sigmoid(x @ WEIGHTS)
    each = (p * (1 - p))[:, None] * x.square()
    examples = {"x": x, "labels": torch.zeros(len(x), dtype=torch.long)}
    fisher = FisherDiagonal.empty({"w": WEIGHTS})
    fisher = fisher.observe_categorical(logistic, {"w": WEIGHTS}, examples, config, generator=seeded(3))
    found = fisher.anchor({"w": WEIGHTS}, config).values["w"]
    assert torch.allclose(found, each.mean(0), rtol=0.05)


def test_the_empirical_one_also_counts_how_wrong_the_model_is() -> None:
    """Given labels that the model finds unlikely: E[(y − p)² x²] is beyond E[p (1 − p) x²]. The choice is documented."""
    x = inputs(4000)
    p = torch.sigmoid(x @ WEIGHTS)
    unlikely = {"x": x, "labels": (p < 0.5).long()}
    found = {}
    for labels in ("given", "sampled"):
        config = FisherConfig(labels=labels, chunk_examples=4096)
        fisher = FisherDiagonal.empty({"w": WEIGHTS})
        fisher = fisher.observe_categorical(logistic, {"w": WEIGHTS}, unlikely, config, generator=seeded())
        found[labels] = fisher.anchor({"w": WEIGHTS}, config).values["w"]
    assert torch.allclose(
        found["given"], ((p > 0.5) * p + (p < 0.5) * (1 - p)).square() @ x.square() / len(x), rtol=1e-3
    )
    assert bool((found["given"] > 1.5 * found["sampled"]).all())


def test_squaring_the_mean_of_a_batch_is_low_by_the_size_of_the_batch() -> None:
    """Where the model is right on average the gradients of B examples cancel: E[(Σg/B)²] = F / B."""
    size, batches = 32, 1500
    examples = drawn(size * batches)
    gradients = -(examples["y"] - examples["x"] @ WEIGHTS)[:, None] * examples["x"]
    squared_mean = gradients.view(batches, size, 3).mean(1).square().mean(0)
    found = observed(examples).values["w"]
    assert torch.allclose(found, gradients.square().mean(0), rtol=1e-4)
    # The square of a normal variable has a deviation of sqrt(2) times its mean.
    assert torch.allclose(found / squared_mean, torch.full((3,), float(size)), rtol=5 * 2**0.5 / batches**0.5)


class Tagger(nn.Module):
    """Token ids to logits of 5 classes, with a frozen embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(ids).cumsum(1))))


def tagging() -> tuple[Tagger, dict[str, Tensor], dict[str, Tensor]]:
    module = Tagger()
    ids, labels = (torch.randint(limit, (11, 4), generator=seeded(limit)) for limit in (9, 5))
    labels[:, 0], labels[3] = IGNORED, IGNORED
    slow = {name: value for name, value in module.named_parameters() if not name.startswith("embed")}
    return module, slow, {"ids": ids, "labels": labels}


def test_a_module_at_once_and_one_by_one_and_as_autograd_has_it() -> None:
    module, slow, examples = tagging()
    loss = nll(module_logits(module, "ids"))
    found = [squared_gradients(loss, slow, examples, config)[0] for config in (VMAP, LOOP)]
    expected = {name: torch.zeros_like(value) for name, value in slow.items()}
    for ids, labels in zip(examples["ids"], examples["labels"], strict=True):
        module.zero_grad()
        nn.functional.cross_entropy(module(ids[None])[0], labels, ignore_index=IGNORED, reduction="sum").backward()
        for name, value in slow.items():
            if value.grad is not None:
                expected[name] += value.grad.square()
    for sums in found:
        assert sums.keys() == slow.keys()
        assert all(torch.allclose(sums[name], expected[name], rtol=1e-4, atol=1e-7) for name in slow)


def test_sampled_labels_follow_the_model_and_leave_out_what_was_left_out() -> None:
    module, slow, examples = tagging()
    logits = module_logits(module, "ids")
    many = {name: value[:1].expand(4000, -1) for name, value in examples.items()}
    drawn = sampled_labels(logits, slow, many, seeded())
    assert bool((drawn["labels"][:, 0] == IGNORED).all()) and torch.equal(drawn["ids"], many["ids"])
    shares = torch.stack([(drawn["labels"][:, 2] == k).float().mean() for k in range(5)])
    assert torch.allclose(shares, module(examples["ids"][:1])[0, 2].softmax(-1), atol=5 * 0.5 / 4000**0.5)
    again = sampled_labels(logits, slow, many, seeded())
    assert torch.equal(again["labels"], drawn["labels"])


def test_a_model_that_cannot_be_mapped_is_told_the_remedy() -> None:
    def branches(parameters: dict[str, Tensor], example: Example) -> Tensor:
        return gaussian(parameters, example) if example["y"] > 0 else 0 * parameters["w"].sum()

    with pytest.raises(IncompatibleError, match=r'cannot be mapped over examples .* set it to "loop"'):
        squared_gradients(branches, {"w": WEIGHTS}, drawn(4), VMAP)
    assert squared_gradients(branches, {"w": WEIGHTS}, drawn(4), LOOP)[1] == 4


def test_epochs_are_added_with_decay_and_each_is_a_mean_over_its_examples() -> None:
    config, parameters = FisherConfig(decay=0.25, chunk_examples=64), {"w": WEIGHTS}
    first, second, third = drawn(20, 1), drawn(30, 2), drawn(10, 3)

    def mean(*parts: dict[str, Tensor]) -> Tensor:
        sums = [squared_gradients(gaussian, parameters, part, config) for part in parts]
        return sum(s["w"] for s, _ in sums) / sum(count for _, count in sums)  # type: ignore[return-value]

    fisher = FisherDiagonal.empty(parameters).observe(gaussian, parameters, first, config)
    assert not bool(fisher.values["w"].any()) and fisher.num_examples == 20
    fisher = fisher.observe(gaussian, parameters, second, config).anchor(parameters, config)
    assert torch.allclose(fisher.values["w"], mean(first, second))
    fisher = fisher.observe(gaussian, parameters, third, config).anchor(parameters, config)
    assert torch.allclose(fisher.values["w"], 0.25 * mean(first, second) + mean(third))
    assert (fisher.num_epochs, fisher.num_examples) == (2, 0)
    assert fisher.trace == pytest.approx(float(fisher.values["w"].sum()), rel=1e-6)
    moved = fisher.anchor({"w": WEIGHTS + 1}, config)
    assert torch.equal(moved.values["w"], fisher.values["w"]) and moved.num_epochs == 2


@given(st.lists(st.floats(-2, 2), min_size=3, max_size=3), st.floats(0.01, 10))
def test_the_penalty_pulls_back_from_everywhere_but_the_anchor(step: list[float], weight: float) -> None:
    config = FisherConfig(weight=weight, damping=0.1)
    fisher = observed(drawn(50))
    here = (WEIGHTS + torch.tensor(step)).requires_grad_()
    penalty = fisher.penalty({"w": here}, config)
    penalty.backward()
    apart = here.detach() - WEIGHTS
    assert here.grad is not None
    assert torch.allclose(here.grad, weight * (fisher.values["w"] + 0.1) * apart, rtol=1e-4, atol=1e-6)
    assert torch.equal(here.grad == 0, apart == 0)
    assert float(penalty.detach()) == pytest.approx(0.5 * float(here.grad @ apart), rel=1e-4, abs=1e-6)


def test_an_anchor_before_every_step_bounds_nothing() -> None:
    """The source's way. Its gradient is 0 where it is asked for: the parameters go where they would without it."""
    config = FisherConfig(weight=1.0, damping=1.0)

    def after(every_step: bool, weight: float) -> float:
        fisher, here = observed(drawn(50)), WEIGHTS.clone().requires_grad_()
        settings = config.model_copy(update={"weight": weight})
        for _ in range(200):
            if every_step:
                fisher = fisher.anchor({"w": here}, settings)
            (slope,) = torch.autograd.grad(fisher.penalty({"w": here}, settings) + here.sum(), here)
            here = (here - 0.01 * slope).detach().requires_grad_()
        return float((here.detach() - WEIGHTS).norm())

    free = after(every_step=False, weight=0.0)
    assert after(every_step=True, weight=1.0) == pytest.approx(free)
    assert after(every_step=False, weight=1.0) < 0.5 * free


def test_a_snapshot_is_a_copy_and_changes_make_a_new_one() -> None:
    here = WEIGHTS.clone()
    fisher = FisherDiagonal.empty({"w": here})
    more = fisher.observe(gaussian, {"w": here}, drawn(5), VMAP)
    here += 1
    assert torch.equal(more.anchors["w"], WEIGHTS)
    assert not bool(fisher.sums["w"].any()) and bool(more.sums["w"].any())


def test_a_saved_one_goes_on(tmp_path: Path) -> None:
    config, parameters = FisherConfig(), {"w": WEIGHTS}
    fisher = observed(drawn(50)).observe(gaussian, parameters, drawn(20, 5), config)
    fisher.save(tmp_path / "fisher.safetensors")
    again = FisherDiagonal.empty(parameters).load(tmp_path / "fisher.safetensors")
    assert again.num_examples == 20 and again.num_epochs == 1
    one, other = (f.anchor({"w": WEIGHTS * 2}, config) for f in (fisher, again))
    assert all(torch.equal(part, other.state()[0][name]) for name, part in one.state()[0].items())
    with pytest.raises(IncompatibleError, match="made for other parameters"):
        FisherDiagonal.empty({"v": WEIGHTS}).load(tmp_path / "fisher.safetensors")
    whole = (tmp_path / "fisher.safetensors").read_bytes()
    (tmp_path / "fisher.safetensors").write_bytes(whole[:-1])
    with pytest.raises(DataError, match="not a whole safetensors file"):
        FisherDiagonal.empty(parameters).load(tmp_path / "fisher.safetensors")


@pytest.mark.parametrize(
    ("tensors", "counters", "message"),
    [
        ({"values.w": -WEIGHTS.abs()}, {}, "negative"),
        ({"anchors.w": WEIGHTS * float("nan")}, {}, "not finite"),
        ({"other.w": WEIGHTS}, {}, r"other\.w is no part of it"),
        ({}, {"num_epochs": "1"}, r"counters \[0, '1'\]"),
        ({}, {"num_examples": -1}, r"counters \[-1, 0\]"),
    ],
)
def test_a_damaged_state_is_refused(tensors: dict, counters: dict, message: str) -> None:
    fisher = FisherDiagonal.empty({"w": WEIGHTS})
    good_tensors, good_counters = fisher.state()
    with pytest.raises(DataError, match=message):
        fisher.restored(good_tensors | tensors, good_counters | counters)


def test_wrong_examples_and_parameters() -> None:
    fisher = FisherDiagonal.empty({"w": WEIGHTS})
    with pytest.raises(DataError, match=r"examples have \{'x': 0, 'y': 0\} rows"):
        fisher.observe(gaussian, {"w": WEIGHTS}, {name: part[:0] for name, part in drawn(3).items()}, VMAP)
    with pytest.raises(DataError, match="as many of each"):
        fisher.observe(gaussian, {"w": WEIGHTS}, drawn(3) | {"x": inputs(4)}, VMAP)
    with pytest.raises(DataError, match="squared gradient of w is not finite"):
        fisher.observe(gaussian, {"w": WEIGHTS}, drawn(3) | {"y": torch.full((3,), float("inf"))}, VMAP)
    with pytest.raises(IncompatibleError, match=r"parameter w \[2\]"):
        fisher.penalty({"w": WEIGHTS[:2]}, VMAP)
    with pytest.raises(ConfigError, match="there are none to hold"):
        FisherDiagonal.empty({})
    with pytest.raises(ConfigError, match="give a seeded generator"):
        fisher.observe_categorical(logistic, {"w": WEIGHTS}, drawn(3), FisherConfig(labels="sampled"))
