"""`cortex bench`: a public long-context benchmark, asked of a memory and of the bare model, example by example.

Answers are written as they come, so an interrupted run goes on where it stopped. No Ray: one model, in this process.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cortex_core.errors import ConfigError, DataError
from cortex_core.eval.benchmarks.example import Selection
from cortex_core.eval.benchmarks.sources import HUB, Catalogue, open_benchmark
from pipelines.preflight import backbone_folder, check_folder, described_backbone

if TYPE_CHECKING:
    from rich.console import Console

    from cortex_core.backbone.model import Cortex
    from cortex_core.eval.benchmarks.ask import Limits

MODEL, SIDECARS = "builtin:stdlib-1m", "builtin:stdlib-1m/sidecars"
PLAIN_EVERY_S = 10.0
"""Seconds between lines where there is no terminal to draw a bar on."""

Say = Callable[[float, str], None]
"""Told how many examples are done, parts included, and what is being read."""


class Request(NamedTuple):
    """What the command line asks for."""

    name: str
    """Key of `sources.BENCHMARKS`."""
    data: str
    model: str | None = None
    sidecars: str | None = None
    selection: Selection = Selection()
    window: int | None = None
    """Most tokens that the bare model sees; None is a segment."""
    out: str | None = None


def run(request: Request) -> int:
    """Ask what has no answer yet, print and write the scores. Returns the exit code.

    Raises DataError, ConfigError, IncompatibleError. The data are read through once before the model is loaded.
    """
    out = Path(request.out).expanduser() if request.out else Path("runs") / "bench" / request.name
    check_folder(out, f"--out {out}", "Give another folder")
    _check_model(request)
    catalogue = open_benchmark(request.name, request.data, request.selection)

    from rich.console import Console
    from rich.markup import escape

    console = Console(width=None if sys.stdout.isatty() else 120)
    with console.status(f"Reading {escape(request.data)}"):
        keys = catalogue.keys()

    from cortex_core.eval.benchmarks import ask, results

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, highlight=False, markup=False)

    say(f"{catalogue.benchmark.title}: {len(keys)} examples in {request.data}")
    say(f"Loading {request.model or MODEL}")
    model, tokenizer = _load(request.model or MODEL, request.sidecars or SIDECARS)
    limits = ask.limits(model, request.window)
    results.check_settings(out, _settings(request, limits.window) | model.identity())
    answers = results.read_answers(out)
    missing = {key for key in keys if key not in answers}
    if len(missing) < len(keys):
        say(f"{len(keys) - len(missing)} of them answered before, in {out}")
    with _progress(console, len(missing)) as done:
        for row in _ask(catalogue, missing, model, tokenizer, limits, done):
            results.add_answer(out, row)
            answers[row["key"]] = row
    _report(request, [answers[key] for key in keys], out, console)
    return 0


def _check_model(request: Request) -> None:
    """What can be told about the model and its memory from their folders, without loading them."""
    if request.model is not None and request.sidecars is None:  # an untrained memory changes no answer
        raise ConfigError(
            f"--model {request.model}: needs --sidecars, the folder of a memory trained for it. "
            f"Train one: cortex train demo name=mine backbone.name={request.model}"
        )
    described_backbone(request.model or MODEL, f"--model {request.model or MODEL}")
    sidecars = request.sidecars or SIDECARS
    folder = backbone_folder(sidecars) or Path(sidecars)
    if not (folder / "cortex.json").is_file():
        state = "has no cortex.json" if folder.is_dir() else "no such folder"
        raise DataError(f"--sidecars {sidecars}: {state}. Give what cortex train wrote: runs/NAME/sidecars")


def _settings(request: Request, window: int) -> dict[str, Any]:
    """What answers in one folder have in common, with the model's fingerprints."""
    local = Path(request.data).expanduser().absolute()
    data = request.data if request.data.startswith(HUB) else str(local)
    return {"benchmark": request.name, "data": data, "window": window}


def _load(name: str, sidecars: str) -> tuple[Cortex, Any]:
    import torch
    from transformers.utils import logging

    from cortex_core.backbone.load import load_tokenizer
    from cortex_core.backbone.model import Cortex
    from cortex_core.config import BackboneConfig

    logging.disable_progress_bar()
    model = Cortex.from_pretrained(name, sidecars=sidecars)
    if torch.cuda.is_available():
        model.to("cuda")
    return model, load_tokenizer(BackboneConfig(name=name))


def _ask(
    catalogue: Catalogue, missing: set[str], model: Cortex, tokenizer: Any, limits: Limits, say: Say
) -> Iterator[dict[str, Any]]:
    """The line of each example that is missing, once it has been asked."""
    from cortex_core.eval.benchmarks.ask import ask
    from cortex_core.eval.benchmarks.measures import scores

    done = 0
    for example in catalogue.examples() if missing else ():
        if example.key not in missing:
            continue
        task, what = catalogue.benchmark.tasks[example.task], f"{example.task} {example.length}"

        def on_progress(read_frac: float, done: int = done, what: str = what) -> None:
            say(done + min(read_frac, 0.99), what)

        found = ask(model, tokenizer, example, task, limits, on_progress)
        memory, bare = scores(found.memory, example, task), scores(found.bare, example, task)
        done += 1
        say(done, what)
        yield {
            "key": example.key, "id": example.id, "task": example.task, "length": example.length,
            "question": example.question, "answers": example.answers,
            "memory": found.memory, "bare": found.bare,
            "prompt_tokens": found.prompt_tokens, "bare_tokens": found.bare_tokens,
            "scores": {name: {"memory": memory[name], "bare": bare[name]} for name in memory},
        }  # fmt: skip
        if done == len(missing):
            return


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Say]:
    """A bar on a terminal, a line now and then anywhere else."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(24), TaskProgressColumn(), TimeRemainingColumn()
    said = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("asking", total=total or 1)

        def say(done: float, what: str) -> None:
            nonlocal said
            bar.update(task, completed=done, description=what)
            if not console.is_terminal and time.monotonic() - said >= PLAIN_EVERY_S:
                said = time.monotonic()
                console.print(f"{int(done)} of {total} asked, {done % 1:.0%} of the next read: {what}", highlight=False)

        yield say


def _report(request: Request, answers: list[dict[str, Any]], out: Path, console: Console) -> None:
    """Scores on the terminal and on disk."""
    from rich import box
    from rich.table import Table

    from cortex_core.eval.benchmarks import results

    rows = results.summarize(answers)
    summary = results.write_summary(out, rows)
    table = Table(title="Mean score and 95 % interval", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("task", "length", "measure"):
        table.add_column(name, no_wrap=True)
    for name in ("n", "memory", "bare, last window", "difference"):
        table.add_column(name, justify="right")
    for row in rows:
        means = [_shown(row[name]) for name in ("memory", "bare", "difference")]
        table.add_row(row["task"], row["length"], row["measure"], str(row["n"]), *means)
    console.print(table)
    files = [("Scores", f"{summary}, {', '.join(results.TABLES)}"), ("Answers", str(out / results.ANSWERS))]
    if request.name == "longmemeval":
        files += [("For the official judge", str(path)) for path in results.write_hypotheses(out, answers)]
    for title, path in files:
        console.print(f"{title:<9} {path}", soft_wrap=True, highlight=False, markup=False)


def _shown(mean: dict[str, float]) -> str:
    return f"{mean['value']:.3f} [dim]{mean['low']:.2f}…{mean['high']:.2f}[/dim]"
