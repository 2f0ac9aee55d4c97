"""Rehearses a training step: what it would hold, compute and gather, moment by moment, with no memory of its own.

The real `Learner` runs its real step on a `Shape`, whose numbers are torch's fake tensors: sizes, no contents. Tokens
and masks are real. Every operation is seen on its way to torch: which storages it makes and when they are let go, how
much it multiplies, which frozen weights it needs. Objective, memory rules and layers are not described here again.

Of a run of equal layers three are rehearsed. `Timeline.whole` puts copies of the middle one's moments where the others'
would be: what a layer leaves behind on the way forward, and lets go on the way back, is the same for each of them.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.flop_counter import flop_registry

from cortex_core.backbone.shape import Shape, decoder_layers, sized
from cortex_core.config import OptimizerConfig, TrainingConfig
from cortex_core.fast_weights import chunk, kernel
from cortex_core.training.batches import BatchShape
from cortex_core.training.loop import Learner
from cortex_core.training.objectives import ReadingLoss

aten = torch.ops.aten
FLASH = 1
"""What torch calls flash attention where it chooses one."""
PARTS = ("layers", "memory", "rest")
"""Where a tensor is made: in the decoder's layers, in the sidecars, or in embedding, head and loss."""
_COUNTED: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # What runs on a processor in the place of a GPU's attention, and experts: torch counts neither.
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
    aten._grouped_mm: lambda rows, weights, *_, **__: 2 * rows.shape[0] * rows.shape[1] * weights.shape[-1],
}
_INDEXED = {
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index_put.default,
    aten._index_put_impl_.default,
}  # fmt: skip


class Timeline(NamedTuple):
    """A micro-batch, operation by operation, from its first to the end of its backward pass."""

    live_bytes: NDArray[np.int64]
    """[operations, parts] What was made since the step began and is still held, after each operation."""
    unit: NDArray[np.int64]
    """[operations] The unit whose weights were used last (`Shape.units`); -1 before the first."""
    begins: NDArray[np.bool_]
    """[operations] Whether it is used again after another one, or for the first time: then it is gathered."""
    flops: NDArray[np.float64]
    """[operations] Multiplications and additions."""
    backward: NDArray[np.bool_]
    """[operations]"""
    held_numel: NDArray[np.int64]
    """[units] Elements of a unit's weights that the graph keeps through views when the backward pass begins, for one of
    the units that it stands for. Where weights are gathered they outlive their turn: once for each call."""

    @property
    def kept_bytes(self) -> dict[str, int]:
        """What the forward pass leaves for the backward pass, by part."""
        last = int(self.backward.argmax()) - 1
        return dict(zip(PARTS, self.live_bytes[last].tolist(), strict=True))

    def whole(self, shape: Shape) -> Timeline:
        """With the moments of all the layers that the middle of each run stands for."""
        starts = [0, *np.flatnonzero(self.begins).tolist(), len(self.unit)]
        pieces = []
        for start, stop in itertools.pairwise(starts):
            unit = self.unit[start]
            pieces.append(np.tile(np.arange(start, stop), shape.units[unit].repeats if unit >= 0 else 1))
        index = np.concatenate(pieces)
        change = np.diff(self.live_bytes, axis=0, prepend=0)[index]
        return Timeline(
            change.cumsum(0), self.unit[index], self.begins[index], self.flops[index], self.backward[index],
            self.held_numel,
        )  # fmt: skip


