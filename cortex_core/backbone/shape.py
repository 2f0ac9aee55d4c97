"""What a backbone is made of, without its weights: built on the meta device from its `config.json` alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cortex_core.backbone.attach import chosen_layers
from cortex_core.backbone.load import first_line, resolve_name
from cortex_core.backbone.model import Cortex
from cortex_core.config import BackboneConfig, FastWeightsConfig
from cortex_core.errors import DataError, IncompatibleError

KEPT_OF_A_RUN = 3
"""Layers of a run of equal ones that are kept: one for either end, and one that stands for all between them."""


class Unit(NamedTuple):
    """Weights that are gathered together: a decoder layer, or a module outside of the layers."""

    name: str
    tensors: tuple[int, ...]
    """Elements of each of its tensors."""
    layer: bool
    """Whether it is a decoder layer."""
    repeats: int = 1
    """How many units this one stands for: more than 1 in the middle of a run of equal layers."""

    @property
    def numel(self) -> int:
        """Elements of one such unit."""
        return sum(self.tensors)


class Shape(NamedTuple):
    """A backbone with its memory on the meta device, all but three layers of each run of equal ones left out."""

    model: Cortex
    units: tuple[Unit, ...]
    unit_of: dict[str, int]
    """Index of the unit that each frozen parameter belongs to, by its name in the backbone."""
    depth: int
    """Decoder layers of the whole backbone."""
    memory_layers: tuple[int, ...]
    """Numbers, in the whole backbone, of the layers that carry a memory."""
    dtype: torch.dtype
    """Type of the frozen weights."""

    @property
    def total_numel(self) -> int:
        """Elements of the whole backbone."""
        return sum(unit.numel * unit.repeats for unit in self.units)


def shape_of(backbone: BackboneConfig, memory: FastWeightsConfig, dtype: torch.dtype | None = None) -> Shape:
    """Builds the backbone on the meta device and attaches a memory to it; nothing is loaded, no tokenizer is needed.

    `dtype` is that of the frozen weights; None takes what the model's description says. Raises DataError,
    IncompatibleError, ConfigError as loading and attaching the real one would.
    """
    described = _described(backbone)
    found = dtype or described.get_text_config().dtype or torch.float32
    attention = "eager" if backbone.attn_implementation == "eager" else "sdpa"  # flash need not be installed here
    try:
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(described, dtype=found, attn_implementation=attention)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IncompatibleError(f"backbone.name = {backbone.name}: {first_line(error)}") from error
    whole.requires_grad_(False).eval()
    chosen, depth = (), len(decoder_layers(whole))
    if depth:
        chosen = chosen_layers(memory, depth)
        memory = memory.model_copy(update={"layers": _shorten(whole, chosen)})
    with _Sizes():
        model = Cortex.attach(whole, memory, backbone.segment_tokens)
    units, unit_of = _listed(model)
    return Shape(model, units, unit_of, depth, chosen or tuple(model.sidecars_by_layer), found)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that a decoder keeps in lists: its layers, whatever the family calls them."""
    lists = [child for child in model.get_decoder().children() if isinstance(child, nn.ModuleList)]
    return [layer for layers in lists for layer in layers]


