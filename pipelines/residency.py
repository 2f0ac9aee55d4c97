"""Which weights of a sharded backbone are gathered, and for how long: as few as possible, as briefly as possible.

DeepSpeed gathers the weights of a module before it runs and lets them go after it has run, forward and backward.
That is kept; when weights are let go in a backward pass is decided here, because DeepSpeed's way does not fit how
a memory is trained:

- It counts the gradients that a module still owes, but starts from zero at each forward call. When the backbone is
  called again before the backward pass, with gradients or without, only the last call's weights are let go; the
  rest pile up, up to the whole model. Modules run backward one after the other, so no count is needed: when one
  begins, the others have ended.
- It keeps what gradient checkpointing recomputes as long as the module runs backward that asked for it. Gradients
  that reach into a layer past its output (a penalty on gates, a state that is carried on) ask for it outside of
  any module. Here what is recomputed stays until another layer's turn comes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass
class Peak:
    """Most frozen elements that were resident on this rank at once: its shard, and what was gathered."""

    forward_numel: int = 0
    backward_numel: int = 0
    """Includes what gradient checkpointing computes again."""

    @property
    def numel(self) -> int:
        """Most at any time."""
        return max(self.forward_numel, self.backward_numel)


class Residency:
    """Takes over the hooks of a `DeepSpeedZeRoOffload`. `layers` are the modules that checkpointing recomputes."""

    def __init__(self, model: nn.Module, layers: list[nn.Module], offload: Any) -> None:
        for layer in layers:
            # Gathered as a whole, in one go instead of a dozen. Marked only now that the modules below have hooks, too:
            # gradients may reach them before they reach the layer.
            layer._z3_leaf = True  # type: ignore[assignment]
        self._parameters = list(model.parameters())
        self._layer_of = {module: layer for layer in layers for module in layer.modules()}
        # What runs while a module has its turn, for those whose turn includes others': layers, above all.
        self._below = {
            m: set(m.modules()) - {m} for m in model.modules() if _holds_weights(m) and next(m.children(), None)
        }
        self._running: list[nn.Module] = []  # gathered for their backward pass
        self._recomputed: dict[nn.Module, None] = {}  # gathered for recomputation, all of one layer
        self._peak: Peak | None = None
        self._at_rest = 0
        self._offload, self._stack_depth = offload, len(_forward_stack())
        self._fetch_forward = offload.pre_sub_module_forward_function
        self._end_forward = offload.post_sub_module_forward_function
        self._fetch_backward = offload.pre_sub_module_backward_function
        self._end_backward = offload.post_sub_module_backward_function
        offload.pre_sub_module_forward_function = self._before_forward
        offload.post_sub_module_forward_function = self._after_forward
        offload.pre_sub_module_backward_function = self._before_backward
        offload.post_sub_module_backward_function = self._after_backward
        # DeepSpeed learns the order of modules in one step to prefetch in the next. Here reading, training and the
        # bare model visit different modules; each change would discard the order, at a broadcast per call.
        offload.fwd_pre_hook.remove()

    def release(self) -> None:
        """After a backward pass: let everything go."""
        self._let_go_recomputed()
        self._let_go_running()
        self._offload.release_backward_leftovers()
        # Recomputation stops a layer early, before its hook pops the stack: it would grow with every step.
        del _forward_stack()[self._stack_depth :]

    def gathered_numel(self) -> int:
        """Elements that are gathered now. In a group of one a weight is its own shard, and nothing is gathered."""
        return sum(p.numel() for p in self._parameters if p.data_ptr() != p.ds_tensor.data_ptr())  # type: ignore[attr-defined]

    @contextmanager
    def watch(self, at_rest: int) -> Iterator[Peak]:
        """Measure after every gather within the block, on top of `at_rest` elements."""
        self._peak, self._at_rest = (peak := Peak(at_rest, at_rest)), at_rest
        try:
            yield peak
        finally:
            self._peak = None

    def _before_forward(self, module: nn.Module) -> None:
        if _in_backward() and _holds_weights(module):
            other = next(iter(self._recomputed), module)
            if self._layer_of.get(other) is not self._layer_of.get(module):
                self._let_go_recomputed()
            self._let_go_running(around=module)
            self._recomputed[module] = None
        self._fetch_forward(module)
        self._sample()

    def _after_forward(self, module: nn.Module) -> None:
        if module not in self._recomputed:
            self._end_forward(module)

    def _before_backward(self, module: nn.Module) -> None:
        if not _holds_weights(module):
            return
        if module not in self._recomputed:
            self._let_go_recomputed()
        self._let_go_running(around=module)
        self._fetch_backward(module)
        self._running.append(module)
        self._sample()

    def _after_backward(self, module: nn.Module) -> None:
        if module in self._running:
            self._running.remove(module)
            self._end_backward(module)

    def _let_go_running(self, around: nn.Module | None = None) -> None:
        """All but the modules whose turn includes that of `around`."""
        for module in [m for m in self._running if around not in self._below.get(m, ())]:
            self._after_backward(module)

    def _let_go_recomputed(self) -> None:
        while self._recomputed:
            self._end_forward(self._recomputed.popitem()[0])

    def _sample(self) -> None:
        if self._peak is None:
            return
        resident = self._at_rest + self.gathered_numel()
        if _in_backward():
            self._peak.backward_numel = max(self._peak.backward_numel, resident)
        else:
            self._peak.forward_numel = max(self._peak.forward_numel, resident)


def _holds_weights(module: nn.Module) -> bool:
    """Whether weights are gathered for this module itself: its own, or all below it where DeepSpeed wants it so."""
    return next(module.parameters(recurse=getattr(module, "_z3_leaf", False)), None) is not None


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _forward_stack() -> list[nn.Module]:
    from deepspeed.runtime.zero import parameter_offload

    return parameter_offload.FWD_MODULE_STACK
