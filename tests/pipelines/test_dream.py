"""`cortex dream` from end to end: what it leaves, the same by any number of actors, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cortex_core.dreaming import provenance
from cortex_core.dreaming.graph import MemoryGraph
from cortex_core.training.dreams import MEMORIES
from pipelines import cli
from pipelines.dream import DREAMS, FOLDER
from pipelines.dream_report import PICTURE, SUMMARY
from tests.consolidation import sleepers
from tests.pipelines.sleep_scenes import ALONE, SETTINGS

QUICK = ["scenario.batch_size=8", "scenario.max_filler_tokens=8"]


@pytest.fixture
def slept(trained: Path) -> Path:
    """The folder of a run that has slept on twelve facts."""
    assert cli.main(["sleep", str(trained), *SETTINGS, *ALONE]) == 0
    return trained.with_name("trained-sleep")


def test_what_dreams_leave(slept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each with all that it came from, how the judge did by the book of facts, and a picture."""
    assert len(MemoryGraph.load(slept / MEMORIES)) >= sleepers.FACTS
    capsys.readouterr()
    assert cli.main(["dream", str(slept), *QUICK, "--number", "20"]) == 0
    said, out = capsys.readouterr().out, slept / FOLDER
    assert "20 of 20 dreams" in said and "Right among those kept" in said and str(out / PICTURE) in said
    rows = provenance.read(out / DREAMS)
    assert [row["ticket"] for row in rows] == list(range(20))
    assert all(row["verified"] and row["answer_text"].strip() for row in rows)
    assert all(row["passed"] == (row["reasons"] == []) for row in rows)
    document = json.loads((out / SUMMARY).read_text())
    quality = document["quality"]
    assert quality["yield_n"] == 20 and quality["yield_value"] >= 0.5 and quality["precision_value"] >= 0.9
    assert (out / PICTURE).read_bytes().startswith(b"\x89PNG")


def test_a_model_that_has_not_slept(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["dream", str(trained)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has not slept. First: cortex sleep" in line
    assert cli.main(["dream", str(trained), "--number", "0"]) == 2
    assert "must be a whole number, at least 1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.nightly
def test_two_actors_dream_the_same(slept: Path) -> None:
    found = []
    for workers in (0, 2):
        settings = [f"cluster.num_workers={workers}", "cluster.cpus_per_worker=0.5"]
        assert cli.main(["dream", str(slept), *QUICK, *settings, "--number", "20"]) == 0
        found.append(provenance.read(slept / FOLDER / DREAMS))
    for name in ("ticket", "walk", "prompt", "answer", "passed"):
        assert [row[name] for row in found[0]] == [row[name] for row in found[1]]
