"""`cortex sleep` from end to end: what it leaves, that it goes on where it was, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cortex_core.backbone.model import Cortex
from cortex_core.backbone.prompts import Prompts, answers
from cortex_core.backbone.sidecar_files import WEIGHTS
from cortex_core.consolidation.sleeper import Sleeper, Slept
from cortex_core.tasks.fact_book import FactBook
from pipelines import cli
from pipelines.config import SIDECARS_FOLDER
from pipelines.runs import read_run
from pipelines.sleep_report import DOCUMENT, PICTURE
from tests.consolidation import sleepers
from tests.pipelines.sleep_scenes import ALONE, SETTINGS


def slow(folder: Path) -> dict[str, torch.Tensor]:
    """The slow weights among the sidecars of a run."""
    return {n: v for n, v in load_file(folder / SIDECARS_FOLDER / WEIGHTS).items() if n.endswith("slow.values")}


def test_what_a_life_leaves(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers, a picture, and sidecars that know the facts in three lines of Python."""
    assert cli.main(["sleep", str(trained), *SETTINGS, *ALONE]) == 0
    said = capsys.readouterr().out
    folder = trained.with_name("trained-sleep")
    assert "12 facts told in 3 days" in said and "Nights undone" in said and str(folder / PICTURE) in said
    document = json.loads((folder / DOCUMENT).read_text())
    rows = {(row["when"], row["lead_tokens"]): row for row in document["rows"]}
    assert set(rows) == {("before", 0), ("before", 20), ("after", 0), ("after", 20)}
    assert rows["before", 0]["known"] == 0 and rows["after", 0]["known"] >= 0.9 and rows["after", 0]["n"] == 12
    assert [len(shares) for shares in document["known_by_day"]] == [1, 2, 3] and document["nights_undone"] == 0
    assert 0.99 < document["drift"]["ratio"] < 1.005
    assert (folder / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert read_run(folder).state == "FINISHED"  # type: ignore[union-attr]

    model = Cortex.from_pretrained(sleepers.NAME, folder / SIDECARS_FOLDER, dtype="float32")
    book = FactBook(sleepers.book().vocabulary, sleepers.book().filler, sleepers.FACTS)
    found = answers(model, Prompts.of([book.question(fact) for fact in book.facts])).argmax(-1)
    share = (found == torch.tensor([fact.value for fact in book.facts])).float().mean().item()
    assert share == pytest.approx(rows["after", 0]["known"])
    before = load_file(trained / SIDECARS_FOLDER / WEIGHTS)
    after = load_file(folder / SIDECARS_FOLDER / WEIGHTS)
    assert all(torch.equal(value, after[name]) for name, value in before.items()), "nothing but slow weights changed"


def test_an_interrupted_life_goes_on_after_its_last_night(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sleep", str(trained), *SETTINGS, *ALONE]
    assert cli.main([*command, "name=whole"]) == 0
    night, nights = Sleeper.sleep, list[int]()

    def interrupted(self: Sleeper) -> Slept:
        nights.append(self.num_nights)
        if self.num_nights == 2:
            raise KeyboardInterrupt
        return night(self)

    monkeypatch.setattr(Sleeper, "sleep", interrupted)
    assert cli.main([*command, "name=parted"]) == 130
    assert "to resume: cortex sleep" in capsys.readouterr().err
    monkeypatch.setattr(Sleeper, "sleep", night)
    assert cli.main([*command, "name=parted"]) == 0
    assert "from step 2" in capsys.readouterr().out and nights == [0, 1, 2]
    whole, parted = slow(trained.with_name("whole")), slow(trained.with_name("parted"))
    assert whole and all(torch.equal(value, parted[name]) for name, value in whole.items())
    documents = [json.loads((trained.with_name(name) / DOCUMENT).read_text()) for name in ("whole", "parted")]
    assert documents[0]["rows"] == documents[1]["rows"]
    assert documents[0]["known_by_day"] == documents[1]["known_by_day"]


def test_the_first_night_is_not_taken_for_loading(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: Sleeper) -> Slept:
        raise KeyboardInterrupt

    monkeypatch.setattr(Sleeper, "sleep", interrupted)
    assert cli.main(["sleep", str(trained), *SETTINGS, *ALONE]) == 130
    assert "loading the backbone\ntrained-sleep: reading and sleeping\n" in capsys.readouterr().out


def test_a_memory_that_has_slept_is_evaluated_and_sleeps_on(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the slow weights that it has grown since its settings were written."""
    assert cli.main(["sleep", str(trained), *SETTINGS, *ALONE]) == 0
    slept = trained.with_name("trained-sleep")
    few = ["evaluation.gaps_tokens=0", "evaluation.num_examples=4", "evaluation.fillers=text"]
    assert cli.main(["evaluate", str(slept), *few, *ALONE]) == 0
    capsys.readouterr()
    assert cli.main(["sleep", str(slept), "name=again", *SETTINGS, *ALONE]) == 0
    document = json.loads((slept.with_name("again") / DOCUMENT).read_text())
    assert document["rows"][0]["when"] == "before" and document["rows"][0]["known"] >= 0.9


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            ["sleep.every_tokens=300"],
            "sleep.every_tokens = 300: a day that facts are told in must be a multiple of 256",
        ),
        (["life.num_facts=99999"], "num_facts = 99999 must lie in 1 to"),
        (["life.facts_per_day=100", "life.num_facts=100"], "tell fewer, or longer days"),
        (["fast_weights.rank=8"], "were trained with other fast_weights"),
        (["sleep.active=600"], "slow_active = 600 must be less than slow_slots = 512"),
    ],
)
def test_wrong_settings_are_one_line(
    trained: Path, changes: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sleep", str(trained), *SETTINGS, *ALONE, *changes]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (trained.with_name("trained-sleep") / SIDECARS_FOLDER).exists()


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sleep", str(tmp_path)]) == 2
    assert "so it is no run" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.nightly
def test_two_workers_with_a_sharded_backbone_live_the_same_life(trained: Path) -> None:
    assert cli.main(["sleep", str(trained), *SETTINGS, *ALONE, "name=one"]) == 0
    assert cli.main(["sleep", str(trained), *SETTINGS, "name=two", "cluster.cpus_per_worker=0.5"]) == 0
    one, two = slow(trained.with_name("one")), slow(trained.with_name("two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=0.02, rtol=0.02)
