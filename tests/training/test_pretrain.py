from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from cortex_core.backbone.create import create_model
from cortex_core.errors import ConfigError, DataError, IncompatibleError
from cortex_core.training.pretrain import MOMENTS, STATE, Pretraining, rate_at
from cortex_core.training.pretrain_config import PretrainConfig
from cortex_core.training.pretrain_export import card, export, measure
from cortex_core.training.pretrain_rows import KINDS, Rows, RowSource
from cortex_core.training.pretrain_scores import bits_per_byte, score_tasks
from pipelines.pretrain import load_pretrain_config, main

NOUNS = [
    f"{a}{b}{c}" for a, b, c in itertools.product(("ba", "ko", "lu", "mi"), ("na", "re", "so", "ti"), "nrst")
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
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
                "window_tokens": 128,
            },
            "rows": {"early_steps": 2},
            "corpus": {"path": str(folder), "held_out_frac": 0.2},
        }
    )


@pytest.fixture(scope="module")
def started(config: PretrainConfig) -> Pretraining:
    """A run that nobody trains."""
    return Pretraining.start(config)


def weights(run: Pretraining) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Training


def test_a_resumed_run_is_the_same_to_the_bit(config: PretrainConfig, tmp_path: Path) -> None:
    whole, first, second = (Pretraining.start(config) for _ in range(3))
    whole_metrics = list(whole.run())
    for metrics in first.run():
        if metrics["step"] == 3:
            break
    first.save(tmp_path)
    second.resume(tmp_path)
    assert second.step == 3
    rest = list(second.run())
    assert same(weights(whole), weights(second))
    assert not same(weights(whole), weights(first))
    assert [m["loss/text_nats"] for m in rest] == [m["loss/text_nats"] for m in whole_metrics[3:]]


def test_a_checkpoint_holds_no_pickle(started: Pretraining, tmp_path: Path) -> None:
    started.save(tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors", ".safetensors"]
    assert json.loads((tmp_path / STATE).read_text())["step"] == started.step


def test_training_lowers_the_losses(config: PretrainConfig) -> None:
    run = Pretraining.start(config.model_copy(update={"steps": 40, "report_every_steps": 40}))
    before = bits_per_byte(run.model, run.corpus, window_tokens=128)["nats_per_token"]
    [metrics] = list(run.run())
    assert bits_per_byte(run.model, run.corpus, window_tokens=128)["nats_per_token"] < 0.9 * before
    assert metrics["step"] == 40
    assert all(np.isfinite(value) for value in metrics.values())


def test_a_checkpoint_of_another_run_is_refused(
    config: PretrainConfig, started: Pretraining, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"holds no checkpoint .state.json is missing"):
        started.resume(tmp_path)
    started.save(tmp_path)
    other = Pretraining.start(config.model_copy(update={"seed": 1}))
    with pytest.raises(
        IncompatibleError, match="was trained with seed = 0, this run has 1: use the same value"
    ):
        other.resume(tmp_path)
    assert (tmp_path / MOMENTS).is_file()


def test_rate_rises_stays_and_falls() -> None:
    config = PretrainConfig(steps=100, warmup_steps=10, decay_frac=0.4, final_frac=0.1)
    rates = [rate_at(step, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:60] == [1.0] * 50
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[60:]))
    assert rates[100] == pytest.approx(0.1)
    assert rate_at(99, PretrainConfig(steps=100, decay_frac=0.0)) == 1.0


# Rows


@pytest.fixture(scope="module")
def source(started: Pretraining) -> RowSource:
    config = started.config.model_copy(update={"batch_size": 200})
    return RowSource(config, started.vocabulary, started.corpus)


def test_rows_are_a_function_of_the_step(started: Pretraining, source: RowSource) -> None:
    again = RowSource(source.config, started.vocabulary, started.corpus)
    for one, other in zip(source.batch(7), again.batch(7), strict=True):
        assert np.array_equal(one, other)
    assert not np.array_equal(source.batch(7).tokens, source.batch(8).tokens)


def test_rows_have_the_configured_shares(source: RowSource) -> None:
    late = Counter(KINDS[kind] for step in range(10, 15) for kind in source.batch(step).kinds)
    rows = source.config.rows
    assert late["key_value"] / 1000 == pytest.approx(rows.key_value_frac, abs=0.05)
    assert late["text"] / 1000 == pytest.approx(1 - rows.task_frac, abs=0.05)
    assert set(late) == set(KINDS)
    early = Counter(KINDS[kind] for kind in source.batch(0).kinds)
    assert early["key_value"] > 120


def test_no_answer_is_a_held_out_word(started: Pretraining, source: RowSource) -> None:
    held_out = started.vocabulary.held_out_words()
    for step in (0, 10):
        rows = source.batch(step)
        tasks = ~np.isin(rows.kinds, [KINDS.index("repeat")])
        asked = rows.tokens[tasks][rows.answer_weight[tasks] > 0]
        assert asked.size > 500
        assert not np.isin(asked, held_out).any()


def test_some_questions_lack_their_facts_and_cost_nothing(started: Pretraining, source: RowSource) -> None:
    remember, recall = (started.vocabulary.pieces[marker][0] for marker in (" remember", " recall"))
    batches = [source.batch(step) for step in range(10, 14)]
    rows = Rows(*(np.concatenate(column) for column in zip(*batches, strict=True)))
    key_value = rows.kinds == KINDS.index("key_value")
    bare = key_value & ~(rows.tokens == remember).any(axis=1)
    assert 0 < bare.sum() < 0.4 * key_value.sum()
    assert (rows.tokens[bare] == recall).any(axis=1).all()
    assert rows.answer_weight[bare].sum() == 0
    assert (rows.answer_weight[key_value & ~bare].sum(axis=1) > 0).all()


