"""APOLLO and APOLLO-Mini, from Algorithm 1 of Zhu et al. 2024 (arXiv:2412.05270): gradients scaled as Adam would.

Of a matrix with the gradient G [m, n], m <= n, Adam's moments are taken of R = P G alone, P [r, m] random:

    D = Adam(R)                                  s_j = |D_:j| / |R_:j|   (channel)    s = |D| / |R|   (tensor)
    U = limited(G diag(s))                       W <- W - lr (scale U + weight_decay W)

These are the paper's factors, `lengths` "projected". |R| estimates |G|, which is known. In few dimensions it is a bad
estimate: where G is nearly of rank 1, G = g u v^T, R is (P u) g v^T, and at r = 1 one normal number decides how long
the step is, for as long as P stays. "exact" divides by |G_:j| and |G| instead: a step is as long as D.

State: 2 r n + 2 numbers (moments, norm of the last U, step), so 2 n + 2 at APOLLO-Mini's rank 1; AdamW keeps 2 m n + 1.
The paper's values: APOLLO rank = a quarter of the model's width, channel, scale 1; APOLLO-Mini rank 1, tensor, scale
sqrt(128); both a new P every 200 steps, growth limit 1.01. Where P is redrawn the moments go on, in another space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from cortex_core.optim.projection import draw, is_projected, projection_seed, wide
from cortex_core.optim.scaling import Lengths, ScaleType, adam_directions, factors, limited


class _Turn(NamedTuple):
    """A parameter that has a gradient."""

    parameter: Tensor
    """As it is, or the way round in which it is projected; a view, like the gradient."""
    gradient: Tensor
    """In float32."""
    seen: Tensor
    """What the moments are taken of: the projected gradient, or all of it."""
    state: dict[str, Tensor]

    @property
    def projected(self) -> bool:
        return self.seen is not self.gradient


class Apollo(torch.optim.Optimizer):
    """Scales the gradient of each matrix by channel (APOLLO) or as a whole (APOLLO-Mini); all else as AdamW.

    Matrices whose sides both exceed `rank` are projected. State is float32 whatever the parameters' type. Projections
    hang on `seed`, on the parameter's name (its index, where the groups have no names) and on the step alone. Every
    setting but `seed` may differ by group. Raises ValueError for a setting out of its range and for a sparse gradient.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        rank: int,
        scale_type: ScaleType = "channel",
        scale: float = 1.0,
        update_proj_gap: int = 200,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        lengths: Lengths = "exact",
        seed: int = 0,
    ) -> None:
        self.seed = seed
        super().__init__(params, {
            "lr": lr, "rank": rank, "scale_type": scale_type, "scale": scale, "update_proj_gap": update_proj_gap,
            "betas": betas, "eps": eps, "weight_decay": weight_decay, "lengths": lengths,
        })  # fmt: skip

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in any optimizer; the group's settings are checked."""
        super().add_param_group(param_group)
        _check(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. Returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, members in self._named():
            turns = [self._turn(name, parameter, group) for name, parameter in members if parameter.grad is not None]
            if turns:
                _update(turns, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`. By itself torch would round moments to the parameters' type."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group.setdefault("lengths", "projected")  # of states from before there was a choice
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        members = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, members, strict=True):
            self.state[parameter] = {
                key: value.to("cpu" if key == "step" else parameter.device, torch.float32, copy=True)
                for key, value in state_dict["state"].get(number, {}).items()
            }

    def _named(self) -> Iterator[tuple[dict[str, Any], list[tuple[str, Tensor]]]]:
        """Groups, and their parameters by name."""
        index = 0
        for group in self.param_groups:
            members = group["params"]
            names = group.get("param_names") or [str(number) for number in range(index, index + len(members))]
            index += len(members)
            yield group, list(zip(names, members, strict=True))

    def _turn(self, name: str, parameter: Tensor, group: dict[str, Any]) -> _Turn:
        assert parameter.grad is not None
        if parameter.grad.is_sparse:
            raise ValueError(
                f"the gradient of parameter {name} is sparse, and Apollo takes dense ones: create the embedding with "
                "sparse=False, or give its parameters to torch.optim.SparseAdam"
            )
        rank, state = group["rank"], self.state[parameter]
        projected = is_projected(parameter, rank)
        if not state:
            shape = (rank, max(parameter.shape)) if projected else parameter.shape
            state["step"] = torch.zeros(())  # on the processor: the projection's number hangs on it
            state["exp_avg"], state["exp_avg_sq"] = (parameter.new_zeros(shape, dtype=torch.float32) for _ in range(2))
            if projected:
                state["norm"] = parameter.new_zeros((), dtype=torch.float32)
        number = int(state["step"]) // group["update_proj_gap"]
        state["step"] += 1
        gradient = parameter.grad.float()
        if not projected:
            return _Turn(parameter, gradient, gradient, state)
        gradient = wide(gradient)
        seed = projection_seed(self.seed, name, number)
        return _Turn(wide(parameter), gradient, draw(rank, len(gradient), seed, gradient.device) @ gradient, state)


def _update(turns: list[_Turn], group: dict[str, Any]) -> None:
    """One step of a group's parameters."""
    rate = float(group["lr"])
    directions = adam_directions([t.seen for t in turns], [t.state for t in turns], group["betas"], group["eps"])
    if group["weight_decay"]:
        torch._foreach_mul_([t.parameter for t in turns], 1.0 - rate * group["weight_decay"])
    for turn, direction in zip(turns, directions, strict=True):
        if not turn.projected:
            turn.parameter.sub_(direction, alpha=rate)
            continue
        measured = turn.seen if group["lengths"] == "projected" else turn.gradient
        factor = factors(measured, direction, group["scale_type"])
        factor, norm = limited(factor, turn.gradient, turn.state["norm"])
        turn.state["norm"].copy_(norm)
        turn.parameter.addcmul_(turn.gradient, factor, value=-rate * group["scale"])


def _check(group: dict[str, Any]) -> None:
    """Raises ValueError, with name, value and bound."""
    bounds = {
        "lr": (group["lr"] >= 0.0, "at least 0"),
        "rank": (group["rank"] >= 1, "at least 1"),
        "scale_type": (group["scale_type"] in get_args(ScaleType), '"channel" or "tensor"'),
        "lengths": (group["lengths"] in get_args(Lengths), '"exact" or "projected"'),
        "scale": (group["scale"] > 0.0, "above 0"),
        "update_proj_gap": (group["update_proj_gap"] >= 1, "at least 1"),
        "betas": (all(0.0 <= beta < 1.0 for beta in group["betas"]), "two numbers, at least 0, below 1"),
        "eps": (group["eps"] >= 0.0, "at least 0"),
        "weight_decay": (group["weight_decay"] >= 0.0, "at least 0"),
    }
    for name, (holds, bound) in bounds.items():
        if not holds:
            raise ValueError(f"{name} = {group[name]}: must be {bound}")
