"""What can be known to fail before torch and ray are imported: it is said now, not minutes later on a worker.

A backbone is judged by the JSON beside its weights; what only the loaded model can tell waits until then.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from cortex_core.config import ASSETS, BUILTIN, CORPUS_SUFFIXES
from cortex_core.errors import ConfigError, DataError, IncompatibleError
from pipelines import zero3
from pipelines.config import RunConfig, located

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def check(config: RunConfig) -> None:
    """Every check below. Reads a few small files, writes nothing.

    Raises:
        ConfigError: a value contradicts the backbone or the machine, or DeepSpeed's file what Cortex sets.
        DataError: the corpus, the backbone or DeepSpeed's file is not there.
        IncompatibleError: the backbone cannot be used.
    """
    check_out_dir(config)
    check_against_machine(config)
    check_deepspeed(config)
    check_data(config)
    check_against_backbone(config)


def check_out_dir(config: RunConfig) -> None:
    """Something will be written there."""
    check_folder(Path(config.out_dir), f'out_dir = "{config.out_dir}"', "Set out_dir to another folder")


def check_folder(folder: Path, what: str, remedy: str) -> None:
    """The folder can be made or written to. Raises ConfigError that begins with `what` and ends with `remedy`."""
    folder = folder.absolute()
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        why = "may not be written to" if existing.is_dir() else "is a file"
        raise ConfigError(f"{what}: {existing} {why}. {remedy}")


def check_data(config: RunConfig) -> None:
    """The path exists and holds a kind of file that is read."""
    if config.data.path is None:
        return
    path, kinds = Path(str(located(config).data.path)), ", ".join(CORPUS_SUFFIXES)
    what = f'data.path = "{config.data.path}"'
    if not path.exists():
        raise DataError(
            f"{what}: no such file or folder. Give a file or a folder of them ({kinds}), or leave it out to "
            "train on the Python standard library's sources"
        )
    files = (p for p in path.rglob("*")) if path.is_dir() else iter([path])
    if not any(p.suffix in CORPUS_SUFFIXES for p in files):
        state = "holds no" if path.is_dir() else "is not a"
        raise DataError(f"{what}: {state} file that can be read: {kinds}")


def check_against_machine(config: RunConfig) -> None:
    """Ray would wait for resources that a cluster on this machine alone can never have."""
    cluster, cpus = config.cluster, len(os.sched_getaffinity(0))
    if cluster.num_workers == 0 or (cluster.address or os.environ.get("RAY_ADDRESS")):
        return
    name, workers = cluster.needed_workers
    needed = workers * cluster.cpus_per_worker
    if needed > cpus:
        fewer = int(cpus / cluster.cpus_per_worker)
        remedy = f"{name}={fewer} or " if fewer else ""
        remedy += f"cluster.cpus_per_worker={math.floor(100 * cpus / workers) / 100:g}"
        raise ConfigError(
            f"{name} = {workers} x cluster.cpus_per_worker = "
            f"{cluster.cpus_per_worker:g}: must be at most {cpus}, the CPUs of this machine. Set "
            f"{remedy}, or cluster.address=auto for a cluster"
        )
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    _check_room_for_actors(config, "cpu", needed, cpus)
    if cluster.use_gpu and workers > gpus and not Path("/dev/dxg").exists():  # WSL has this one
        remedy = f"Set {name}={gpus}" if gpus else "Set cluster.use_gpu=false"
        raise ConfigError(
            f"{name} = {workers} with cluster.use_gpu = true: must be at most "
            f"{gpus}, the NVIDIA GPUs of this machine. {remedy}, or cluster.address=auto for a cluster"
        )
    if not Path("/dev/dxg").exists():
        _check_room_for_actors(config, "gpu", float(workers * cluster.use_gpu), gpus)


def _check_room_for_actors(config: RunConfig, kind: Literal["cpu", "gpu"], workers: float, there: int) -> None:
    """Beside the workers. An actor that cannot be placed would be waited for in vain."""
    if not config.life.beside_training:
        return
    what, dreamers = f"num_{kind}s", config.dream_actors.num_generators if config.dreams_beside_training else 0
    actors = getattr(config.sleep_actor, what) + dreamers * getattr(config.dream_actors, what)
    if actors and workers + actors > there + 1e-9:  # ten times 0.1 are not quite 1
        first = "cluster.cpus_per_worker, " if kind == "cpu" else ""
        raise ConfigError(
            f"life.beside_training = true: the workers reserve {workers:g} {kind.upper()}s and the actors {actors:g} "
            f"(sleep_actor.{what} + {dreamers} x dream_actors.{what}): must be at most {there} together, the "
            f"{kind.upper()}s of this machine. Lower {first}sleep_actor.{what} or dream_actors.{what}: they are "
            "reservations, what is reserved can be shared"
        )


def check_deepspeed(config: RunConfig) -> None:
    """The file is there and asks for ZeRO-3. Whether DeepSpeed knows every key in it, only DeepSpeed can tell."""
    file = located(config).sharding.deepspeed
    if file is not None:
        zero3.read(file)


def check_against_backbone(config: RunConfig, *, whole: bool = True) -> None:
    """The memory fits the model and the segments fit its window, from `config.json` alone.

    Only for a builtin or a local folder: about a hub id nothing is known before it is downloaded. Unless it is `whole`,
    weights and a tokenizer may be missing.
    """
    what = f'backbone.name = "{config.backbone.name}"'
    described = described_backbone(located(config).backbone.name, what, whole=whole)
    if described is None:
        return
    shape = described.get("text_config") or described  # multimodal models nest their language part
    for line in _misfits(config, shape):
        raise ConfigError(line)


def described_backbone(name: str, what: str, *, whole: bool = True) -> dict[str, Any] | None:
    """`config.json` of a builtin or a local folder, which holds a model, a `whole` one; None for a hub id.

    Raises DataError or IncompatibleError that begins with `what` if something is missing.
    """
    folder = backbone_folder(name)
    if folder is None:
        return None
    described = _read_config(folder, what)
    if described.get("is_encoder_decoder"):
        raise IncompatibleError(f"{what}: is an encoder-decoder. A decoder-only language model is needed")
    if whole:
        _check_files(folder, what)
    return described


def backbone_folder(name: str) -> Path | None:
    """The folder that `name` means, or None for a hub id. It need not exist."""
    if name.startswith(BUILTIN):
        return ASSETS / name.removeprefix(BUILTIN)
    path = Path(os.path.expanduser(name))
    is_path = path.is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") > 1
    return path if is_path or path.exists() else None


def _read_config(folder: Path, what: str) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        shipped = ", ".join(sorted(BUILTIN + p.parent.name for p in ASSETS.glob("*/config.json"))) or "none"
        state = "it has no config.json" if folder.is_dir() else "no such folder"
        raise DataError(
            f"{what}: {state} (looked for {path}). Give a folder written by save_pretrained, a hub id of "
            f"Hugging Face, or a model that ships: {shipped}"
        ) from None
    except ValueError as error:
        raise DataError(f"{what}: {path} is not JSON ({error}). Download or save the model again") from None
    if not isinstance(described, dict):
        raise DataError(f"{what}: {path} does not describe a model. Download or save the model again")
    return described


def _check_files(folder: Path, what: str) -> None:
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise IncompatibleError(
            f"{what}: has no tokenizer (looked for {', '.join(TOKENIZER_FILES)}). "
            "Save one into the same folder with tokenizer.save_pretrained(folder)"
        )
    if not any(folder.glob("*.safetensors")):
        raise DataError(
            f"{what}: has no weights (looked for *.safetensors). "
            "Download them, or convert others with model.save_pretrained(folder)"
        )


def _misfits(config: RunConfig, shape: Mapping[str, Any]) -> Iterator[str]:
    """One line per setting that the described model has no room for. A family may name nothing we know."""
    window = _first_int(shape, "max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    heads = _first_int(shape, "num_attention_heads", "n_head")
    width = _first_int(shape, "hidden_size", "n_embd")
    layers = _first_int(shape, "num_hidden_layers", "n_layer")
    head_dim = _first_int(shape, "head_dim") or (width // heads if width and heads else None)
    segment, memory = config.backbone.segment_tokens, config.fast_weights
    if window and segment > window:
        yield (
            f"backbone.segment_tokens = {segment}: must be at most {window}, the window of "
            f"{config.backbone.name}. Set backbone.segment_tokens={window}; memory carries what came before"
        )
    if head_dim and memory.rank > head_dim:
        yield (
            f"fast_weights.rank = {memory.rank}: must be at most {head_dim}, the width of a head of "
            f"{config.backbone.name}: its memory is low-rank. Set fast_weights.rank={head_dim} or less"
        )
    if head_dim and heads and memory.adapter_rank > heads * head_dim:
        yield (
            f"fast_weights.adapter_rank = {memory.adapter_rank}: must be at most {heads * head_dim}, the width of all "
            f"heads of {config.backbone.name} together. Set fast_weights.adapter_rank={heads * head_dim} or less"
        )
    if layers and memory.layers != "auto" and max(memory.layers, default=0) >= layers:
        yield (
            f"fast_weights.layers = {list(memory.layers)}: must be at most {layers - 1}, the last layer of "
            f'{config.backbone.name}, counted from 0. Set fast_weights.layers="auto" or smaller numbers'
        )


def _first_int(shape: Mapping[str, Any], *names: str) -> int | None:
    return next((shape[name] for name in names if isinstance(shape.get(name), int) and shape[name] > 0), None)
