"""Real text as token arrays, split by file into a part to train on and a part that training never sees."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cortex_core.config import CORPUS_SUFFIXES, DataConfig
from cortex_core.errors import DataError
from cortex_core.tasks.vocabulary import IntArray, Split

SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
)
"""Left out of the standard library: installed packages, tests, and the encodings, which are tables."""
BLOCK_CHARACTERS = 4096
"""Longest of the blocks that a lone .txt is cut into, so that some can be held out."""
_BATCH = 64
_SURROGATE = re.compile("[\ud800-\udfff]")


class Document(NamedTuple):
    """One text."""

    unit: str
    """What it is held out with: its file, or the record or block alone where there is one file."""
    text: str


@dataclass(frozen=True)
class Corpus:
    """Token ids of both splits, documents one after another with the end-of-sequence token between them."""

    train: NDArray[np.int32] = field(repr=False)
    held_out: NDArray[np.int32] = field(repr=False)
    train_starts: IntArray = field(repr=False)
    """Where each training document starts, ascending, int64 [documents]."""
    held_out_starts: IntArray = field(repr=False)
    train_bytes: int
    """UTF-8 bytes of the training text."""
    held_out_bytes: int

    def tokens(self, split: Split) -> NDArray[np.int32]:
        """All tokens of a split, int32 [n]. Validation sets words aside, no text: its filler is that of training."""
        return self.held_out if split == "held_out" else self.train

    def excerpt(self, seed: tuple[int, ...], num_tokens: int, split: Split) -> IntArray:
        """`num_tokens` in a row from a random place, int64; past the end it starts over."""
        source = self.tokens(split)
        start = int(np.random.default_rng(list(seed)).integers(len(source)))
        if start + num_tokens <= len(source):
            return source[start : start + num_tokens].astype(np.int64)
        return np.take(source, np.arange(start, start + num_tokens), mode="wrap").astype(np.int64)


def load_corpus(config: DataConfig, tokenizer: Any) -> Corpus:
    """Read, split and tokenise the text that `config` names.

    Documents are taken in the order of a hash of their names, so `max_bytes` cuts a fair sample, the same one
    everywhere. Raises DataError when there is no text, or too little of it to hold some out.
    """
    parts = _split(config)
    train, train_starts = tokenize(parts["train"], tokenizer)
    held_out, held_out_starts = tokenize(parts["held_out"], tokenizer)
    return Corpus(
        train=train,
        held_out=held_out,
        train_starts=train_starts,
        held_out_starts=held_out_starts,
        train_bytes=sum(len(text.encode()) for text in parts["train"]),
        held_out_bytes=sum(len(text.encode()) for text in parts["held_out"]),
    )


def training_texts(config: DataConfig) -> list[str]:
    """The training documents' text: what a tokenizer may be trained on."""
    return _split(config)["train"]


def tokenize(texts: list[str], tokenizer: Any) -> tuple[NDArray[np.int32], IntArray]:
    """Token ids of all texts, each ended by the end-of-sequence token, int32 [n]; where each text starts."""
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    runs: list[NDArray[np.int32]] = []
    for first in range(0, len(texts), _BATCH):
        encoded = tokenizer(texts[first : first + _BATCH], add_special_tokens=False, verbose=False)["input_ids"]
        runs += [np.array([*ids, *separator], dtype=np.int32) for ids in encoded]
    starts = np.cumsum([0, *(len(run) for run in runs)])[:-1]
    tokens = np.concatenate(runs)
    if len(tokens) < 2:
        raise DataError("the text is too short: it makes fewer than 2 tokens")
    return tokens, starts.astype(np.int64)


def _split(config: DataConfig) -> dict[Split, list[str]]:
    """Texts of both splits. Names alone decide what is held out; at least one unit is on each side."""
    documents = list(_sample(config))
    shares = {document.unit: _hash(document.unit) for document in documents}
    if len(shares) < 2:
        raise DataError(
            f"corpus {_shown(config)} holds {len(shares)} documents with text, and some must be held "
            "out: give at least 2 files with text, or one file with 2 records or lines"
        )
    # Few documents may all fall on one side of the share: the nearest one then changes sides.
    bound = min(max(config.held_out_frac, min(shares.values()) + 1e-12), max(shares.values()))
    parts: dict[Split, list[str]] = {"train": [], "held_out": []}
    for document in documents:
        parts["held_out" if shares[document.unit] < bound else "train"].append(document.text)
    return parts


