"""Calibration: addresses are fitted to the backbone before the first step, and nothing else is touched."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from cortex_core.backbone.model import Cortex
from cortex_core.training.batches import BatchSource
from cortex_core.training.calibrate import calibrate
from tests import tiny

BOTH = tiny.MEMORY.model_copy(update={"layers": (0, 1)})


def source(windows: int = 40) -> BatchSource:
    return tiny.batches(tiny.training(calibration_windows=windows))


def calibrated(windows: int = 40) -> Cortex:
    model = tiny.model(BOTH)
    calibrate(model, source(windows).calibration_ids())
    return model


def alike(model: Cortex, ids: Tensor) -> list[float]:
    """For each memory layer, the root mean square cosine between the addresses of the words `ids`."""
    found = []
    hidden = functional.normalize(model.backbone.get_input_embeddings()(ids).float(), dim=-1)
    for sidecar in model.sidecars_by_layer.values():
        _, queries = sidecar.addresses(hidden[None], read=True)
        cosines = queries @ queries.transpose(-1, -2)
        found.append(float(cosines[:, :, ~torch.eye(len(ids), dtype=torch.bool)].square().mean().sqrt()))
    return found


def test_all_addresses_change_and_nothing_else_does() -> None:
    before, after = tiny.weights(tiny.model(BOTH).sidecars), tiny.weights(calibrated().sidecars)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"0.addresses.content", "1.addresses.content"}
    assert all(weights.isfinite().all() for weights in after.values())


def test_it_is_the_same_each_time_and_without_windows_nothing() -> None:
    assert tiny.same(tiny.weights(calibrated()), tiny.weights(calibrated()))
    assert tiny.same(tiny.weights(calibrated(0)), tiny.weights(tiny.model(BOTH)))


def test_the_backbone_answers_as_before_and_no_hook_stays() -> None:
    model, ids = calibrated(), source().calibration_ids()[:2]
    bare = tiny.model(BOTH).backbone(input_ids=ids).logits
    assert torch.equal(model.backbone(input_ids=ids).logits, bare)
    assert all(not sidecar._forward_pre_hooks for sidecar in model.sidecars.values())


def test_inputs_that_shared_a_direction_are_told_apart() -> None:
    """The words' addresses, after every embedding was moved by the same large vector."""
    words = torch.from_numpy(tiny.vocabulary().keys["held_out"])

    def shifted() -> Cortex:
        model = tiny.model(BOTH)
        embedding = model.backbone.get_input_embeddings().weight
        embedding.data += 3.0 * embedding.std() * torch.sign(torch.arange(embedding.shape[1]) % 2 - 0.5)
        return model

    random_map, fitted = shifted(), shifted()
    calibrate(fitted, source().calibration_ids())
    with torch.no_grad():
        before, after = alike(random_map, words), alike(fitted, words)
    assert after[0] < 0.7 * before[0], (before, after)


def test_the_windows_are_those_of_the_in_window_mixture() -> None:
    of = source(8)
    ids = of.calibration_ids()
    assert ids.shape == (8, tiny.SEGMENT) and ids.dtype == torch.long
    expected, _ = of.in_window.in_window_batch(range(8), tiny.SEGMENT, num_queries=tiny.TASKS.num_queries)
    assert torch.equal(ids, torch.from_numpy(expected))
    assert source(0).calibration_ids().shape == (0, tiny.SEGMENT)
