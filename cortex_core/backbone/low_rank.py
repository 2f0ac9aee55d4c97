"""Low-rank deltas: a change of chosen layers of a backbone that is kept beside its weights and can be taken off again.

A linear module with weight W answers y = W x + b. With a delta it answers y + scale · B (A x), which is what it would
say with the weight W + scale · B A. The delta is added by a forward hook, so that the weight itself is never read or
written: shards need no gather, and what is removed leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cortex_core.backbone.model import Cortex
from cortex_core.errors import ConfigError, IncompatibleError


class Sizes(NamedTuple):
    """What a linear module maps from, and to."""

    inputs: int
    outputs: int


def sizes_of(module: nn.Module) -> Sizes | None:
    """None for a module that is not linear. Not from the weight, of which a shard may hold nothing."""
    if isinstance(module, nn.Linear):
        return Sizes(module.in_features, module.out_features)
    return Sizes(module.nx, module.nf) if isinstance(module, Conv1D) else None


def layer_of(name: str) -> int | None:
    """Number of the decoder layer in a module's name, such as 3 in `model.layers.3.mlp.up_proj`."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


def linear_modules(
    backbone: PreTrainedModel, patterns: Sequence[str] = ("*",), layers: Iterable[int] | None = None
) -> list[str]:
    """Names of the linear modules in decoder layers that match a pattern (`*.mlp.*`), in the order of the model.

    `layers` None is all of them. Raises ConfigError for a pattern or a layer that matches nothing.
    """
    every = [name for name, part in backbone.named_modules() if sizes_of(part) and layer_of(name) is not None]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in every):
            raise ConfigError(
                f"modules = {pattern!r} matches no linear module of {type(backbone).__name__}; its last layer has "
                f"{', '.join(name for name in every if layer_of(name) == layer_of(every[-1])) or 'none'}"
            )
    wanted = {layer_of(name) for name in every} if layers is None else set(layers)
    if missing := sorted(wanted - {layer_of(name) for name in every}, key=str):
        raise ConfigError(
            f"layers = {missing}: {type(backbone).__name__} has layers 0 to {max(layer_of(n) or 0 for n in every)}"
        )
    return [n for n in every if layer_of(n) in wanted and any(fnmatchcase(n, pattern) for pattern in patterns)]


