"""A small pretraining run on made-up words, which takes seconds."""

from __future__ import annotations

import itertools

import pytest

from cortex_core.training.pretrain import Pretraining
from cortex_core.training.pretrain_config import PretrainConfig

NOUNS = [f"{a}{b}{c}" for a, b, c in itertools.product(("ba", "ko", "lu", "mi"), ("na", "re", "so", "ti"), "nrst")]


@pytest.fixture(scope="session")
def pretrain_config(tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    folder = tmp_path_factory.mktemp("text")
    for number in range(30):
        (folder / f"{number}.txt").write_text(" ".join(NOUNS[number:] + NOUNS[:number]) * 3)
    return PretrainConfig.model_validate(
        {
            "name": "tiny",
            "steps": 6,
            "batch_size": 4,
            "warmup_steps": 2,
            "report_every_steps": 1,
            "checkpoint_every_steps": 2,
            "score_examples": 4,
            "decoder": {
                "vocab_size": 700,
                "hidden_size": 32,
                "num_layers": 2,
                "mlp_size": 32,
                "window_tokens": 256,
            },
            "rows": {"early_steps": 2},
            "data": {"path": str(folder), "held_out_frac": 0.2},
        }
    )


@pytest.fixture(scope="session")
def started(pretrain_config: PretrainConfig) -> Pretraining:
    """A run that nobody trains."""
    return Pretraining.start(pretrain_config)
