"""One example asked twice: of a memory that has read all of it, and of the bare model, which sees the end of it.

Both continue the same plain text (no chat template), greedily, for as many tokens. The memory reads the context into a
fresh session and then the question; the bare model gets the last window of the same tokens: the question and what
stands before it. Nothing is cut from the middle. The context is streamed: neither its tokens nor what the model makes
of them are ever all in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from cortex_core.backbone.model import Cortex
from cortex_core.errors import ConfigError
from cortex_core.eval.benchmarks.example import Example, Task
from cortex_core.eval.reach import READ_TOKENS

PIECE_CHARACTERS = 1 << 16
"""Longest text that the tokenizer gets at once: it keeps some hundred bytes for each token."""


class Answers(NamedTuple):
    """What was generated, without special tokens, and for how long a prompt."""

    memory: str
    bare: str
    prompt_tokens: int
    bare_tokens: int
    """Tokens of the prompt that the bare model saw."""


class Limits(NamedTuple):
    """What both get in tokens, whatever the example."""

    window: int
    """Most tokens of the prompt that the bare model sees."""
    positions: int
    """The backbone's own window, for prompt and answer together."""

    def new_tokens(self, task: Task) -> int:
        """Most tokens of an answer, at most half of what the backbone can see at all."""
        return min(task.max_new_tokens, max(1, self.positions // 2))


def limits(model: Cortex, window: int | None) -> Limits:
    """`window` defaults to one segment, as much attention as the memory has. Raises ConfigError."""
    positions = getattr(model.backbone.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    if window is not None and not 2 <= window <= positions:
        raise ConfigError(f"--window {window}: must be at least 2 and at most {positions}, the backbone's own window")
    return Limits(window or model.segment_tokens, positions)


@torch.no_grad()
def ask(
    model: Cortex,
    tokenizer: Any,
    example: Example,
    task: Task,
    limits: Limits,
    on_progress: Callable[[float], None] = lambda read_frac: None,
) -> Answers:
    """Generate both answers. `on_progress` is told the share of the context that has been read."""
    device, count, session = model.backbone.device, limits.new_tokens(task), model.new_session()
    first, closing = _beginning(tokenizer), _ids(tokenizer, task.closing(example))
    room = max(1, min(limits.window, limits.positions - count) - len(first))
    held, end, num_tokens = first, closing[:0], len(first) + len(closing)
    for block, read_frac in _blocks(tokenizer, [task.before + example.context[0], *example.context[1:]]):
        if len(held):
            model.read(_batch(held, device), session)
        held, end = block, np.concatenate([end, block])[-room:]  # generation needs a token to go on from
        num_tokens += len(block)
        on_progress(read_frac)
    memory = _generate(model, tokenizer, _batch(np.concatenate([held, closing]), device), count, session=session)
    prompt = _batch(np.concatenate([first, np.concatenate([end, closing])[-room:]]), device)
    with model.memory(False):
        bare = _generate(model, tokenizer, prompt, count, attention_mask=torch.ones_like(prompt))
    return Answers(memory, bare, num_tokens, prompt.shape[1])


def _generate(model: Cortex, tokenizer: Any, ids: Int[Tensor, "1 tokens"], count: int, **options: Any) -> str:
    settings = model.backbone.generation_config
    pad = settings.pad_token_id if settings.pad_token_id is not None else _first(settings.eos_token_id)
    out = model.generate(
        ids,
        max_new_tokens=count,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=pad,
        **options,
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def _first(eos: int | list[int] | None) -> int:
    return (eos[0] if eos else 0) if isinstance(eos, list) else eos or 0


def _beginning(tokenizer: Any) -> NDArray[np.int64]:
    """The token that begins a text, if the model has one."""
    begin = tokenizer.bos_token_id
    has_one = begin is not None and begin in tokenizer("").input_ids
    return np.array([begin] if has_one else [], dtype=np.int64)


def _blocks(tokenizer: Any, texts: Sequence[str]) -> Iterator[tuple[NDArray[np.int64], float]]:
    """Tokens [at most READ_TOKENS] of all texts in order, and the share of the characters that they reach up to."""
    done, total = 0, sum(map(len, texts))
    for text in texts:
        for piece in _pieces(text):
            ids = _ids(tokenizer, piece)
            for at in range(0, len(ids), READ_TOKENS):
                block = ids[at : at + READ_TOKENS]
                yield block, (done + len(piece) * (at + len(block)) / len(ids)) / total
            done += len(piece)


def _ids(tokenizer: Any, text: str) -> NDArray[np.int64]:
    return np.array(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=np.int64)


def _pieces(text: str) -> Iterator[str]:
    """Cut before spaces: there a tokenizer cuts as well."""
    at = 0
    while len(text) - at > PIECE_CHARACTERS:
        space = text.rfind(" ", at + 1, at + PIECE_CHARACTERS)
        end = space if space > 0 else at + PIECE_CHARACTERS
        yield text[at:end]
        at = end
    yield text[at:]


def _batch(ids: NDArray[np.int64], device: torch.device) -> Int[Tensor, "1 tokens"]:
    return torch.from_numpy(ids).to(device)[None]