def _sample(config: DataConfig) -> Iterator[Document]:
    """Documents with text in hash order up to `max_bytes`; the last one is cut there.

    A first unit that alone would use up all of it is cut to half: there must be a second one to hold out.
    """
    left = config.max_bytes
    for unit, texts in _units(config):
        kept, size = _up_to(left, texts)
        if size == config.max_bytes:
            kept, size = _up_to(left // 2, kept)
        yield from (Document(unit, text) for text in kept)
        left -= size
        if left <= 0:
            return


def _units(config: DataConfig) -> Iterator[tuple[str, Iterable[str]]]:
    """Names and texts of what is held out together, in hash order of the files."""
    files = _files(config)
    for path, name in sorted(files, key=lambda item: _hash(f"order of {item[1]}")):
        texts = (text for text in _records(path, config.text_column, blocks=len(files) == 1) if text.strip())
        if len(files) > 1:
            yield name, texts
        else:
            yield from ((f"{name}:{number}", [text]) for number, text in enumerate(texts))


def _up_to(limit: int, texts: Iterable[str]) -> tuple[list[str], int]:
    """The first `limit` bytes of `texts`, and how many there are: `limit`, or fewer if that is all."""
    kept, left = [], limit
    for text in texts:
        raw = text.encode()
        kept.append(text if len(raw) <= left else raw[:left].decode(errors="ignore"))
        left -= len(raw)
        if left <= 0:
            return kept, limit
    return kept, limit - left


def _files(config: DataConfig) -> list[tuple[Path, str]]:
    """Files to read with the names that decide their split: relative, so a folder may move."""
    if config.path is None:
        root = Path(sysconfig.get_path("stdlib"))
        found = list(_python_files(root))
    else:
        root = Path(config.path)
        if root.is_file():
            if root.suffix not in CORPUS_SUFFIXES:
                raise DataError(f"data.path = {config.path} is not one of {', '.join(CORPUS_SUFFIXES)}")
            return [(root, root.name)]
        if not root.is_dir():
            raise DataError(f"data.path = {config.path} does not exist: name a file or a folder")
        found = [path for path in root.rglob("*") if path.suffix in CORPUS_SUFFIXES and path.is_file()]
    if not found:
        raise DataError(f"corpus {_shown(config)} holds no file of type {', '.join(CORPUS_SUFFIXES)}")
    return [(path, path.relative_to(root).as_posix()) for path in found]


def _python_files(root: Path) -> Iterator[Path]:
    """Of a Python installation, without looking into the folders to skip: site-packages hold tens of thousands."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _records(path: Path, column: str, *, blocks: bool) -> Iterator[str]:
    """Texts of one file, lazily; a .txt is one text, or `blocks` of it. Raises DataError with file and line."""
    try:
        match path.suffix:
            case ".jsonl":
                yield from _jsonl(path, column)
            case ".parquet":
                yield from _parquet(path, column)
            case _:
                # A user's file must be right; in a Python installation one odd file is no reason to stop.
                text = path.read_text(encoding="utf-8", errors="replace" if path.suffix == ".py" else "strict")
                yield from _blocks(text) if blocks else [text]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}): convert it") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def _blocks(text: str) -> Iterator[str]:
    """The text in pieces of whole lines; a line that is too long is cut at a space."""
    shortest, start = max(min(BLOCK_CHARACTERS // 2, len(text) // 10), 1), 0
    while start < len(text):
        end = start + shortest
        if end < len(text):
            line = text.find("\n", end - 1, start + BLOCK_CHARACTERS)
            end = line + 1 or text.rfind(" ", start, end) + 1 or end
        yield text[start:end]
        start = end


def _jsonl(path: Path, column: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path} line {number} is not JSON: {error.msg}") from None
            if not isinstance(record, dict) or not isinstance(record.get(column), str):
                raise DataError(f"{path} line {number} has no text in {column!r}: set data.text_column")
            if _SURROGATE.search(record[column]):
                raise DataError(f"{path} line {number} has half of a surrogate pair (\\ud800 to \\udfff): remove it")
            yield record[column]


def _parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow as arrow  # slow to import, and only this format needs it
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
    except arrow.ArrowInvalid as error:
        raise DataError(f"{path} is not a parquet file: {str(error).splitlines()[0]}") from None
    if column not in file.schema_arrow.names:
        names = ", ".join(file.schema_arrow.names)
        raise DataError(f"{path} has no column {column!r}, only {names}: set data.text_column")
    for batch in file.iter_batches(batch_size=1024, columns=[column]):
        for text in batch.column(0).to_pylist():
            if text is not None and not isinstance(text, str):
                raise DataError(f"{path} column {column!r} holds {type(text).__name__}, not text: set data.text_column")
            yield text or ""


def _hash(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64


def _shown(config: DataConfig) -> str:
    return "of the standard library" if config.path is None else config.path
