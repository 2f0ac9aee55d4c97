"""`Cortex`: a frozen language model with a memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from cortex_core.backbone import attach, sidecar_files
from cortex_core.backbone.attach import check_sizes, chosen_layers, find_ports, first_layers, window_of
from cortex_core.backbone.attention import attention_pass, capture_hidden, select_positions
from cortex_core.backbone.fingerprint import fingerprint
from cortex_core.backbone.forgetting import forget, tagged
from cortex_core.backbone.generate import generate
from cortex_core.backbone.load import in_assets, load_backbone
from cortex_core.backbone.passes import MemoryPass, States
from cortex_core.backbone.reading import CortexOutput, advance, metrics_of
from cortex_core.backbone.segments import Layout, Rows, checked_rows
from cortex_core.backbone.session import Session
from cortex_core.backbone.session_files import load_session
from cortex_core.backbone.write_log import WriteLog
from cortex_core.config import BackboneConfig, FastWeightsConfig
from cortex_core.fast_weights.sidecar import Sidecar
from cortex_core.privacy.write_filter import WriteFilter


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
        check_sizes(fast_weights, segment_tokens, ports[layers[0]].shape, backbone)
        self.sidecars = nn.ModuleDict({str(n): Sidecar(ports[n].shape, fast_weights) for n in layers})
        self.sidecars.to(backbone.device)
        self.write_filter: WriteFilter | None = None
        """Says which tokens are never written, such as `PersonalData`; None is no filter."""
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
            segment_tokens = min(BackboneConfig().segment_tokens, window_of(backbone))
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

    def grow_slow_weights(self, slots: int, active: int = 32) -> None:
        """Give each memory slow weights, into which sleep can move what fast weights hold; they read 0 until then.

        Raises ConfigError: there are slow weights of other sizes already, or this memory cannot have any.
        """
        self.fast_weights = attach.with_slow_weights(self.fast_weights, slots, active)
        for sidecar in self.sidecars_by_layer.values():
            sidecar.grow_slow_weights(self.fast_weights)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("backbone"), name)

    # --- memory on and off -------------------------------------------------------------------------------------------

    @contextmanager
    def memory(self, on: bool) -> Iterator[Cortex]:
        """`with model.memory(False):` is the bare model; sessions given to it stay as they are."""
        before, self._memory_on = self._memory_on, on
        try:
            yield self
        finally:
            self._memory_on = before

    @property
    def memory_is_on(self) -> bool:
        """Not so within `memory(False)`: low-rank deltas are off there as well."""
        return self._memory_on

    def checkpoint_gradients(self) -> None:
        """Recompute the backbone's activations in the backward pass instead of keeping them."""
        attach.checkpoint_layers(self.backbone, min(self.sidecars_by_layer))

    # --- sessions ----------------------------------------------------------------------------------------------------

    def new_session(self, batch_size: int = 1, log_writes: int | None = None) -> Session:
        """An empty memory for `batch_size` independent readers.

        With `log_writes`, the session keeps as many of each row's latest writes per memory layer, with their sources,
        so that they can be taken back (`forget`, `ttl_tokens`); the oldest beyond that stay for good.
        """
        session = self._unnamed_session(batch_size)
        session.identity = self.identity()
        if log_writes is not None:
            session.log = WriteLog.empty(log_writes, self.sidecars_by_layer, session.states)
            session.open_rows = session.open_rows.with_tags()
        return session

    @torch.no_grad()
    def _unnamed_session(self, batch_size: int) -> Session:
        """A session that nobody will keep: without fingerprints, for which a GPU is waited for."""
        states, rows = self.empty_states(batch_size), Rows.empty(batch_size, self.backbone.device)
        return Session(states, rows, torch.zeros_like(rows.lengths), {}, self.empty_states(1))

    def load_session(self, path: str | Path, like: Session | None = None) -> Session:
        """Read a session with the fingerprints of this model, or of `like`. Raises DataError, IncompatibleError."""
        vocab_size, strongest = self.backbone.config.get_text_config().vocab_size, self.fast_weights.write_strength
        like = like or self.new_session(log_writes=1)
        return load_session(path, like, self.segment_tokens, vocab_size=vocab_size, write_strength=strongest)

    def forget(
        self,
        session: Session,
        source: str | None = None,
        *,
        positions: tuple[int, int] | None = None,
        rows: Sequence[int] | None = None,
    ) -> int:
        """Take back the writes of tokens read with this `source`, or at `positions` [first, stop), or both.

        The state is then that of a session in which these tokens wrote nothing; all others keep what they wrote, with
        the strength that they wrote it with. In the open segment they are not written when it closes; attention sees
        them until then. `rows` of the session, all by default. Returns the number of writes taken back, over rows and
        layers. Raises ConfigError without a log, for a source that was never named, and for writes that have left
        the log.
        """
        return forget(self, session, source, positions, rows)

    def identity(self) -> dict[str, str]:
        """Fingerprints that a session must share with the model that continues it."""
        slept = "slow.values"  # sessions outlive a night
        return {"backbone": fingerprint(self.backbone), "sidecars": fingerprint(self.sidecars, without=slept)}

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
        source: str | None = None,
        ttl_tokens: int | None = None,
    ) -> CortexOutput:
        """Read tokens and say what comes after each (0) or after those in the last `logits_to_keep` columns.

        With a session, reading goes on where its last call stopped, and the session is advanced. `source` and
        `ttl_tokens`: see `read`.
        """
        if not self._memory_on:
            out = self.backbone(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=logits_to_keep)
            return CortexOutput(out.logits, {})
        if session is None and input_ids.shape[1] <= self.segment_tokens and self.write_filter is None:
            return self._one_segment(input_ids, attention_mask, reward, logits_to_keep)
        session = session or self._unnamed_session(len(input_ids))
        rows, mask = checked_rows(input_ids, attention_mask, reward, session.batch_size)
        rows = tagged(session, rows, source, ttl_tokens)
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
        *,
        source: str | None = None,
        ttl_tokens: int | None = None,
    ) -> CortexOutput:
        """Read tokens into the session without predicting: only the layers up to the last memory run.

        In a session with a log: `source` labels them, `ttl_tokens` takes back what each has written at the first
        segment that begins as many tokens after it or later. Raises ConfigError for either without a log.
        """
        rows, _ = checked_rows(input_ids, attention_mask, reward, session.batch_size)
        rows = tagged(session, rows, source, ttl_tokens)
        return CortexOutput(None, advance(self, session, rows, keep=torch.zeros_like(rows.lengths))[1])

    def generate(
        self,
        input_ids: Int[Tensor, "batch tokens"],
        session: Session | None = None,
        source: str | None = None,
        **options: Any,
    ) -> Tensor:
        """As `generate` of Hugging Face models, with a memory: input and output may be longer than the window.

        Returns input and new tokens [batch, tokens + new]. Raises ConfigError for options that cannot work with a
        memory (several beams or sequences, assisted decoding). What looks back over the text (`repetition_penalty`,
        `no_repeat_ngram_size`) sees the open segment only: tokens of closed segments are no longer there. `source`
        labels input and result in the session's log.
        """
        if not self._memory_on:
            return self.backbone.generate(input_ids=input_ids, **options)  # type: ignore[operator]
        session = session or self._unnamed_session(len(input_ids))
        mask = options.pop("attention_mask", None)
        rows, _ = checked_rows(input_ids, mask, None, session.batch_size)
        return generate(self, input_ids, tagged(session, rows, source, None), session, source, **options)

    def listen(self, layout: Layout, states: States, **settings: Any) -> MemoryPass:
        """A pass that lets the sidecars take part in one backbone call (`attention_pass`)."""
        return MemoryPass(self.ports, states, layout, **settings)

    @property
    def ports(self) -> Mapping[nn.Module, tuple[int, Sidecar]]:
        """Attention modules that carry a memory, in order, with layer number and sidecar."""
        return self._ports[0]

    @property
    def sidecars_by_layer(self) -> dict[int, Sidecar]:
        """Sidecars by layer number, in order."""
        return dict(self.ports.values())

    @property
    def reader(self) -> nn.Module:
        """The decoder up to the last memory layer: called without the language-model head."""
        return self._reader[0]

    def _one_segment(
        self, input_ids: Tensor, attention_mask: Tensor | None, reward: Tensor | None, logits_to_keep: int
    ) -> CortexOutput:
        """Nothing before it and no more than the window: the backbone's own call, with its own padding."""
        session = self._unnamed_session(len(input_ids))
        _, mask = checked_rows(input_ids, attention_mask, reward, session.batch_size)
        reward = torch.zeros(input_ids.shape, device=input_ids.device) if reward is None else reward
        layout = Layout(1, mask, session.start_tokens, reward, left_padded=attention_mask is not None)
        memory = self.listen(layout, session.states)
        with attention_pass(memory):
            out = self.backbone(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=logits_to_keep
            )
        return CortexOutput(out.logits, metrics_of(memory))
