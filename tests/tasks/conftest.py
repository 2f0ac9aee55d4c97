"""Two real tokenizers of different kinds, and a small corpus, built once."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cortex_core.backbone.create import train_tokenizer
from cortex_core.config import DataConfig
from cortex_core.tasks.corpus import Corpus, load_corpus
from cortex_core.tasks.vocabulary import DIGITS, MARKERS, TaskVocabulary

NOUNS = [f"{a}{b}{c}" for a, b, c in itertools.product(("ba", "ko", "lu", "mi"), ("na", "re", "so", "ti"), "nrst")]
"""64 made-up words."""


@pytest.fixture(scope="session")
def bpe() -> PreTrainedTokenizerBase:
    """Byte-level BPE with <bos> and <eos>, spaces inside the tokens."""
    text = " ".join(NOUNS * 20)
    return train_tokenizer([text], 700, (*MARKERS, *DIGITS))


@pytest.fixture(scope="session")
def word_level() -> PreTrainedTokenizerBase:
    """Whole words without any mark for a space, neither <bos> nor <eos>; " digits" is one unknown word to it."""
    known = [*NOUNS, *(marker.strip() for marker in MARKERS if marker != " digits"), *"0123456789"]
    inner = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(["[UNK]", *known])}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]")


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty text files, each with words of its own order."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        words = itertools.islice(itertools.cycle(NOUNS[number:] + NOUNS[:number]), 60)
        (folder / f"file{number}.txt").write_text(" ".join(words), encoding="utf-8")
    return folder


@pytest.fixture(scope="session", params=["bpe", "word_level"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    """Each of the two, one after the other."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def vocabulary(tokenizer: PreTrainedTokenizerBase) -> TaskVocabulary:
    return TaskVocabulary.from_tokenizer(tokenizer)


@pytest.fixture(scope="session")
def corpus(tokenizer: PreTrainedTokenizerBase, corpus_folder: Path) -> Corpus:
    return load_corpus(DataConfig(path=str(corpus_folder), held_out_frac=0.2), tokenizer)
