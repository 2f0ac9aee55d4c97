from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from cortex_core.config import ASSETS, DataConfig, TaskName
from cortex_core.tasks.corpus import load_corpus
from cortex_core.tasks.vocabulary import TaskVocabulary
from cortex_core.training import pretrain_scores
from cortex_core.training.pretrain import Pretraining
from cortex_core.training.pretrain_config import PretrainConfig
from cortex_core.training.pretrain_export import card, export, measure
from cortex_core.training.pretrain_scores import bits_per_byte, score_tasks
from pipelines.pretrain import load_pretrain_config


class Shifted(torch.nn.Module):
    """Predicts the token `ahead` places after the one it reads: right everywhere when that is the next one."""

    def __init__(self, ahead: int) -> None:
        super().__init__()
        self.ahead = ahead

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=F.one_hot(input_ids.roll(-self.ahead, dims=1), 700).float())


def test_scores_tell_a_model_that_knows_from_one_that_does_not(started: Pretraining) -> None:
    for ahead, accuracy in ((1, 1.0), (0, 0.0)):
        rows = score_tasks(Shifted(ahead), started.vocabulary, started.corpus, window_tokens=256, num_examples=5)
        assert len(rows) == 2 * (len(get_args(TaskName)) + 1), "every task and another key-value, with two fillers each"
        assert {(row["task"], row["words"]) for row in rows} >= {
            ("key_value", "held_out"),
            ("key_value", "train"),
        }
        assert all(row["accuracy"] == accuracy for row in rows)
        assert all(row["n"] == 5 and row["low"] <= accuracy <= row["high"] for row in rows)
        assert all(row["token_accuracy"] >= accuracy for row in rows)


def test_bits_per_byte_of_a_uniform_model(started: Pretraining) -> None:
    class Uniform(torch.nn.Module):
        """Every token is as likely as any other: log2(vocabulary) bits per token."""

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, len(started.tokenizer)))

    score = bits_per_byte(Uniform(), started.corpus, window_tokens=128)
    assert score["nats_per_token"] == pytest.approx(np.log(len(started.tokenizer)), rel=1e-5)
    bytes_per_token = started.corpus.held_out_bytes / len(started.corpus.held_out)
    assert score["bits_per_byte"] == pytest.approx(np.log2(len(started.tokenizer)) / bytes_per_token, rel=1e-5)


def test_the_exported_folder_loads_and_its_card_quotes_its_scores(started: Pretraining, tmp_path: Path) -> None:
    scores = measure(started, 4)
    export(started, scores, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer(" remember banan kores;", return_tensors="pt").input_ids
    assert torch.equal(model(input_ids=ids).logits, started.model(input_ids=ids).logits)
    assert tokenizer.get_vocab() == started.tokenizer.get_vocab()
    code = "def f(x_1):\n    return 12 + x_1\n"
    assert tokenizer.encode(code) == started.tokenizer.encode(code)
    assert json.loads((tmp_path / "model" / "scores.json").read_text()) == scores
    text = (tmp_path / "model" / "README.md").read_text()
    assert f"{scores['parameters']:,}" in text
    assert f"{scores['text']['bits_per_byte']:.3f} bits per byte" in text
    changed = scores | {"text": scores["text"] | {"bits_per_byte": 9.8765}}
    assert "9.877 bits per byte" in card(changed)
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "no draft is left"


# The model that ships


@pytest.fixture(scope="module")
def shipped() -> Path:
    return ASSETS / "stdlib-1m"


def test_shipped_model_is_what_its_card_and_the_recipe_say(shipped: Path) -> None:
    scores = json.loads((shipped / "scores.json").read_text())
    assert (shipped / "README.md").read_text() == card(scores)
    config = load_pretrain_config("pretrain")
    assert PretrainConfig.model_validate(scores["config"]).decoder == config.decoder
    assert scores["steps"] == config.steps
    assert sum(path.stat().st_size for path in shipped.iterdir()) <= 8_000_000
    model = AutoModelForCausalLM.from_pretrained(shipped)
    assert sum(parameter.numel() for parameter in model.parameters()) == scores["parameters"]
    assert all(row["n"] >= 1000 for row in scores["tasks"])


def test_shipped_model_recalls_words_that_it_was_not_trained_on(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        pretrain_scores, "SCORED", ("key_value",)
    )  # each task has examples of its own, whatever the others
    model, tokenizer = AutoModelForCausalLM.from_pretrained(shipped), AutoTokenizer.from_pretrained(shipped)
    vocabulary = TaskVocabulary.from_tokenizer(tokenizer)
    scores = json.loads((shipped / "scores.json").read_text())
    assert len(vocabulary.keys["held_out"]) == scores["words"]["held_out_keys"]
    corpus = load_corpus(DataConfig(max_bytes=400_000, held_out_frac=0.2), tokenizer)
    rows = score_tasks(model, vocabulary, corpus, window_tokens=256, num_examples=50)
    recall = [row["accuracy"] for row in rows if row["task"] == "key_value"]
    assert len(recall) == 4 and min(recall) >= 0.9
    assert tokenizer.model_max_length > 10**6, "no warning about texts beyond one window"
