"""The text of token ids, and which token each character comes from, through any tokenizer that can decode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Pieces:
    """What each token adds to the text before it. Decoded one token at a time, once each, and kept.

    Tokenizers need not know offsets, and many do not. What is not valid text by itself, such as a part of a character
    outside ASCII, is one or more U+FFFD.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._special = frozenset(getattr(tokenizer, "all_special_ids", ()))
        # Behind another token, because many tokenizers drop the space that a text begins with.
        self._anchor = list(tokenizer.encode("a", add_special_tokens=False))[-1:]
        self._before = self._decode(self._anchor)
        self._known: dict[int, str] = {}

    def __getitem__(self, token_id: int) -> str:
        """The token's text; special tokens end a line."""
        piece = self._known.get(token_id)
        if piece is None:
            piece = self._known[token_id] = "\n" if token_id in self._special else self._piece(token_id)
        return piece

    def text(self, token_ids: Sequence[int]) -> tuple[str, list[int]]:
        """All of it, and the position where each token ends."""
        parts, ends, end = [], [], 0
        for token_id in token_ids:
            piece = self[token_id]
            end += len(piece)
            parts.append(piece)
            ends.append(end)
        return "".join(parts), ends

    def _piece(self, token_id: int) -> str:
        behind = self._decode([*self._anchor, token_id])
        return behind[len(self._before) :] if behind.startswith(self._before) else self._decode([token_id])

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
