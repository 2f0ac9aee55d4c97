"""From `--data` to examples: a file, a folder, a zip archive, or a data set of the hub."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cortex_core.errors import ConfigError, DataError
from cortex_core.eval.benchmarks.babilong import BABILONG
from cortex_core.eval.benchmarks.example import Benchmark, Example, Place, Selection, Source, by_size
from cortex_core.eval.benchmarks.longbench import LONGBENCH
from cortex_core.eval.benchmarks.longmemeval import LONGMEMEVAL
from cortex_core.eval.benchmarks.records import Part, members

BENCHMARKS: dict[str, Benchmark] = {"longbench": LONGBENCH, "babilong": BABILONG, "longmemeval": LONGMEMEVAL}
HUB = "hub:"
"""What begins the id of a data set on the hub."""
_SUFFIXES = (".json", ".jsonl", ".parquet", ".zip")


@dataclass(frozen=True)
class Catalogue:
    """What is to be asked: `open_benchmark` makes it."""

    benchmark: Benchmark
    data: str
    sources: tuple[Source, ...]
    asked: Selection
    """As given."""
    selection: Selection
    """What is read: `asked`, filled up with the defaults of the hub if the data come from there."""

    def examples(self) -> Iterator[Example]:
        """The selected ones, lazily, in order of the files' names. Raises DataError with file and place."""
        taken: Counter[tuple[str | None, str | None]] = Counter()
        for source in self.sources:
            if self.selection.wants(*source.place):
                for example in self._each(source):
                    group = example.task, example.length
                    if self.selection.wants(*group) and taken[group] != self.selection.limit:
                        taken[group] += 1
                        yield example
                    if taken[source.place] == self.selection.limit:
                        break  # all that it has is of one group: the rest need not be read

    def keys(self) -> list[str]:
        """Keys of the selected examples. Reads everything once, so that what is broken is told before a model runs.

        Raises DataError, and ConfigError if something was selected that is not there.
        """
        seen: set[tuple[str | None, str | None]] = {source.place for source in self.sources}
        keys = []
        for example in self.examples():
            seen.add((example.task, example.length))
            keys.append(example.key)
        for option, asked, column in (("--task", self.asked.tasks, 0), ("--length", self.asked.lengths, 1)):
            there = sorted({name for pair in seen if (name := pair[column])}, key=by_size)
            for name in asked:
                if name not in there:
                    known = f"It has: {', '.join(there)}" if there else "Leave the option out"
                    raise ConfigError(f"{option} {name}: {self.data} has none of {self.benchmark.title}. {known}")
        if not keys:
            raise DataError(f"--data = {self.data}: no example of {self.benchmark.title} is selected, or in it")
        return keys

    def _each(self, source: Source) -> Iterator[Example]:
        """Those of one source. A key that comes again is numbered: each example is asked."""
        times: Counter[str] = Counter()
        for example in self.benchmark.examples(source):
            times[example.key] += 1
            again = times[example.key]
            yield example if again == 1 else example._replace(key=f"{example.key}#{again}")


def open_benchmark(name: str, data: str, selection: Selection) -> Catalogue:
    """Find, or fetch from the hub, the files of the benchmark `name`. No file is read yet but the list in an archive.

    Raises DataError (nothing there, nothing of this benchmark, no network), ConfigError (a task that it does not have).
    """
    benchmark, asked = BENCHMARKS[name], selection
    for task in selection.tasks:
        if task not in benchmark.tasks:
            known = ", ".join(sorted(benchmark.tasks, key=by_size))
            raise ConfigError(f"--task {task}: {benchmark.title} has no such task. It has: {known}")
    if data.startswith(HUB):
        default = benchmark.hub_default
        selection = Selection(asked.tasks or default.tasks, asked.lengths or default.lengths, asked.limit)
        root = _fetch(data, benchmark.hub_files(selection))
    else:
        root = Path(data).expanduser()
        if not root.exists():
            raise DataError(
                f"--data = {data}: no such file or folder. Give what you have downloaded, or {HUB}{benchmark.hub}"
            )
    sources = _sources(root, benchmark)
    if not sources:
        raise DataError(
            f"--data = {data}: has no file named as {benchmark.title} is published. Compare {HUB}{benchmark.hub}"
        )
    return Catalogue(benchmark, data, sources, asked, selection)


def _sources(root: Path, benchmark: Benchmark) -> tuple[Source, ...]:
    """Files by what they hold, in the order of their names."""
    if root.is_file() and root.suffix.lower() not in (*_SUFFIXES, ""):
        raise DataError(f"--data = {root} is not one of {', '.join(_SUFFIXES)}, or a folder")
    if root.is_file() and root.suffix.lower() != ".zip":
        part = Part(root)
        return (Source(benchmark.place(part.name) or Place(), (part,)),)
    # What lies there twice, unpacked and packed or in two formats, is read once: a folder and a type make a copy.
    copies: dict[Place, tuple[tuple[bool, Path, str], list[Part]]] = {}
    for part in _parts(root):
        place = benchmark.place(part.name)
        if place is not None:
            packed = part.member is not None
            copy = packed, part.path if packed else part.path.parent, part.suffix
            kept = copies.setdefault(place, (copy, []))
            if kept[0] == copy:
                kept[1].append(part)
    order = sorted(copies.items(), key=lambda item: [by_size(name or "") for name in item[0]])
    return tuple(Source(place, tuple(parts)) for place, (_, parts) in order)


def _parts(root: Path) -> Iterator[Part]:
    """All files under a folder, archives last; hidden folders are left out: they hold what a download left over."""
    files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
    files = [path for path in files if not any(name.startswith(".") for name in path.relative_to(root).parts)]
    yield from (Part(path) for path in files if path.suffix.lower() != ".zip")
    for path in files:
        if path.suffix.lower() == ".zip":
            yield from members(path)


def _fetch(data: str, patterns: list[str]) -> Path:
    """The folder of a hub data set in the local cache, after fetching the files that are missing. Raises DataError."""
    from huggingface_hub import errors, snapshot_download  # slow to import, and only this way needs it

    name, _, revision = data.removeprefix(HUB).partition("@")
    try:
        folder = snapshot_download(name, repo_type="dataset", revision=revision or None, allow_patterns=patterns)
    except errors.HFValidationError:
        raise DataError(f"--data = {data}: not an id of the hub. Write {HUB}owner/name, or a path") from None
    except errors.LocalEntryNotFoundError:
        raise DataError(
            f"--data = {data}: not in the cache, and the hub cannot be reached. Go online, or give a folder"
        ) from None
    except errors.GatedRepoError:
        raise DataError(
            f"--data = {data}: access has to be asked for on its page; then log in: hf auth login"
        ) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise DataError(f"--data = {data}: the hub has no such data set or revision, or it is private") from None
    except Exception as error:  # of the HTTP library, another one in each version
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"--data = {data}: cannot be fetched ({reason[0]}). Try again: what has come is kept") from None
    return Path(folder)
