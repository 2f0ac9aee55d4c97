"""The tables of docs/plan.md are what `cortex plan` says today, of published shapes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from pipelines import plan_options
from pipelines.config import load_config, located
from pipelines.plan import Plan, Planner

ROOT = Path(__file__).parents[2]
PAGE, SHAPES = ROOT / "docs" / "plan.md", "tests/pipelines/shapes"
ROWS, SEGMENT = 2, 1024


class Case(NamedTuple):
    """A line of the page."""

    shape: str
    title: str
    cluster: tuple[str, ...]
    overrides: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        """Of `cortex plan`."""
        nodes, gpus = (int(number) for number in (self.cluster[1], self.cluster[3]))
        settings = {
            "backbone.name": f"{SHAPES}/{self.shape}",
            "backbone.segment_tokens": SEGMENT,
            "training.batch_size": ROWS * nodes * gpus,
            "training.in_window_batch_size": nodes * gpus,
        }
        return ["demo", *(f"{name}={value}" for name, value in settings.items()), *self.overrides, *self.cluster]


CLUSTERS = {
    "1 x 8 H100": ("--nodes", "1", "--gpus-per-node", "8"),
    "2 x 8 H100": ("--nodes", "2", "--gpus-per-node", "8"),
    "4 x RTX 4090": ("--nodes", "1", "--gpus-per-node", "4", "--gpu", "rtx4090"),
}
CHECKPOINTING, OFFLOAD = "training.gradient_checkpointing=true", "sharding.offload=cpu"
CASES = [
    Case(shape, title, cluster, overrides)
    for shape in ("llama-3.1-8b", "llama-3.1-70b", "mixtral-8x7b")
    for title, cluster in CLUSTERS.items()
    for overrides in ((), (CHECKPOINTING,), *([(CHECKPOINTING, OFFLOAD)] if "4090" in title else []))
]


@cache
def planner() -> Planner:
    return Planner()


def plan(case: Case) -> Plan:
    given = plan_options._parser().parse_intermixed_args(case.arguments())
    workers = plan_options.workers_of(given)
    config = load_config(given.recipe, [*given.overrides, f"cluster.num_workers={workers}"])
    return planner().plan(located(config), plan_options.hardware_of(given, workers or 0))


def line(case: Case) -> str:
    """The case as the page has it."""
    found, settings = plan(case), " ".join(override.rpartition(".")[2] for override in case.overrides)
    memory, time = found.memory, found.time
    sizes = [
        memory.shards_bytes,
        memory.gathered_bytes,
        memory.held_bytes,
        memory.activations_bytes,
        memory.total_bytes,
    ]
    cells = [case.title, settings, *(f"{size / 2**30:.2f}" for size in sizes), "yes" if found.fits else "no"]
    cells += [f"{seconds:.2f}" for seconds in (time.compute_s, time.gather_s + time.host_s, time.serial_s)]
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize(
    "shape",
    [
        "llama-3.1-8b",
        *(pytest.param(s, marks=[pytest.mark.slow, pytest.mark.nightly]) for s in ("llama-3.1-70b", "mixtral-8x7b")),
    ],
)
def test_the_page_has_what_is_planned_today(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    section = PAGE.read_text(encoding="utf-8").partition(f"### {shape}\n")[2].partition("\n#")[0]
    lines = [text for text in section.splitlines() if text.startswith("| ") and "total" not in text]
    assert lines == [line(case) for case in CASES if case.shape == shape]


def test_the_commands_of_the_page_are_those_of_the_tables() -> None:
    page = PAGE.read_text(encoding="utf-8")
    example = next(case for case in CASES if case.shape == "llama-3.1-8b" and CHECKPOINTING in case.overrides)
    assert " ".join(example.arguments()) in " ".join(page.replace("\\\n", " ").split())
