"""Asking a model: the memory reads everything, the bare model sees the end, and both go on from the same tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from cortex_core.backbone.model import Cortex
from cortex_core.errors import ConfigError
from cortex_core.eval.benchmarks import ask as module
from cortex_core.eval.benchmarks.ask import Answers, Limits, ask, limits
from cortex_core.eval.benchmarks.example import Example, Task
from tests import restless, tiny

TASK = Task("\n{question}", 6, ("f1",), "read ")


def example(*context: str, question: str = "bana") -> Example:
    return Example("k", "k", "x", "4k", context, question, ("a",))


def long_context(words: int = 300) -> str:
    return " ".join(np.random.default_rng(0).choice(tiny.NOUNS, words))


@pytest.fixture(scope="module")
def model() -> Cortex:
    return restless.model()


def asked(model: Cortex, one: Example, task: Task = TASK, tokenizer: Any = None, **more: Any) -> Answers:
    return ask(model, tokenizer or tiny.vocabulary().tokenizer, one, task, limits(model, None), **more)


def tokens(text: str) -> torch.Tensor:
    return tiny.vocabulary().tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids


def test_the_memory_has_read_everything_in_one_pass(model: Cortex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "READ_TOKENS", 50)
    text = long_context()
    found = asked(model, example(text))
    ids = torch.cat([tokens("read " + text), tokens("\nbana")], dim=1)
    session = model.new_session()
    out = model.generate(ids, session=session, max_new_tokens=6, do_sample=False)
    assert found.memory == tiny.vocabulary().tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert found.prompt_tokens == ids.shape[1] > 250
    assert found.memory != found.bare != "", "or this test could not fail"


def test_the_bare_model_sees_the_last_window_and_nothing_else(model: Cortex) -> None:
    text = long_context()
    found, other = asked(model, example(text)), asked(model, example("konas " * 40 + text))
    ids = tokens("\nbana")
    seen = torch.cat([tokens("read " + text), ids], dim=1)[:, -tiny.SEGMENT :]
    with model.memory(False):
        out = model.generate(seen, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(seen))
    assert found.bare == tiny.vocabulary().tokenizer.decode(out[0, seen.shape[1] :], skip_special_tokens=True)
    assert (found.bare_tokens, other.bare_tokens) == (tiny.SEGMENT, tiny.SEGMENT)
    assert other.bare == found.bare and other.prompt_tokens > found.prompt_tokens
    assert other.memory != found.memory, "what stands before the window matters to the memory"


def test_a_prompt_that_fits_is_the_same_for_an_untrained_memory() -> None:
    found = asked(tiny.model(), example("bana kore"))
    assert found.memory == found.bare and found.bare_tokens == found.prompt_tokens < tiny.SEGMENT


def test_sessions_are_read_one_after_another(model: Cortex) -> None:
    text = long_context(100)
    half = text.index(" ", len(text) // 2)
    assert asked(model, example(text[:half], text[half:])) == asked(model, example(text))


def test_long_texts_are_tokenized_in_pieces_of_whole_words(model: Cortex, monkeypatch: pytest.MonkeyPatch) -> None:
    text = long_context(100)
    whole = asked(model, example(text))
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 20)
    pieces = list(module._pieces(text))
    assert "".join(pieces) == text and max(map(len, pieces)) <= 20 and all(p.startswith(" ") for p in pieces[1:])
    assert asked(model, example(text)) == whole
    assert list(module._pieces("x" * 45)) == ["x" * 20, "x" * 20, "x" * 5], "a text without spaces is cut anywhere"
    assert list(module._pieces("")) == [""]


def test_a_question_may_be_empty_as_in_code_to_complete(model: Cortex) -> None:
    task = dataclasses.replace(TASK, after="{question}")
    text = long_context(50)
    found = asked(model, example(text, question=""), task)
    ids = tokens("read " + text)
    out = model.generate(ids, session=model.new_session(), max_new_tokens=6, do_sample=False)
    assert found.memory == tiny.vocabulary().tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_answers_of_one_example_do_not_leak_into_the_next(model: Cortex) -> None:
    first = asked(model, example(long_context(100)))
    asked(model, example("konas " * 50))
    assert asked(model, example(long_context(100))) == first


class WithBeginning:
    """A tokenizer that begins each text with a token, as Llama's and Gemma's do."""

    def __init__(self) -> None:
        self.inner, self.bos_token_id = tiny.vocabulary().tokenizer, 3

    def __call__(self, text: str, add_special_tokens: bool = True, **options: Any) -> Any:
        out = self.inner(text, add_special_tokens=False, **options)
        if add_special_tokens:
            out["input_ids"] = [self.bos_token_id, *out["input_ids"]]
        return out

    def decode(self, *arguments: Any, **options: Any) -> str:
        return self.inner.decode(*arguments, **options)


def test_a_context_is_streamed(model: Cortex, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text is tokenized once all before it, but for the last block, has been read; a block is all that is held."""
    monkeypatch.setattr(module, "READ_TOKENS", 10)
    read, before, real = [], [], Cortex.read
    monkeypatch.setattr(
        Cortex, "read", lambda self, ids, *a, **o: read.append(ids.shape[1]) or real(self, ids, *a, **o)
    )

    class Noting(WithBeginning):
        def __call__(self, text: str, add_special_tokens: bool = True, **options: Any) -> Any:
            before.append(sum(read))
            return super().__call__(text, add_special_tokens, **options)

    texts = [long_context(30)] * 8
    found = asked(model, example(*texts), tokenizer=Noting())
    each, told = tokens(texts[0]).shape[1], before[-8:]
    assert max(read) == 10 and sum(read) > found.prompt_tokens - 20 > 7 * each > 200
    assert all(number * each - 10 <= at <= 2 + number * each for number, at in enumerate(told)), told


