"""The stages of `cortex train`, one after the other: codes, sleep, and guarded unfreezing, from the sidecars before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from cortex_core.backbone.fingerprint import fingerprint
from cortex_core.backbone.low_rank_files import load_deltas
from cortex_core.backbone.model import Cortex
from cortex_core.consolidation.codes import load_coder
from cortex_core.consolidation.unfreezer import DELTAS
from cortex_core.errors import DataError, IncompatibleError
from pipelines import cli
from pipelines.codes import DOCUMENT
from pipelines.config import CODER, SIDECARS_FOLDER, load_config
from pipelines.runs import read_run
from pipelines.trained import with_its_memory
from tests.consolidation import sleepers
from tests.pipelines.sleep_scenes import ALONE, SETTINGS, trained_run

BACKBONE = [f"backbone.name={sleepers.NAME}", "backbone.dtype=float32", "data.max_bytes=400_000"]


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    return trained_run(tmp_path)


def test_codes_of_what_a_memory_reads(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, sidecars = trained.with_name("codes"), f"sidecars={trained / SIDECARS_FOLDER}"
    sizes = ["codes.num_streams=2", "codes.held_out_streams=1", "codes.stream_tokens=1024", "codes.code_size=16"]
    command = ["train", "codes", f"out_dir={trained.parent}", sidecars, *BACKBONE, *ALONE, *sizes, "codes.steps=50"]
    assert cli.main([*command, "tracking.system_metrics=false"]) == 0
    said, document = capsys.readouterr().out, json.loads((folder / DOCUMENT).read_text())
    assert "kept by 16 numbers" in said and str(folder / CODER) in said
    assert document["tokens"] == 3 * 1024 and document["segments"] > document["held_out_segments"] > 8
    assert document["codes/mean_explained"] > 0.3 and 0 < document["wrote_frac"] < 0.5
    assert read_run(folder).state == "FINISHED"  # type: ignore[union-attr]

    backbone = fingerprint(sleepers.fresh_model().backbone)
    assert load_coder(folder / CODER, backbone).config.code_size == 16
    with pytest.raises(IncompatibleError, match="is for another backbone"):
        load_coder(folder / CODER, "0" * 16)
    (folder / CODER).write_bytes((folder / CODER).read_bytes()[:1000])
    with pytest.raises(DataError, match="not a whole safetensors file"):
        load_coder(folder / CODER, backbone)


def test_too_little_text_for_codes(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["codes.num_streams=1", "codes.held_out_streams=1", "codes.stream_tokens=256"]
    sidecars = f"sidecars={trained / SIDECARS_FOLDER}"
    assert cli.main(["train", "codes", f"out_dir={trained.parent}", sidecars, *BACKBONE, *ALONE, *sizes]) == 2
    assert "0 segments to fit and 0 held out: there must be at least 8 of each" in capsys.readouterr().err


def test_unfreezing_begins_with_what_has_slept(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two stages: slow weights, then deltas of the backbone; the first one's sidecars are in the second one's."""
    out_dir, few = f"out_dir={trained.parent}", ["life.num_facts=4", "life.lead_tokens=0"]
    settings = [*BACKBONE, *SETTINGS, *few, *ALONE, out_dir]
    slept, unfrozen = trained.with_name("sleep"), trained.with_name("unfreeze")
    assert cli.main(["train", "sleep", *settings, f"sidecars={trained / SIDECARS_FOLDER}"]) == 0
    small = ["unfreeze.steps=4", "unfreeze.num_modules=3", "unfreeze.rank=2"]
    assert cli.main(["train", "unfreeze", *settings, *small, f"sidecars={slept / SIDECARS_FOLDER}"]) == 0
    assert "Backbone deltas" in capsys.readouterr().out
    document = json.loads((unfrozen / "sleep.json").read_text())
    assert document["place"] == "backbone" and document["config"]["fast_weights"]["slow_slots"] == 512

    model = Cortex.from_pretrained(sleepers.NAME, unfrozen / SIDECARS_FOLDER, dtype="float32")
    before = Cortex.from_pretrained(sleepers.NAME, slept / SIDECARS_FOLDER, dtype="float32")
    weights = before.sidecars.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.sidecars.state_dict().items())
    deltas = load_deltas(unfrozen / SIDECARS_FOLDER / DELTAS, model.backbone)
    assert len(deltas.names) == 3 and any(bool(value.any()) for value in deltas.up)
    with safe_open(unfrozen / SIDECARS_FOLDER / DELTAS, framework="pt") as file:
        assert json.loads(file.metadata()["notes"])["backbone"] == fingerprint(model.backbone)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stage=codes"], 'stage = "codes": begins with a memory that is trained. Set sidecars'),
        (["stage=sleep"], 'stage = "sleep": begins with a memory that is trained. Set sidecars'),
        (["stage=dream"], 'stage = "dream": expected one of "memory", "codes", "sleep"'),
        (
            ["life.beside_training=true", "sidecars=x", "sleep.place=backbone"],
            'sleep.place = "backbone": must be "slow_weights" beside training',
        ),
    ],
)
def test_stages_that_cannot_be(overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "demo", *overrides]) == 2
    assert message in capsys.readouterr().err


def test_a_run_takes_over_the_memory_that_it_begins_with(trained: Path) -> None:
    given = load_config(overrides={"sidecars": str(trained / SIDECARS_FOLDER)})
    shipped = with_its_memory(load_config(overrides={"sidecars": f"{sleepers.NAME}/sidecars"}))
    assert with_its_memory(given).fast_weights == shipped.fast_weights == sleepers.fresh_model().fast_weights
    assert with_its_memory(load_config()) == load_config()
