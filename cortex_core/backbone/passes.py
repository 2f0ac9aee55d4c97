"""What listens to the backbone's attention while it reads: the sidecars of one model, state in, state out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor, nn

from cortex_core.backbone.segments import Layout
from cortex_core.fast_weights.sidecar import LayerTokens, Reading, Sidecar
from cortex_core.fast_weights.state import FastWeights

States = dict[int, FastWeights]


@dataclass
class MemoryPass:
    """One backbone call over stacked segments. Filled in while it runs; nothing of it outlives the call."""

    sidecars: Mapping[nn.Module, tuple[int, Sidecar]]
    """Attention module to (layer number, sidecar)."""
    states: States
    layout: Layout
    snapshot_segment: Int[Tensor, " batch"] | None = None
    """Segment, counted from the first, at whose start each row's state is kept in `snapshots`."""
    read_last: bool = True
    """Whether the last memory layer's read is needed; False when only the state is."""
    log: bool = False
    """Whether the readings say what was written."""
    read_strength: float = 1.0
    """Share of what the memory reads that is added to the attention output."""
    final: States = field(default_factory=dict)
    snapshots: States = field(default_factory=dict)
    readings: dict[int, Reading] = field(default_factory=dict)
    _inputs: dict[nn.Module, Tensor] = field(default_factory=dict)

    def before(self, module: nn.Module, hidden: Tensor) -> None:
        if module in self.sidecars:
            self._inputs[module] = hidden

    def after(self, module: nn.Module, q: Tensor, v: Tensor, attended: Tensor) -> Tensor:
        if module not in self.sidecars:
            return attended
        layer, sidecar = self.sidecars[module]
        tokens = self._tokens(self._inputs.pop(module), v, attended)
        reading = self._read(layer, sidecar, tokens)
        self.readings[layer] = reading
        self.final[layer] = reading.final_state
        if reading.added is None:
            return attended
        added = self.layout.to_flat(self.read_strength * reading.added.transpose(1, 2))
        return attended + added.to(attended.dtype)

    def _read(self, layer: int, sidecar: Sidecar, tokens: LayerTokens) -> Reading:
        wanted = self.read_last or layer != max(number for number, _ in self.sidecars.values())
        reading, self.snapshots[layer] = sidecar(
            tokens, self.states[layer], snapshot_segment=self.snapshot_segment, read=wanted, log=self.log
        )
        return reading

    def _tokens(self, hidden: Tensor, v: Tensor, attended: Tensor) -> LayerTokens:
        layout, new = self.layout, hidden.shape[1]
        v = _for_queries(v[:, :, -new:], attended.shape[2])  # with a cache, values begin with those of earlier calls
        return LayerTokens(
            layout.to_sequences(hidden),
            values=layout.to_sequences(v.transpose(1, 2)).transpose(1, 2),
            attended=layout.to_sequences(attended).transpose(1, 2),
            valid=layout.to_sequences(layout.valid),
            positions=layout.positions(),
            reward=layout.to_sequences(layout.reward),
            segment_tokens=hidden.shape[1],
            silent=None if layout.silent is None else layout.to_sequences(layout.silent),
            forced=None if layout.forced is None else layout.to_sequences(layout.forced),
        )


@dataclass
class GatePass(MemoryPass):
    """One call in which memories are neither written nor read: what their write gates would say to its tokens."""

    activations: dict[int, Tensor] = field(default_factory=dict)
    """Per layer [batch, heads, tokens], 0 to 1, before the dead zone."""

    def after(self, module: nn.Module, q: Tensor, v: Tensor, attended: Tensor) -> Tensor:
        if module in self.sidecars:
            layer, sidecar = self.sidecars[module]
            tokens = self._tokens(self._inputs.pop(module), v, attended)
            self.activations[layer] = sidecar.activations(tokens, self.states[layer])
        return attended


@dataclass
class GenerationPass(MemoryPass):
    """The calls of one generation: the open segment with its cache, then token by token, the state carried along."""

    anchors: States = field(default_factory=dict)
    """Per layer, the state at the start of the open segment."""
    write_new: bool = True
    """Whether tokens that are made are written before their segment closes. A write filter cannot know yet."""

    def before(self, module: nn.Module, hidden: Tensor) -> None:
        first = next(iter(self.sidecars))
        if module is first and self.final:
            self._advance(hidden)
        super().before(module, hidden)

    def _advance(self, hidden: Tensor) -> None:
        """A new call begins: the next token of every row."""
        rows, device = hidden.shape[0], hidden.device
        self.states = dict(self.final)
        self.layout = Layout(
            segments=1,
            valid=torch.ones(rows, hidden.shape[1], dtype=torch.bool, device=device),
            start=self.layout.start + self.layout.valid.sum(1),
            reward=torch.zeros(rows, hidden.shape[1], device=device),
            silent=None if self.write_new else torch.ones(rows, hidden.shape[1], dtype=torch.bool, device=device),
            left_padded=False,
        )

    def _read(self, layer: int, sidecar: Sidecar, tokens: LayerTokens) -> Reading:
        if layer in self.anchors:
            return sidecar(tokens, self.states[layer], anchor=self.anchors[layer])[0]
        self.anchors[layer] = self.states[layer]
        return sidecar(tokens, self.states[layer])[0]


def _for_queries(v: Tensor, heads: int) -> Tensor:
    """Grouped-query attention: the value head that each query head uses."""
    return v if v.shape[1] == heads else v.repeat_interleave(heads // v.shape[1], dim=1)
