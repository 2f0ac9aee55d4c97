from __future__ import annotations

import hashlib
import json
import sysconfig
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from transformers import PreTrainedTokenizerBase

from cortex_core.config import DataConfig
from cortex_core.errors import DataError
from cortex_core.tasks.corpus import BLOCK_CHARACTERS, SKIPPED_FOLDERS, Corpus, load_corpus, training_texts

RECORDS = [f"record {number} banan kores lutit " * 3 for number in range(60)]


def write(path: Path) -> Path:
    """The same sixty records in the format that the name says."""
    match path.suffix:
        case ".jsonl":
            path.write_text("\n".join(json.dumps({"text": text, "id": 1}) for text in RECORDS) + "\n\n")
        case ".parquet":
            pd.DataFrame({"id": range(len(RECORDS)), "text": RECORDS}).to_parquet(path)
        case _:
            path.write_text(RECORDS[0])
    return path


def load(path: Path, tokenizer: PreTrainedTokenizerBase, **settings: object) -> Corpus:
    return load_corpus(DataConfig.model_validate({"path": str(path), **settings}), tokenizer)


@pytest.mark.parametrize("name", ["notes.jsonl", "notes.parquet"])
def test_one_file_is_split_by_record(tmp_path: Path, bpe: PreTrainedTokenizerBase, name: str) -> None:
    corpus = load(write(tmp_path / name), bpe, held_out_frac=0.3)
    shown = [bpe.decode(tokens) for tokens in (corpus.train, corpus.held_out)]
    inside = [{text for text in RECORDS if text in whole} for whole in shown]
    assert inside[0] | inside[1] == set(RECORDS)
    assert not inside[0] & inside[1]
    assert 5 < len(inside[1]) < 35
    assert len(corpus.held_out_starts) == len(inside[1])
    assert corpus.train_bytes + corpus.held_out_bytes == sum(len(text) for text in RECORDS)


def test_folder_is_split_by_file_and_a_file_never_lands_in_both(
    tmp_path: Path, corpus_folder: Path, bpe: PreTrainedTokenizerBase
) -> None:
    write(corpus_folder / "sub.jsonl")
    try:
        corpus = load(corpus_folder, bpe, held_out_frac=0.3)
    finally:
        (corpus_folder / "sub.jsonl").unlink()
    train, held_out = (bpe.decode(tokens).split(bpe.eos_token) for tokens in (corpus.train, corpus.held_out))
    assert not set(train) & set(held_out) - {""}
    sides = {text in "".join(train) for text in RECORDS}
    assert len(sides) == 1, "the records of one file stay together"


def test_split_does_not_change_when_the_folder_moves_or_grows(tmp_path: Path, bpe: PreTrainedTokenizerBase) -> None:
    texts = {}
    for name, count in (("a", 30), ("b", 40)):
        (tmp_path / name).mkdir()
        for number in range(count):
            (tmp_path / name / f"{number}.txt").write_text(f"file number {number} kores")
        texts[name] = set(training_texts(DataConfig(path=str(tmp_path / name), held_out_frac=0.3)))
    assert texts["a"] == {text for text in texts["b"] if int(text.split()[2]) < 30}