def test_progress_goes_up_to_one(model: Cortex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "READ_TOKENS", 64)
    told: list[float] = []
    asked(model, example(long_context()), on_progress=told.append)
    assert len(told) > 3 and told == sorted(told) and told[-1] == 1


def test_a_token_that_begins_a_text_begins_both_prompts(model: Cortex, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = []
    real = Cortex.generate
    monkeypatch.setattr(
        Cortex, "generate", lambda self, ids, **o: prompts.append((self._memory_on, ids)) or real(self, ids, **o)
    )
    read: list[torch.Tensor] = []
    real_read = Cortex.read
    monkeypatch.setattr(Cortex, "read", lambda self, ids, *a, **o: read.append(ids) or real_read(self, ids, *a, **o))
    found = asked(model, example(long_context()), tokenizer=WithBeginning())
    assert int(read[0][0, 0]) == 3 and not bool((read[0][0, 1:] == 3).any())
    (bare,) = (ids for on, ids in prompts if not on)
    assert int(bare[0, 0]) == 3 and bare.shape[1] == found.bare_tokens == tiny.SEGMENT


def test_a_window_is_a_segment_unless_the_backbone_can_see_more(model: Cortex) -> None:
    assert limits(model, None) == Limits(tiny.SEGMENT, tiny.WINDOW)
    assert limits(model, tiny.WINDOW).window == tiny.WINDOW
    found = ask(model, tiny.vocabulary().tokenizer, example(long_context()), TASK, limits(model, tiny.WINDOW))
    assert found.bare_tokens == tiny.WINDOW - TASK.max_new_tokens, "the answer needs room, too"
    for window in (1, tiny.WINDOW + 1):
        with pytest.raises(ConfigError, match=rf"--window {window}: must be at least 2 and at most 64"):
            limits(model, window)


def test_an_answer_is_at_most_half_of_what_the_backbone_sees(model: Cortex) -> None:
    assert Limits(32, 64).new_tokens(dataclasses.replace(TASK, max_new_tokens=512)) == 32
    assert Limits(32, 64).new_tokens(TASK) == 6
    found = asked(model, example(long_context()), dataclasses.replace(TASK, max_new_tokens=512))
    assert found.bare_tokens == 32 and found.memory


def test_a_trained_memory_knows_what_the_bare_model_has_not_seen() -> None:
    """Facts at the start of a context of eight windows, put as text: the memory answers, the bare model cannot."""
    model, task, tokenizer = tiny.trained(), tiny.task(), tiny.vocabulary().tokenizer
    right = {"memory": 0, "bare": 0}
    for index in range(20):
        told = task.example(index, 8 * tiny.SEGMENT)
        at = len(told.tokens) - task.query_tokens(index)
        (answer,) = np.flatnonzero(told.answer[at:])[:1]
        text, question = (tokenizer.decode(part) for part in (told.tokens[:at], told.tokens[at : at + answer]))
        truth = tokenizer.decode(told.tokens[at + answer : at + answer + 1]).strip()
        one = Example("k", "k", "x", "4k", (text,), question, (truth,))
        found = ask(model, tokenizer, one, Task("{question}", 1, ("contains",)), limits(model, None))
        right["memory"] += found.memory.strip() == truth
        right["bare"] += found.bare.strip() == truth
    assert right["memory"] >= 12 and right["bare"] <= 4, right
