"""Where the gate opened, counted token by token from what the sidecars report while each example is read alone."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from cortex_core.backbone.model import Cortex
from cortex_core.eval.usage import GAP_SEGMENTS, gate_usage
from cortex_core.tasks.layout import TextTask
from tests import tiny
from tests.tiny import SEGMENT

TOTAL = (GAP_SEGMENTS + 1) * SEGMENT


class Readings:
    """What every sidecar reports within the block, in the order of the calls."""

    def __init__(self, model: Cortex) -> None:
        self._model = model
        self.of_layer: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.gates: dict[int, list[Tensor]] = {}

    def __enter__(self) -> Readings:
        self._handles = [
            sidecar.register_forward_hook(self._keep(int(layer))) for layer, sidecar in self._model.sidecars.items()
        ]
        self._handles += [
            sidecar.controller.register_forward_hook(
                lambda _, args, said, layer=int(layer): self.gates.setdefault(layer, []).append(said.gate)
            )
            for layer, sidecar in self._model.sidecars.items()
            if sidecar.controller is not None
        ]
        return self

    def __exit__(self, *exit_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, layer: int) -> Any:
        def hook(module: object, args: object, out: Any) -> None:
            self.of_layer.setdefault(layer, []).append((out[0].write, out[0].surprise))

        return hook


def correlation(readings: list[tuple[Tensor, Tensor]], gates: list[Tensor]) -> float:
    """Pearson's r of the surprise that was reported and the controller's gate, head by head and token by token."""
    surprise = [float(x) for _, surprises in readings for x in surprises.flatten()]
    gate = [float(x) for _, at in zip(readings, by_example(gates, len(readings)), strict=True) for x in at.flatten()]
    return statistics.correlation(surprise, gate)


def by_example(gates: list[Tensor], examples: int) -> list[Tensor]:
    """The calls of one example, one per segment, as one."""
    calls = len(gates) // examples
    return [torch.cat(gates[first : first + calls], dim=2) for first in range(0, len(gates), calls)]


@torch.no_grad()
def counted(model: Cortex, task: TextTask, indices: range) -> list[dict[str, float]]:
    """The same table from sums over single numbers."""
    rows = []
    with Readings(model) as seen:
        for index in indices:
            model(input_ids=torch.from_numpy(task.example(index, TOTAL).tokens[:TOTAL])[None])
    for layer, readings in seen.of_layer.items():
        sums: dict[str, list[float]] = {name: [] for name in ("written", "facts", "filler", "s_facts", "s_filler")}
        for index, (write, surprise) in zip(indices, readings, strict=True):
            facts = len(task.vocabulary.prefix) + sum(len(part.tokens) for part in task.sheet(index, 1).facts)
            for position in range(TOTAL):
                where = "facts" if position < facts else "filler"
                for head in range(write.shape[1]):
                    sums["written"].append(float(write[0, head, position] > 0))
                    sums[where].append(float(write[0, head, position]))
                    sums["s_" + where].append(float(surprise[0, head, position]))
        means = {name: sum(values) / len(values) for name, values in sums.items()}
        rows.append({
            "layer": layer, "write_frac": means["written"],
            "mean_write_on_facts": means["facts"], "mean_write_on_filler": means["filler"],
            "mean_surprise_on_facts": means["s_facts"], "mean_surprise_on_filler": means["s_filler"],
            "gate_surprise_r": correlation(readings, seen.gates[layer]),
        })  # fmt: skip
    return rows


@pytest.mark.parametrize("kind", ["ragged", "key_value"])
def test_shares_are_those_of_a_count(kind: str) -> None:
    model = tiny.model(tiny.MEMORY.model_copy(update={"layers": (0, 1)}), open_gates=True)
    task = tiny.ragged() if kind == "ragged" else tiny.task("random")
    rows, expected = gate_usage(model, task, range(2, 7)), counted(model, task, range(2, 7))
    assert [row["layer"] for row in rows] == [0, 1]
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, abs=1e-5)
        assert 0.05 < row["write_frac"] < 0.95
        assert row["mean_write_on_facts"] != pytest.approx(row["mean_write_on_filler"], abs=1e-3)
        assert 0.05 < abs(row["gate_surprise_r"]) < 1


def test_a_trained_memory_writes_facts_rather_than_filler() -> None:
    (row,) = gate_usage(tiny.trained(), tiny.task(split="held_out"), range(8))
    assert row["mean_write_on_facts"] > 1.5 * row["mean_write_on_filler"]


def test_a_shut_gate_writes_nowhere() -> None:
    model = tiny.model()
    for sidecar in model.sidecars.values():
        torch.nn.init.constant_(sidecar.write_gate.bias, -9.0)
    (row,) = gate_usage(model, tiny.task(), range(3))
    assert row["write_frac"] == row["mean_write_on_facts"] == row["mean_write_on_filler"] == 0.0
    assert row["mean_surprise_on_facts"] == pytest.approx(1.0, abs=1e-4), "an empty memory is surprised by everything"
    assert row["gate_surprise_r"] is None, "surprise is the same everywhere"


def test_without_a_controller_nothing_correlates() -> None:
    model = tiny.model(tiny.MEMORY.model_copy(update={"controller": False}))
    assert gate_usage(model, tiny.task(), range(2))[0]["gate_surprise_r"] is None


def test_listening_leaves_nothing_behind() -> None:
    model = tiny.model()
    gate_usage(model, tiny.task(), range(2))
    assert not any(sidecar.controller._forward_hooks for sidecar in model.sidecars.values())
