"""`cortex train dream` on Ray: two workers share the backbone, an actor sleeps, another one dreams; and some are killed."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cortex_core.backbone.model import Cortex
from cortex_core.backbone.prompts import Prompts, answers
from cortex_core.backbone.sidecar_files import WEIGHTS
from cortex_core.dreaming import provenance
from cortex_core.tasks.fact_book import FactBook
from cortex_core.training.dreams import MEMORIES
from pipelines import cli, train
from pipelines.config import SIDECARS_FOLDER, ClusterConfig, RunConfig
from pipelines.dream import DREAMS, FOLDER
from pipelines.sleep_report import DOCUMENT, DREAMED, PICTURE
from tests import tiny
from tests.consolidation import sleepers
from tests.pipelines.living_scenes import run_config
from tests.processes import at_work

pytestmark = [
    pytest.mark.slow,
    # mlflow, of pandas, while it logs a table
    pytest.mark.filterwarnings("ignore:For backward compatibility, 'str' dtypes:DeprecationWarning"),
]
SHRUNK = [
    "training.steps=8", "training.batch_size=4", "training.in_window_batch_size=0", "training.filler_windows=0",
    "training.max_segments=2", "life.num_facts=12", "life.facts_per_day=4", "life.lead_tokens=0,20",
    "sleep.every_tokens=256", "sleep.steps=10", "sleep.slots=512", "sleep.guard_windows=2", "sleep.dreams_per_night=16",
    "data.max_bytes=400000", "evaluation.gaps_tokens=0", "evaluation.num_examples=4", "evaluation.perplexity_tokens=2048",
    "evaluation.fillers=text", "scenario.max_filler_tokens=6", "tracking.system_metrics=false",
]  # fmt: skip


def two(out: Path, name: str) -> RunConfig:
    """Two ZeRO-3 workers; nothing depends on who is quicker."""
    return run_config(
        out_dir=str(out), name=name, training__steps=8, sleep__dream_frac=0.5, cluster__num_workers=2, sharding__stage=3,
        cluster__cpus_per_worker=0.5, cluster__max_failures=4,
    )  # fmt: skip


def weights(config: RunConfig) -> dict[str, torch.Tensor]:
    return load_file(config.run_dir / SIDECARS_FOLDER / WEIGHTS)


@contextmanager
def killed(*victims: str) -> Iterator[list[str]]:
    """Within the block, each is killed as soon as it is at work, one after the other; yields who was."""
    done, hit = threading.Event(), list[str]()

    def look() -> None:
        for what in victims:
            while not done.wait(0.01):
                if there := at_work(what):
                    there[0].kill()
                    hit.append(what)
                    break

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield hit
    finally:
        done.set()
        thread.join()


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, mlflow_database: Callable[[Path], None], ray_here: ClusterConfig
) -> RunConfig:
    out = tmp_path_factory.mktemp("undisturbed")
    mlflow_database(out)
    config = two(out, "undisturbed")
    assert train.run(config) == 0
    return config


def test_what_it_leaves_and_that_it_dreams_on(
    tmp_path: Path, mlflow_database: Callable[[Path], None], ray_here: ClusterConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    mlflow_database(tmp_path)
    folder = tmp_path / "dream"
    assert cli.main(["train", "dream", f"out_dir={tmp_path}", "cluster.cpus_per_worker=0.5", *SHRUNK]) == 0
    said = capsys.readouterr().out
    assert "12 facts told in 3 days" in said and str(folder / PICTURE) in said and "known " in said
    assert json.loads((folder / "evaluation.json").read_text())["rows"]
    assert (folder / PICTURE).read_bytes().startswith(b"\x89PNG") and (folder / MEMORIES).is_file()
    document = json.loads((folder / DOCUMENT).read_text())
    known = {(row["when"], row["lead_tokens"]): row["known"] for row in document["rows"]}
    assert known["before", 0] == 0.0 and known["after", 0] >= 0.6 and document["nights"] == 3, known
    assert [len(shares) for shares in document["known_by_day"]] == [1, 2, 3]

    model = Cortex.from_pretrained(sleepers.NAME, folder / SIDECARS_FOLDER, dtype="float32")
    assert all(bool(v.any()) for n, v in model.sidecars.state_dict().items() if n.endswith("slow.values"))
    book = FactBook(sleepers.book().vocabulary, sleepers.book().filler, sleepers.FACTS)
    found = answers(model, Prompts.of([book.question(fact) for fact in book.facts])).argmax(-1)
    share = (found == torch.tensor([fact.value for fact in book.facts])).float().mean().item()
    assert share == pytest.approx(known["after", 0], abs=0.1), "as users load them"

    assert cli.main(["dream", str(folder), "--number", "10"]) == 0
    learned = provenance.read(folder / DREAMED)
    assert [row["ticket"] for row in learned] == [*range(len(learned))] and {row["night"] for row in learned} == {2, 3}
    assert all((row["passed"] or row["reasons"]) and row["prompt_text"] for row in learned)
    rows = provenance.read(folder / FOLDER / DREAMS)
    assert [row["ticket"] for row in rows] == [*range(10)]


@pytest.mark.nightly
@pytest.mark.parametrize(
    "victims",
    [("Consolidating.work", "Generating.work"), ("Generating.work", "RayTrainWorker", "Consolidating.work")],
    ids=["actors", "a worker too"],
)
def test_who_is_killed_changes_nothing(
    tmp_path: Path, mlflow_database: Callable[[Path], None], undisturbed: RunConfig, victims: tuple[str, ...]
) -> None:
    mlflow_database(tmp_path)
    config = two(tmp_path, "disturbed")
    with killed(*victims) as hit:
        assert train.run(config) == 0
    assert hit == [*victims]
    assert tiny.same(weights(config), weights(undisturbed))
    documents = [json.loads((each.run_dir / DOCUMENT).read_text()) for each in (config, undisturbed)]
    for part in ("rows", "known_by_day", "nights", "nights_undone", "drift"):
        assert documents[0][part] == documents[1][part], part
    assert tiny.same(load_file(config.run_dir / MEMORIES), load_file(undisturbed.run_dir / MEMORIES))
