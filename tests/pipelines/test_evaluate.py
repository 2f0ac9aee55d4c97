"""`cortex evaluate`: a trained memory asked again, its run left as it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cortex_core.backbone.sidecar_files import WEIGHTS
from cortex_core.errors import DataError, IncompatibleError
from pipelines import cli, evaluate, train
from pipelines.config import SIDECARS_FOLDER, RunConfig
from tests import tiny

# mlflow, of pandas, while it logs a table.
pytestmark = pytest.mark.filterwarnings("ignore:For backward compatibility, 'str' dtypes:DeprecationWarning")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, mlflow_database: Callable[[Path], None]) -> RunConfig:
    """A finished run. Do not change its folder."""
    out = tmp_path_factory.mktemp("original")
    mlflow_database(out)
    config = tiny.run_config(out)
    assert train.run(config) == 0
    return config


@pytest.fixture
def trained(original: RunConfig, tmp_path: Path) -> RunConfig:
    """A copy of it, to be evaluated."""
    shutil.copytree(original.run_dir, tmp_path / "tiny")
    return tiny.run_config(tmp_path)


def files(folder: Path) -> dict[str, str]:
    """Every file below, except those of an evaluation, with its content's hash."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).parts[0] != "evaluation"
    }


def document(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


def asked(config: RunConfig, **evaluation: object) -> RunConfig:
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update=evaluation)})


def test_the_same_questions_get_the_same_answers(trained: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(trained.run_dir)
    assert evaluate.run(trained, trained.run_dir) == 0
    again, first = document(trained.run_dir / "evaluation"), document(trained.run_dir)
    assert again["rows"] == first["rows"] and again["usage"] == first["usage"]
    assert again["drift"] == pytest.approx(first["drift"])
    assert again.keys() == first.keys() and again["run"] == "tiny"
    written = {path.name for path in (trained.run_dir / "evaluation").iterdir() if path.is_file()}
    assert {"evaluation.json", "evaluation.csv", "evaluation.parquet", "reach.png", "report.html"} <= written
    assert files(trained.run_dir) == before
    said = capsys.readouterr().out.splitlines()
    assert f"Report    {trained.run_dir / 'evaluation' / 'report.html'}" in said


def test_other_questions_may_be_asked_and_replace_the_last_ones(trained: RunConfig) -> None:
    out = trained.run_dir / "evaluation"
    for gaps, examples in (((0, 40, 200), 8), ((16,), 4)):
        assert evaluate.run(asked(trained, gaps_tokens=gaps, num_examples=examples), trained.run_dir) == 0
        rows = document(out)["rows"]
        assert sorted({row["gap_tokens"] for row in rows}) == list(gaps)
        assert {row["n"] for row in rows} == {examples}
        assert document(out)["config"]["evaluation"]["num_examples"] == examples


def test_it_is_the_saved_memory_that_is_asked(trained: RunConfig) -> None:
    assert evaluate.run(trained, trained.run_dir) == 0
    weights = trained.run_dir / SIDECARS_FOLDER / WEIGHTS
    tensors = load_file(weights)
    changed = {name: torch.full_like(t, 3.0) if name.endswith("output_gate") else t for name, t in tensors.items()}
    save_file(changed, weights)
    first = document(trained.run_dir / "evaluation")
    assert evaluate.run(trained, trained.run_dir) == 0
    assert abs(document(trained.run_dir / "evaluation")["drift"]["ratio"] - first["drift"]["ratio"]) > 1e-3


def test_a_memory_of_another_backbone_is_refused(trained: RunConfig) -> None:
    settings = trained.run_dir / SIDECARS_FOLDER / "cortex.json"
    settings.write_text(settings.read_text().replace('"backbone_fingerprint": "', '"backbone_fingerprint": "0'))
    with pytest.raises(IncompatibleError, match="trained on another backbone"):
        evaluate.run(trained, trained.run_dir)
    assert not (trained.run_dir / "evaluation" / "report.html").exists()


def test_damaged_weights_are_refused(trained: RunConfig) -> None:
    weights = trained.run_dir / SIDECARS_FOLDER / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(DataError, match="not readable"):
        evaluate.run(trained, trained.run_dir)


def test_the_command_takes_the_folder_and_overrides(trained: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(trained.run_dir)
    assert cli.main(["evaluate", folder, "evaluation.gaps_tokens=24", "evaluation.num_examples=5"]) == 0
    assert {row["gap_tokens"] for row in document(trained.run_dir / "evaluation")["rows"]} == {24}
    assert cli.main(["evaluate", folder, "fast_weights.rank=4"]) == 2
    line = capsys.readouterr().err.strip()
    assert "sidecars" in line and "\n" not in line, "the memory on disk has another rank"
