"""The memory as a sequence mixer of its own, trained from scratch: for benchmarks that are defined that way."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from cortex_core.config import FastWeightsConfig
from cortex_core.fast_weights.sidecar import LayerShape, LayerTokens, Sidecar
from cortex_core.tasks.mqar import TRAIN, RecallBatch

STEPS, BATCH_TOKENS, WARM_UP = 200, 8192, 20
LEARNING_RATE, GATE_LEARNING_RATE = 3e-3, 1e-2


class RecallModel(nn.Module):
    """Embedding, one memory layer with a residual connection, tied output map. No attention anywhere."""

    def __init__(self, vocab_size: int, width: int, value_dim: int, config: FastWeightsConfig) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.embed.weight, std=width**-0.5)
        self.norm, self.out_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.values, self.out = nn.Linear(width, value_dim, bias=False), nn.Linear(value_dim, width, bias=False)
        nn.init.orthogonal_(self.values.weight)
        with torch.no_grad():
            self.out.weight.copy_(self.values.weight.T)
        self.sidecar = Sidecar(LayerShape(width, 1, config.rank, value_dim), config)
        nn.init.constant_(self.sidecar.output_gate, 1 / config.write_strength)

    @property
    def state_floats(self) -> int:
        """Numbers that are kept of a sequence, however long it is; as published, without a short convolution's inputs."""
        return self.sidecar.empty_state(1).matrices.num_bytes // 4

    def forward(
        self, ids: Int[Tensor, "batch tokens"], wanted: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "wanted vocab"]:
        """Logits at the wanted positions, row by row."""
        x = self.embed(ids)
        hidden = self.norm(x)
        values = self.values(hidden)[:, None]
        place = torch.arange(ids.shape[1]).expand(len(ids), -1)
        tokens = LayerTokens(
            hidden, values, attended=values, valid=torch.ones_like(ids, dtype=torch.bool), positions=place,
            reward=torch.zeros(ids.shape), segment_tokens=ids.shape[1],
        )  # fmt: skip
        reading, _ = self.sidecar(tokens, self.sidecar.empty_state(len(ids)))
        assert reading.added is not None
        x = x + self.out(reading.added[:, 0])
        return self.out_norm(x[wanted]) @ self.embed.weight.T


def train(model: RecallModel, seed: int, steps: int = STEPS) -> None:
    """`steps` batches of some `BATCH_TOKENS` tokens, of the published training sizes in the published proportion."""
    gates = [p for name, p in model.named_parameters() if "gate" in name]
    others = [p for name, p in model.named_parameters() if "gate" not in name]
    peaks = (GATE_LEARNING_RATE, LEARNING_RATE)
    optimizer = torch.optim.AdamW([{"params": gates}, {"params": others}], betas=(0.9, 0.98), weight_decay=0.0)
    for step, batch in enumerate(_batches(seed, steps)):
        rate = min(1.0, (step + 1) / WARM_UP) * min(1.0, (steps - step) / (steps / 2))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * rate
        logits, expected = answers(model, batch)
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(logits, expected).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def answers(model: RecallModel, batch: RecallBatch) -> tuple[Float[Tensor, "asked vocab"], Int[Tensor, " asked"]]:
    """Logits and right values of all questions, row by row."""
    expected, asked = torch.from_numpy(batch.expected), torch.from_numpy(batch.asked)
    return model(torch.from_numpy(batch.tokens), asked), expected[asked]


def _batches(seed: int, steps: int) -> Iterator[RecallBatch]:
    rng, used = np.random.default_rng([seed, 1]), [0] * len(TRAIN)
    shares = np.array([portion.num_sequences for portion in TRAIN], np.float64)
    for which in rng.choice(len(TRAIN), steps, p=shares / shares.sum()):
        portion = TRAIN[which]
        count = BATCH_TOKENS // portion.task.num_tokens
        yield portion.task.batch(range(used[which], used[which] + count), split="train", seed=seed)
        used[which] += count