class LowRankDeltas(nn.Module):
    """One delta for each of some modules of a backbone; a module of its own that the backbone does not contain.

    Its parameters are float32 whatever the backbone is, do not ask for gradients until somebody wants them to, and
    begin with B = 0: adding 0 changes no number. (It may turn −0 into +0, which no operation of a language model tells
    apart.) A depends on `seed` and the module's name alone, so that a delta does not depend on which others there are.
    """

    def __init__(
        self, backbone: PreTrainedModel, names: Sequence[str], rank: int = 8, scale: float = 1.0, seed: int = 0
    ) -> None:
        """For the modules of these names. Raises ConfigError: none, one twice, or a rank that is not below a module's
        sizes; IncompatibleError: the backbone has no such module, or it is not linear."""
        super().__init__()
        self.names, self.rank, self.scale = tuple(names), rank, scale
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"deltas: names = {list(names)}: give at least one module, and each once")
        modules = _found(backbone, names)
        for name, (_, sizes) in modules.items():
            if not 1 <= rank <= min(sizes):
                raise ConfigError(
                    f"deltas: rank = {rank} must lie in 1 to {min(sizes)}, the smaller side of {name} "
                    f"({sizes.inputs} to {sizes.outputs}): a delta of a higher rank is no smaller than the weight"
                )
        self.sizes = {name: sizes for name, (_, sizes) in modules.items()}
        self.down = nn.ParameterList(
            nn.Parameter(_drawn(seed, name, rank, self.sizes[name].inputs).to(_device(part)), requires_grad=False)
            for name, (part, _) in modules.items()
        )
        self.up = nn.ParameterList(
            nn.Parameter(torch.zeros(sizes.outputs, rank, device=_device(part)), requires_grad=False)
            for part, sizes in modules.values()
        )
        self._hooks: list[RemovableHandle] = []
        # Inside a tuple, so that the model does not become a part of this.
        self._on: tuple[Cortex | PreTrainedModel, ...] = ()
        self._off = 0
        self._learns: Tensor | None = None

    # --- on a model, and off it --------------------------------------------------------------------------------------

    def attach(self, model: Cortex | PreTrainedModel) -> LowRankDeltas:
        """Add the deltas to what `model` computes from now on; once more changes nothing. Returns itself.

        On a `Cortex` they are part of what is learned: `memory(False)` is the bare model, without them. On a plain
        backbone only `off` and `remove` turn them off. Raises ConfigError if they are on another model,
        IncompatibleError if this one does not have the modules.
        """
        if self._on:
            if self._on[0] is model:
                return self
            raise ConfigError("deltas: are attached to another model; call remove() first")
        modules = _found(_backbone(model), self.names)
        for name, (_, sizes) in modules.items():
            if sizes != self.sizes[name]:
                raise IncompatibleError(
                    f"deltas: {name} maps {sizes.inputs} to {sizes.outputs} here, {self.sizes[name].inputs} to "
                    f"{self.sizes[name].outputs} where the deltas were made; use the same backbone"
                )
        for index, (module, _) in enumerate(modules.values()):
            self._hooks.append(module.register_forward_hook(partial(self._added, index)))
        self._on = (model,)
        return self

    def remove(self) -> None:
        """Take the deltas off: the model computes what it did before, to the bit. Their values stay."""
        while self._hooks:
            self._hooks.pop().remove()
        self._on = ()

    @contextmanager
    def attached(self, model: Cortex | PreTrainedModel) -> Iterator[LowRankDeltas]:
        """Attached within, removed afterwards, whatever happens."""
        self.attach(model)
        try:
            yield self
        finally:
            self.remove()

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within it they add nothing; may be nested."""
        self._off += 1
        try:
            yield
        finally:
            self._off -= 1

    @contextmanager
    def learning_at(self, tokens: Bool[Tensor, "batch tokens"]) -> Iterator[None]:
        """Within it, gradients reach them only through what they add at these tokens of the calls, each of which reads
        as many tokens. At all others it is a constant; what is computed is the same."""
        before, self._learns = self._learns, tokens
        try:
            yield
        finally:
            self._learns = before

    @property
    def active(self) -> bool:
        """Whether a call of the model would now be changed."""
        return bool(self._on) and not self._off and getattr(self._on[0], "memory_is_on", True)

    def on(self, model: Cortex | PreTrainedModel) -> bool:
        """Whether they are attached to this model."""
        return bool(self._on) and self._on[0] is model

    def _added(self, index: int, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        if not self.active:
            return output
        delta = inputs[0].float() @ self.down[index].T @ self.up[index].T
        if self._learns is not None:
            delta = torch.where(self._learns[..., None], delta, delta.detach())
        return output + (self.scale * delta).to(output.dtype)

    # --- values ------------------------------------------------------------------------------------------------------

    def values(self) -> dict[str, Tensor]:
        """The parameters by name: `down.0`, `up.0` belong to the first of `names`."""
        return dict(self.named_parameters())

    @property
    def is_finite(self) -> bool:
        """Every number of them is one."""
        return all(bool(torch.isfinite(value).all()) for value in self.parameters())

    @torch.no_grad()
    def weight_delta(self, name: str) -> Float[Tensor, "outputs inputs"]:
        """What is added to the weight of a module, were it written out: scale · B A."""
        index = self.names.index(name)
        return self.scale * self.up[index] @ self.down[index]


def _backbone(model: Cortex | PreTrainedModel) -> PreTrainedModel:
    return model.backbone if isinstance(model, Cortex) else model


def _found(backbone: PreTrainedModel, names: Sequence[str]) -> Mapping[str, tuple[nn.Module, Sizes]]:
    """Modules by name, with their sizes. Raises IncompatibleError."""
    modules = dict(backbone.named_modules())
    found = {}
    for name in names:
        sizes = sizes_of(modules[name]) if name in modules else None
        if sizes is None:
            kind = f"a {type(modules[name]).__name__}, not a linear module" if name in modules else "no module of it"
            raise IncompatibleError(
                f"deltas: {name!r} is {kind} ({type(backbone).__name__}); name modules that linear_modules() lists"
            )
        found[name] = (modules[name], sizes)
    return found


def _drawn(seed: int, name: str, rank: int, inputs: int) -> Tensor:
    """A: rows of expected length 1, so that A x is about as large as one entry of x times the root of their number."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(rank, inputs, generator=generator) * inputs**-0.5


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
