"""Loads a backbone and its tokenizer: a hub id, a folder, or a model that ships with the package. One path for all."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from cortex_core.config import ASSETS, BUILTIN, BackboneConfig
from cortex_core.errors import DataError, IncompatibleError


def in_assets(name: str) -> Path:
    """The folder that a name means: `builtin:<folder>` lies inside the package."""
    return ASSETS / name.removeprefix(BUILTIN) if name.startswith(BUILTIN) else Path(name)


def resolve_name(name: str) -> str:
    """`builtin:<folder>` to the folder inside the package; anything else as it is. Raises DataError."""
    if not name.startswith(BUILTIN):
        return name
    folder = in_assets(name)
    if not (folder / "config.json").is_file():
        shipped = ", ".join(sorted(BUILTIN + p.parent.name for p in ASSETS.glob("*/config.json"))) or "none"
        raise DataError(f"backbone.name = {name}: no such model ships with this package. Shipped: {shipped}")
    return str(folder)


def load_backbone(config: BackboneConfig) -> PreTrainedModel:
    """The causal language model, in evaluation mode and frozen; under an active `HfDeepSpeedConfig`, this rank's shard.

    Never runs code from the checkpoint. Raises DataError if there is no such model, IncompatibleError if transformers
    cannot read it as a causal language model.
    """
    dtype = fast_dtype() if config.dtype == "fast" else config.dtype
    name = resolve_name(config.name)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            revision=config.revision,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=config.attn_implementation,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except OSError as error:
        raise DataError(
            f"backbone.name = {config.name}: cannot be loaded ({first_line(error)}). "
            "Give a Hugging Face hub id or a folder with config.json and *.safetensors"
        ) from error
    except (ValueError, KeyError) as error:
        raise IncompatibleError(f"backbone.name = {config.name}: {first_line(error)}") from error
    model.requires_grad_(False)
    return model.eval()


def fast_dtype() -> Literal["bfloat16", "float32"]:
    """What `backbone.dtype = "fast"` means here: bfloat16 takes half the memory, but is slow where emulated."""
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return "bfloat16" if native else "float32"


def load_tokenizer(config: BackboneConfig) -> PreTrainedTokenizerBase:
    """The backbone's own tokenizer. Raises IncompatibleError if it has none."""
    try:
        return AutoTokenizer.from_pretrained(
            resolve_name(config.name), revision=config.revision, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IncompatibleError(
            f"backbone.name = {config.name}: has no tokenizer that transformers can load ({first_line(error)}). "
            "Save one into the same folder with tokenizer.save_pretrained(folder)"
        ) from error


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
