"""A write filter for personal data: e-mail addresses, telephone numbers, payment cards, bank accounts, secret keys."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import phonenumbers

from cortex_core.errors import ConfigError
from cortex_core.privacy.detectors import Span, beginnings, detectors
from cortex_core.privacy.pieces import Pieces

KINDS = ("email", "phone", "card", "iban", "secret")


class PersonalData:
    """Keeps tokens of personal data out of the memory: `model.write_filter = PersonalData(tokenizer)`.

    It knows things by their form: names, addresses and whatever has no form of its own are not found. Attention sees
    what is filtered while its segment is open, and so do the tokens behind it, some of which may be written.
    """

    def __init__(
        self,
        tokenizer: Any,
        kinds: Sequence[str] = KINDS,
        *,
        regions: Sequence[str] = ("US", "GB", "DE"),
        context_tokens: int = 256,
    ) -> None:
        """`tokenizer` needs `encode` and `decode` of a Hugging Face one; `kinds` of "email", "phone", "card", "iban",
        "secret". `regions`: countries (ISO 3166) whose telephone numbers are found without their "+". `context_tokens`
        before a segment are searched with it, for what began there. Raises ConfigError.
        """
        found = detectors(regions)
        unknown = [kind for kind in kinds if kind not in found]
        if unknown or not kinds:
            raise ConfigError(f"kinds = {list(kinds)}: choose at least one of {', '.join(found)}")
        unknown = [region for region in regions if region not in phonenumbers.SUPPORTED_REGIONS]
        if unknown:
            raise ConfigError(f"regions: {unknown[0]!r} is no country's code; such as 'US', 'DE'")
        if context_tokens < 0:
            raise ConfigError(f"context_tokens = {context_tokens} must be at least 0")
        self.context_tokens = context_tokens
        self._detectors = [found[kind] for kind in kinds]
        self._pieces = Pieces(tokenizer)

    def spans(self, text: str) -> list[Span]:
        """Where personal data stands in a text: first character, and the one after the last. Ascending, may overlap."""
        return sorted({span for detect in self._detectors for span in detect(text)})

    def __call__(self, rows: Sequence[Sequence[int]], cut: Sequence[bool]) -> list[list[bool]]:
        """See `WriteFilter`."""
        return [self._row(row, goes_on) for row, goes_on in zip(rows, cut, strict=True)]

    def _row(self, row: Sequence[int], goes_on: bool) -> list[bool]:
        text, ends = self._pieces.text(row)
        mask = [False] * len(row)
        for first, stop in [*self.spans(text), *(beginnings(text) if goes_on else ())]:
            token = bisect_right(ends, first)
            while token < len(row) and (ends[token - 1] if token else 0) < stop:
                mask[token] = True
                token += 1
        return mask