def test_text_rows_start_anywhere_and_count_fully(started: Pretraining, source: RowSource) -> None:
    rows = source.batch(10)
    text = rows.kinds == KINDS.index("text")
    assert (rows.text_weight[text] == 1).all()
    assert (rows.answer_weight[text] == 0).all()
    assert (rows.tokens[text, 0] != started.tokenizer.bos_token_id).all()
    assert len(set(rows.tokens[text, 0].tolist())) > 20


def test_repeats_repeat_and_only_repeats_are_asked(source: RowSource) -> None:
    rows = source.batch(10)
    for row in np.flatnonzero(rows.kinds == KINDS.index("repeat")):
        tokens, asked = rows.tokens[row], rows.answer_weight[row] > 0
        period = int(np.flatnonzero(asked)[0]) - 1
        assert np.array_equal(tokens[period:], tokens[:-period])
        assert asked[period + 1 :].all()


# The fresh model


def test_fresh_heads_look_back_and_look_up() -> None:
    torch.manual_seed(0)
    model = create_model(
        vocab_size=400, hidden_size=128, num_layers=2, num_heads=4, mlp_size=64, window_tokens=128,
        rope_theta=1e6, tied_embeddings=True, seed=3,
    )  # fmt: skip
    model.set_attn_implementation("eager")
    run = torch.randperm(400)[:40]
    with torch.no_grad():
        attention = model(input_ids=torch.cat([run, run])[None], output_attentions=True).attentions
    at = torch.arange(4, 80)
    assert (attention[0][0, 0, at].argmax(-1) == at - 1).float().mean() > 0.95
    assert (attention[0][0, 1, at].argmax(-1) == at - 2).float().mean() > 0.95
    again = torch.arange(42, 80)
    assert (attention[1][0, 0, again].argmax(-1) == again - 39).float().mean() > 0.8


def test_fresh_weights_depend_on_the_seed_alone(config: PretrainConfig, started: Pretraining) -> None:
    shape = config.decoder.model_dump(exclude={"vocab_size"})
    models = [create_model(vocab_size=300, seed=seed, **shape) for seed in (4, 4, 5)]
    embeddings = [model.get_input_embeddings().weight for model in models]
    assert torch.equal(embeddings[0], embeddings[1])
    assert not torch.equal(embeddings[0], embeddings[2])
    assert all(parameter.dtype == torch.float32 for parameter in models[0].parameters())


def test_tokenizer_is_exact_and_knows_the_markers(started: Pretraining) -> None:
    text = "def naïve(x_y):\n\treturn 1234 +  x_y  # ok\n\n"
    tokenizer = started.tokenizer
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    for marker in (" remember", " recall", " 7"):
        assert len(tokenizer.encode(marker, add_special_tokens=False)) == 1
    assert len(tokenizer.encode("1234", add_special_tokens=False)) == 4


# Scores and export


class Shifted(torch.nn.Module):
    """Predicts the token `ahead` places after the one it reads: right everywhere when that is the next one."""

    def __init__(self, ahead: int) -> None:
        super().__init__()
        self.ahead = ahead

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=F.one_hot(input_ids.roll(-self.ahead, dims=1), 700).float())


def test_scores_tell_a_model_that_knows_from_one_that_does_not(started: Pretraining) -> None:
    for ahead, accuracy in ((1, 1.0), (0, 0.0)):
        rows = score_tasks(
            Shifted(ahead), started.vocabulary, started.corpus, window_tokens=128, num_examples=5
        )
        assert len(rows) == 10, "five tasks with two fillers each"
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
    assert score["bits_per_byte"] == pytest.approx(
        np.log2(len(started.tokenizer)) / bytes_per_token, rel=1e-5
    )


def test_the_exported_folder_loads_and_its_card_quotes_its_scores(
    started: Pretraining, tmp_path: Path
) -> None:
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


# The command


def test_command_trains_scores_and_resumes(
    config: PretrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(
        'name = "tiny"\nsteps = 4\nbatch_size = 2\nscore_examples = 2\ncheckpoint_every_steps = 2\n'
        "report_every_steps = 2\n[decoder]\nvocab_size = 700\nhidden_size = 32\nnum_layers = 2\nmlp_size = 32\n"
        f'window_tokens = 128\n[corpus]\nheld_out_frac = 0.2\npath = "{config.corpus.path}"\n'
    )
    out = tmp_path / "model"
    assert main([str(recipe), "steps=2", "decay_frac=0", "--out", str(out)]) == 0
    assert json.loads((out / "scores.json").read_text())["steps"] == 2
    assert main([str(recipe), "--out", str(out)]) == 0
    assert "resuming from" in capsys.readouterr().out
    scores = json.loads((out / "scores.json").read_text())
    assert scores["steps"] == 4
    assert scores["training_tokens"] == 4 * 2 * 128


def test_shipped_recipe_is_the_default_configuration() -> None:
    config = load_pretrain_config("pretrain")
    assert config.name == "stdlib-1m"
    assert config.decoder.window_tokens == 256


def test_wrong_settings_are_one_readable_line() -> None:
    for override, complaint in (
        ("stepz=3", "stepz: unknown key"),
        ("steps=0", "steps = 0: must be at least 1"),
        ("decoder.hidden_size=130", "hidden_size = 130 must be a multiple of 2"),
        ("rows.key_value_frac=0.95", "the shares of task rows add up to"),
        ("steps", "'steps' is not an override"),
        ("steps.more=1", "steps is a value, not a section"),
    ):
        with pytest.raises(ConfigError) as error:
            load_pretrain_config("pretrain", [override])
        assert complaint in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="no such recipe"):
        load_pretrain_config("absent")
