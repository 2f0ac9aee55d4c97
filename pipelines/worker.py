"""What runs on every worker: build, train, evaluate. No Ray Train handle is touched but through `Edge`."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cortex_core.backbone.fingerprint import fingerprint
from cortex_core.backbone.load import in_assets, load_tokenizer
from cortex_core.backbone.model import Cortex
from cortex_core.backbone.sidecar_files import read, restore, write
from cortex_core.errors import DataError, IncompatibleError
from cortex_core.eval.suite import Suite
from cortex_core.eval.validation import Validation
from cortex_core.tasks.corpus import Corpus, load_corpus
from cortex_core.tasks.mixture import Mixture, check_tasks
from cortex_core.tasks.vocabulary import TaskVocabulary
from cortex_core.training import checkpoint
from cortex_core.training.batches import BatchSource
from cortex_core.training.calibrate import calibrate
from cortex_core.training.loop import Learner
from cortex_core.training.objectives import ReadingLoss
from pipelines import living
from pipelines.config import EVALUATION, LIFE, SIDECARS_FOLDER, RunConfig
from pipelines.disk import room_for
from pipelines.sharding import Shards, load_backbone, replicate


@dataclass(frozen=True)
class Edge:
    """The worker's side of the cluster: who it is, and how it reports."""

    rank: int
    world_size: int
    report: Callable[[dict[str, float], Path | None], None]
    """(metrics, folder of a checkpoint on rank 0 or None). Every worker calls it equally often."""
    resume_from: Callable[[], AbstractContextManager[Path | None]]
    """Opens the last checkpoint, if there is one, as a local folder."""

    def gather(self, mine: Any) -> list[Any]:
        """Every worker's object, in order of rank."""
        if self.world_size == 1:
            return [mine]
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, mine)
        return everyone

    def from_first(self, mine: Any = None) -> Any:
        """What the first worker gives, on every worker."""
        box = [mine]
        if self.world_size > 1:
            dist.broadcast_object_list(box, 0)
        return box[0]


def train(config: RunConfig, edge: Edge, until_step: int | None = None) -> None:
    """Train sidecars from the last checkpoint (or from nothing), then evaluate them; both end up in checkpoints.

    With `until_step`, end there without evaluating: with a checkpoint, from which the rest can be trained.
    """
    torch.set_num_threads(config.cluster.worker_threads)
    torch.manual_seed(config.seed)
    edge.report({"phase": 0.0, "workers": edge.world_size, "num_workers": config.cluster.num_workers}, None)
    vocabulary, corpus = _words(config)
    model, shards = build(config)
    batches = _batches(config, vocabulary, corpus)
    backbone = fingerprint(model.backbone, shards.gathered)
    if config.sidecars is None:
        calibrate(model, batches.calibration_ids())
    else:
        begin_with(model, config, backbone)
    shards.release()
    with living.opened(config, edge, model, corpus, backbone, shards.release) as life:
        if model.fast_weights.slow_slots:
            living.keep_addresses(model)
        objective = replicate(ReadingLoss(model, config.training))
        learner = Learner(
            model, objective, config.training, config.optimizer, after_backward=shards.release, seed=config.seed
        )
        with edge.resume_from() as folder:
            if folder is not None:
                checkpoint.load(folder, learner)
                if life is not None:
                    life.load(folder)
        _check_same(edge.gather(learner.step_number))
        state = Trained(config, learner, backbone, life)
        validation = _validation(config, edge, vocabulary, corpus) if config.validation.every_steps else None
        _train_steps(edge, state, batches, validation, until_step or config.training.steps)
        if learner.step_number < config.training.steps:
            return
        with learner.averaged():  # what is evaluated is what is exported
            documents = {EVALUATION: _suite(config, edge, vocabulary, corpus).run(model)}
            documents[EVALUATION]["backbone_parameters"] = shards.total_numel
            if life is not None:
                documents[LIFE] = life.document()
        with tempfile.TemporaryDirectory() as scratch:
            saved = state.save(Path(scratch), documents) if edge.rank == 0 else None
            edge.report({"phase": 3.0, "step": learner.step_number}, saved)


def evaluate(config: RunConfig, edge: Edge, sidecars: Path) -> None:
    """Evaluate saved sidecars; the document is reported as a checkpoint."""
    torch.set_num_threads(config.cluster.worker_threads)
    vocabulary, corpus = _words(config)
    model, shards = build(config)
    restore(model.sidecars, read(sidecars), fingerprint(model.backbone, shards.gathered))
    document = _suite(config, edge, vocabulary, corpus).run(model) | {"backbone_parameters": shards.total_numel}
    with tempfile.TemporaryDirectory() as scratch:
        if edge.rank == 0:
            (Path(scratch) / EVALUATION).write_text(json.dumps(document))
        edge.report({"phase": 3.0}, Path(scratch) if edge.rank == 0 else None)


def _words(config: RunConfig) -> tuple[TaskVocabulary, Corpus]:
    """What the tasks are made of; before anything expensive, because both come from the user. Raises user errors."""
    tokenizer = load_tokenizer(config.backbone)
    vocabulary = TaskVocabulary.from_tokenizer(tokenizer, validation=config.validation.every_steps > 0)
    corpus = load_corpus(config.data, tokenizer)
    check_tasks(config, vocabulary, corpus)
    return vocabulary, corpus


def build(config: RunConfig) -> tuple[Cortex, Shards]:
    """The backbone as this worker holds it, with new sidecars: equal on all workers, because the seed is."""
    sharding = config.sharding
    backbone, shards = load_backbone(
        config.backbone, stage=sharding.stage, offload=sharding.offload, deepspeed_file=sharding.deepspeed,
        memory=config.fast_weights,
    )  # fmt: skip
    torch.manual_seed(config.seed)
    model = Cortex.attach(backbone, config.fast_weights, config.backbone.segment_tokens)
    if config.training.gradient_checkpointing:
        model.checkpoint_gradients()
    return model, shards


