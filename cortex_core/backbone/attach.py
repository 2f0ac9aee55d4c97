"""Finds where a model's attention can be listened to, and refuses, by name, a model where it cannot."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from cortex_core.backbone.attention import PREFIX, WRAPPED, attention_pass, capture_hidden, same_pass_again
from cortex_core.config import FastWeightsConfig
from cortex_core.errors import ConfigError, IncompatibleError
from cortex_core.fast_weights.sidecar import LayerShape


class Port(NamedTuple):
    """One attention module of the backbone, in the order of the forward pass."""

    module: nn.Module
    shape: LayerShape


class _Probe:
    """Notes which modules call the attention interface, and their sizes."""

    def __init__(self) -> None:
        self.ports: list[Port] = []
        self.hidden: dict[nn.Module, int] = {}

    def before(self, module: nn.Module, hidden: Tensor) -> None:
        self.hidden[module] = hidden.shape[-1]

    def after(self, module: nn.Module, q: Tensor, v: Tensor, attended: Tensor) -> Tensor:
        shape = LayerShape(self.hidden.get(module, 0), q.shape[1], q.shape[-1], attended.shape[-1])
        self.ports.append(Port(module, shape))
        return attended


def find_ports(model: PreTrainedModel) -> list[Port]:
    """Switches the model's attention to the listening one and sees, on two tokens, who calls it.

    Every rank must call this together if the weights are sharded. Raises IncompatibleError.
    """
    name = type(model).__name__
    if model.config.is_encoder_decoder or not hasattr(model, "get_decoder") or not model.can_generate():
        raise IncompatibleError(f"{name} cannot carry a memory: a decoder-only causal language model is needed")
    wrapped = (model.config._attn_implementation or "eager").removeprefix(PREFIX)
    if wrapped not in WRAPPED:
        raise IncompatibleError(
            f"{name} runs attention '{wrapped}'; memory can wrap {', '.join(WRAPPED)}: set backbone.attn_implementation"
        )
    hooks = [
        module.register_forward_pre_hook(capture_hidden, with_kwargs=True)
        for module in model.modules()
        if type(module).__name__.endswith("Attention")
    ]
    probe = _Probe()
    try:
        model.set_attn_implementation(PREFIX + wrapped)
        tokens = torch.zeros(1, 2, dtype=torch.long, device=model.device)
        with torch.no_grad(), attention_pass(probe):
            model(input_ids=tokens, use_cache=False)
    except (ValueError, TypeError, AttributeError) as error:
        probe.ports.clear()
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    else:
        reason = f"no module named *Attention among {len(hooks)} called it"
    finally:
        for hook in hooks:
            hook.remove()
    if not probe.ports or any(port.shape.hidden == 0 for port in probe.ports):
        model.set_attn_implementation(wrapped)
        raise IncompatibleError(
            f"{name} cannot carry a memory: its attention does not go through transformers' "
            f"AttentionInterface ({reason})"
        )
    return probe.ports


def chosen_layers(config: FastWeightsConfig, num_layers: int) -> tuple[int, ...]:
    """The layers that get a sidecar, ascending. Raises ConfigError for a layer that the backbone does not have."""
    if config.layers == "auto":
        return (max(1, num_layers // 4) if num_layers > 1 else 0,)
    if not config.layers or max(config.layers) >= num_layers:
        raise ConfigError(
            f"fast_weights.layers = {list(config.layers)}: the backbone has layers 0 to {num_layers - 1}; "
            "name at least one"
        )
    return tuple(sorted(set(config.layers)))


def first_layers(model: PreTrainedModel, last: nn.Module) -> nn.Module:
    """The model's decoder, cut off after the attention of the layer that contains `last`: reading needs no more.

    A view: it shares every submodule (and hook) with the decoder and owns nothing; its output means nothing. The full
    decoder itself where the layers are not kept in one ModuleList.
    """
    decoder = model.get_decoder()
    for name, child in decoder.named_children():
        if isinstance(child, nn.ModuleList):
            for index, layer in enumerate(child):
                if any(module is last for module in layer.modules()):
                    view = copy.copy(decoder)
                    view._modules = dict(decoder._modules)
                    view._modules[name] = nn.ModuleList([*child[:index], _without_mlp(layer)])
                    return view
    return decoder


def _without_mlp(layer: nn.Module) -> nn.Module:
    """A view of `layer` whose MLP passes its input on; the layer itself where nothing in it is called `mlp`."""
    if not isinstance(layer._modules.get("mlp"), nn.Module):
        return layer
    view = copy.copy(layer)
    view._modules = dict(layer._modules) | {"mlp": nn.Identity()}
    return view


def window_of(backbone: PreTrainedModel) -> int:
    """Longest input that the backbone's positions allow, in tokens."""
    return getattr(backbone.config.get_text_config(), "max_position_embeddings", None) or 1 << 30


def check_sizes(config: FastWeightsConfig, segment_tokens: int, shape: LayerShape, backbone: PreTrainedModel) -> None:
    """Its maps are of low rank: no wider than what they map. Segments fit the window. Raises ConfigError."""
    if config.rank > shape.head_dim:
        raise ConfigError(
            f"fast_weights.rank = {config.rank} exceeds the backbone's head_dim = {shape.head_dim}: choose at most "
            f"{shape.head_dim}, a memory is no wider than its head"
        )
    if config.adapter_rank > (width := shape.heads * shape.value_dim):
        raise ConfigError(
            f"fast_weights.adapter_rank = {config.adapter_rank} exceeds the {width} dimensions that the backbone's "
            f"heads have together: choose at most {width}"
        )
    if segment_tokens > window_of(backbone):
        raise ConfigError(
            f"backbone.segment_tokens = {segment_tokens} exceeds the backbone's window of {window_of(backbone)} tokens"
        )


def checkpoint_layers(backbone: PreTrainedModel, first: int) -> None:
    """Recompute layers in the backward pass instead of keeping their activations, from number `first` up.

    No gradient goes through the layers below it, so nothing of them is kept anyhow.
    """
    backbone.activation_checkpointing_enable({"use_reentrant": False, "context_fn": same_pass_again})
    backbone.disable_input_require_grads()  # or gradients would go down to the embeddings
    layers = [module for module in backbone.modules() if isinstance(module, GradientCheckpointingLayer)]
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = layer.training = number >= first  # of it alone: its dropouts stay off


def with_slow_weights(config: FastWeightsConfig, slots: int, active: int) -> FastWeightsConfig:
    """`config` with slow weights of these sizes. Raises ConfigError: it has others, or cannot have any."""
    if config.slow_slots and (config.slow_slots, config.slow_active) != (slots, active):
        raise ConfigError(
            f"slow weights: there are {config.slow_slots} slots already, of which {config.slow_active} answer; others "
            f"({slots}, {active}) could not hold what these do. Keep those (sleep.slots, sleep.active), or begin with "
            "sidecars that have not slept"
        )
    try:
        return FastWeightsConfig.model_validate(config.model_dump() | {"slow_slots": slots, "slow_active": active})
    except ValidationError as error:
        raise ConfigError(f"slow weights: {error.errors()[0]['msg']}") from None
