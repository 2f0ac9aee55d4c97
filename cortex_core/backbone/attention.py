"""The one place where memory meets attention: a function in transformers' `AttentionInterface`.

It calls the attention that the model would have used, then hands queries, values and result to whatever pass is active
in this context. No forward is patched and no weight is touched, so sharded weights need no extra gather.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PREFIX = "cortex_"
WRAPPED = ("sdpa", "eager", "flash_attention_2")


@runtime_checkable
class AttentionPass(Protocol):
    """Something that wants to see, and may add to, every attention call of one forward pass."""

    def before(self, module: nn.Module, hidden: Tensor) -> None:
        """The attention module is about to run on `hidden` [rows, tokens, hidden]."""

    def after(self, module: nn.Module, q: Tensor, v: Tensor, attended: Tensor) -> Tensor:
        """It ran. q [rows, heads, tokens, d], v [rows, kv_heads, cached + tokens, d]; the result and what is returned
        [rows, tokens, heads, d]."""
        ...


_active: ContextVar[AttentionPass | None] = ContextVar("cortex_attention_pass", default=None)


@contextmanager
def attention_pass(observer: AttentionPass | None) -> Iterator[None]:
    """Makes `observer` the active pass of this context (thread, task); None is the bare model."""
    token = _active.set(observer)
    try:
        yield
    finally:
        _active.reset(token)


def same_pass_again() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For activation checkpointing: recomputation reports to the pass that the first computation reported to."""
    return nullcontext(), attention_pass(_active.get())


def capture_hidden(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of an attention module: its input, which the attention function itself is not given."""
    observer = _active.get()
    if observer is not None:
        observer.before(module, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])


_wanted: ContextVar[Tensor | None] = ContextVar("cortex_wanted_positions", default=None)


@contextmanager
def only_at(positions: Tensor | None) -> Iterator[None]:
    """Within it, the language-model head computes logits [1, wanted, vocab] for the positions of a bool mask
    [rows, tokens] alone, in its order; None is every position. A head is often most of a small model."""
    token = _wanted.set(positions)
    try:
        yield
    finally:
        _wanted.reset(token)


def select_positions(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Forward pre-hook of the language-model head."""
    positions = _wanted.get()
    return None if positions is None else (args[0][positions][None], *args[1:])


def _wrap(name: str):  # noqa: ANN202
    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        if name == "eager":  # every family has its own (soft caps, scaling) beside its attention class
            wrapped = sys.modules[type(module).__module__].eager_attention_forward
        else:
            wrapped = ALL_ATTENTION_FUNCTIONS[name]
        attended, weights = wrapped(module, q, k, v, mask, **kwargs)
        observer = _active.get()
        if observer is not None:
            attended = observer.after(module, q, v, attended)
        return attended, weights

    return attend


for _name in WRAPPED:
    AttentionInterface.register(PREFIX + _name, _wrap(_name))
    AttentionMaskInterface.register(PREFIX + _name, ALL_MASK_ATTENTION_FUNCTIONS[_name])
