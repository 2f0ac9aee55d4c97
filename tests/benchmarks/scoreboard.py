"""`python -m tests.benchmarks.scoreboard [ROW,ROW ...]` (`make scoreboard ROW=…`): measures anew what is claimed.

Prints one JSON line per row as soon as it is measured, then all rows as a table. Not part of the tests: it judges
quality, they judge correctness. Exit codes: 0 all was measured (met or missed), 1 a row could not be measured, 2 wrong
input (one line says what), 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator, Sequence, Set
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, NoReturn

from cortex_core.errors import ConfigError, DataError, IncompatibleError
from pipelines.explain import nearest
from tests.benchmarks import async_actors, kills, train_kills
from tests.benchmarks.child import ROOT
from tests.benchmarks.row import Row, table
from tests.benchmarks.rows import (
    associative_recall,
    codes,
    continual,
    cost,
    far,
    gpu,
    machinery,
    needles,
    optim,
    overhead,
    plan,
    ranks,
    recall,
    safety,
    scales,
    seeds,
    sharding,
    sleep,
    speed,
    startup,
    sweep,
    tasks,
    text,
    unfreezing,
    wallclock,
    worlds,
)
from tests.benchmarks.rows.demo import Demo

Measure = Callable[[Demo, Set[str]], Iterator[Row]]


class Measurement(NamedTuple):
    """Rows that are measured together."""

    measure: Measure
    """Yields the rows that are wanted (it may yield others). Its docstring says how."""
    names: tuple[str, ...]
    group: str
    needs_run: bool = True


def _one(measure: Measure, group: str, *, needs_run: bool = True) -> Measurement:
    return Measurement(measure, (measure.__name__,), group, needs_run)


MEASUREMENTS = (
    Measurement(recall.recall_by_gap, recall.RECALL_ROWS, "recall"),
    _one(recall.bare_beyond_window, "recall"),
    _one(recall.cut_question_recall, "recall"),
    _one(recall.in_window_recall_loss_points, "recall"),
    Measurement(associative_recall.associative_recall, associative_recall.ROWS, "mqar", needs_run=False),
    Measurement(safety.forgetting_one_fact, safety.FORGET_ROWS, "safety"),
    Measurement(safety.int8_sessions, safety.INT8_ROWS, "safety"),
    _one(cost.text_perplexity_drift_percent, "cost"),
    _one(cost.evaluation_peak_memory_ratio, "cost"),
    _one(cost.memory_overhead_ratio, "cost"),
    Measurement(overhead.overhead_of_a_large_model, overhead.ROWS, "overhead", needs_run=False),
    Measurement(sharding.sharding_of_the_demo, sharding.DEMO_ROWS, "sharding"),
    Measurement(sharding.sharding_of_a_deep_model, sharding.DEEP_ROWS, "sharding", needs_run=False),
    Measurement(plan.plan_error_percent, plan.ROWS, "plan", needs_run=False),
    _one(speed.pipeline_throughput_ratio, "speed"),
    _one(speed.chunk_vs_oracle_speedup, "speed", needs_run=False),
    Measurement(
        speed.chunk_vs_transformers_speedup,
        ("chunk_vs_transformers_speedup", "chunk_vs_transformers_speedup_forward"),
        "speed",
        needs_run=False,
    ),
    _one(speed.decode_after_long_text_ratio, "speed"),
    Measurement(
        speed.backward_bytes, ("backward_bytes_growth", "backward_bytes_oracle_over_chunk"), "speed", needs_run=False
    ),
    Measurement(needles.needles, needles.ROWS, "needles"),
    Measurement(far.a_million_tokens, far.ROWS, "million"),
    _one(text.long_files_bits_saved_percent, "text"),
    Measurement(seeds.recall_over_seeds, seeds.ROWS, "seeds"),
    Measurement(ranks.recall_by_rank, ranks.ROWS, "ranks"),
    Measurement(tasks.recall_of_tasks, tasks.ROWS, "tasks"),
    Measurement(worlds.stories_of_a_small_world, worlds.ROWS, "worlds"),
    Measurement(gpu.kernel_and_flash_linear_attention, gpu.KERNEL_ROWS, "gpu", needs_run=False),
    Measurement(gpu.overhead_on_a_gpu, gpu.MODEL_ROWS, "gpu", needs_run=False),
    _one(machinery.pipeline_step_over_ddp, "machinery"),
    _one(machinery.sharded_step_over_replicated, "machinery"),
    Measurement(machinery.checkpoints, machinery.CHECKPOINT_ROWS, "machinery"),
    Measurement(machinery.loading_shard_by_shard, machinery.LOADING_ROWS, "machinery", needs_run=False),
    Measurement(startup.startup, startup.ROWS, "startup", needs_run=False),
    Measurement(async_actors.training_beside_actors, async_actors.ROWS, "actors", needs_run=False),
    Measurement(kills.two_hundred_kills, kills.ROWS, "kills", needs_run=False),
    Measurement(train_kills.two_hundred_kills_of_a_training, train_kills.ROWS, "train-kills", needs_run=False),
    Measurement(sweep.sweep_killed_and_restored, sweep.KILLED_ROWS, "sweep", needs_run=False),
    Measurement(sweep.sweep_overhead_ratio, (sweep.OVERHEAD_ROW,), "sweep", needs_run=False),
    Measurement(sleep.lives_of_facts, sleep.LIFE_ROWS, "sleep"),
    Measurement(sleep.dreams_for_lessons, sleep.DREAM_ROWS, "dreams"),
    Measurement(codes.segment_codes, codes.ROWS, "codes"),
    Measurement(unfreezing.facts_in_the_backbone, unfreezing.ROWS, "unfreezing"),
    Measurement(continual.tasks_one_after_the_other, continual.ROWS, "continual", needs_run=False),
    Measurement(scales.six_scales, scales.ROWS, "scales", needs_run=False),
    Measurement(scales.five_predictions, scales.PREDICTION_ROWS, "scales", needs_run=False),
    Measurement(optim.perplexity, optim.PERPLEXITY_ROWS, "optim", needs_run=False),
    Measurement(optim.cost, optim.COST_ROWS, "optim", needs_run=False),
    Measurement(wallclock.wall_clock, wallclock.ROWS, "wallclock", needs_run=False),
)
OPT_IN = (
    "wallclock",
    "sweep",
    "kills",
    "train-kills",
    "million",
    "seeds",
    "ranks",
    "tasks",
    "worlds",
    "text",
    "gpu",
    "optim",
    "dreams",
    "continual",
    "scales",
)
"""Groups that are measured only when they are named: they take the better part of an hour, or need other runs or a GPU."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. See --help")


QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DS_ACCELERATOR": "cpu",  # transformers imports deepspeed, which would say that it found no GPU
}


def main(argv: Sequence[str] | None = None, measurements: Sequence[Measurement] = MEASUREMENTS) -> int:
    """Measure, print, return the exit code."""
    try:
        given = _parser().parse_args(argv)
        if given.list:
            print(listing(measurements))
            return 0
        wanted = chosen(given.rows, measurements)
        demo = Demo(Path(given.run).absolute())
        if any(m.needs_run for m in measurements if wanted & {*m.names}):
            demo.check()
    except (ConfigError, DataError, IncompatibleError) as error:
        print(f"scoreboard: {error}", file=sys.stderr)
        return 2
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    rows: list[Row] = []
    code = 0
    try:
        for row in measured(demo, wanted, measurements):
            if row is None:
                code = 1
                continue
            rows.append(row)
            print(row.json(), flush=True)
    except KeyboardInterrupt:
        code = 130
    print("\n" + table(rows))
    if given.out:
        Path(given.out).write_text(json.dumps(document(rows, demo), indent=2) + "\n")
    return code


def chosen(texts: Sequence[str], measurements: Sequence[Measurement]) -> set[str]:
    """Names of rows and groups, separated by commas or blanks, to names of rows; nothing is all that is not opt-in.

    Raises ConfigError for a name that is neither.
    """
    groups: dict[str, set[str]] = {}
    for measurement in measurements:
        groups.setdefault(measurement.group, set()).update(measurement.names)
    rows = set().union(*groups.values())
    names = [name for text in texts for name in text.replace(",", " ").split()]
    found: set[str] = set()
    for name in names:
        if name not in rows and name not in groups:
            close = nearest(name, [*rows, *groups])
            raise ConfigError(
                f"{name}: no such row" + (f", did you mean {close}" if close else "") + "? --list names all"
            )
        found |= groups.get(name, {name})
    return found if names else set().union(*(names for group, names in groups.items() if group not in OPT_IN))


def measured(demo: Demo, wanted: Set[str], measurements: Sequence[Measurement]) -> Iterator[Row | None]:
    """The wanted rows, timed; None for a measurement that failed, whose traceback goes to stderr."""
    for measurement in measurements:
        mine = wanted & {*measurement.names}
        if not mine:
            continue
        print(f"measuring {_title(measurement)}", file=sys.stderr, flush=True)
        since, missing = time.perf_counter(), set(mine)
        try:
            for row in measurement.measure(demo, mine):
                now = time.perf_counter()
                if row.name in missing:
                    missing.remove(row.name)
                    yield dataclasses.replace(row, seconds=row.seconds or now - since)
                since = now
        except Exception:
            traceback.print_exc()
            print(f"scoreboard: {', '.join(sorted(missing))} could not be measured", file=sys.stderr)
            yield None


def listing(measurements: Sequence[Measurement]) -> str:
    """Every row under its group, with the first line of how it is measured."""
    lines, group = [], ""
    for measurement in measurements:
        if measurement.group != group:
            group = measurement.group
            lines.append(f"{group}" + (" (only when named)" if group in OPT_IN else ""))
        doc = (measurement.measure.__doc__ or "").strip().splitlines()[0]
        names = textwrap.wrap(" ".join(measurement.names), 100, break_on_hyphens=False)
        lines += [f"  {doc}", *(f"    {line}" for line in names)]
    return "\n".join(lines)


def document(rows: Sequence[Row], demo: Demo) -> dict[str, object]:
    """What `--out` writes: the rows, and of what and when they are."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "schema": "cortex-scoreboard/1",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": git.stdout.strip() or None,
        "run": demo.folder.name,
        "cpus": os.cpu_count(),
        "gpu": _gpu(),
        "rows": [json.loads(row.json()) for row in rows],
    }


def _gpu() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    versions = {name: getattr(sys.modules.get(name), "__version__", None) for name in ("torch", "triton", "fla")}
    named = [f"{name} {version}" for name, version in versions.items() if version]
    return ", ".join([torch.cuda.get_device_name(), *named])


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="scoreboard", description=(__doc__ or "").split("\n\n")[1], allow_abbrev=False)
    parser.add_argument(
        "rows", nargs="*", metavar="ROW,ROW", help="rows or groups; without any, all but " + " and ".join(OPT_IN)
    )
    parser.add_argument("--list", action="store_true", help="name every row and how it is measured")
    parser.add_argument("--run", default="runs/demo", metavar="FOLDER", help="a finished run [runs/demo]")
    parser.add_argument("--out", metavar="FILE", help="also write all rows to this JSON file")
    return parser


def _title(measurement: Measurement) -> str:
    return measurement.measure.__name__.replace("_", " ")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the processes that it started end with it
    sys.exit(main())
