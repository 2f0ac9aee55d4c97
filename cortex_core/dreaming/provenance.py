"""Where every dream came from and what became of it: a line of JSON each, and the same as rows of a table."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cortex_core.dreaming.dream import Dream
from cortex_core.dreaming.judge import Verdict
from cortex_core.errors import ConfigError, DataError

Row = dict[str, Any]
Decode = Callable[[Sequence[int]], str]
COLUMNS = ("id", "asked", "lines", "prompt_text", "answer_text", "passed", "reasons")
"""What a table shows unless told otherwise."""
_BLOCK = 65_536


def row(dream: Dream, verdict: Verdict, decode: Decode | None = None) -> Row:
    """All of it, as JSON has it. With `decode`, also as text. Raises ConfigError for the verdict on another dream."""
    if verdict.dream_id != dream.id:
        raise ConfigError(f"the verdict is on dream {verdict.dream_id}, the dream is {dream.id}: pair them in order")
    found: Row = {
        "id": dream.id,
        "ticket": dream.ticket,
        "seed": dream.seed,
        "model_version": dream.model_version,
        "walk": list(dream.walk),
        "asked": dream.asked,
        "lines": list(dream.lines),
        "question": list(dream.question),
        "filler": list(dream.filler.tokens),
        "prompt": list(dream.prompt),
        "answer": list(dream.answer.tokens),
        "passed": verdict.passed,
        "verified": verdict.verified,
        "reasons": [str(reason) for reason in verdict.reasons],
        "scores": verdict.scores._asdict(),
    }
    return found if decode is None else with_text(found, decode)


def with_text(found: Row, decode: Decode) -> Row:
    """A row with its prompt and answer as text, too."""
    return found | {f"{name}_text": decode(found[name]) for name in ("prompt", "answer")}


def packed(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Rows as compressed lines. What was packed one after the other is, end to end, as if packed at once."""
    return gzip.compress(_lines(rows), mtime=0)


def unpacked(data: bytes) -> list[Row]:
    """What `packed` was given. Raises DataError for anything else."""
    try:
        return [json.loads(line) for line in gzip.decompress(data).splitlines()] if data else []
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"dreams: not packed lines of JSON ({error}); damaged") from error


def append(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a file of one writer, or begin it; they are on disk when this returns. What a crash has left of a
    line is taken out first."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.truncate(_whole(file))
        file.write(_lines(rows))
        file.flush()
        os.fsync(file.fileno())


def read(path: str | Path) -> list[Row]:
    """All rows; what a crash has left of a last line is passed over. Raises DataError: missing, damaged elsewhere."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"dreams {path}: there is no such file")
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"dreams {path}, line {number}: not a line of JSON ({error}); take it out") from error
        if not isinstance(rows[-1], dict):
            raise DataError(f"dreams {path}, line {number}: not a table but {type(rows[-1]).__name__}; take it out")
    return rows


def table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str] = COLUMNS, *, width: int = 40) -> str:
    """Rows to be read, one line each; long cells keep their end, where the question stands. Scores are columns too."""
    if width < 2:
        raise ConfigError(f"width = {width}: a column has at least 2 characters")
    cells = [list(columns), *([_cell(line, name, width) for name in columns] for line in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(size) for cell, size in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def _cell(line: Mapping[str, Any], name: str, width: int) -> str:
    found = line[name] if name in line else line.get("scores", {}).get(name)
    if isinstance(found, list):
        found = " ".join(map(str, found))
    elif isinstance(found, float):
        found = f"{found:.2f}"
    elif isinstance(found, bool):
        found = "yes" if found else "no"
    text = "" if found is None else "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(found))
    return text if len(text) <= width else "…" + text[1 - width :]


def _lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(dict(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()


def _whole(file: Any) -> int:
    """Bytes up to the end of the last whole line."""
    end = file.seek(0, os.SEEK_END)
    while end:
        first = max(0, end - _BLOCK)
        file.seek(first)
        found = file.read(end - first).rfind(b"\n")
        if found >= 0:
            return first + found + 1
        end = first
    return 0
