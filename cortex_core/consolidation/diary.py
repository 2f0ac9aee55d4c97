"""A diary of reading: the segments of a text that were surprising, and what each did to the memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from cortex_core.backbone.model import Cortex
from cortex_core.config import SegmentsConfig
from cortex_core.consolidation.record import Chunk, Opened, Segment, finish, record, states_of_session
from cortex_core.consolidation.segments import Marks, SegmentState, detect
from cortex_core.errors import ConfigError

LOG_WRITES = 4096


class Diary:
    """Reads streams side by side, from their beginnings, and gives out segments as they end.

    Surprise is -log p(token | those before), in nats, of the token that was just read. What a segment did to the memory
    is known when the backbone's segment that it ends in has closed: one window late.
    """

    def __init__(self, model: Cortex, config: SegmentsConfig, sources: Sequence[str]) -> None:
        """One name per stream; streams are as many as names."""
        self.model, self._config, self._sources = model, config, list(sources)
        self.session = model.new_session(len(sources), log_writes=LOG_WRITES)
        self._state = SegmentState.zeros(len(sources))
        self._opened: Opened = (None,) * len(sources)
        self._said: Float[Tensor, "streams vocab"] | None = None
        self._waiting: tuple[Chunk, Marks] | None = None
        self._num_tokens = 0

    @torch.no_grad()
    def read(self, input_ids: Int[Tensor, "streams tokens"], step: int = 0) -> list[Segment]:
        """Read on. Returns the segments that have ended, up to the last window. Raises ConfigError for anything but
        whole windows (`model.segment_tokens`)."""
        width = self.model.segment_tokens
        if input_ids.shape[1] % width or len(input_ids) != len(self._sources):
            raise ConfigError(
                f"input_ids {list(input_ids.shape)}: must be {len(self._sources)} streams, of a multiple of {width} "
                "tokens"
            )
        return [segment for window in input_ids.split(width, dim=1) for segment in self._window(window, step)]

    @torch.no_grad()
    def finish(self, step: int = 0) -> list[Segment]:
        """The segments of the last window, and what is still open. A token more is read, for a window is written when
        the next one begins; so nothing else can be."""
        if self._waiting is None:
            return []
        chunk, marks = self._waiting
        self.model.read(chunk.token_ids[:, -1:], self.session)
        states_at = states_of_session(self.session, self.model.sidecars_by_layer)
        segments, opened = record(chunk, marks, self._opened, states_at, sources=self._sources, step=step)
        return [*segments, *finish(opened, states_at, sources=self._sources, step=step)]

    def _window(self, ids: Tensor, step: int) -> list[Segment]:
        with _inputs(self.model) as found:
            logits = self.model(ids, session=self.session).logits
        assert logits is not None
        ids = ids.to(logits.device)
        hidden = {layer: part.unflatten(0, (len(ids), -1))[:, -1] for layer, part in found.items()}
        surprise = self._surprise(ids, logits)
        marks, self._state = detect(surprise, self._state, self._config)
        before = self._waiting
        self._waiting = Chunk(ids, surprise, hidden, torch.full((len(ids),), self._num_tokens)), marks
        self._num_tokens += ids.shape[1]
        if before is None:
            return []
        states_at = states_of_session(self.session, self.model.sidecars_by_layer)
        segments, self._opened = record(*before, self._opened, states_at, sources=self._sources, step=step)
        return segments

    def _surprise(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Of the first token of a stream, that of a guess."""
        first = functional.log_softmax(logits.new_zeros(logits[:, 0].shape) if self._said is None else self._said, -1)
        rest = logits[:, :-1].float().log_softmax(-1)
        self._said = logits[:, -1].float()
        said = torch.cat([first.float()[:, None], rest], dim=1)
        return -said.gather(-1, ids[..., None])[..., 0]


@contextmanager
def _inputs(model: Cortex) -> Iterator[dict[int, Tensor]]:
    """What each memory layer is given by the last backbone call within: windows as rows, those of a stream together."""
    found: dict[int, Tensor] = {}

    def hook(layer: int) -> Any:
        def keep(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            found[layer] = (named["hidden_states"] if "hidden_states" in named else args[0]).detach()

        return keep

    handles = [m.register_forward_pre_hook(hook(n), with_kwargs=True) for m, (n, _) in model.ports.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
