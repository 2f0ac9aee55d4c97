from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cortex_core.errors import DataError
from cortex_core.tasks.vocabulary import DIGITS, MARKERS, TaskVocabulary


def test_every_word_is_one_token_with_its_space(tokenizer: PreTrainedTokenizerBase, vocabulary: TaskVocabulary) -> None:
    for pools in (vocabulary.keys, vocabulary.values):
        for word in np.concatenate([pools["train"], pools["held_out"]]):
            text = tokenizer.decode([int(word)]).strip()
            assert re.fullmatch("[a-z]{3,12}", text)
            assert tokenizer.encode(f" {text}", add_special_tokens=False) == [word]


def test_pools_never_meet(vocabulary: TaskVocabulary) -> None:
    pools = [pool[split] for pool in (vocabulary.keys, vocabulary.values) for split in ("train", "held_out")]
    assert all(len(pool) > 5 for pool in pools)
    for one, other in itertools.combinations(pools, 2):
        assert not set(one) & set(other)
    assert set(vocabulary.held_out_words()) == {*vocabulary.keys["held_out"], *vocabulary.values["held_out"]}


def test_no_marker_is_a_word_or_filler(vocabulary: TaskVocabulary) -> None:
    markers = {token for text in MARKERS for token in vocabulary.pieces[text]}
    digits = {token for text in DIGITS for token in vocabulary.pieces[text]}
    words = {*vocabulary.held_out_words(), *vocabulary.keys["train"], *vocabulary.values["train"]}
    assert not words & (markers | digits)
    assert not markers & set(vocabulary.random_ids)
    assert not set(vocabulary.tokenizer.all_special_ids) & set(vocabulary.random_ids)
    assert words < set(vocabulary.random_ids)


def test_pools_depend_on_the_seed_alone(bpe: PreTrainedTokenizerBase) -> None:
    first, again, other = (TaskVocabulary.from_tokenizer(bpe, seed) for seed in (5, 5, 6))
    assert np.array_equal(first.keys["train"], again.keys["train"])
    assert np.array_equal(first.values["held_out"], again.values["held_out"])
    assert not np.array_equal(first.keys["train"], other.keys["train"])


def test_document_marks_are_left_out_where_the_tokenizer_has_none(
    bpe: PreTrainedTokenizerBase, word_level: PreTrainedTokenizerBase
) -> None:
    assert TaskVocabulary.from_tokenizer(bpe).prefix == (bpe.bos_token_id,)
    assert TaskVocabulary.from_tokenizer(bpe).separator == (bpe.eos_token_id,)
    assert TaskVocabulary.from_tokenizer(word_level).prefix == ()
    assert TaskVocabulary.from_tokenizer(word_level).separator == ()


def test_digits_that_take_several_tokens() -> None:
    """A tokenizer that splits the space off: a digit is two ids, and a string of them is still exact."""
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789; "]
    words = [f"word{a}{b}" for a in "abcdefg" for b in "abcdefg"]
    vocab = {token: number for number, token in enumerate(["[UNK]", *letters, *(f" {word}" for word in words)])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r" [a-z]+|."), behavior="isolated")
    split = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")
    vocabulary = TaskVocabulary.from_tokenizer(split)
    assert len(vocabulary.pieces[" 7"]) == 2
    assert vocabulary.digits([7, 3]) == split.encode(" 7 3", add_special_tokens=False)


def test_too_few_words_is_one_readable_line() -> None:
    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "river": 1, "stone": 2}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(DataError, match=r"only \d suitable words.*at least 24") as error:
        TaskVocabulary.from_tokenizer(PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]"))
    assert "\n" not in str(error.value)