def begin_with(model: Cortex, config: RunConfig, backbone: str) -> None:
    """The sidecars that the run begins with. Raises DataError, IncompatibleError."""
    assert config.sidecars is not None
    saved = read(in_assets(config.sidecars))
    if saved.fast_weights != config.fast_weights or saved.segment_tokens != config.backbone.segment_tokens:
        raise IncompatibleError(
            f"sidecars = {config.sidecars}: were trained with other fast_weights or backbone.segment_tokens than these "
            "settings have; take those of the run that trained them"
        )
    restore(model.sidecars, saved, backbone)


@dataclass(frozen=True)
class Trained:
    """All that is trained, and what has to be known to write it down."""

    config: RunConfig
    learner: Learner
    backbone: str
    """Fingerprint of the backbone."""
    life: living.Living | None = None

    def save(self, folder: Path, documents: Mapping[str, Any] | None = None) -> Path:
        """What a checkpoint holds: training state. The last one has `documents`, and sidecars as users load them."""
        with room_for("a checkpoint that is being written", folder):
            if self.life is not None:
                self.life.save(folder)
            if documents is not None:
                model = self.learner.model
                weights = dict(model.sidecars.state_dict()) | self.learner.average
                write(folder / SIDECARS_FOLDER, weights, model.fast_weights, model.segment_tokens, self.backbone)
                for name, document in documents.items():
                    (folder / name).write_text(json.dumps(document))
            checkpoint.save(folder, self.learner, [file.name for file in folder.glob("*.safetensors")])
        return folder


def _train_steps(
    edge: Edge, state: Trained, batches: BatchSource, validation: Validation | None, until_step: int
) -> None:
    config, learner, life = state.config, state.learner, state.life
    training, window, every = config.training, _Window(), config.validation.every_steps
    tokens = [batches.tokens(step) for step in range(training.steps)]
    while learner.step_number < until_step:
        step = learner.step_number
        window.add(learner.step(batches.micro_batches(step, edge.rank, edge.world_size)), tokens[step])
        done = learner.step_number
        if life is not None:
            life.step(done / training.steps)
            if done == training.steps:
                with learner.averaged():  # of what is exported, nights are the last part
                    life.finish()
        last = done == until_step
        due, validated = last or done % training.checkpoint_every_steps == 0, every and (last or done % every == 0)
        if due or validated or done % training.report_every_steps == 0:
            means = _mean(edge.gather(window.means()))
            metrics = {"step": done, "done_frac": sum(tokens[:done]) / sum(tokens), **means}
            if validation is not None and validated:
                with learner.averaged():
                    metrics |= validation.run(learner.model)
                window = _Window()
            metrics |= life.metrics() if life is not None else {}
            with tempfile.TemporaryDirectory() as scratch:
                saved = state.save(Path(scratch)) if due and edge.rank == 0 else None
                edge.report({"phase": 1.0, **metrics}, saved)


class _Window:
    """Means over the steps since the last report."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.steps = self.tokens = 0
        self.since = time.perf_counter()

    def add(self, metrics: dict[str, float], tokens: int) -> None:
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps += 1
        self.tokens += tokens

    def means(self) -> dict[str, float]:
        """Of everything since the last call; also the speed over all workers."""
        seconds = time.perf_counter() - self.since
        means = {name: value / self.steps for name, value in self.sums.items()}
        means |= {"throughput/tokens_per_s": self.tokens / seconds, "throughput/steps_per_s": self.steps / seconds}
        self.__init__()
        return means


def _check_same(steps: list[int]) -> None:
    """Or weights would drift apart without a word."""
    if len(set(steps)) > 1:
        raise DataError(
            f"workers found checkpoints of steps {', '.join(map(str, steps))} (by rank): not every node sees the same "
            "files. Set cluster.storage_path, or out_dir, to a folder that all of them share"
        )


def _mean(everyone: list[dict[str, float]]) -> dict[str, float]:
    """Over workers, who have read equal parts of each batch: what is reported does not depend on their number."""
    return {name: sum(each[name] for each in everyone) / len(everyone) for name in everyone[0]}


def _batches(config: RunConfig, vocabulary: TaskVocabulary, corpus: Corpus) -> BatchSource:
    long = Mixture.from_config(config.tasks, vocabulary, corpus, seed=config.seed)
    windows = config.tasks.model_copy(update={"names": (*config.tasks.names, "corpus")})
    in_window = Mixture.from_config(windows, vocabulary, corpus, seed=config.seed + 1)
    needed = max(task.overhead_tokens(0, num_queries=config.tasks.num_queries) for task in long.fitting(0).tasks)
    return BatchSource(
        long, in_window, config.tasks, config.training, config.backbone.segment_tokens, needed, config.seed
    )


def _suite(config: RunConfig, edge: Edge, vocabulary: TaskVocabulary, corpus: Corpus) -> Suite:
    def on_progress(done_frac: float) -> None:
        edge.report({"phase": 2.0, "evaluated_frac": done_frac}, None)

    return Suite(
        config.evaluation, vocabulary, corpus, config.tasks.num_pairs, config.seed, edge.rank, edge.world_size,
        edge.gather, on_progress,
    )  # fmt: skip


def _validation(config: RunConfig, edge: Edge, vocabulary: TaskVocabulary, corpus: Corpus) -> Validation:
    return Validation(
        config.validation, config.evaluation, vocabulary, corpus, config.tasks.num_pairs, config.seed, edge.rank,
        edge.world_size, edge.gather,
    )  # fmt: skip
