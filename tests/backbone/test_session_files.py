"""Sessions and sidecars on disk: identity, and a clear error for everything else. Never code execution."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cortex_core.backbone import sidecar_files
from cortex_core.backbone.fingerprint import fingerprint
from cortex_core.backbone.load import in_assets, load_backbone
from cortex_core.backbone.model import Cortex
from cortex_core.backbone.session import SCHEMA
from cortex_core.config import BackboneConfig
from cortex_core.errors import DataError, IncompatibleError
from tests.backbone.families import SEGMENT, VOCAB, bare, open_gates, random_ids, small_memory, with_memory


@pytest.fixture
def model() -> Cortex:
    return with_memory()


@pytest.fixture
def saved(model: Cortex, tmp_path: Path) -> Path:
    session = model.new_session(2)
    with torch.no_grad():
        model.read(random_ids(2, 75), session)
    session.save(tmp_path / "chat.safetensors")
    return tmp_path / "chat.safetensors"


@torch.no_grad()
def test_a_loaded_session_goes_on_bit_for_bit(model: Cortex, tmp_path: Path) -> None:
    ids = random_ids(2, 150)
    session = model.new_session(2)
    model.read(ids[:, :75], session)
    session.save(tmp_path / "deep" / "chat.safetensors")
    again = model.load_session(tmp_path / "deep" / "chat.safetensors")
    assert again.num_tokens.tolist() == [75, 75]
    assert again.num_bytes == session.num_bytes
    a, b = (model(input_ids=ids[:, 75:], session=s).logits for s in (session, again))
    assert torch.equal(a, b)


@torch.no_grad()
def test_the_size_does_not_depend_on_what_was_read(model: Cortex) -> None:
    sizes = set()
    for tokens in (SEGMENT, 4 * SEGMENT, 20 * SEGMENT):
        session = model.new_session()
        model.read(random_ids(1, tokens), session)
        sizes.add(session.num_bytes)
    assert len(sizes) == 1


def edited(path: Path, metadata: dict[str, str] | None = None, **tensors: torch.Tensor | None) -> Path:
    """The saved session with some tensors replaced (None removes one)."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        kept = {**file.metadata(), **(metadata or {})}
    content = {name.replace("__", "."): value for name, value in tensors.items()}
    merged = {name: value for name, value in (load_file(path) | content).items() if value is not None}
    save_file(merged, path, metadata=kept)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start_tokens": None}, "start_tokens is missing"),
        ({"layer__1__up": torch.zeros(2, 4, 8, 9)}, r"layer\.1\.up is .*\[2, 4, 8, 9\], expected"),
        ({"layer__1__up": torch.full((2, 4, 8, 8), float("nan"))}, "not finite"),
        ({"open__lengths": torch.tensor([11, 99])}, "open.lengths outside"),
        ({"open__input_ids": torch.full((2, 11), VOCAB)}, "outside the vocabulary"),
        ({"start_tokens": torch.tensor([-1, 0])}, "negative start_tokens"),
        ({"metadata": {"schema": "cortex-session/0"}}, f"schema is 'cortex-session/0', this version reads '{SCHEMA}'"),
        ({"metadata": {"identity": "{"}}, "identity is unreadable"),
    ],
)
def test_a_damaged_session_is_refused(model: Cortex, saved: Path, change: dict, message: str) -> None:
    edited(saved, **change)
    with pytest.raises(DataError, match=message):
        model.load_session(saved)


def test_truncated_missing_and_hostile_files(model: Cortex, saved: Path, tmp_path: Path) -> None:
    whole = saved.read_bytes()
    for size in (0, 7, 100, len(whole) - 1):
        saved.write_bytes(whole[:size])
        with pytest.raises(DataError, match="not a whole safetensors file"):
            model.load_session(saved)
    with pytest.raises(DataError, match="no such file"):
        model.load_session(tmp_path / "nothing")
    fired = tmp_path / "fired"

    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path.touch, (fired,))

    saved.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError):
        model.load_session(saved)
    assert not fired.exists()


def test_a_session_of_another_model_is_refused(saved: Path) -> None:
    other_sidecars = with_memory()
    torch.nn.init.ones_(other_sidecars.sidecars["1"].write_gate.weight)
    with pytest.raises(IncompatibleError, match="another sidecars"):
        other_sidecars.load_session(saved)
    backbone = bare("qwen2")
    backbone.model.layers[0].mlp.up_proj.weight.data += 1
    torch.manual_seed(0)
    other_backbone = Cortex.attach(backbone, small_memory(), segment_tokens=SEGMENT)
    with pytest.raises(IncompatibleError, match="another backbone"):
        other_backbone.load_session(saved)


def test_a_failed_save_leaves_the_old_file(model: Cortex, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def fails(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("cortex_core.backbone.session.save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        model.new_session().save(saved)
    assert saved.read_bytes() == before


@torch.no_grad()
def test_sidecars_come_back_bit_for_bit(model: Cortex, tmp_path: Path) -> None:
    model.backbone.save_pretrained(tmp_path / "backbone")
    model.save_pretrained(tmp_path / "sidecars")
    again = Cortex.from_pretrained(str(tmp_path / "backbone"), sidecars=tmp_path / "sidecars")
    assert again.fast_weights == model.fast_weights
    assert again.segment_tokens == SEGMENT
    assert again.identity() == model.identity()
    ids = random_ids(1, 90)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_backbone_keeps_its_fingerprint_in_bfloat16() -> None:
    same = [fingerprint(load_backbone(BackboneConfig(dtype=dtype))) for dtype in ("float32", "bfloat16")]
    assert same == [sidecar_files.read(in_assets("builtin:stdlib-1m/sidecars")).backbone] * 2, "as it was when saved"


def test_sidecars_of_a_backbone_in_float16_say_so() -> None:
    settings = {"sidecars": "builtin:stdlib-1m/sidecars", "dtype": "float16"}
    with pytest.raises(IncompatibleError, match=r"in its dtype \(float16"):
        Cortex.from_pretrained("builtin:stdlib-1m", **settings)


@torch.no_grad()
def test_sidecars_of_another_backbone_are_refused(model: Cortex, tmp_path: Path) -> None:
    bare("llama").save_pretrained(tmp_path / "llama")
    model.save_pretrained(tmp_path / "sidecars")
    with pytest.raises(IncompatibleError, match="trained on another backbone"):
        Cortex.from_pretrained(str(tmp_path / "llama"), sidecars=tmp_path / "sidecars")


def test_damaged_sidecar_folders(model: Cortex, tmp_path: Path) -> None:
    model.backbone.save_pretrained(tmp_path / "backbone")
    folder = tmp_path / "sidecars"
    with pytest.raises(DataError, match=r"cortex\.json is missing"):
        Cortex.from_pretrained(str(tmp_path / "backbone"), sidecars=folder)
    open_gates(model)
    model.save_pretrained(folder)
    settings = json.loads((folder / "cortex.json").read_text())
    for broken in ("{", json.dumps({**settings, "schema": "x"}), json.dumps({**settings, "fast_weights": {"rank": 0}})):
        (folder / "cortex.json").write_text(broken)
        with pytest.raises(DataError, match="sidecars"):
            Cortex.from_pretrained(str(tmp_path / "backbone"), sidecars=folder)
    model.save_pretrained(folder)
    weights = (folder / "sidecars.safetensors").read_bytes()
    (folder / "sidecars.safetensors").write_bytes(weights[:-5])
    with pytest.raises(DataError, match="not readable"):
        Cortex.from_pretrained(str(tmp_path / "backbone"), sidecars=folder)
