"""Random streams, gates and rules for the tests of the write rules."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from cortex_core.fast_weights.rules import Dose, Rule, step_by_step
from cortex_core.fast_weights.state import FastWeights

BATCH, HEADS, RANK, DIM, SEGMENT, CHUNK = 2, 3, 8, 16, 50, 16
LOG_DECAYS = torch.tensor([0.9, 0.99, 0.5]).log()  # a time scale per head
RULES = {
    "delta": Rule(LOG_DECAYS),
    "hebbian": Rule(LOG_DECAYS, hebbian=True, anti_hebbian=0.02),
    "source": Rule(torch.full((HEADS,), math.log(0.95)), hebbian=True, anti_hebbian=0.01, slow=False, clamp=True),
}
STRENGTH = {"delta": 1.0, "hebbian": 0.03, "source": 0.05}


@dataclass
class Opening:
    """Exactly 0 for about half of the tokens; open where the memory was wrong, if it is told."""

    gate: Tensor
    strength: float = 1.0
    needs_surprise: bool = True
    per_token: bool = False

    def __call__(self, surprise: Tensor | None, now: slice) -> Dose:
        wrong = surprise if self.needs_surprise and surprise is not None else 0.5
        opened = (self.gate[:, :, now] + wrong - 0.5).clamp(0, 1)
        return Dose(opened * self.strength, torch.ones_like(opened) if self.per_token else opened)


def streams(name: str, tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Keys and queries of unit length; values of unit length for the source's rule; a state that holds something."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(BATCH, HEADS, *shape, generator=generator).to(dtype).float()

    width = DIM if name == "source" else RANK
    values = random(tokens, DIM)
    drawn = {
        "keys": functional.normalize(random(tokens, width), dim=-1),
        "queries": functional.normalize(random(tokens, width), dim=-1),
        "values": functional.normalize(values, dim=-1) if name == "source" else values,
        "gate": random(tokens),
        "up": random(RANK, DIM) * (0.1 if name == "source" else 1.0),
    }
    if name != "delta":
        down = torch.linalg.qr(random(width, RANK))[0].contiguous()
        drawn["down"] = down if name == "source" else 0.1 * down
    return drawn


def state_of(inputs: dict[str, Tensor]) -> FastWeights:
    return FastWeights(inputs["up"], inputs.get("down"))


def gate_of(name: str, inputs: dict[str, Tensor], *, needs_surprise: bool = True) -> Opening:
    return Opening(inputs["gate"], STRENGTH[name], needs_surprise, per_token=name == "source")


def oracle(
    rule: Rule, inputs: dict[str, Tensor], gate: Opening, segment_tokens: int = SEGMENT
) -> tuple[Tensor, FastWeights]:
    """Token by token, segment after segment: surprise is measured against the state at each segment's start."""
    state, outputs = state_of(inputs), []
    keys, queries, values = inputs["keys"], inputs["queries"], inputs["values"]
    for start in range(0, keys.shape[2], segment_tokens):
        now = slice(start, start + segment_tokens)
        part = Opening(gate.gate[:, :, now], gate.strength, gate.needs_surprise, gate.per_token)
        out, state = step_by_step(rule, keys[:, :, now], queries[:, :, now], values[:, :, now], part, state, state)
        outputs.append(out)
    return torch.cat(outputs, dim=2), state


def gradients(outputs: Tensor, final: FastWeights, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Of a random weighting of outputs and final state, to every input."""
    generator = torch.Generator().manual_seed(1)
    parts = [outputs, *(part for part in final if part is not None)]
    loss = sum((part * torch.randn(part.shape, generator=generator)).sum() for part in parts)
    return torch.autograd.grad(torch.as_tensor(loss), [*inputs.values()])


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / a.detach().abs().max().clamp_min(1e-12))
