"""Backbone pretraining: text and in-window tasks, one thread, resumable to the bit."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cortex_core.backbone.create import Decoder, create_model, train_tokenizer
from cortex_core.errors import DataError, IncompatibleError
from cortex_core.optim.groups import build_optimizer
from cortex_core.tasks.corpus import Corpus, load_corpus, training_texts
from cortex_core.tasks.vocabulary import DIGITS, MARKERS, TaskVocabulary
from cortex_core.training.pretrain_config import PretrainConfig
from cortex_core.training.pretrain_rows import KINDS, Rows, RowSource

WEIGHTS, MOMENTS, STATE = "weights.safetensors", "moments.safetensors", "state.json"
FREE = ("steps", "report_every_steps", "checkpoint_every_steps", "score_examples")
"""Settings that may change when a run is resumed: no step that is done was made from them while the rate is level."""


@dataclass
class Pretraining:
    """A run: the model with its optimizer, at a step."""

    config: PretrainConfig
    tokenizer: Any
    vocabulary: TaskVocabulary
    corpus: Corpus
    model: Decoder
    optimizer: torch.optim.Optimizer
    step: int = 0
    """Optimizer steps done."""

    @classmethod
    def start(cls, config: PretrainConfig) -> Pretraining:
        """Read the corpus, train the tokenizer, create the model. Raises DataError for too little text."""
        tokenizer = train_tokenizer(training_texts(config.data), config.decoder.vocab_size, (*MARKERS, *DIGITS))
        shape = config.decoder.model_dump(exclude={"vocab_size"})
        model = create_model(vocab_size=len(tokenizer), seed=config.seed, **shape)
        parameters = dict(model.named_parameters())
        optimizer = build_optimizer(
            parameters,
            [{"params": list(parameters.values()), "lr": config.learning_rate}],
            config.optimizer,
            betas=config.betas,
            weight_decay=config.weight_decay,
            seed=config.seed,
            foreach=True,
        )
        vocabulary = TaskVocabulary.from_tokenizer(tokenizer)
        return cls(config, tokenizer, vocabulary, load_corpus(config.data, tokenizer), model, optimizer)

    def run(self, checkpoint: Path | None = None) -> Iterator[dict[str, float]]:
        """Train to the last step; metrics of every `report_every_steps` steps, and of the last.

        With a `checkpoint` folder, the run is saved there every `checkpoint_every_steps` steps, and at the end.
        """
        torch.set_flush_denormal(True)  # of the whole process: moments near 0 would slow every step down
        try:
            yield from self._steps(checkpoint)
        finally:
            torch.set_flush_denormal(False)

    def _steps(self, checkpoint: Path | None) -> Iterator[dict[str, float]]:
        config, source = self.config, RowSource(self.config, self.vocabulary, self.corpus)
        reported, since = self.step, time.monotonic()
        while self.step < config.steps:
            metrics = train_step(self.model, self.optimizer, source.batch(self.step), config, self.step)
            self.step += 1
            last = self.step == config.steps
            if checkpoint and (last or self.step % config.checkpoint_every_steps == 0):
                self.save(checkpoint)
            if last or self.step % config.report_every_steps == 0:
                tokens = (self.step - reported) * config.batch_size * config.decoder.window_tokens
                rate = tokens / (time.monotonic() - since)
                yield {"step": float(self.step), "throughput/tokens_per_s": rate} | metrics
                reported, since = self.step, time.monotonic()

    def save(self, folder: Path) -> None:
        """Write a checkpoint; an older one in the folder is replaced file by file, the state last."""
        folder.mkdir(parents=True, exist_ok=True)
        names = dict(self.model.named_parameters())
        moments = {
            f"{name}.{key}": value
            for name, parameter in names.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
            if key != "step"
        }
        _replace(folder / WEIGHTS, lambda path: save_file({n: p.detach() for n, p in names.items()}, path))
        _replace(folder / MOMENTS, lambda path: save_file(moments, path))
        state = {"step": self.step, "config": self.config.model_dump(mode="json")}
        _replace(folder / STATE, lambda path: path.write_text(json.dumps(state, indent=2)))

    def resume(self, folder: Path) -> None:
        """Continue from a checkpoint. Raises DataError without one, IncompatibleError for another run's."""
        if not (folder / STATE).is_file():
            raise DataError(f"{folder} holds no checkpoint ({STATE} is missing): give the folder of an earlier run")
        state = json.loads((folder / STATE).read_text())
        self._check_same_run(PretrainConfig.model_validate(state["config"]), folder)
        weights, moments = load_file(folder / WEIGHTS), load_file(folder / MOMENTS)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights[name])
                kept = {key.rpartition(".")[2]: key for key in moments if key.rpartition(".")[0] == name}
                if kept:
                    self.optimizer.state[parameter] = {
                        "step": torch.tensor(float(state["step"])),
                        **{key: moments[saved] for key, saved in kept.items()},
                    }
        self.step = int(state["step"])

    def _check_same_run(self, saved: PretrainConfig, folder: Path) -> None:
        """The length of a run may change while its rate is level; what its steps were made from may not."""
        then, now = _flat(saved), _flat(self.config)
        for name, value in then.items():
            if name not in FREE and value != now[name]:
                raise IncompatibleError(
                    f"{folder} was trained with {name} = {value}, this run has {now[name]}: use the same value, or "
                    "another folder"
                )


