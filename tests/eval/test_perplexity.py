"""Drift: the bare loss is Hugging Face's own, the other one is a plain reading, and the ratio says what it claims."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cortex_core.backbone.model import Cortex
from cortex_core.eval.perplexity import TextLoss, drift, text_loss
from tests import tiny
from tests.tiny import SEGMENT


def held_out(rows: int, tokens: int, seed: int = 0) -> Tensor:
    corpus = tiny.corpus()
    return torch.stack([torch.from_numpy(corpus.excerpt((seed, row), tokens, "held_out")) for row in range(rows)])


@torch.no_grad()
def read_alone(model: Cortex, before: Tensor, text: Tensor) -> float:
    """Loss of one row, read in one call after `before`, a whole number of segments."""
    ids = torch.cat([before, text])[None]
    logits = model(input_ids=ids).logits
    assert logits is not None
    losses = [
        functional.cross_entropy(logits[0, at - 1], ids[0, at]).item()
        for at in range(len(before), ids.shape[1])
        if at % SEGMENT  # the first token of a segment is not scored
    ]
    assert len(losses) == len(text) // SEGMENT * (SEGMENT - 1)
    return sum(losses) / len(losses)


@torch.no_grad()
def test_the_bare_loss_is_that_of_hugging_face() -> None:
    model, text = tiny.model(open_gates=True), held_out(3, 4 * SEGMENT)
    with model.memory(False):
        expected = [
            sum(model.backbone(input_ids=ids[None], labels=ids[None]).loss.item() for ids in row.view(4, SEGMENT)) / 4
            for row in text
        ]
    assert text_loss(model, text).bare.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("context", [0, SEGMENT, 3 * SEGMENT])
def test_with_memory_it_is_a_plain_reading(context: int) -> None:
    model, text, before = tiny.model(open_gates=True), held_out(3, 4 * SEGMENT), held_out(3, context, seed=1)
    losses = text_loss(model, text, before)
    expected = [read_alone(model, *row) for row in zip(before, text, strict=True)]
    assert losses.with_memory.tolist() == pytest.approx(expected, abs=1e-5)
    assert losses.with_memory.dtype == losses.bare.dtype == torch.float64
    assert (losses.with_memory - losses.bare).abs().max() > 1e-3, "the memory does nothing here"


def test_what_was_read_before_matters_to_the_memory_alone() -> None:
    model, text = tiny.model(open_gates=True), held_out(2, 2 * SEGMENT)
    one, other = (text_loss(model, text, held_out(2, 17, seed=seed)) for seed in (1, 2))
    assert torch.equal(one.bare, other.bare)
    assert (one.with_memory - other.with_memory).abs().min() > 1e-6


def test_a_context_of_any_length_ends_where_the_text_begins() -> None:
    """Both models score the same segments, whatever the context; the part of a segment that is left is dropped."""
    model, text = tiny.model(), held_out(2, 3 * SEGMENT + 11)
    expected = text_loss(model, text[:, : 3 * SEGMENT])
    for context in (0, 1, 17, SEGMENT, SEGMENT + 5):
        losses = text_loss(model, text, held_out(2, context, seed=1))
        assert torch.equal(losses.bare, expected.bare)
        assert torch.allclose(losses.with_memory, expected.bare, atol=1e-6)


def test_an_untrained_memory_costs_nothing() -> None:
    losses = text_loss(tiny.model(), held_out(3, 4 * SEGMENT), held_out(3, 20, seed=1))
    numbers = drift(losses, bytes_per_token=4.0)
    assert numbers["ratio"] == pytest.approx(1.0, abs=1e-6)
    assert numbers["low"] == pytest.approx(1.0, abs=1e-6) and numbers["high"] == pytest.approx(1.0, abs=1e-6)
    assert numbers["perplexity_on"] == pytest.approx(numbers["perplexity_off"], rel=1e-6)


def test_drift_is_a_paired_comparison() -> None:
    """Rows differ a lot from each other, memory changes each by about a hundredth: the interval is of the change."""
    bare = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    change = torch.tensor([0.01, 0.02, 0.01, 0.02], dtype=torch.float64)
    numbers = drift(TextLoss(bare + change, bare), bytes_per_token=3.0)
    half = 3.182446 * change.std().item() / math.sqrt(4)  # Student's t with 3 degrees of freedom
    assert numbers["perplexity_on"] == pytest.approx(math.exp(2.515))
    assert numbers["perplexity_off"] == pytest.approx(math.exp(2.5))
    assert numbers["ratio"] == pytest.approx(math.exp(0.015))
    assert (numbers["low"], numbers["high"]) == pytest.approx((math.exp(0.015 - half), math.exp(0.015 + half)))
    assert numbers["low"] > 1.0
    assert numbers["bits_per_byte_off"] == pytest.approx(2.5 / math.log(2) / 3)
    assert numbers["bits_per_byte_on"] == pytest.approx(2.515 / math.log(2) / 3)


def test_one_row_has_no_interval() -> None:
    numbers = drift(TextLoss(torch.tensor([1.1]).double(), torch.tensor([1.0]).double()), bytes_per_token=1.0)
    assert numbers["ratio"] == pytest.approx(math.exp(0.1), rel=1e-6)
    assert math.isnan(numbers["low"]) and math.isnan(numbers["high"])
