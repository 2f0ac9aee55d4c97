"""A checkpoint under ZeRO-3, part by part: which parts there are, and that no more than one is in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import modeling_utils

from cortex_core.backbone.create import create_model
from cortex_core.backbone.load_parts import part_by_part, parts


def test_a_layer_is_a_part_with_all_its_experts() -> None:
    names = [
        "model.embed_tokens.weight", "model.layers.0.mlp.experts.0.w1.weight", "lm_head.weight",
        "model.layers.0.mlp.experts.1.w1.weight", "model.layers.10.mlp.gate.weight", "model.layers.1.mlp.gate.weight",
    ]  # fmt: skip
    assert parts(names) == [
        ["model.embed_tokens.weight"],
        ["model.layers.0.mlp.experts.0.w1.weight", "model.layers.0.mlp.experts.1.w1.weight"],
        ["lm_head.weight"],
        ["model.layers.10.mlp.gate.weight"],
        ["model.layers.1.mlp.gate.weight"],
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_values_are_read_one_part_at_a_time_and_on_rank_0_alone(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = create_model(
        vocab_size=64, hidden_size=32, num_layers=3, num_heads=2, mlp_size=48, window_tokens=32, rope_theta=1e4,
        tied_embeddings=False, seed=0,
    )  # fmt: skip
    model.save_pretrained(tmp_path, max_shard_size="20KB")  # layers go on in the next file
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    filled: list[dict[str, Tensor]] = []

    def fill(of: Any, values: dict[str, Tensor], load_config: Any) -> tuple[list[str], set[str]]:
        filled.append(values)
        return [f"{len(values)} tensors"], {*of.state_dict()} - {*values}

    monkeypatch.setattr(modeling_utils, "_load_state_dict_into_zero3_model", fill)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    with part_by_part():
        merged = {name: at for file in files for name, at in modeling_utils.load_state_dict(str(file)).items()}
        assert all(value.is_meta for value in merged.values())
        errors, missing = modeling_utils._load_state_dict_into_zero3_model(model, merged, None)
    assert modeling_utils._load_state_dict_into_zero3_model is fill
    assert missing == set() and len(errors) == len(filled) == 6
    assert all(value.is_meta == bool(rank) for part in filled for value in part.values())
    if rank == 0:
        read = {name: value for part in filled for name, value in part.items()}
        assert read.keys() == model.state_dict().keys()
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in read.items())
