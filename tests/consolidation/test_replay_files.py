"""The buffer on disk: whatever stops a save, the last good file is there; whatever is damaged is refused in one line."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cortex_core import files
from cortex_core.config import ReplayConfig
from cortex_core.consolidation.replay import SCHEMA, ReplayBuffer
from cortex_core.errors import DataError

CONFIG = ReplayConfig()


def buffer_of(*importance: float) -> ReplayBuffer:
    buffer = ReplayBuffer(CONFIG)
    for value in importance:
        tensors = {"token_ids": torch.arange(4), "1.delta_up": torch.full((2, 3), value)}
        buffer.add(tensors, {"source": "a", "first": 7}, importance=value, surprise=value)
    buffer.sleep_passed()
    return buffer


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    buffer_of(1.0, 2.0).save(tmp_path / "deep" / "replay.safetensors")
    return tmp_path / "deep" / "replay.safetensors"


def test_a_loaded_buffer_is_the_saved_one(saved: Path) -> None:
    buffer, again = buffer_of(1.0, 2.0), ReplayBuffer.load(saved, CONFIG)
    buffer.draw(1)
    assert again.state()[1] == {**buffer.state()[1], "num_draws": 0}
    assert {name: part.tolist() for name, part in again.state()[0].items()} == {
        name: part.tolist() for name, part in buffer.state()[0].items()
    }
    assert again.num_bytes == buffer.num_bytes
    assert again.add({}, importance=1.0, surprise=1.0)[0] == 2
    assert [path.name for path in saved.parent.iterdir()] == ["replay.safetensors"]


def test_an_empty_buffer_can_be_saved(tmp_path: Path) -> None:
    ReplayBuffer(CONFIG).save(tmp_path / "replay")
    assert len(ReplayBuffer.load(tmp_path / "replay", CONFIG)) == 0


def test_a_smaller_capacity_lets_go_as_always(saved: Path) -> None:
    small = ReplayBuffer.load(saved, ReplayConfig(capacity_items=1))
    assert [item.id for item in small.items] == [1]
    tensors, table = buffer_of(1.0, 2.0, 0.5).state()
    assert ReplayBuffer(ReplayConfig(capacity_items=1)).restore(tensors, table) == [2, 0]


CRASH = """
import os, sys
from pathlib import Path
from cortex_core import files
from tests.consolidation.test_replay_files import buffer_of

stop, path = sys.argv[1], Path(sys.argv[2])
real, events, buffer = files.save_file, [], buffer_of(5.0)

