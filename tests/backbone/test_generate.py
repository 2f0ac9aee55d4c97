"""Generation: Hugging Face's own loop, the memory carried along, segments rolled over."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cortex_core.errors import ConfigError
from tests.backbone.families import KINDS, ROTARY, SEGMENT, random_ids, with_memory

GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.mark.parametrize(("family", "settings"), KINDS)
@torch.no_grad()
def test_every_token_is_what_a_full_pass_predicts(family: str, settings: dict[str, Any]) -> None:
    """50 tokens of prompt and 40 more: over several segments, token by token equal to reading the result at once."""
    model, prompt = with_memory(family, **settings), random_ids(2, 50)
    session = model.new_session(2)
    out = model.generate(input_ids=prompt, session=session, max_new_tokens=40, **GREEDY)
    assert out.shape == (2, 90)
    assert torch.equal(out[:, :50], prompt)
    predicted = model(input_ids=out).logits.argmax(-1)
    assert torch.equal(predicted[:, 49:-1], out[:, 50:])
    assert session.num_tokens.tolist() == [90, 90]


@pytest.mark.parametrize("family", ROTARY)
@torch.no_grad()
def test_rows_of_unequal_length_are_generated_as_if_alone(family: str) -> None:
    model, ids = with_memory(family), random_ids(3, 50)
    lengths = [50, 31, 7]
    mask = torch.stack([(torch.arange(50) >= 50 - n).long() for n in lengths])
    out = model.generate(input_ids=ids * mask, attention_mask=mask, max_new_tokens=36, **GREEDY)
    for row, n in enumerate(lengths):
        alone = model.generate(input_ids=ids[row : row + 1, 50 - n :], max_new_tokens=36, **GREEDY)
        assert torch.equal(out[row, 50:], alone[0, n:])


@torch.no_grad()
def test_generation_goes_on_from_a_session() -> None:
    model, ids = with_memory(), random_ids(1, 70)
    session = model.new_session()
    model.read(ids[:, :60], session)
    first = model.generate(input_ids=ids[:, 60:], session=session, max_new_tokens=5, **GREEDY)
    second = model.generate(input_ids=first[:, :0], session=session, max_new_tokens=6, **GREEDY)
    at_once = model.generate(input_ids=ids, max_new_tokens=11, **GREEDY)
    assert torch.equal(torch.cat([first[:, 10:], second], dim=1), at_once[:, 70:])


@torch.no_grad()
def test_rows_stop_at_their_own_end() -> None:
    model, ids = with_memory(), random_ids(4, 20)
    free = model.generate(input_ids=ids, max_new_tokens=50, **GREEDY)[:, 20:]
    stop = int(free[0, 3])
    session = model.new_session(4)
    out = model.generate(
        input_ids=ids, session=session, max_new_tokens=50, do_sample=False, pad_token_id=0, eos_token_id=stop
    )[:, 20:]
    for row in range(4):
        ends = (free[row] == stop).nonzero()
        length = int(ends[0]) + 1 if len(ends) else 50
        assert torch.equal(out[row, :length], free[row, :length])
        assert (out[row, length:] == 0).all()
        assert int(session.num_tokens[row]) == 20 + length


@torch.no_grad()
def test_sampling_is_repeatable_and_max_length_counts_the_prompt() -> None:
    model, ids = with_memory(), random_ids(1, 30)
    outs = []
    for _ in range(2):
        torch.manual_seed(3)
        outs.append(
            model.generate(input_ids=ids, max_length=80, do_sample=True, top_k=20, pad_token_id=0, eos_token_id=None)
        )
    assert outs[0].shape == (1, 80)
    assert torch.equal(*outs)


@torch.no_grad()
def test_segment_boundary_lengths() -> None:
    for length in (SEGMENT - 1, SEGMENT, SEGMENT + 1):
        model, ids = with_memory(), random_ids(1, length)
        out = model.generate(input_ids=ids, max_new_tokens=3, **GREEDY)
        assert torch.equal(model(input_ids=out).logits.argmax(-1)[:, length - 1 : -1], out[:, length:])


@pytest.mark.parametrize("fewest", [5, 20])
@torch.no_grad()
def test_the_least_length_counts_over_all_segments(fewest: int) -> None:
    """The end-of-sequence token is the first choice at the start of the second segment, 13 tokens on."""
    model, ids = with_memory(), random_ids(1, 20)
    stop = int(model.generate(input_ids=ids, max_new_tokens=14, **GREEDY)[0, -1])
    expected = ids
    while expected.shape[1] < 60:
        logits = model(input_ids=expected).logits[:, -1]
        if expected.shape[1] < 20 + fewest:
            logits[:, stop] = -torch.inf
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
        if int(expected[0, -1]) == stop:
            break
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "eos_token_id": stop}
    assert torch.equal(model.generate(input_ids=ids, min_new_tokens=fewest, **options), expected)
    assert torch.equal(model.generate(input_ids=ids, min_length=20 + fewest, **options), expected)


def test_a_length_that_leaves_nothing_to_make_is_named() -> None:
    with pytest.raises(ConfigError, match="max_length = 50: ask for more than the 100 tokens"):
        with_memory().generate(input_ids=random_ids(1, 100), max_length=50)


@pytest.mark.parametrize(("option", "value"), [("num_beams", 2), ("num_return_sequences", 2), ("max_new_tokens", 0)])
def test_options_that_cannot_work_are_refused(option: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{option} = {value}"):
        with_memory().generate(input_ids=random_ids(1, 5), **{option: value})


def test_nothing_to_go_on_from() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        with_memory().generate(input_ids=random_ids(1, 0), max_new_tokens=2)