class _Rehearsal(TorchDispatchMode):
    """Sees every operation. Integers and truth values are real, the rest fake."""

    def __init__(self, shape: Shape, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake, self.part, self.running = fake, 2, True
        self.live, self.unit = [0] * len(PARTS), -1
        self.rows: list[tuple[int, ...]] = []
        named = dict(shape.model.backbone.named_parameters(remove_duplicate=False))
        self.weights = {id(parameter) for parameter in named.values()}
        self.num_units, self.held = len(shape.units), []
        self.views: list[tuple[weakref.ref[Tensor], int]] = []
        self._unit_of = {_key(named[name]): unit for name, unit in shape.unit_of.items()}
        self._known: dict[int, Any] = {_key(t): None for t in (*shape.model.parameters(), *shape.model.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # more than half of all calls
            return func(*args)
        if func is aten._fused_sdp_choice.default:
            return FLASH
        args, kwargs, out = self._run(func, args, kwargs or {})
        if not self.running:
            return out
        for tensor in tree_iter((args, kwargs)):
            if isinstance(tensor, Tensor):
                self.unit = self._unit_of.get(_key(tensor), self.unit)
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        backward = torch._C._current_graph_task_id() != -1
        if backward and not self.held:
            self.held = self._held()
        count = _COUNTED.get(func._overloadpacket)
        flops = count(*args, **kwargs, out_val=out) if count else 0
        self.rows.append((*self.live, self.unit, flops, backward))
        return out

    def _run(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
        given = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        if not any(isinstance(t, FakeTensor) for t in given):
            if given or not kwargs.get("dtype", torch.float32).is_floating_point:
                return args, kwargs, func(*args, **kwargs)
            with self.fake:  # a new tensor of numbers
                return args, kwargs, func(*args, **kwargs)
        if func in _INDEXED:
            args = (args[0], _places(args[1]), *args[2:])
        args, kwargs = tree_map_only(Tensor, self._as_fake, (args, kwargs))
        return args, kwargs, sized(func, args, kwargs)

    def _as_fake(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            if key in self._unit_of and id(tensor) not in self.weights:
                self.views.append((weakref.ref(tensor), self._unit_of[key]))
            return
        part, size = self.part, storage.nbytes()
        self.live[part] += size
        self._known[key] = weakref.ref(storage, partial(self._forget, key, part, size))

    def _forget(self, key: int, part: int, size: int, _: Any) -> None:
        self.live[part] -= size
        del self._known[key]

    def _held(self) -> list[int]:
        held = [0] * self.num_units
        for view, unit in self.views:
            tensor = view()
            held[unit] += 0 if tensor is None else tensor.numel()
        return held

    def timeline(self) -> Timeline:
        rows = np.array(self.rows, np.float64)
        parts = len(PARTS)
        live, unit, flops, backward = rows[:, :parts], rows[:, parts], rows[:, parts + 1], rows[:, parts + 2]
        held = np.array(self.held or self._held(), np.int64)
        begins = (np.diff(unit, prepend=-1) != 0) & (unit >= 0)
        return Timeline(live.astype(np.int64), unit.astype(np.int64), begins, flops, backward.astype(bool), held)


class _NoLaunch:
    """Stands where the kernel's passes are: each can be launched on any grid, and does nothing."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *_, **__: None


def rehearse(
    shape: Shape,
    batch: BatchShape,
    training: TrainingConfig,
    optimizer: OptimizerConfig,
    *,
    on_gpu: bool = True,
    linear: Callable[..., Tensor] | None = None,
) -> Timeline:
    """One micro-batch of a training step, forward and backward, of the layers that `shape` has (`Timeline.whole`).

    `on_gpu`: with the memory's kernel, as far as it takes the rule and the rank. `linear` takes the place of
    `torch.nn.functional.linear`, as in a sharded backbone.
    """
    fake = _faked(shape)
    model, seen = shape.model, _Rehearsal(shape, fake)
    runs_kernel = on_gpu and model.fast_weights.rank <= kernel.MAX_RANK

    def stop() -> None:
        seen.running = False

    with ExitStack() as stack:
        for module, name, value in (
            (chunk, "_kernel_runs", lambda _: runs_kernel),
            (kernel, "passes", _NoLaunch()),
            (functional, "linear", linear or functional.linear),
        ):
            stack.enter_context(_replaced(module, name, value))
        for part, modules in enumerate((decoder_layers(model.backbone), model.sidecars.values())):
            stack.enter_context(_told(seen, part, list(modules)))
        stack.enter_context(seen)
        seen.running = False
        learner = Learner(model, ReadingLoss(model, training), training, optimizer, after_backward=stop)
        seen.running = True
        learner.step([batch.batch()])
        learner.optimizer.zero_grad(set_to_none=True)
    return seen.timeline()


def _faked(shape: Shape) -> FakeTensorMode:
    """Gives the model fake tensors, once: those of the meta device have no device that can be computed on."""
    first = next(shape.model.parameters())
    if isinstance(first, FakeTensor):
        return first.fake_mode
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        shape.model.to_empty(device="cpu")
    return fake


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextmanager
def _told(seen: _Rehearsal, part: int, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Meanwhile the rehearsal knows when one of the modules computes."""
    outer: list[int] = []

    def enter(*_: Any) -> None:
        outer.append(seen.part)
        seen.part = part

    def leave(*_: Any) -> None:
        seen.part = outer.pop()

    hooks = [module.register_forward_pre_hook(enter) for module in modules]
    hooks += [module.register_forward_hook(leave, always_call=True) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _places(index: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Real masks as the places where they are true: how many there are decides the size of the result."""
    places: list[Tensor | None] = []
    for one in index:
        real = one is not None and not isinstance(one, FakeTensor) and one.dtype == torch.bool
        places += one.nonzero().unbind(1) if real and one is not None else [one]
    return places


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