def half(content, partial, metadata):
    real(content, partial, metadata=metadata)
    with open(partial, "r+b") as file:
        file.truncate(os.path.getsize(partial) // 2)
    os._exit(9)

def die(event, details):
    # Python reports whatever it is about to do to a file: opening, renaming, removing.
    if event in ("open", "os.rename", "os.remove") and str(path.parent) in str(details[0]):
        events.append(event)
        if stop == f"before {len(events)}: {event}":
            os._exit(9)

if stop == "in the middle of writing":
    files.save_file = half
sys.addaudithook(die)
buffer.save(path)
print(*events)
"""
POINTS = {
    "in the middle of writing": [1.0, 2.0],
    "before 1: open": [1.0, 2.0],
    "before 2: os.rename": [1.0, 2.0],
    "before 3: open": [5.0],
    "never": [5.0],
}


@pytest.mark.parametrize("point", POINTS)
def test_a_process_that_dies_while_saving_leaves_the_last_good_file(saved: Path, point: str) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", CRASH, point, str(saved)]
    done = subprocess.run(command, cwd=root, check=False, timeout=120, capture_output=True, text=True)
    assert done.returncode == (0 if point == "never" else 9), done.stderr
    assert point != "never" or done.stdout.split() == ["open", "os.rename", "open"]  # all of them are tried above
    assert [item.importance for item in ReplayBuffer.load(saved, CONFIG).items] == POINTS[point]
    buffer_of(6.0).save(saved)  # over whatever was left beside it
    assert [item.importance for item in ReplayBuffer.load(saved, CONFIG).items] == [6.0]
    assert [path.name for path in saved.parent.iterdir()] == ["replay.safetensors"]


def test_a_full_disk_leaves_the_last_good_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        buffer_of(5.0).save(saved)
    assert [item.importance for item in ReplayBuffer.load(saved, CONFIG).items] == [1.0, 2.0]


def test_truncated_missing_and_hostile_files_are_refused(saved: Path, tmp_path: Path) -> None:
    whole = saved.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:size])
        with pytest.raises(DataError, match="not a whole safetensors file") as error:
            ReplayBuffer.load(saved, CONFIG)
        assert "\n" not in str(error.value) and str(saved) in str(error.value)
    with pytest.raises(DataError, match="there is no such file"):
        ReplayBuffer.load(tmp_path / "nothing", CONFIG)
    fired = tmp_path / "fired"

    class Bomb:
        def __reduce__(self) -> tuple[Callable, tuple[Path]]:
            return (Path.touch, (fired,))

    saved.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError, match="not a whole safetensors file"):
        ReplayBuffer.load(saved, CONFIG)
    assert not fired.exists()


def rewritten(path: Path, table: object, schema: str = SCHEMA, **more: torch.Tensor) -> None:
    save_file(load_file(path) | more, path, metadata={"schema": schema, "notes": json.dumps(table)})


def table(**changes: object) -> dict:
    return buffer_of(1.0, 2.0).state()[1] | changes


ITEM = table()["items"][0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "its notes are list, not a table"),
        ({}, "num_sleeps"),
        (table(next_id=1), "item 1 has no place in it"),
        (table(next_id="2"), "counters"),
        (table(num_draws=-1), "counters"),
        (table(items=[]), "tensors of item 0, which is not in its table"),
        (table(items=[ITEM, ITEM]), "item 0 has no place|tensors of item 1"),
        (table(items=[ITEM | {"id": 1}, ITEM]), "item 0 has no place"),
        (table(items=[ITEM, ITEM | {"id": 1, "born": 9}]), "item 1 has no place"),
        (table(items=[ITEM, ITEM | {"id": 1, "importance": -1.0}]), "importance = -1"),
        (table(items=[ITEM, ITEM | {"id": 1, "importance": "much"}]), "importance of an item is 'much'"),
        (table(items=[ITEM, ITEM | {"id": 1, "notes": 3}]), "damaged"),
        (table(items=[ITEM, {"id": 1}]), "damaged"),
        (table(items=7), "damaged"),
    ],
)  # fmt: skip
def test_a_damaged_table_is_refused_with_one_line(saved: Path, content: object, message: str) -> None:
    rewritten(saved, content)
    with pytest.raises(DataError, match=message) as error:
        ReplayBuffer.load(saved, CONFIG)
    assert "\n" not in str(error.value) and str(saved) in str(error.value)


def test_another_schema_missing_notes_and_poisoned_tensors(saved: Path) -> None:
    rewritten(saved, table(), **{"0.token_ids": torch.tensor([float("nan")])})
    with pytest.raises(DataError, match="not finite"):
        ReplayBuffer.load(saved, CONFIG)
    rewritten(saved, table(), schema="cortex-session/3")
    with pytest.raises(DataError, match=f"schema is 'cortex-session/3', this version reads '{SCHEMA}'"):
        ReplayBuffer.load(saved, CONFIG)
    save_file({}, saved, metadata={"schema": SCHEMA, "notes": "{"})
    with pytest.raises(DataError, match="its notes are unreadable"):
        ReplayBuffer.load(saved, CONFIG)


def test_a_state_that_does_not_fit_leaves_the_buffer_as_it_was() -> None:
    buffer = buffer_of(3.0)
    with pytest.raises(DataError, match="its state is damaged"):
        buffer.restore({}, {"items": []})
    assert [item.importance for item in buffer.items] == [3.0] and buffer.num_sleeps == 1
