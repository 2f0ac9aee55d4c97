"""The detectors on a generated set, and the filter on tokens of any tokenizer."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from cortex_core.errors import ConfigError
from cortex_core.privacy.personal_data import KINDS, PersonalData
from cortex_core.privacy.pieces import Pieces
from cortex_core.privacy.write_filter import WriteFilter
from tests import tiny
from tests.privacy.samples import POSITIVES, negative, sentence

NUM = 100
MAIL = "write to john.doe@example.com today"


def pieces_with_spaces() -> PreTrainedTokenizerFast:
    """As sentencepiece: a space is part of the word behind it, and a text loses the one that it begins with."""
    words = [
        "<unk>",
        "▁write",
        "▁to",
        "▁john",
        ".doe",
        "@",
        "example",
        ".com",
        "▁today",
        "▁",
        *"abcdefghijklmnopqrstuvwxyz",
    ]
    core = Tokenizer(models.Unigram([(word, -float(n)) for n, word in enumerate(words)], unk_id=0))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


TOKENIZERS = {
    "byte-level": lambda: tiny.vocabulary().tokenizer,
    "sentencepiece": pieces_with_spaces,
    "without offsets": ByT5Tokenizer,
}


@pytest.fixture(scope="module")
def found() -> PersonalData:
    return PersonalData(ByT5Tokenizer())


@pytest.mark.parametrize("kind", KINDS)
def test_all_of_a_kind_are_found_whole(found: PersonalData, kind: str) -> None:
    rng = random.Random(kind)
    missed = []
    for _ in range(NUM):
        text, first, stop = sentence(rng, POSITIVES[kind](rng))
        inner = first + len("phone ") if text[first:].startswith("phone ") else first
        covered = {at for a, b in found.spans(text) for at in range(a, b)}
        if not set(range(inner, stop)) <= covered | {at for at in range(inner, stop) if text[at] in "()"}:
            missed.append(text)
    assert len(missed) <= NUM // 50, missed


def test_hardly_anything_else_is_found(found: PersonalData) -> None:
    rng = random.Random(0)
    wrong = []
    for _ in range(5 * NUM):
        text, _, _ = sentence(rng, negative(rng))
        if found.spans(text):
            wrong.append((text, [text[a:b] for a, b in found.spans(text)]))
    assert len(wrong) <= 5, wrong


def test_edges_of_what_is_found(found: PersonalData) -> None:
    def caught(text: str) -> list[str]:
        return [text[first:stop] for first, stop in found.spans(text)]

    assert caught("to <a.b@c-d.org>, or 邮箱x@y.cn。") == ["a.b@c-d.org", "x@y.cn"]
    assert caught("IBAN DE89 3704 0044 0532 0130 00 BIC COBADEFF") == ["DE89 3704 0044 0532 0130 00"]
    assert caught("pay 4111 1111 1111 1111, not 4111 1111 1111 1112") == ["4111 1111 1111 1111"]
    assert caught("call me: 2025550143; order 2025550143") == ["2025550143"]
    assert caught('password: "hunter2hunter2XYZ99"') == ["hunter2hunter2XYZ99"]
    assert caught("key AKIAIOSFODNN7EXAMPLE.") == ["AKIAIOSFODNN7EXAMPLE"]
    open_block = "-----BEGIN PRIVATE KEY-----\nMIIEvQ"
    assert caught(f"see {open_block}") == [open_block]
    body = ("abcDEF0123456789" * 4 + "\n") * 3
    assert caught(body + "-----END PRIVATE KEY-----\nbye") == [body + "-----END PRIVATE KEY-----"]
    assert caught("f00\n" + body + "and so on") == ["f00\n" + body + "and"]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_of_a_hit_through_any_tokenizer(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    mask = PersonalData(tokenizer)
    assert isinstance(mask, WriteFilter)
    row = tokenizer.encode(MAIL, add_special_tokens=False)
    (silent,) = mask([row], [False])
    assert tokenizer.decode([t for t, hit in zip(row, silent, strict=True) if hit]).strip() == "john.doe@example.com"
    kept = tokenizer.decode([t for t, hit in zip(row, silent, strict=True) if not hit])
    assert kept.split() == ["write", "to", "today"]
    assert mask([row, row[:3], []], [False] * 3) == [silent, [False] * 3, []]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_are_the_text(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    row = tokenizer.encode(MAIL, add_special_tokens=False)
    text, ends = Pieces(tokenizer).text(row)
    assert text.strip() == MAIL
    assert ends == sorted(ends) and ends[-1] == len(text) and len(ends) == len(row)


def test_special_tokens_and_parts_of_characters_separate() -> None:
    tokenizer = ByT5Tokenizer()
    row = tokenizer.encode("a@b.de", add_special_tokens=False)
    row.insert(2, tokenizer.eos_token_id)
    assert Pieces(tokenizer).text(row)[0] == "a@\nb.de"
    assert not any(PersonalData(tokenizer)([row], [False])[0])
    snow = tokenizer.encode("☃ a@b.de", add_special_tokens=False)
    assert PersonalData(tokenizer)([snow], [False])[0] == [False] * 4 + [True] * 6


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("see john.do", "john.do"), ("see john ", ""), ("tel +49 30 ", "+49 30 "), ("at (202) 5", "(202) 5"),
        ("DE89 3704 ", "DE89 3704 "), ("so -----BEGIN RSA PRIV", "-----BEGIN RSA PRIV"), ("中文没有空格", ""),
        ("it is done. ", ""),
    ],
)  # fmt: skip
def test_what_may_go_on_is_held_back(text: str, held: str) -> None:
    tokenizer = ByT5Tokenizer()
    row = tokenizer.encode(text, add_special_tokens=False)
    whole, cut = PersonalData(tokenizer)([row, row], [False, True])
    assert not any(whole)
    assert cut == [False] * (len(row) - len(held)) + [True] * len(held)


def test_kinds_and_regions() -> None:
    tokenizer = ByT5Tokenizer()
    text = "a@b.de or 030 901820 or +49 30 901820"
    assert len(PersonalData(tokenizer).spans(text)) == 3
    assert len(PersonalData(tokenizer, ("email",)).spans(text)) == 1
    assert len(PersonalData(tokenizer, ("phone",), regions=()).spans(text)) == 1
    with pytest.raises(
        ConfigError, match=r"kinds = \['name'\]: choose at least one of email, phone, card, iban, secret"
    ):
        PersonalData(tokenizer, ("name",))
    with pytest.raises(ConfigError, match="regions: 'XX' is no country's code"):
        PersonalData(tokenizer, regions=("XX",))
    with pytest.raises(ConfigError, match="context_tokens = -1 must be at least 0"):
        PersonalData(tokenizer, context_tokens=-1)
