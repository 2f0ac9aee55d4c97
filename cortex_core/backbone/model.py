"""`Cortex`: a frozen language model with a memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from cortex_core.backbone import sidecar_files
from cortex_core.backbone.attach import chosen_layers, find_ports, first_layers
from cortex_core.backbone.attention import attention_pass, capture_hidden, same_pass_again, select_positions
from cortex_core.backbone.fingerprint import fingerprint
from cortex_core.backbone.generate import generate
from cortex_core.backbone.load import in_assets, load_backbone
from cortex_core.backbone.passes import MemoryPass, States
from cortex_core.backbone.reading import advance, metrics_of
from cortex_core.backbone.segments import Layout, Rows
from cortex_core.backbone.session import Session, load_session
from cortex_core.config import BackboneConfig, FastWeightsConfig
from cortex_core.errors import ConfigError
from cortex_core.fast_weights.sidecar import Sidecar


@dataclass(frozen=True)
class CortexOutput:
    """Result of a call."""

    logits: Float[Tensor, "batch tokens vocab"] | None
    """For each new token (or the last `logits_to_keep`), what comes next. At padding: no meaning. None after `read`."""
    metrics: dict[str, float]
    """`memory/write_frac`, `memory/surprise`: means over layers and the tokens of the last backbone call, the open
    segment's earlier tokens among them; `memory/state_norm`: after it, mean over layers. Empty with the memory off."""


