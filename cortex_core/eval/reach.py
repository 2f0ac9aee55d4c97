"""Reach: how often a fact is recalled, by the number of tokens since it was read. Memory on and off, same examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cortex_core.backbone.attention import only_at
from cortex_core.backbone.model import Cortex
from cortex_core.tasks.layout import TextTask

READ_TOKENS = 4096
"""Tokens of each row per call: a long gap is streamed, or the copies of its tokens would add up."""


class Hits(NamedTuple):
    """Exact-match results of some examples at one gap."""

    gap_tokens: int
    indices: tuple[int, ...]
    with_memory: tuple[bool, ...]
    bare: tuple[bool, ...]
    """Empty where only the memory was asked."""
    loss_nats: tuple[float, ...]
    """With memory: negative log-likelihood of the answer, mean over its tokens."""


class _Example(NamedTuple):
    """One example at its longest gap, of which the filler of a shorter one is the start."""

    tokens: np.ndarray
    answer: np.ndarray
    first_query: int
    """Position of the first question."""


@torch.no_grad()
def recall(
    model: Cortex,
    task: TextTask,
    gaps_tokens: Sequence[int],
    indices: Sequence[int],
    on_progress: Callable[[int], None] = lambda tokens: None,
    *,
    bare: bool = True,
) -> Iterator[Hits]:
    """Ask each example's question after each gap.

    The memory reads facts and filler once, up to the longest gap; at each gap a fork of the session is asked. Scattered
    facts lie elsewhere in each gap: a session of its own reads it from the start. With `bare`, the bare
    model is asked as well: it sees the last window before the answer. `on_progress` is told the tokens read.
    """
    gaps = sorted(set(gaps_tokens))
    for run in [[gap] for gap in gaps] if task.scattered else [gaps]:
        yield from _recall(model, task, run, indices, on_progress, bare)


def _recall(
    model: Cortex,
    task: TextTask,
    gaps: list[int],
    indices: Sequence[int],
    on_progress: Callable[[int], None],
    bare: bool,
) -> Iterator[Hits]:
    """Results at gaps of which each, ascending, begins as the longest one does. Nothing is read twice."""
    longest = [_example(task, index, gaps[-1]) for index in indices]
    session = model.new_session(len(indices))
    read_to = [0] * len(indices)
    for gap in gaps:
        stops = [example.first_query - gaps[-1] + gap for example in longest]
        pieces = [e.tokens[start:stop] for e, start, stop in zip(longest, read_to, stops, strict=True)]
        for start in range(0, max(map(len, pieces)), READ_TOKENS):
            ids, mask = padded([piece[start : start + READ_TOKENS] for piece in pieces], model.backbone.device)
            model.read(ids, session, attention_mask=mask)
        read_to = stops
        on_progress(sum(map(len, pieces)))
        questions = [(e.tokens[e.first_query :], e.answer[e.first_query :]) for e in longest]
        answers = ask(model, session.fork(), questions)
        with_memory, losses = (tuple(part) for part in zip(*answers, strict=True))
        texts = [
            np.concatenate([e.tokens[max(0, stop - model.segment_tokens) : stop], tokens])
            for e, stop, (tokens, _) in zip(longest, stops, questions, strict=True)
        ]
        without = tuple(_bare(model, texts, questions)) if bare else ()
        yield Hits(gap, tuple(indices), with_memory, without, losses)


def _example(task: TextTask, index: int, gap_tokens: int) -> _Example:
    example = task.example(index, gap_tokens)
    return _Example(example.tokens, example.answer, len(example.tokens) - task.query_tokens(index))


def padded(rows: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ragged rows to ids and mask [rows, widest], padding on the right."""
    widest = max(map(len, rows))
    ids, mask = np.zeros((len(rows), widest), np.int64), np.zeros((len(rows), widest), np.int64)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


class Answer(NamedTuple):
    """What came of one question."""

    right: bool
    loss_nats: float


@torch.no_grad()
def ask(model: Cortex, session, questions) -> list[Answer]:  # noqa: ANN001
    """Ask each row's question (tokens [T], answer mask [T]); advances the session."""
    ids, mask = padded([tokens for tokens, _ in questions], model.backbone.device)
    logits = model(input_ids=ids, attention_mask=mask, session=session).logits
    predicted, answers = logits.argmax(-1).cpu().numpy(), list[Answer]()
    for row, (tokens, answer) in enumerate(questions):
        asked = torch.from_numpy(np.flatnonzero(answer))
        expected = torch.from_numpy(tokens)[asked].to(logits.device)
        loss = functional.cross_entropy(logits[row, asked - 1].float(), expected)
        answers.append(Answer(_right(predicted[row], tokens, answer), float(loss)))
    return answers


def _bare(model: Cortex, texts: list[np.ndarray], questions) -> list[bool]:  # noqa: ANN001
    windows = [text[-model.segment_tokens :] for text in texts]
    ids, mask = padded(windows, model.backbone.device)
    asked = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (window, (tokens, _)) in enumerate(zip(windows, questions, strict=True)):
        asked[row, len(window) - len(tokens) : len(window)] = True
    with model.memory(False), only_at(asked.to(ids.device)):
        predicted = model(input_ids=ids, attention_mask=mask).logits[0].argmax(-1).cpu().numpy()
    ends = np.cumsum([len(tokens) for tokens, _ in questions])
    return [
        _right(predicted[end - len(tokens) : end], tokens, answer)
        for end, (tokens, answer) in zip(ends, questions, strict=True)
    ]


def _right(predicted: np.ndarray, tokens: np.ndarray, answer: np.ndarray) -> bool:
    """Exact match: `predicted[t]` is what was expected after token t."""
    asked = np.flatnonzero(answer)
    return bool((predicted[asked - 1] == tokens[asked]).all())
