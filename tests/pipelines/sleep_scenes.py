"""A trained run, and settings under which its memory sleeps on twelve facts in seconds."""

from __future__ import annotations

import shutil
from pathlib import Path

from cortex_core.backbone.load import in_assets
from cortex_core.backbone.sidecar_files import read
from pipelines.config import CONFIG_FILE, SIDECARS_FOLDER, load_config
from pipelines.toml_text import dump_toml
from tests.consolidation import sleepers

SETTINGS = [
    f"life.num_facts={sleepers.FACTS}", f"life.facts_per_day={sleepers.PER_DAY}", "life.checkpoint_every_days=1",
    "life.lead_tokens=0,20", f"sleep.every_tokens={sleepers.DAY}", "sleep.slots=512", "sleep.guard_windows=2",
    "evaluation.perplexity_tokens=2048", "tracking.system_metrics=false",
]  # fmt: skip
ALONE = ["cluster.num_workers=0", "sharding.stage=0"]


def trained_run(out_dir: Path) -> Path:
    """The folder of a run that has trained the memory that ships."""
    folder, shipped = out_dir / "trained", in_assets(f"{sleepers.NAME}/sidecars")
    config = load_config(overrides={
        "name": "trained", "out_dir": str(out_dir), "data.max_bytes": 400_000,
        "backbone": {"name": sleepers.NAME, "dtype": "float32"},
        "fast_weights": read(shipped).fast_weights.model_dump(),
    })  # fmt: skip
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(dump_toml(config))
    shutil.copytree(shipped, folder / SIDECARS_FOLDER)
    return folder