def test_documents_are_ended_and_starts_point_at_them(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> None:
    ends = corpus.train_starts[1:] - 1
    if tokenizer.eos_token_id is not None:
        assert (corpus.train[ends] == tokenizer.eos_token_id).all()
        assert (corpus.train == tokenizer.eos_token_id).sum() == len(corpus.train_starts)
    assert corpus.train_starts[0] == 0
    assert (np.diff(corpus.train_starts) > 0).all()


def test_excerpts_are_exact_deterministic_and_wrap(corpus: Corpus) -> None:
    size = len(corpus.held_out)
    for length in (0, 1, 17, size, 3 * size + 1):
        first, again = (corpus.excerpt((4, 2), length, "held_out") for _ in range(2))
        assert first.shape == (length,)
        assert first.dtype == np.int64
        assert np.array_equal(first, again)
    assert not np.array_equal(corpus.excerpt((4, 2), 50, "train"), corpus.excerpt((4, 3), 50, "train"))
    long = corpus.excerpt((4, 2), 2 * size, "held_out")
    assert np.array_equal(long[:size], long[size:])


def test_max_bytes_takes_a_sample_in_hash_order(corpus_folder: Path) -> None:
    whole = DataConfig(path=str(corpus_folder), held_out_frac=0.2)
    part = whole.model_copy(update={"max_bytes": 4096})
    all_texts, some_texts = list(training_texts(whole)), list(training_texts(part))
    assert 0 < len(some_texts) < len(all_texts)
    assert some_texts[:-1] == all_texts[: len(some_texts) - 1]
    assert all_texts[len(some_texts) - 1].startswith(some_texts[-1])
    assert sum(map(len, some_texts)) <= 4096


def test_standard_library_is_the_default() -> None:
    texts = list(training_texts(DataConfig(max_bytes=300_000)))
    assert 100_000 < sum(len(text.encode()) for text in texts) <= 300_000
    assert any("def " in text for text in texts)


def first_bytes_of_the_standard_library(limit: int, held_out_frac: float) -> dict[str, list[str]]:
    """Whole files in the order of a hash, the last one cut; another hash decides the side."""

    def share(name: str) -> float:
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64

    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    sides: dict[str, list[str]] = {"train": [], "held_out": []}
    for name in sorted(
        (n.as_posix() for n in names if not SKIPPED_FOLDERS & set(n.parts)), key=lambda n: share(f"order of {n}")
    ):
        raw = (root / name).read_text(encoding="utf-8", errors="replace").encode()
        if limit > 0 and raw.strip():
            sides["held_out" if share(name) < held_out_frac else "train"].append(raw[:limit].decode(errors="ignore"))
            limit -= len(raw)
    return sides


def test_the_standard_library_is_read_in_one_order_for_ever(bpe: PreTrainedTokenizerBase) -> None:
    """The scores of the model that ships depend on it."""
    config = DataConfig(max_bytes=1_000_000)
    expected = first_bytes_of_the_standard_library(config.max_bytes, config.held_out_frac)
    assert len(expected["held_out"]) > 1
    assert training_texts(config) == expected["train"]
    corpus = load_corpus(config, bpe)
    for split, texts in expected.items():
        tokens = [
            token for ids in bpe(texts, add_special_tokens=False)["input_ids"] for token in (*ids, bpe.eos_token_id)
        ]
        assert corpus.tokens(split).tolist() == tokens


@pytest.mark.parametrize(
    "text",
    ["".join(f"line {number} kores\n" for number in range(3000)), "line one\nline two kores\nline three\n",
     "kores " * 30_000, "kores" * 3_000],
    ids=["lines", "few lines", "one line", "one word"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["lone.txt", "folder/lone.txt"])
def test_a_lone_text_file_is_split_by_block(tmp_path: Path, bpe: PreTrainedTokenizerBase, name: str, text: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    corpus = load(path if path.parent == tmp_path else path.parent, bpe, held_out_frac=0.2)
    assert corpus.train_bytes + corpus.held_out_bytes == len(text)
    assert 0 < corpus.held_out_bytes < 0.6 * len(text)
    if len(text) > 10 * BLOCK_CHARACTERS:
        blocks = bpe.decode(corpus.train).split(bpe.eos_token)[:-1]
        assert {block[-1] for block in blocks} == {text[-1]}, "blocks end where a line or a word does"
        assert max(map(len, blocks)) <= BLOCK_CHARACTERS


@pytest.mark.parametrize("names", [("huge.txt", "small.txt"), ("small.txt", "huge.txt"), ("huge.jsonl", "small.txt")])
def test_a_file_beyond_max_bytes_leaves_room_for_another(tmp_path: Path, names: tuple[str, str]) -> None:
    """Whichever of the two comes first in hash order."""
    huge = "kores lutit\n" * 2000
    for name, text in zip(names, (huge, "banan") if "huge" in names[0] else ("banan", huge), strict=True):
        lines = [json.dumps({"text": line}) for line in text.splitlines()]
        (tmp_path / name).write_text("\n".join(lines) if name.endswith(".jsonl") else text)
    config = DataConfig(path=str(tmp_path), max_bytes=4096, held_out_frac=0.5)
    train = training_texts(config)
    assert sum(len(text.encode()) for text in train) <= 4096
    (tmp_path / names["small" in names[1]]).unlink()
    assert train == ["banan"] or train[0] == huge[: len(train[0])]


def test_one_record_beyond_max_bytes_leaves_room_for_another(tmp_path: Path, bpe: PreTrainedTokenizerBase) -> None:
    lines = [json.dumps({"text": text}) for text in ("kores " * 2000, "banan lutit")]
    (tmp_path / "two.jsonl").write_text("\n".join(lines))
    corpus = load(tmp_path / "two.jsonl", bpe, max_bytes=4096)
    assert sorted([corpus.train_bytes, corpus.held_out_bytes]) == [11, 2048]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("missing.txt", None, "does not exist: name a file or a folder"),
        ("table.csv", "a,b", "is not one of .txt, .jsonl, .parquet"),
        ("empty.txt", "  \n", "holds 0 documents with text"),
        ("bad.jsonl", '{"text": "x"}\n{"text"', "line 2 is not JSON"),
        ("column.jsonl", '{"body": "x"}', "line 1 has no text in 'text': set data.text_column"),
        ("list.jsonl", "[1]", "line 1 has no text in 'text'"),
        ("fake.parquet", "not parquet", "is not a parquet file"),
        ("half.jsonl", '{"text": "x"}\n\n{"text": "\\ud800 y"}', "line 3 has half of a surrogate pair"),
        ("latin.txt", b"caf\xe9", "is not UTF-8 text .byte 3.: convert it"),
    ],
)
def test_bad_data_is_one_readable_line(
    tmp_path: Path, bpe: PreTrainedTokenizerBase, name: str, content: str | bytes | None, complaint: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=complaint) as error:
        load(path, bpe)
    assert "\n" not in str(error.value)
    assert name in str(error.value)


def test_parquet_without_the_column_names_what_it_has(tmp_path: Path, bpe: PreTrainedTokenizerBase) -> None:
    path = write(tmp_path / "notes.parquet")
    with pytest.raises(DataError, match=r"has no column 'body', only id, text: set data\.text_column"):
        load(path, bpe, text_column="body")
    with pytest.raises(DataError, match="column 'id' holds int, not text"):
        load(path, bpe, text_column="id")


def test_empty_folder_and_a_single_document(tmp_path: Path, bpe: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="holds no file of type"):
        load(tmp_path, bpe)
    (tmp_path / "only.jsonl").write_text(json.dumps({"text": RECORDS[0]}))
    with pytest.raises(
        DataError, match=r"holds 1 documents with text.*give at least 2 files with text, or one file with"
    ):
        load(tmp_path, bpe)


@pytest.mark.parametrize("held_out_frac", [1e-9, 0.5, 1 - 1e-9])
def test_two_documents_are_enough(tmp_path: Path, bpe: PreTrainedTokenizerBase, held_out_frac: float) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"file {name} kores")
    corpus = load(tmp_path, bpe, held_out_frac=held_out_frac)
    sides = [bpe.decode(tokens, skip_special_tokens=True) for tokens in (corpus.train, corpus.held_out)]
    assert sorted(sides) == ["file one kores", "file two kores"]