def sized(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an operation on tensors without contents. Where it asks for a value, the answer is yes, or 1.

    The product of rows with each one's expert is torch's own only for bfloat16 here; on a GPU and on a processor it
    multiplies float32 as well.
    """
    if func is torch.ops.aten._local_scalar_dense.default:
        return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
    if func is torch.ops.aten._grouped_mm.default and args[1].dim() == 3:
        return args[0].new_empty(len(args[0]), args[1].shape[-1])
    return func(*args, **kwargs)


class _Sizes(TorchDispatchMode):
    """Lets a model run on the meta device, where it could ask for no value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = any(isinstance(arg, Tensor) and arg.is_meta for arg in args)
        return sized(func, args, kwargs or {}) if known else func(*args, **(kwargs or {}))


def _described(backbone: BackboneConfig) -> Any:
    try:
        return AutoConfig.from_pretrained(
            resolve_name(backbone.name), revision=backbone.revision, trust_remote_code=False
        )
    except OSError as error:
        raise DataError(
            f"backbone.name = {backbone.name}: has no description that can be read ({first_line(error)}). "
            "Give a Hugging Face hub id or a folder with config.json"
        ) from error
    except (ValueError, KeyError) as error:
        raise IncompatibleError(f"backbone.name = {backbone.name}: {first_line(error)}") from error


def _shorten(model: PreTrainedModel, chosen: Sequence[int]) -> tuple[int, ...]:
    """Takes layers out of the middle of runs of equal ones, and notes on the others how many each stands for.

    Returns where the layers with a memory now stand. A run never crosses a layer with a memory: what is kept for the
    backward pass differs on its two sides.
    """
    decoder, moved, number, before = model.get_decoder(), [], 0, 0
    for name, child in list(decoder.named_children()):
        if not isinstance(child, nn.ModuleList):
            continue
        kept: list[nn.Module] = []
        numbered = [(number + index, layer) for index, layer in enumerate(child)]
        number += len(numbered)
        for _, group in itertools.groupby(numbered, lambda one: _kind(one[0], one[1], chosen)):
            run = list(group)
            moved += [before + len(kept) for index, _ in run if index in chosen]
            kept += _ends_and_middle([layer for _, layer in run])
        before += len(kept)
        setattr(decoder, name, nn.ModuleList(kept))
    return tuple(moved)


def _kind(number: int, layer: nn.Module, chosen: Sequence[int]) -> tuple[Any, ...]:
    """Equal for neighbours of the same kind between the same two memories."""
    sizes = tuple((name, *parameter.shape) for name, parameter in layer.named_parameters())
    windows = tuple(getattr(module, "sliding_window", None) for module in layer.modules())
    return type(layer), sizes, windows, number in chosen, sum(layer > number for layer in chosen)


def _ends_and_middle(run: list[nn.Module]) -> list[nn.Module]:
    if len(run) <= KEPT_OF_A_RUN:
        return run
    first, middle, last = run[0], run[1], run[-1]
    middle.stands_for = len(run) - 2  # type: ignore[assignment]
    return [first, middle, last]


def _listed(model: Cortex) -> tuple[tuple[Unit, ...], dict[str, int]]:
    """All units, and of which one each frozen parameter is, by name."""
    layers = set(decoder_layers(model.backbone))
    units: list[Unit] = []
    owner: dict[nn.Parameter, int] = {}
    for name, module, parameters in _owners(model.backbone, layers):
        new = [parameter for parameter in parameters if parameter not in owner]  # a tied head is the embedding
        if new:
            owner |= dict.fromkeys(new, len(units))
            sizes = tuple(parameter.numel() for parameter in new)
            units.append(Unit(name, sizes, module in layers, getattr(module, "stands_for", 1)))
    named = model.backbone.named_parameters(remove_duplicate=False)
    return tuple(units), {name: owner[parameter] for name, parameter in named}


def _owners(model: nn.Module, layers: Set[nn.Module]) -> Iterator[tuple[str, nn.Module, list[nn.Parameter]]]:
    """Each layer with all of its parameters, each other module with its own."""
    inside = {module for layer in layers for module in layer.modules()}
    for name, module in model.named_modules():
        if module in layers:
            yield name, module, list(module.parameters())
        elif module not in inside:
            yield name, module, list(module.parameters(recurse=False))


def shard_numel(units: Sequence[Unit], workers: int) -> int:
    """Elements that rest on one of `workers` ranks: each tensor is cut into equally long parts, the last one padded."""
    return sum(-(-size // workers) * unit.repeats for unit in units for size in unit.tensors)


def state_bytes(model: Cortex) -> int:
    """What a session keeps of one sequence, without its open segment, in bytes."""

    def size(tensor: Tensor) -> int:
        return tensor.numel() * tensor.element_size()

    states = model.empty_states(1).values()
    return sum(size(part) for state in states for part in state if part is not None)
