"""Dreams of a small model: a ticket's dream is its own, and the model said what it is said to have said."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from cortex_core.backbone.model import Cortex
from cortex_core.config import DreamConfig, ScenarioConfig
from cortex_core.dreaming.decode import decode
from cortex_core.dreaming.dream import Dream, Dreamer
from cortex_core.dreaming.graph import MemoryGraph
from cortex_core.dreaming.memories import Memory
from cortex_core.errors import ConfigError, DataError
from tests import tiny
from tests.dreaming.scenes import memories, memory

CONFIG = DreamConfig(scenario=ScenarioConfig(max_lines=2, max_filler_tokens=12, temperature=1.0, top_p=1.0))
GRAPH = MemoryGraph.of([*memories(7), memory(7, answer=(301, 302))])
TICKETS = (0, 1, 2, 3, 41, 5, 66)


@pytest.fixture(scope="module")
def model() -> Cortex:
    return tiny.model(open_gates=True)


def dreams(model: Cortex, tickets: Sequence[int] = TICKETS, config: DreamConfig = CONFIG) -> list[Dream]:
    return Dreamer(model, GRAPH, config, model_version="v3").dream(tickets)


def without_eos(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities among all other tokens."""
    logits = logits.clone()
    logits[list(tiny.vocabulary().separator)] = -torch.inf
    return logits.log_softmax(-1)


def close(one: Sequence[float], other: Sequence[float]) -> bool:
    return list(one) == pytest.approx(list(other), abs=1e-4)


def test_a_ticket_gives_the_same_dream_in_any_company(model: Cortex) -> None:
    together = dreams(model)
    two = DreamConfig(scenario=CONFIG.scenario.model_copy(update={"batch_size": 2}))
    for found, alone, batched in zip(together, (dreams(model, [t])[0] for t in TICKETS), dreams(model, config=two), strict=True):  # fmt: skip
        for other in (alone, batched):
            assert (found.prompt, found.answer.tokens, found.lines) == (other.prompt, other.answer.tokens, other.lines)
            assert close(found.filler.nats, other.filler.nats) and close(found.answer.nats, other.answer.nats)
            assert close(found.answer.margins, other.answer.margins)
    assert [found.ticket for found in together] == list(TICKETS)
    assert len({found.prompt for found in together}) == len(TICKETS)


def test_a_dream_says_where_it_came_from(model: Cortex) -> None:
    for found in dreams(model):
        assert pickle.loads(pickle.dumps(found)) == found
        by_id = {m.id: m for m in GRAPH.memories}
        assert found.id == f"v3/0/{found.ticket}" and found.question == by_id[found.asked].cue
        assert {found.asked, *found.lines} <= set(found.walk) and found.asked not in found.lines
        assert found.memories == (found.asked, *found.lines)
        assert found.prompt[-2:] == found.question
        assert len(found.prompt) == len(found.filler.tokens) + 2 + 4 * len(found.lines)
        assert len(found.answer.tokens) == len(by_id[found.asked].answer)


@torch.no_grad()
def test_the_answer_is_what_the_model_says_next(model: Cortex) -> None:
    """Greedy, with nothing in fast weights."""
    for found in dreams(model, range(12)):
        said = list(found.prompt)
        for token, nats, margin in zip(*found.answer, strict=True):
            logits = model(input_ids=torch.tensor([said])).logits
            assert logits is not None
            best = without_eos(logits[0, -1]).topk(2)
            assert token == int(best.indices[0])
            assert close([nats, margin], [float(best.values[0]), float(best.values[0] - best.values[1])])
            said.append(token)