class Cortex(nn.Module):
    """A frozen Hugging Face causal language model whose chosen layers carry a trainable memory.

    What it does not own (`config`, `device`, `dtype`, `generation_config` …) it takes from the backbone.
    """

    def __init__(self, backbone: PreTrainedModel, fast_weights: FastWeightsConfig, segment_tokens: int) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.fast_weights, self.segment_tokens = fast_weights, segment_tokens
        ports = find_ports(backbone)
        layers = chosen_layers(fast_weights, len(ports))
        _check_sizes(fast_weights, segment_tokens, ports[layers[0]].shape.head_dim, backbone)
        self.sidecars = nn.ModuleDict({str(n): Sidecar(ports[n].shape, fast_weights) for n in layers})
        self.sidecars.to(backbone.device)
        self._memory_on = True
        modules = {ports[n].module: (n, self.sidecars[str(n)]) for n in layers}
        for module in modules:
            module.register_forward_pre_hook(capture_hidden, with_kwargs=True)
        head = backbone.get_output_embeddings()
        assert isinstance(head, nn.Module)  # every causal language model has one
        head.register_forward_pre_hook(select_positions)
        # Plain attributes inside a tuple: not registered as submodules a second time.
        self._ports: tuple[Mapping[nn.Module, tuple[int, Any]], ...] = (modules,)
        self._reader = (first_layers(backbone, ports[layers[-1]].module),)

    @classmethod
    def attach(
        cls,
        backbone: PreTrainedModel,
        fast_weights: FastWeightsConfig | None = None,
        segment_tokens: int | None = None,
    ) -> Cortex:
        """Give a loaded model a new, untrained memory; its outputs do not change until it is trained.

        `segment_tokens` defaults to `BackboneConfig.segment_tokens`, or the model's window if that is smaller.
        Raises IncompatibleError for a model that cannot be attached, ConfigError for sizes that do not fit it.
        """
        if segment_tokens is None:
            segment_tokens = min(BackboneConfig().segment_tokens, _window(backbone))
        return cls(backbone, fast_weights or FastWeightsConfig(), segment_tokens)

    @classmethod
    def from_pretrained(cls, name: str, sidecars: str | Path | None = None, **backbone_settings: Any) -> Cortex:
        """Load a backbone (hub id, folder, `builtin:…`) and, with `sidecars` (folder, `builtin:…`), a memory for it.

        Further settings are those of `BackboneConfig`. Raises DataError, IncompatibleError, ConfigError.
        """
        if sidecars is None:
            config = BackboneConfig(name=name, **backbone_settings)
            chosen = config.segment_tokens if "segment_tokens" in backbone_settings else None
            return cls.attach(load_backbone(config), segment_tokens=chosen)
        saved = sidecar_files.read(in_assets(str(sidecars)))
        settings: dict[str, Any] = {"segment_tokens": saved.segment_tokens} | backbone_settings
        config = BackboneConfig(name=name, **settings)
        model = cls(load_backbone(config), saved.fast_weights, config.segment_tokens)
        sidecar_files.restore(model.sidecars, saved, fingerprint(model.backbone))
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the sidecars (not the backbone) to a folder, as safetensors and JSON."""
        sidecar_files.write(
            Path(folder),
            dict(self.sidecars.state_dict()),
            self.fast_weights,
            self.segment_tokens,
            fingerprint(self.backbone),
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("backbone"), name)

    # --- memory on and off -------------------------------------------------------------------------------------------

    @contextmanager
    def memory(self, on: bool) -> Iterator[Cortex]:
        """`with model.memory(False):` is the bare model; sessions given to it are neither read nor advanced."""
        before, self._memory_on = self._memory_on, on
        try:
            yield self
        finally:
            self._memory_on = before

    def checkpoint_gradients(self) -> None:
        """Recompute the backbone's activations in the backward pass instead of keeping them."""
        self.backbone.activation_checkpointing_enable({"use_reentrant": False, "context_fn": same_pass_again})
        for module in self.backbone.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True  # of the layer alone: its dropouts stay off

    # --- sessions ----------------------------------------------------------------------------------------------------

    def new_session(self, batch_size: int = 1) -> Session:
        """An empty memory for `batch_size` independent readers."""
        device = self.backbone.device
        start = torch.zeros(batch_size, dtype=torch.long, device=device)
        rows = Rows.empty(batch_size, device)
        with torch.no_grad():
            return Session(self.empty_states(batch_size), rows, start, self.identity(), self.empty_states(1))

    def load_session(self, path: str | Path) -> Session:
        """Read a session that a model with the same fingerprints has saved. Raises DataError, IncompatibleError."""
        return load_session(
            path, self.new_session(), self.segment_tokens, self.backbone.config.get_text_config().vocab_size
        )

    def identity(self) -> dict[str, str]:
        """Fingerprints that a session must share with the model that continues it."""
        return {"backbone": fingerprint(self.backbone), "sidecars": fingerprint(self.sidecars)}

    def empty_states(self, batch: int) -> States:
        """Per memory layer, a state that holds nothing."""
        return {layer: sidecar.empty_state(batch) for layer, sidecar in self.ports.values()}

    # --- calls -------------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"],
        attention_mask: Tensor | None = None,
        session: Session | None = None,
        reward: Float[Tensor, "batch tokens"] | None = None,
        logits_to_keep: int = 0,
    ) -> CortexOutput:
        """Read tokens and say what comes after each (0) or after the last `logits_to_keep` of each row.

        With a session, reading goes on where its last call stopped, and the session is advanced.
        """
        if not self._memory_on:
            out = self.backbone(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=logits_to_keep)
            return CortexOutput(out.logits, {})
        if session is None and input_ids.shape[1] <= self.segment_tokens:
            return self._one_segment(input_ids, attention_mask, reward, logits_to_keep)
        session = session or self.new_session(len(input_ids))
        rows, mask = self._rows(input_ids, attention_mask, reward, session)
        tail = input_ids.shape[1] - logits_to_keep if logits_to_keep else 0
        wanted = mask[:, tail:]
        logits, metrics = advance(self, session, rows, keep=wanted.sum(1))
        if wanted.all():  # no padding to put back: logits are large, and copies of them what a memory costs most
            return CortexOutput(logits, metrics)
        out = logits.new_zeros(*wanted.shape, logits.shape[-1])
        out[wanted] = logits[torch.arange(logits.shape[1], device=logits.device) < wanted.sum(1)[:, None]]
        return CortexOutput(out, metrics)

    @torch.no_grad()
    def read(
        self,
        input_ids: Int[Tensor, "batch tokens"],
        session: Session,
        attention_mask: Tensor | None = None,
        reward: Float[Tensor, "batch tokens"] | None = None,
    ) -> CortexOutput:
        """Read tokens into the session without predicting: only the layers up to the last memory run."""
        rows, _ = self._rows(input_ids, attention_mask, reward, session)
        return CortexOutput(None, advance(self, session, rows, keep=torch.zeros_like(rows.lengths))[1])

    def generate(
        self, input_ids: Int[Tensor, "batch tokens"], session: Session | None = None, **options: Any
    ) -> Tensor:
        """As `generate` of Hugging Face models, with a memory: input and output may be longer than the window.

        Returns input and new tokens [batch, tokens + new]. Raises ConfigError for options that cannot work with a
        memory (several beams or sequences, assisted decoding). What looks back over the text (`repetition_penalty`,
        `no_repeat_ngram_size`) sees the open segment only: tokens of closed segments are no longer there.
        """
        if not self._memory_on:
            return self.backbone.generate(input_ids=input_ids, **options)  # type: ignore[operator]
        session = session or self.new_session(len(input_ids))
        mask = options.pop("attention_mask", None)
        rows, _ = self._rows(input_ids, mask, None, session)
        return generate(self, input_ids, rows, session, **options)

    def listen(self, layout: Layout, states: States, **settings: Any) -> MemoryPass:
        """A pass that lets the sidecars take part in one backbone call (`attention_pass`)."""
        return MemoryPass(self.ports, states, layout, **settings)

    @property
    def ports(self) -> Mapping[nn.Module, tuple[int, Sidecar]]:
        """Attention modules that carry a memory, in order, with layer number and sidecar."""
        return self._ports[0]

    @property
    def reader(self) -> nn.Module:
        """The decoder up to the last memory layer: called without the language-model head."""
        return self._reader[0]

    def _one_segment(
        self, input_ids: Tensor, attention_mask: Tensor | None, reward: Tensor | None, logits_to_keep: int
    ) -> CortexOutput:
        """Nothing before it and no more than the window: the backbone's own call, with its own padding."""
        session = self.new_session(len(input_ids))
        _, mask = self._rows(input_ids, attention_mask, reward, session)
        reward = torch.zeros(input_ids.shape, device=input_ids.device) if reward is None else reward
        memory = self.listen(Layout(1, mask, session.start_tokens, reward), session.states)
        with attention_pass(memory):
            out = self.backbone(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=logits_to_keep
            )
        return CortexOutput(out.logits, metrics_of(memory))

    def _rows(
        self, input_ids: Tensor, attention_mask: Tensor | None, reward: Tensor | None, session: Session
    ) -> tuple[Rows, Bool[Tensor, "batch tokens"]]:
        if input_ids.dim() != 2 or len(input_ids) != session.batch_size:
            raise ConfigError(
                f"input_ids has shape {list(input_ids.shape)}, the session has {session.batch_size} rows: give "
                "[batch, tokens] with the same batch, or new_session(batch_size=…)"
            )
        mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        reward = torch.zeros(input_ids.shape, device=input_ids.device) if reward is None else reward.float()
        for name, value in (("attention_mask", mask), ("reward", reward)):
            if value.shape != input_ids.shape:
                raise ConfigError(
                    f"{name} has shape {list(value.shape)}, input_ids {list(input_ids.shape)}: they must agree"
                )
        return Rows.from_padded(input_ids, mask, reward), mask


def _window(backbone: PreTrainedModel) -> int:
    """Longest input that the backbone's positions allow, in tokens."""
    return getattr(backbone.config.get_text_config(), "max_position_embeddings", None) or 1 << 30


def _check_sizes(config: FastWeightsConfig, segment_tokens: int, head_dim: int, backbone: PreTrainedModel) -> None:
    """A head's memory is of low rank: no wider than the head. Segments fit the window."""
    if config.rank > head_dim:
        raise ConfigError(
            f"fast_weights.rank = {config.rank} exceeds the backbone's head_dim = {head_dim}: choose at most "
            f"{head_dim}, a memory is no wider than its head"
        )
    if segment_tokens > _window(backbone):
        raise ConfigError(
            f"backbone.segment_tokens = {segment_tokens} exceeds the backbone's window of {_window(backbone)} tokens"
        )
