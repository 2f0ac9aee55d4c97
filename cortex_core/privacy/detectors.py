"""Finds personal data in text by its form and its check digits. Each kind is a function from a text to spans."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import phonenumbers
from stdnum import iban as stdnum_iban
from stdnum import luhn

Span = tuple[int, int]
"""First character, and the one after the last."""
Detector = Callable[[str], Iterator[Span]]

_WORD = "A-Za-z0-9\u00c0-\u024f\ufffd"  # Latin letters; not those of scripts that put no spaces between words
_EMAIL = re.compile(rf"[{_WORD}._%+'-]{{1,64}}@(?:[{_WORD}](?:[{_WORD}-]{{0,62}})\.){{1,8}}[{_WORD}]{{2,24}}")
_CARD = re.compile(r"(?<![A-Za-z0-9.+-])\d(?:[ -]?\d){12,18}(?![A-Za-z0-9]|\.\d|-\d)")
_CARD_PREFIX = re.compile(
    r"4|5[1-5]|2(?:22[1-9]|2[3-9]|[3-6]|7[01]|720)|3[47]|3(?:0[0-5]|[689])|6(?:011|4[4-9]|5|2)|35(?:2[89]|[3-8])|50|5[6-9]"
)
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}\d{2}(?:[ -]?[A-Za-z0-9]){11,30}")
_DIGITS = re.compile(r"\d[\d\s().\-/]{5,}\d")
_PHONE_WORD = re.compile(r"(?:phone|tel|telephone|mobile|cell|call|fax|sms|whatsapp|dial)\b\W*(?:\w+\W+){0,2}\Z", re.I)

_KEY = r"(?<![A-Za-z0-9_])(?:{})(?![A-Za-z0-9_])"
_KNOWN_SECRETS = (
    r"(?:AKIA|ASIA)[0-9A-Z]{16}",  # Amazon
    r"gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{22,255}",
    r"glpat-[\w-]{20,}",
    r"sk-[A-Za-z0-9_-]{20,}",  # OpenAI, Anthropic
    r"(?:sk|rk|pk)_(?:live|test)_[0-9A-Za-z]{16,}",  # Stripe
    r"xox[abeprs]-[0-9A-Za-z-]{10,}",  # Slack
    r"AIza[0-9A-Za-z_-]{35}",  # Google
    r"hf_[A-Za-z0-9]{30,}",
    r"npm_[A-Za-z0-9]{36}",
    r"SG\.[\w-]{16,}\.[\w-]{16,}",  # SendGrid
    r"eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}",  # JSON web tokens
)
_SECRET = re.compile("|".join(_KEY.format(form) for form in _KNOWN_SECRETS))
_NAMED = re.compile(
    r"(?:api[_-]?key|access[_-]?key|secret(?:[_-]?key)?|auth[_-]?token|token|passw(?:or)?d|client[_-]?secret)"
    r"[\"']?\s*(?:=|:|=>|:=)\s*[\"']?(?:Bearer\s+)?([A-Za-z0-9+/_.=-]{16,})",
    re.I,
)
_BEGIN, _END = r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----", r"-----END [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----"
_PRIVATE_KEY = re.compile(rf"{_BEGIN}.*?(?:{_END}|\Z)", re.S)
_INSIDE_KEY = re.compile(  # the text begins in the middle of one
    rf"\A[A-Za-z0-9+/=\s]*(?:{_END})|\A[A-Za-z0-9+/=]*\r?\n(?:[A-Za-z0-9+/]{{60,76}}\r?\n){{2,}}[A-Za-z0-9+/]*={{0,2}}"
    r"|\A[A-Za-z0-9+/=_.-]{200,}"
)
_LEAST_ENTROPY_BITS = 3.0

_MAY_GO_ON = (
    re.compile(r"[A-Za-z0-9._%+'@:/=~#&*!?$^`{|}\[\]-]+\Z"),  # a word, and whatever a secret is made of
    re.compile(r"[+(\d][\d\s().+/-]*\Z"),  # groups of digits
    re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}\d{2}(?:[ -]?[A-Za-z0-9]){0,30}[ -]?\Z"),
    re.compile(r"-----[A-Z0-9 -]*\Z"),
)


def emails(text: str) -> Iterator[Span]:
    """Addresses with a top-level domain of letters: `react@18.2.0` is none."""
    for match in _EMAIL.finditer(text):
        if not any(letter.isdigit() for letter in match[0].rpartition(".")[2]):
            yield match.span()


def phones(text: str, regions: Sequence[str] = ()) -> Iterator[Span]:
    """Numbers that exist in their country's plan: international ones, and those of `regions` where they are written as
    telephone numbers are (with separators, or behind a word such as "phone")."""
    if not _DIGITS.search(text):
        return
    for region in (None, *regions):
        for match in phonenumbers.PhoneNumberMatcher(text, region, leniency=phonenumbers.Leniency.VALID):
            if match.raw_string.startswith("+") or _looks_dialled(text, match.start, match.raw_string):
                yield match.start, match.end


def _looks_dialled(text: str, start: int, number: str) -> bool:
    return bool(re.search(r"[\s().\-/]", number)) or bool(_PHONE_WORD.search(text[max(0, start - 40) : start]))


def cards(text: str) -> Iterator[Span]:
    """13 to 19 digits of an issuer that pass Luhn's check."""
    for match in _CARD.finditer(text):
        digits = re.sub(r"\D", "", match[0])
        if _CARD_PREFIX.match(digits) and len(set(digits)) > 1 and luhn.is_valid(digits):
            yield match.span()


def ibans(text: str) -> Iterator[Span]:
    """Account numbers that pass the check modulo 97 and the form of their country."""
    at = 0
    while match := _IBAN.search(text, at):
        at = match.start() + 1
        for end in range(match.end(), match.start() + 14, -1):  # words behind it may look like more of it
            if text[end - 1].isalnum() and stdnum_iban.is_valid(text[match.start() : end]):
                yield match.start(), end
                at = end
                break


def secrets(text: str) -> Iterator[Span]:
    """Keys of known services, private keys, and what is named as a secret and looks random."""
    for pattern in (_PRIVATE_KEY, _SECRET):
        for match in pattern.finditer(text):
            yield match.span()
    if inside := _INSIDE_KEY.match(text):
        yield inside.span()
    for match in _NAMED.finditer(text):
        value = match[1]
        if re.search(r"\d", value) and re.search(r"[A-Za-z]", value) and _entropy_bits(value) > _LEAST_ENTROPY_BITS:
            yield match.span(1)


def _entropy_bits(text: str) -> float:
    """Per character."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())


def beginnings(text: str) -> Iterator[Span]:
    """Ends of a text that may turn out to begin something once it goes on."""
    for pattern in _MAY_GO_ON:
        if match := pattern.search(text):
            yield match.span()


def detectors(regions: Sequence[str]) -> dict[str, Detector]:
    """All of them, by kind."""
    return {
        "email": emails, "phone": partial(phones, regions=regions), "card": cards, "iban": ibans, "secret": secrets,
    }  # fmt: skip
