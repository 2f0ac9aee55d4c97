"""Writes a pretrained backbone as a Hugging Face folder, its model card made from the measured numbers."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

from cortex_core.training.pretrain import Pretraining
from cortex_core.training.pretrain_scores import bits_per_byte, score_tasks

CARD, SCORES = "README.md", "scores.json"


def measure(run: Pretraining, num_examples: int, progress: Any = lambda _: None) -> dict[str, Any]:
    """Everything that the card says: what was trained, on what, and the scores with their n."""
    config, window = run.config, run.config.decoder.window_tokens
    text = bits_per_byte(run.model, run.corpus, window_tokens=window)
    tasks = score_tasks(
        run.model,
        run.vocabulary,
        run.corpus,
        window_tokens=window,
        num_examples=num_examples,
        progress=progress,
    )
    return {
        "name": config.name,
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "steps": run.step,
        "training_tokens": run.step * config.batch_size * window,
        "python": platform.python_version(),
        "train_documents": len(run.corpus.train_starts),
        "train_bytes": run.corpus.train_bytes,
        "held_out_documents": len(run.corpus.held_out_starts),
        "held_out_bytes": run.corpus.held_out_bytes,
        "words": {
            f"{split}_{role}": len(pool[split])
            for role, pool in (("keys", run.vocabulary.keys), ("values", run.vocabulary.values))
            for split in ("train", "held_out")
        },
        "text": text,
        "tasks": tasks,
        "config": config.model_dump(mode="json"),
    }


def export(run: Pretraining, scores: dict[str, Any], folder: Path) -> None:
    """Model, tokenizer, scores and card into `folder`. Files appear whole: written aside, then renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as draft:
        run.model.save_pretrained(draft)
        run.tokenizer.save_pretrained(draft)
        (Path(draft) / SCORES).write_text(json.dumps(scores, indent=2) + "\n")
        (Path(draft) / CARD).write_text(card(scores))
        for path in Path(draft).iterdir():
            path.chmod(0o644)  # safetensors writes for the owner alone
            os.replace(path, folder / path.name)


def card(scores: dict[str, Any]) -> str:
    """The model card. Every number in it comes from `scores`."""
    config, text, words = scores["config"], scores["text"], scores["words"]
    decoder = config["decoder"]
    window = decoder["window_tokens"]
    table = {
        "architecture": f"Llama with biases: {decoder['num_layers']} layers, width {decoder['hidden_size']}, "
        f"{decoder['num_heads']} heads, MLP {decoder['mlp_size']}, "
        f"{'tied' if decoder['tied_embeddings'] else 'untied'} embeddings, float32",
        "parameters": f"{scores['parameters']:,}",
        "tokenizer": f"byte-level BPE, {decoder['vocab_size']:,} tokens, digits on their own",
        "training text": f"{scores['train_documents']:,} documents, {scores['train_bytes']:,} bytes",
        "held-out text": f"{scores['held_out_documents']:,} documents, {scores['held_out_bytes']:,} bytes; "
        "the tokenizer has not seen it either",
        "words of the tasks": f"keys: {words['train_keys']} for training, {words['held_out_keys']} held out; "
        f"values: {words['train_values']} and {words['held_out_values']}; no word is both",
    }
    source = config["data"]["path"] or f"the sources of Python {scores['python']}'s standard library, without tests"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
license: mit
---
# {scores["name"]}

A small decoder that recalls facts within its window of {window} tokens, and no further. It is the backbone on
which a memory is trained and tested without a download. It is not a useful language model.

## How it was made
`cortex pretrain pretrain` from fresh weights; nothing was downloaded. {scores["steps"]:,} steps of
{config["batch_size"]} windows, {scores["training_tokens"]:,} tokens in all, on one thread.
The seed is {config["seed"]}. The text is {source}; none of it is in this folder.

| | |
|---|---|
{chr(10).join(f"| {name} | {value} |" for name, value in table.items())}

Rows: {_row_shares(config["rows"])}.

## What it can do
Facts and one question at random places of one window, filler everywhere else. "Held out" means that the words
were used in no training task and the text around them in no training row. Right means that every token of
the answer is the model's first choice.

| task | filler | words | right | 95 % | n | answer tokens right |
|---|---|---|---|---|---|---|
{_task_rows(scores["tasks"])}

Held-out text, in windows of {window} tokens read on their own: **{text["bits_per_byte"]:.3f} bits per byte**
({text["nats_per_token"]:.3f} nats per token, {text["bytes_per_token"]:.2f} bytes per token, {_scored(text)}).

## Limits
English in source code only. Facts must be written as in training (`remember <key> <value>;`, then
`recall <key> <value>;`). All numbers are in `scores.json`, with the configuration.
"""


def _scored(text: dict[str, float]) -> str:
    return f"n = {text['tokens']:,.0f} tokens"


def _row_shares(rows: dict[str, Any]) -> str:
    fracs = {"key-value": rows["key_value_frac"], "repeat": rows["repeat_frac"], "other tasks": rows["tasks_frac"]}
    shares = [f"{100 * frac:.0f} % {kind}" for kind, frac in fracs.items() if frac]
    named = ", ".join(dict.fromkeys(name.replace("_", "-") for name in rows["tasks"]))
    return ", ".join([*shares, f"{100 * (1 - sum(fracs.values())):.0f} % plain text"]) + f". Other tasks: {named}"


def _task_rows(tasks: list[dict[str, Any]]) -> str:
    return "\n".join(
        f"| {row['task'].replace('_', '-')} | {row['filler']} | {row['words'].replace('_', ' ')} "
        f"| {100 * row['accuracy']:.1f} % | {100 * row['low']:.1f} to {100 * row['high']:.1f} | {row['n']} "
        f"| {100 * row['token_accuracy']:.1f} % |"
        for row in tasks
    )
