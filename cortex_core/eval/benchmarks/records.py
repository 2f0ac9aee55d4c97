"""Records of a file, one at a time: JSON lines, a JSON list, parquet, or JSON in a zip archive. Nothing is unpacked to
disk, and no code in a file is ever run.

A published file may hold gigabytes, and a single record tens of megabytes: only one record is in memory at once.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from cortex_core.errors import DataError

BLOCK_CHARACTERS = 1 << 20
"""Characters of a JSON list that are read at once; doubled while a record goes on."""
MAX_RECORD_CHARACTERS = 1 << 28
"""Longest record that is accepted, five times the longest published one (10 million tokens): a broken or hostile file
ends in a message instead of filling the memory."""
_BETWEEN = re.compile(r"[\s,]*")
_SURROGATE = re.compile("[\ud800-\udfff]")
_LONGEST_BROKEN_OFF = 16  # characters from the start of a literal or an escape to where a block may have cut it


class Record(NamedTuple):
    """One record as it was published, and where it stands. The methods return a field or raise DataError."""

    where: str
    """File and line, row or number: how an error begins."""
    values: dict[str, Any]

    def text(self, name: str) -> str:
        """A text, which may be empty."""
        return self._checked(name, self.values.get(name))

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts; missing or null is none."""
        values = self.values.get(name)
        if values is not None and not isinstance(values, list):
            raise DataError(f"{self.where} has {type(values).__name__} in {name!r}, expected a list of texts")
        return tuple(self._checked(name, value) for value in values or ())

    def number(self, name: str) -> int:
        """A whole number."""
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise DataError(f"{self.where} has no whole number in {name!r}: is it a file of another benchmark?")
        return value

    def _checked(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise DataError(f"{self.where} has no text in {name!r}: is it a file of another benchmark?")
        if _SURROGATE.search(value):
            raise DataError(f"{self.where} has half of a surrogate pair (\\ud800 to \\udfff) in {name!r}: remove it")
        return value


class Part(NamedTuple):
    """A file, or one member of a zip archive."""

    path: Path
    member: str | None = None

    @property
    def name(self) -> str:
        """What its content is told from: the member's name, or the last three parts of the path."""
        return self.member or PurePosixPath(*self.path.absolute().parts[-3:]).as_posix()

    @property
    def suffix(self) -> str:
        """With the dot, lower-cased; empty if there is none."""
        return PurePosixPath(self.name).suffix.lower()

    def __str__(self) -> str:
        return f"{self.path}:{self.member}" if self.member else str(self.path)


def members(archive: Path) -> list[Part]:
    """The files in a zip archive, in order of their names. Raises DataError."""
    with _readable(str(archive)), zipfile.ZipFile(archive) as opened:
        names = sorted(info.filename for info in opened.infolist() if not info.is_dir())
    return [Part(archive, name) for name in names if not name.startswith("__MACOSX/")]


def records(part: Part) -> Iterator[Record]:
    """Records of `part`, lazily. Raises DataError with the file and the line, row or number."""
    with _readable(str(part)):
        if part.suffix == ".parquet":
            yield from _parquet(part.path)
            return
        with _text(part) as stream:
            yield from (_lines if part.suffix == ".jsonl" else _json)(stream, str(part))


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """What a broken file raises, as one line."""
    try:
        yield
    except UnicodeDecodeError:
        raise DataError(f"{name} is not UTF-8 text: convert it, or download it again") from None
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(f"{name} is not a whole zip archive ({error}): download it again") from None
    except (RuntimeError, NotImplementedError) as error:  # zipfile: a password, a compression that it does not know
        raise DataError(f"{name} cannot be unpacked ({error}): unpack it, and give the folder") from None
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror or error}") from None


@contextmanager
def _text(part: Part) -> Iterator[io.TextIOWrapper]:
    if part.member is None:
        with part.path.open(encoding="utf-8-sig") as stream:
            yield stream
        return
    with (
        zipfile.ZipFile(part.path) as archive,
        archive.open(part.member) as raw,
        io.TextIOWrapper(raw, encoding="utf-8-sig") as stream,
    ):
        yield stream


def _lines(stream: io.TextIOWrapper, name: str) -> Iterator[Record]:
    number = 0
    while line := stream.readline(MAX_RECORD_CHARACTERS + 1):
        number += 1
        where = f"{name} line {number}"
        _check_length(len(line), where)
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _not_json(where, error) from None
        yield _record(value, where)


def _json(stream: io.TextIOWrapper, name: str) -> Iterator[Record]:
    """Records of a JSON list, or of JSON objects one after another."""
    decoder, text, number, block = json.JSONDecoder(), stream.read(BLOCK_CHARACTERS), 0, BLOCK_CHARACTERS
    at = _skip(text, 0)
    listed = text.startswith("[", at)
    at = _skip(text, at + listed)
    while True:
        where = f"{name} record {number + 1}"
        if listed and text.startswith("]", at):
            return
        if at < len(text):
            try:
                value, end = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                if not _broken_off(error, text):
                    raise _not_json(where, error) from None
            else:
                yield _record(value, where)
                number, at, block = number + 1, _skip(text, end), BLOCK_CHARACTERS
                continue
        _check_length(len(text) - at, where)
        more = stream.read(block)
        if not more:
            if listed or at < len(text):
                raise DataError(f"{where} breaks off, the file ends there: download it again")
            return
        text, block = text[at:] + more, 2 * block  # doubled: each record is scanned about twice, however long
        at = _skip(text, 0)


def _skip(text: str, at: int) -> int:
    """Where the next value begins."""
    found = _BETWEEN.match(text, at)
    return found.end() if found else at


def _broken_off(error: Exception, text: str) -> bool:
    """Whether the JSON may just go on after the end of `text`."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip()) - _LONGEST_BROKEN_OFF


def _record(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{where} is not a JSON object: is it a file of another benchmark?")
    return Record(where, value)


def _check_length(characters: int, where: str) -> None:
    if characters > MAX_RECORD_CHARACTERS:
        raise DataError(f"{where} is longer than {MAX_RECORD_CHARACTERS} characters: no published record is")


def _not_json(where: str, error: Exception) -> DataError:
    reason = "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", str(error))
    return DataError(f"{where} is not JSON: {reason}")


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow as arrow  # slow to import, and only this format needs it
    import pyarrow.parquet as parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=16):  # few: rows may be long
            for values in batch.to_pylist():
                number += 1
                yield Record(f"{path} row {number}", values)
    except arrow.ArrowException as error:
        raise DataError(
            f"{path} is not a whole parquet file ({str(error).splitlines()[0]}): download it again"
        ) from None