@torch.no_grad()
def test_a_session_is_what_the_dreamer_knows(model: Cortex) -> None:
    session = model.new_session()
    model.read(torch.randint(0, 200, (1, 70), generator=torch.Generator().manual_seed(4)), session)
    before = session.num_tokens.tolist(), {n: s.up.clone() for n, s in session.states.items()}
    found = Dreamer(model, GRAPH, CONFIG, model_version="v3", session=session).dream([3])[0]
    logits = model(input_ids=torch.tensor([found.prompt]), session=session.fork()).logits
    assert logits is not None
    best = without_eos(logits[0, -1]).max(-1)
    assert found.answer.tokens[0] == int(best.indices) and close(found.answer.nats[:1], [float(best.values)])
    assert not close(found.answer.nats, dreams(model, [3])[0].answer.nats)
    assert session.num_tokens.tolist() == before[0]
    assert all(torch.equal(session.states[n].up, up) for n, up in before[1].items())


def test_a_prompt_may_be_longer_than_a_segment(model: Cortex) -> None:
    long = DreamConfig(scenario=ScenarioConfig(max_lines=0, max_filler_tokens=90))
    found = max(dreams(model, range(8), long), key=lambda dream: len(dream.prompt))
    assert len(found.prompt) > 2 * tiny.SEGMENT
    assert Dreamer(model, GRAPH, long, model_version="v3").dream([found.ticket])[0].prompt == found.prompt


def test_an_answer_nobody_knows_has_the_length_of_the_settings(model: Cortex) -> None:
    graph = MemoryGraph.of([memory(0, answer=())])
    config = DreamConfig(scenario=ScenarioConfig(answer_tokens=3, max_filler_tokens=0))
    found = Dreamer(model, graph, config, model_version="v3").dream([0, 1])
    assert [len(dream.answer.tokens) for dream in found] == [3, 3] and found[0].filler.tokens == ()


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ([], DataError, "there is nothing to dream of"),
        ([memory(0, answer=(9999,))], DataError, "belongs to another tokenizer"),
    ],
)
def test_graphs_without_sense_are_refused(model: Cortex, wrong: list[Memory], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Dreamer(model, MemoryGraph.of(wrong), model_version="v3")


def test_sessions_of_several_rows_and_tickets_below_0_are_refused(model: Cortex) -> None:
    with pytest.raises(ConfigError, match="session has 2 rows"):
        Dreamer(model, GRAPH, model_version="v3", session=model.new_session(2))
    with pytest.raises(ConfigError, match="tickets count from 0"):
        dreams(model, [1, -1])
    assert dreams(model, []) == []


# --- decoding --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_samples_have_the_probabilities_of_the_model(model: Cortex) -> None:
    """Evenly spaced draws give each token as often as it is likely, sharpened by the temperature, among the likeliest."""
    size, prompt, temperature, top_p = 2000, (1, 2, 3), 0.7, 0.6
    draws = ((np.arange(size) + 0.5) / size)[:, None]
    found = decode(model, [prompt] * size, 1, draws=draws, temperature=temperature, top_p=top_p)
    logits = model(input_ids=torch.tensor([prompt])).logits
    assert logits is not None
    chances = (without_eos(logits[0, -1]) / temperature).softmax(-1)
    order = chances.argsort(descending=True)
    inside = order[: int((chances[order].cumsum(0) < top_p).sum()) + 1]
    expected = torch.zeros_like(chances)
    expected[inside] = chances[inside] / chances[inside].sum()
    counts = torch.bincount(torch.tensor([d.tokens[0] for d in found]), minlength=len(chances)) / size
    assert (counts - expected).abs().max() < 2 / size


def test_the_first_draws_of_a_row_decide_its_first_tokens(model: Cortex) -> None:
    draws = np.random.default_rng(0).random((2, 9))
    long, short = decode(model, [(1, 2), (3,)], 9, draws=draws), decode(model, [(1, 2), (3,)], 4, draws=draws[:, :4])
    assert [found.first(4).tokens for found in long] == [found.tokens for found in short]
    assert any(nats < 0 for found in long for nats in found.margins), "what is sampled need not be the likeliest"


def test_nothing_is_decoded_from_nothing(model: Cortex) -> None:
    assert decode(model, [], 3) == []
    assert decode(model, [(1,)], 0)[0].tokens == ()