def _flat(config: PretrainConfig) -> dict[str, Any]:
    """Values by dotted name."""
    values: dict[str, Any] = {}
    for name, value in config.model_dump().items():
        values |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return values


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, rows: Rows, config: PretrainConfig, step: int
) -> dict[str, float]:
    """One optimizer step. Returns losses in nats, and the accuracy on the answers by kind of row."""
    tokens = torch.from_numpy(rows.tokens)
    text_weight, answer_weight = (
        torch.from_numpy(rows.text_weight)[:, 1:],
        torch.from_numpy(rows.answer_weight)[:, 1:],
    )
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view_as(text_weight)
    text_loss, answer_loss = _weighted_mean(losses, text_weight), _weighted_mean(losses, answer_weight)
    early = step < config.rows.early_steps
    loss = (config.early_text_weight if early else 1.0) * text_loss + config.answer_weight * answer_loss
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * rate_at(step, config)
    optimizer.step()
    metrics = {
        "loss/text_nats": text_loss.item(),
        "loss/answer_nats": answer_loss.item(),
        "gradient_norm": norm.item(),
    }
    return metrics | _accuracies(logits.detach(), tokens, answer_weight > 0, rows)


def rate_at(step: int, config: PretrainConfig) -> float:
    """Learning rate at `step` (from 0) as a share of its peak: warm-up, level, linear decay."""
    warm = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    decay_steps = config.decay_frac * config.steps
    left = (config.steps - step) / decay_steps if decay_steps else 1.0
    return warm * (config.final_frac + (1.0 - config.final_frac) * min(1.0, left))


def _weighted_mean(losses: Tensor, weight: Tensor) -> Tensor:
    return (losses * weight).sum() / weight.sum().clamp_min(1e-6)


def _accuracies(logits: Tensor, tokens: Tensor, asked: Tensor, rows: Rows) -> dict[str, float]:
    """Share of answers predicted, by kind of row."""
    row, column = asked.nonzero(as_tuple=True)
    right = logits[row, column].argmax(-1) == tokens[row, column + 1]
    kinds = torch.from_numpy(rows.kinds)[row]
    present = kinds.unique().tolist()
    return {f"accuracy/{KINDS[kind]}": right[kinds == kind].float().mean().item() for kind in present}


def _replace(path: Path, write: Any) -> None:
    """Write to a neighbour, then rename: a reader sees the old file or the new one, never half of one."""
    draft = path.with_name(path.name + ".draft")
    write(draft)
    os.replace(draft, path)
