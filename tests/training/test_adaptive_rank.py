"""A budget of rank in a run: spent at its step, kept through a restart, and exported without what was dropped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cortex_core.backbone.model import Cortex
from cortex_core.backbone.sidecar_files import WEIGHTS
from cortex_core.errors import DataError
from cortex_core.training import checkpoint
from tests import tiny

MEMORY = tiny.MEMORY.model_copy(
    update={"layers": (0, 1), "rank_budget": 5.0, "reversed_frac": 0.5, "binding": True}  # all that has columns to drop
)
HEADS = 4
TRAINING = tiny.training(steps=6, prune_frac=0.5)


def live(model: Cortex) -> list[torch.Tensor]:
    return [sidecar.addresses.live.clone() for _, sidecar in model.ports.values()]


@pytest.fixture(scope="module")
def pruned() -> Cortex:
    """After a whole run."""
    of = tiny.learner(TRAINING, tiny.model(MEMORY))
    source = tiny.batches(TRAINING)
    tiny.train(of, source, 3)
    assert all(mask.all() for mask in live(of.model))
    tiny.train(of, source, 1)
    assert sum(int(mask.sum()) for mask in live(of.model)) == 5 * 2 * HEADS
    tiny.train(of, source, 2)
    return of.model


def test_without_a_budget_nothing_is_dropped() -> None:
    of = tiny.learner(TRAINING)
    tiny.train(of, tiny.batches(TRAINING), 6)
    assert all(mask.all() for mask in live(of.model))


def test_what_is_kept_is_decided_by_use_and_not_alike_everywhere(pruned: Cortex) -> None:
    assert len({int(count) for mask in live(pruned) for count in mask.sum(1)}) > 1


@pytest.mark.parametrize("before", [2, 4])
def test_a_restart_changes_nothing(pruned: Cortex, tmp_path: Path, before: int) -> None:
    source = tiny.batches(TRAINING)
    first = tiny.learner(TRAINING, tiny.model(MEMORY))
    tiny.train(first, source, before)
    checkpoint.save(tmp_path, first)
    second = tiny.learner(TRAINING, tiny.model(MEMORY))
    checkpoint.load(tmp_path, second)
    tiny.train(second, source, 6 - before)
    assert tiny.same(tiny.weights(second.model.sidecars), tiny.weights(pruned.sidecars))
    assert all(torch.equal(a, b) for a, b in zip(live(second.model), live(pruned), strict=True))


def test_it_is_exported_smaller_and_reads_the_same(pruned: Cortex, tmp_path: Path) -> None:
    pruned.save_pretrained(tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    for name in ("content", "key_taps", "query_taps", "relation", "key_binding", "query_binding"):
        assert sum(stored[f"{layer}.addresses.{name}"].shape[1] for layer in (0, 1)) == 5 * 2 * HEADS, name
    again = Cortex.from_pretrained(tiny.backbone_config().name, sidecars=tmp_path)
    ids = torch.arange(2 * 3 * tiny.SEGMENT).view(2, -1) % 600
    expected, found = (model(input_ids=ids, session=model.new_session(2)).logits for model in (pruned, again))
    assert torch.equal(expected, found)
    assert [s.state_bytes for _, s in again.ports.values()] == [s.state_bytes for _, s in pruned.ports.values()]


def test_a_mask_that_does_not_fit_its_weights_is_refused(pruned: Cortex, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    pruned.save_pretrained(tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    mask = stored["0.addresses.live"].flatten()
    mask[int(mask.argmax())] = 0
    save_file(stored, tmp_path / WEIGHTS)
    with pytest.raises(DataError, match=r"does not fit .*0\.addresses"):
        Cortex.from_pretrained(tiny.backbone_config().name, sidecars=tmp_path)


def test_addresses_that_are_kept_are_not_pruned() -> None:
    """Nothing would be known of their use."""
    model = tiny.model(MEMORY)
    for sidecar in model.sidecars_by_layer.values():
        sidecar.addresses.requires_grad_(False)
    tiny.train(tiny.learner(TRAINING, model), tiny.batches(TRAINING), 6)
    assert all(mask.all() for mask in live(model))
