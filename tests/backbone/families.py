"""Tiny random models of every family that the memory is tested on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from cortex_core.backbone.model import Cortex
from cortex_core.config import FastWeightsConfig

VOCAB, SEGMENT, CHUNK = 96, 32, 8

_SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GROUPED = _SIZES | {"num_key_value_heads": 2}
CONFIGS = {
    "llama": tf.LlamaConfig(**_GROUPED),
    "mistral": tf.MistralConfig(**_GROUPED, sliding_window=16),
    "qwen2": tf.Qwen2Config(**_GROUPED),
    "qwen3": tf.Qwen3Config(**_GROUPED, head_dim=8),
    "gemma2": tf.Gemma2Config(**_GROUPED, head_dim=8, sliding_window=16),
    "gemma3": tf.Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=16),
    "phi3": tf.Phi3Config(**_GROUPED),
    "gpt2": tf.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2
    ),
    "gpt_neox": tf.GPTNeoXConfig(**_SIZES),
}
KINDS = [
    *(pytest.param(family, {}, id=family) for family in CONFIGS),
    pytest.param("qwen2", {"adapter_rank": 4}, id="adapters"),
    pytest.param("qwen2", {"reversed_frac": 0.5, "binding": True}, id="relations"),
    pytest.param("qwen2", {"reversed_frac": 0.5, "shared_values": True}, id="shared values"),
]
"""Families, and settings of the memory beside those of `small_memory`."""
ROTARY = sorted(set(CONFIGS) - {"gpt2"})


def bare(family: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> tf.PreTrainedModel:
    """A random model, the same one each time."""
    torch.manual_seed(0)
    attention = "eager" if family == "gemma2" else attention  # soft-capped scores: sdpa is refused by transformers
    return tf.AutoModelForCausalLM.from_config(CONFIGS[family], attn_implementation=attention, dtype=dtype).eval()


def with_memory(family: str = "qwen2", *, open_gate: bool = True, **memory: Any) -> Cortex:
    """A random model with random sidecars; with `open_gate` they matter."""
    model = Cortex.attach(bare(family), small_memory(**memory), segment_tokens=SEGMENT)
    if open_gate:
        open_gates(model)
    return model


def small_memory(**settings: Any) -> FastWeightsConfig:
    return FastWeightsConfig(**{"rank": 8, "chunk_size": CHUNK, "layers": (1, 2)} | settings)


def open_gates(model: Cortex) -> None:
    """Make the sidecars write some tokens, under addresses from all taps, and add something to every token."""
    generator = torch.Generator().manual_seed(1)
    for sidecar in model.sidecars.values():
        nn.init.constant_(sidecar.output_gate, 1.5)
        for weights in (sidecar.write_gate.weight, sidecar.addresses.key_taps, sidecar.addresses.query_taps):
            nn.init.normal_(weights, std=0.3, generator=generator)
        if sidecar.controller is not None:
            nn.init.normal_(sidecar.controller.out.weight, std=0.3, generator=generator)
        if sidecar.adapters is not None:
            for weights in sidecar.adapters.parameters():
                nn.init.normal_(weights, std=0.3, generator=generator)


def random_ids(rows: int, tokens: int, seed: int = 1) -> torch.Tensor:
    """Without special tokens."""
    return torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))
