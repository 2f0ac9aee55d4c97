"""Checkpoints on disk: the run goes on bit for bit, and whatever is damaged or of another run is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cortex_core.errors import DataError
from cortex_core.training import checkpoint
from cortex_core.training.checkpoint import COUNTERS, SCHEMA, TENSORS
from cortex_core.training.loop import Learner
from tests import tiny


@pytest.fixture
def learner() -> Learner:
    """Two steps into a run."""
    of = tiny.learner(tiny.training(ema_decay=0.9))
    tiny.train(of, tiny.batches(of.training), 2)
    return of


@pytest.fixture
def saved(learner: Learner, tmp_path: Path) -> Path:
    checkpoint.save(tmp_path, learner)
    return tmp_path


def test_a_loaded_run_goes_on_bit_for_bit(learner: Learner, saved: Path) -> None:
    other = tiny.learner(learner.training, tiny.model(open_gates=True))
    checkpoint.load(saved, other)
    assert tiny.same(other.state()[0], learner.state()[0]) and other.state()[1] == learner.state()[1]
    source = tiny.batches(learner.training)
    assert tiny.train(other, source, 2) == tiny.train(learner, source, 2)
    assert tiny.same(other.state()[0], learner.state()[0])


def test_it_holds_numbers_and_no_code(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == [COUNTERS, TENSORS]
    assert json.loads((saved / COUNTERS).read_text()) == {"schema": SCHEMA, "step": 2, "nonfinite_steps": 0}
    kinds = {name.split(".")[0] for name in load_file(saved / TENSORS)}
    assert kinds == {"weights", "average", "optimizer", "usage", "live", "random_state"}


def test_random_numbers_go_on_where_they_were(learner: Learner, tmp_path: Path) -> None:
    torch.manual_seed(7)
    checkpoint.save(tmp_path, learner)
    expected = torch.rand(5)
    torch.manual_seed(8)
    checkpoint.load(tmp_path, learner)
    assert torch.equal(torch.rand(5), expected)


def refused(folder: Path, message: str, learner: Learner) -> None:
    """With one line, and before anything of the learner has changed."""
    before = tiny.weights(learner.model.sidecars)
    with pytest.raises(DataError, match=message) as error:
        checkpoint.load(folder, learner)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    assert tiny.same(tiny.weights(learner.model.sidecars), before) and learner.step_number == 0


def test_a_truncated_file_is_refused(saved: Path) -> None:
    whole, of = (saved / TENSORS).read_bytes(), tiny.learner(tiny.training())
    for size in (0, 5, 200, len(whole) // 2, len(whole) - 1):
        (saved / TENSORS).write_bytes(whole[:size])
        refused(saved, "not whole", of)


@pytest.mark.parametrize("name", [COUNTERS, TENSORS])
def test_a_missing_file_is_refused(saved: Path, name: str) -> None:
    (saved / name).unlink()
    refused(saved, "not whole", tiny.learner(tiny.training()))
    refused(saved / "nowhere", "not whole", tiny.learner(tiny.training()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not whole"),
        ('{"schema": "cortex-che', "not whole"),
        ("[1, 2]", "not whole"),
        ("null", "not whole"),
        (json.dumps({"schema": SCHEMA, "nonfinite_steps": 0}), "not whole"),
        (json.dumps({"schema": SCHEMA, "step": "two", "nonfinite_steps": 0}), "not whole"),
        (json.dumps({"step": 2, "nonfinite_steps": 0}), f"schema is None, this version reads '{SCHEMA}'"),
        (json.dumps({"schema": "cortex-checkpoint/0", "step": 2, "nonfinite_steps": 0}), "schema is 'cortex-checkpoint/0'"),
    ],
)  # fmt: skip
def test_damaged_or_foreign_counters_are_refused(saved: Path, text: str, message: str) -> None:
    (saved / COUNTERS).write_text(text)
    refused(saved, message, tiny.learner(tiny.training()))


@pytest.mark.parametrize(
    "change", [{"rank": 8}, {"controller": False}, {"layers": (0,)}, {"layers": (0, 1)}, {"controller_hidden": 4}]
)
def test_a_checkpoint_of_another_memory_is_refused(saved: Path, change: dict[str, object]) -> None:
    other = tiny.model(tiny.MEMORY.model_copy(update=change))
    refused(saved, "of another memory", tiny.learner(tiny.training(), other))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("average.1.addresses.content", "of another memory"),
        ("weights", "of another memory"),
        ("random_state", "not whole"),
    ],
)
def test_a_checkpoint_that_lacks_something_is_refused(saved: Path, kind: str, message: str) -> None:
    tensors = load_file(saved / TENSORS)
    save_file({name: value for name, value in tensors.items() if not name.startswith(kind)}, saved / TENSORS)
    refused(saved, message, tiny.learner(tiny.training()))


def test_what_a_full_disk_leaves_is_not_whole(
    learner: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(tmp_path, learner)
    refused(tmp_path, "not whole", tiny.learner(tiny.training()))
