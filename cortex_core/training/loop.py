"""One optimizer step over the sidecars, and everything that must survive a restart."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cortex_core.backbone.model import Cortex
from cortex_core.config import OptimizerConfig, TrainingConfig
from cortex_core.fast_weights.ranks import Usage
from cortex_core.optim.groups import build_optimizer
from cortex_core.training.objectives import Batch
from cortex_core.training.schedules import learning_rate_factor, sparsity_factor


class Learner:
    """Optimizer, schedule, weight average and counters of one run; one per worker, equal on all.

    `objective` is the (possibly DDP-wrapped) `ReadingLoss` of `model`; `after_backward` lets sharded weights go;
    on `seed` hangs what an optimizer draws.
    """

    def __init__(
        self,
        model: Cortex,
        objective: nn.Module,
        training: TrainingConfig,
        optimizer: OptimizerConfig,
        after_backward: Callable[[], None] = lambda: None,
        seed: int = 0,
    ) -> None:
        self.model, self.objective = model, objective
        self.training, self.settings = training, optimizer
        self.after_backward = after_backward
        named = dict(model.sidecars.named_parameters())
        self.parameters = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        self.slow = {name: parameter for name, parameter in named.items() if name not in self.parameters}
        """Slow weights, which this does not train."""
        self.optimizer = build_optimizer(
            self.parameters, parameter_groups(self.parameters, optimizer), optimizer,
            betas=optimizer.betas, weight_decay=optimizer.weight_decay, seed=seed,
        )  # fmt: skip
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.usage = Usage(model.sidecars)
        self.step_number = 0
        self.nonfinite_steps = 0

    def step(self, micro_batches: Iterable[Batch]) -> dict[str, float]:
        """Read one global batch and update. A non-finite loss or gradient skips the update; too many end the run.

        Raises FloatingPointError after `max_nonfinite_steps` skipped steps.
        """
        factor = learning_rate_factor(self.step_number, self.training.steps, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        self.optimizer.zero_grad(set_to_none=True)
        metrics = self._accumulate(micro_batches)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.clip_norm)
        metrics["gradient_norm"] = float(norm)
        if math.isfinite(metrics["gradient_norm"]):  # gradients are averaged over workers: all agree
            self._adapt_rank()
            self.optimizer.step()
            self._average()
        else:
            self._skip()
        self.step_number += 1
        metrics["learning_rate_factor"] = factor
        metrics["nonfinite_steps"] = float(self.nonfinite_steps)
        return metrics

    def _accumulate(self, micro_batches: Iterable[Batch]) -> dict[str, float]:
        parts = self.training.accumulation_steps
        sums: dict[str, float] = {}
        for number, batch in enumerate(micro_batches):
            last = number == parts - 1
            unsynced = contextlib.nullcontext if last else getattr(self.objective, "no_sync", contextlib.nullcontext)
            with unsynced():
                with self._autocast():
                    loss, metrics = self.objective(
                        batch.to(self.model.backbone.device), sparsity_factor(self.step_number, self.training)
                    )
                (loss / parts).backward()
            self.after_backward()
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + float(value) / parts
        return sums

    def _adapt_rank(self) -> None:
        budget, cut = self.model.fast_weights.rank_budget, round(self.training.prune_frac * self.training.steps)
        if any(not addresses.content.requires_grad for addresses in self.usage.addresses.values()):
            return  # they are to stay, and without gradients nothing is known about them
        if budget is not None and self.step_number <= cut:
            self.usage.measure()
            if self.step_number == cut:
                self.usage.prune(budget)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        device = self.model.backbone.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.training.autocast == "bfloat16")

    def _skip(self) -> None:
        self.nonfinite_steps += 1
        if self.nonfinite_steps > self.training.max_nonfinite_steps:
            raise FloatingPointError(
                f"{self.nonfinite_steps} steps had a loss or gradient that is not finite "
                f"(training.max_nonfinite_steps = {self.training.max_nonfinite_steps}): "
                "lower optimizer.learning_rate or use a wider dtype"
            )

    @torch.no_grad()
    def _average(self) -> None:
        # At the start, step n counts 9 / (10 + n), so that the first weights are soon forgotten.
        decay = min(self.training.ema_decay, (1 + self.step_number) / (10 + self.step_number))
        for name, parameter in self.parameters.items():
            self.average[name].lerp_(parameter, 1.0 - decay if self.training.ema_decay else 1.0)

    @contextlib.contextmanager
    def averaged(self):  # noqa: ANN201
        """Within it, the model carries the averaged weights: the ones to evaluate and export."""
        own = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._load(self.average)
        try:
            yield
        finally:
            self._load(own)

    @torch.no_grad()
    def _load(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Tensors and counters from which `restore` continues exactly."""
        tensors = {f"weights.{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        tensors |= {f"slow.{name}": value.detach() for name, value in self.slow.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        for name, addresses in self.usage.addresses.items():
            tensors |= {f"usage.{name}": self.usage.scores[name], f"live.{name}": addresses.live}
        return tensors, {"step": self.step_number, "nonfinite_steps": self.nonfinite_steps}

    def restore(self, tensors: dict[str, Tensor], counters: dict[str, int]) -> None:
        """Continue from `state`."""
        device = self.model.backbone.device
        self._load({name: tensors[f"weights.{name}"].to(device) for name in self.parameters})
        for name, parameter in self.slow.items():
            parameter.data.copy_(tensors[f"slow.{name}"])
        for name, parameter in self.parameters.items():
            self.average[name] = tensors[f"average.{name}"].to(device)
            suffix = f".{name}"
            saved = {
                key.removeprefix("optimizer.").removesuffix(suffix): value
                for key, value in tensors.items()
                if key.startswith("optimizer.") and key.endswith(suffix)
            }
            if saved:
                self.optimizer.state[parameter] = {
                    key: value if key == "step" else value.to(device) for key, value in saved.items()
                }
        for name, addresses in self.usage.addresses.items():
            self.usage.scores[name] = tensors[f"usage.{name}"].to(device)
            addresses.live.copy_(tensors[f"live.{name}"])
        self.step_number, self.nonfinite_steps = counters["step"], counters["nonfinite_steps"]


def parameter_groups(parameters: Mapping[str, Tensor], settings: OptimizerConfig) -> list[dict[str, Any]]:
    """Parameters by kind, each with its peak learning rate."""
    rates = dict.fromkeys(("output_gate", "attention_share"), settings.output_learning_rate)
    rates |= dict.fromkeys(("write_gate", "read_gate", "controller"), settings.gate_learning_rate)
    groups: dict[float, list[Tensor]] = {}
    for name, parameter in parameters.items():
        rate = next((rates[part] for part in name.split(".") if part in rates), settings.learning_rate)
        groups.setdefault(rate, []).append(parameter)
    return [{"params": members, "lr": rate, "peak_lr": rate} for rate, members in groups.items()]
