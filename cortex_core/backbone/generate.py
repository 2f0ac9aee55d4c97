"""Generation over segments: Hugging Face's own `generate`, a segment at a time, the memory carried between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from cortex_core.backbone.attention import attention_pass
from cortex_core.backbone.forgetting import tagged
from cortex_core.backbone.passes import GenerationPass
from cortex_core.backbone.reading import advance
from cortex_core.backbone.segments import Layout, Rows
from cortex_core.backbone.session import Session
from cortex_core.backbone.silence import silent_tokens
from cortex_core.errors import ConfigError

if TYPE_CHECKING:
    from cortex_core.backbone.model import Cortex

DEFAULT_NEW_TOKENS = 20
_REFUSED = {
    "num_beams": 1, "num_return_sequences": 1, "assistant_model": None, "streamer": None,
    "return_dict_in_generate": False, "use_cache": True, "past_key_values": None, "cache_implementation": None,
}  # fmt: skip


@torch.no_grad()
def generate(
    model: Cortex,
    input_ids: Int[Tensor, "batch tokens"],
    prompt: Rows,
    session: Session,
    source: str | None,
    **options: Any,
) -> Int[Tensor, "batch total"]:
    """Append new tokens to each row until `max_new_tokens`, `max_length` or the end-of-sequence token.

    A segment that fills up is closed into memory and the next begins with the token just made. `source` labels what is
    made in the session's log.
    """
    for name, only in _REFUSED.items():
        if options.get(name, only) != only:
            raise ConfigError(f"generate: {name} = {options[name]!r} cannot work with a memory; leave it at {only!r}")
    remaining, fewest = _budget(model, input_ids, options), _fewest(model, input_ids, options)
    settings = model.backbone.generation_config
    eos = options.get("eos_token_id", settings.eos_token_id)
    stops = set(eos if isinstance(eos, list) else [] if eos is None else [eos])
    pad = options.setdefault(
        "pad_token_id", settings.pad_token_id if settings.pad_token_id is not None else min(stops, default=0)
    )
    _append(model, session, prompt)
    if bool((session.num_tokens == 0).any()):
        raise ConfigError("generate: a row has no token to go on from; give it at least one")
    made = torch.full((session.batch_size, 0), pad, dtype=torch.long, device=input_ids.device)
    going = torch.ones(session.batch_size, dtype=torch.bool, device=input_ids.device)
    while remaining > 0 and bool(going.any()):
        room = model.segment_tokens - int(session.open_rows.lengths[going].max())
        count = min(remaining, room + 1)
        lengths = {"max_new_tokens": count, "min_new_tokens": min(count, max(0, fewest - made.shape[1]))}
        new = _within_segment(model, session, going, options | lengths)
        padded = torch.full((session.batch_size, new.shape[1]), pad, dtype=torch.long, device=new.device)
        padded[going] = new
        real = going[:, None] & ~_after_stop(padded, stops)
        made_rows = Rows.from_padded(padded, real, torch.zeros_like(padded, dtype=torch.float))
        _append(model, session, tagged(session, made_rows, source, None))
        made = torch.cat([made, padded.where(real, pad)], dim=1)
        going = going & real[:, -1] & ~_is_stop(padded[:, -1], stops)
        remaining -= new.shape[1]
    return torch.cat([input_ids, made], dim=1)


def _append(model: Cortex, session: Session, new: Rows) -> None:
    """Add tokens to the open segments; the backbone reads only when one of them fills up."""
    rows = session.open_rows.then(new)
    if int(rows.lengths.max()) <= model.segment_tokens:
        session.open_rows = rows
    else:
        advance(model, session, new, keep=torch.zeros_like(new.lengths))


def _within_segment(model: Cortex, session: Session, going: Tensor, options: dict[str, Any]) -> Tensor:
    """New tokens for the rows that go on, from their open segments."""
    rows = session.open_rows.of(going)
    width = int(rows.lengths.max())
    index = torch.arange(width, device=going.device) - (width - rows.lengths)[:, None]
    mask = index >= 0
    index = index.clamp_min(0)
    ids, reward = rows.input_ids.gather(1, index), rows.reward.gather(1, index) * mask
    states = {layer: state.map(lambda part: part[going]) for layer, state in session.states.items()}
    silent = silent_tokens(model, session, session.open_rows)
    if silent is not None:
        silent = silent[going].gather(1, index) & mask
    layout = Layout(1, mask, session.start_tokens[going], reward, silent)
    memory = GenerationPass(model.ports, states, layout, write_new=model.write_filter is None)
    with attention_pass(memory):
        out = model.backbone.generate(input_ids=ids, attention_mask=mask.long(), **options)  # type: ignore[operator]
    return out[:, width:]


def _budget(model: Cortex, input_ids: Tensor, options: dict[str, Any]) -> int:
    """Pops the options of the greatest length and returns how many tokens may be made."""
    new, total, given = options.pop("max_new_tokens", None), options.pop("max_length", None), input_ids.shape[1]
    if new is None and total is not None:
        if total <= given:
            raise ConfigError(f"generate: max_length = {total}: ask for more than the {given} tokens of the input")
        return total - given
    if new is None:
        new = model.backbone.generation_config.max_new_tokens or DEFAULT_NEW_TOKENS
    if new < 1:
        raise ConfigError(f"generate: max_new_tokens = {new}: ask for at least 1")
    return new


def _fewest(model: Cortex, input_ids: Tensor, options: dict[str, Any]) -> int:
    """Pops the options of the least length and returns how many tokens are made before a row may end."""
    settings = model.backbone.generation_config
    new, total = options.pop("min_new_tokens", settings.min_new_tokens), options.pop("min_length", settings.min_length)
    return (total or 0) - input_ids.shape[1] if new is None else new


def _is_stop(tokens: Tensor, stops: set[int]) -> Tensor:
    return torch.isin(tokens, torch.tensor(sorted(stops), dtype=tokens.dtype, device=tokens.device))


def _after_stop(tokens: Tensor, stops: set[int]) -> Tensor:
    """True behind the first end-of-sequence token of each row."""
    ended = _is_stop(tokens, stops).cumsum(1)
    return (ended - _is_stop(tokens, stops).long()) > 0
