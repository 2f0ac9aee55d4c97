"""What a fresh backbone can do within its window, on words and text that it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cortex_core.config import TaskName
from cortex_core.intervals import wilson
from cortex_core.tasks.corpus import Corpus
from cortex_core.tasks.layout import Example
from cortex_core.tasks.mixture import build_task, stack
from cortex_core.tasks.vocabulary import Split, TaskVocabulary

SCORED: tuple[TaskName, ...] = get_args(TaskName)
FILLERS = ("text", "random")
SCORE_SEED = 1
"""Seed of the examples that are scored; training has its own."""
_ROWS = 32

Rows = list[dict[str, Any]]


def score_tasks(
    model: nn.Module,
    vocabulary: TaskVocabulary,
    corpus: Corpus,
    *,
    window_tokens: int,
    num_examples: int,
    progress: Callable[[str], object] = lambda _: None,
) -> Rows:
    """One row per task and filler, facts and one question at random places of one window.

    `accuracy` is the share of examples whose whole answer is right, with its 95 % Wilson bounds;
    `token_accuracy` the share of answer tokens, each predicted after the right ones before it. Key-value is
    also asked with training words.
    """
    rows: Rows = []
    subjects: list[tuple[TaskName, Split]] = [(name, "held_out") for name in SCORED]
    for task, split in [*subjects, ("key_value", "train")]:
        for filler in FILLERS:
            progress(f"{task}, {filler} filler, {split} words")
            subject = build_task(task, filler, vocabulary, corpus, split=split, seed=SCORE_SEED)
            examples = [subject.in_window_example(index, window_tokens) for index in range(num_examples)]
            right = _right(model, examples)
            whole = sum(bool(answer.all()) for answer in right)
            share = wilson(whole, len(right))
            rows.append(
                {
                    "task": task,
                    "filler": filler,
                    "words": split,
                    "accuracy": share.value,
                    "low": share.low,
                    "high": share.high,
                    "n": len(right),
                    "token_accuracy": float(np.concatenate(right).mean()),
                }
            )
    return rows


def bits_per_byte(
    model: nn.Module,
    corpus: Corpus,
    *,
    window_tokens: int,
    split: Split = "held_out",
    max_windows: int | None = None,
) -> dict[str, float]:
    """Cross-entropy on the text of a split, in windows read on their own; their first token is not scored.

    Returns bits per byte, nats per token, bytes per token, and the number of tokens scored.
    """
    tokens = corpus.tokens(split)
    size = corpus.held_out_bytes if split == "held_out" else corpus.train_bytes
    windows = torch.from_numpy(tokens[: len(tokens) // window_tokens * window_tokens].astype(np.int64))
    windows = windows.view(-1, window_tokens)[:max_windows]
    total, count = 0.0, 0
    for rows in windows.split(_ROWS):
        logits = _logits(model, rows)
        total += F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
        count += rows[:, 1:].numel()
    bytes_per_token = size / len(tokens)
    nats = total / count
    return {
        "bits_per_byte": nats / math.log(2) / bytes_per_token,
        "nats_per_token": nats,
        "bytes_per_token": bytes_per_token,
        "tokens": float(count),
    }


def _right(model: nn.Module, examples: list[Example]) -> list[np.ndarray]:
    """Per example, whether each of its answer tokens is the model's first choice, bool [answer tokens]."""
    results = []
    for batch in _batches(examples):
        tokens, answer = torch.from_numpy(batch.tokens), batch.answer[:, 1:]
        right = (_logits(model, tokens).argmax(-1) == tokens[:, 1:]).numpy()
        results += [row[asked] for row, asked in zip(right, answer, strict=True)]
    return results


def _batches(examples: list[Example]) -> Iterator[Example]:
    return (stack(examples[first : first + _ROWS]) for first in range(0, len(examples), _ROWS))


@torch.no_grad()
def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits for every token but the first, [B, T - 1, V]."""
    was_training = model.training
    model.eval()
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    model.train(was_training)
    return logits
