"""Sharded training gives what unsharded training gives, from half the frozen weights per rank."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cortex_core.config import BackboneConfig
from cortex_core.errors import ConfigError
from pipelines import zero3
from pipelines.sharding import _absent, _check_with_deepspeed, load_backbone, replicate

ROOT, SCENES = Path(__file__).parents[2], Path(__file__).with_name("sharding_scenes.py")
PLANS, MODES = ("f", "vf", "nf", "fff", "vvnf", "fnf"), ("plain", "checkpointing", "accumulation")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Qwen2 on disk. Its head is tied to its embedding, the harder case."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.utils import logging

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny")
    logging.disable_progress_bar()
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return str(folder)


def _run(scene: str, model: str, out: Path, ranks: int) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR"}
    env = {k: v for k, v in os.environ.items() if k not in launcher}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    processes = []
    for rank in range(ranks):
        if ranks > 1:
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, str(SCENES), scene, model, str(out / f"{scene}{rank}.json")]
        processes.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0] * ranks, "\n".join(said)
    assert "".join(said) == "", "loading and training must be silent"
    return [json.loads((out / f"{scene}{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module", params=["pair", "told"])
def ranks(request: pytest.FixtureRequest, tiny: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return _run(request.param, tiny, tmp_path_factory.mktemp(request.param), 2)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_an_unsharded_run(ranks: list[dict[str, Any]], mode: str) -> None:
    for rank in ranks:
        rows = [row for row in rank["rows"] if row["mode"] == mode]
        assert [row["plan"] for row in rows] == list(PLANS)
        for row in rows:
            assert row["loss"] == pytest.approx(row["expected_loss"], rel=1e-5), row
            assert row["error"] < 1e-5, row


@pytest.mark.slow
def test_a_rank_holds_half_of_the_frozen_weights_at_rest_and_after_every_step(
    ranks: list[dict[str, Any]],
) -> None:
    for rank in ranks:
        assert rank["total"] and rank["owned"] <= 0.51
        assert rank["at_rest"] == rank["owned"]
        assert [row["after"] for row in rank["rows"]] == [rank["owned"]] * len(rank["rows"])


@pytest.mark.slow
def test_at_most_one_unit_is_gathered_at_a_time(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for row in rank["rows"]:
            for peak in (row["peak_forward"], row["peak_backward"]):
                assert rank["owned"] < peak <= rank["owned"] + rank["unit"] + 1e-9, row


@pytest.mark.slow
def test_ranks_start_from_the_sidecars_of_the_first(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["sidecars"] == ranks[1]["sidecars"]
    assert ranks[0]["scale"] == ranks[1]["scale"] == 0.5


@pytest.mark.slow
def test_nothing_else_is_left_behind(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["stayed_normal"], "the load after a sharded one was sharded, too"
        assert rank["gathered"], "gathered() did not show the whole parameter"
        assert rank["stack"] == 1, "DeepSpeed's module stack grows with every step"


@pytest.mark.slow
def test_a_lone_process_can_shard(tiny: str, tmp_path: Path) -> None:
    (got,) = _run("single", tiny, tmp_path, 1)
    assert got["equal"] and got["dtype"] == "torch.bfloat16" and got["buffers"] == ["torch.float32"]
    assert got["resident"] == 1.0 and got["same"] and got["after"]
    assert "backbone.dtype = float16" in got["refusal"] and "bfloat16" in got["refusal"]
    assert "-missing: cannot be loaded" in got["missing"]
    assert not got["mlflow"], "DeepSpeed took it in, which takes seconds"


@pytest.mark.slow
def test_experts_of_a_layer_become_one_tensor_from_whichever_file(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, num_local_experts=4,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral", max_shard_size="40KB")
    index = (tmp_path / "mixtral" / "model.safetensors.index.json").read_text()
    where = {file for name, file in json.loads(index)["weight_map"].items() if ".layers.0." in name}
    assert len(where) > 1 and ".experts.0.w1.weight" in index
    assert _run("experts", str(tmp_path / "mixtral"), tmp_path, 1) == [{"differing": []}]


@pytest.mark.slow
def test_a_file_lays_the_backbone_out_and_changes_nothing_else(tiny: str, tmp_path: Path) -> None:
    (got,) = _run("files", tiny, tmp_path, 1)
    assert 'typo.json": DeepSpeed refuses it (stage3_typo: Extra inputs are not permitted)' in got.pop("typo")
    assert sorted(got) == ["zero3", "zero3_cpu_offload"]
    for row in got.values():
        assert row["equal"] and row["error"] < 1e-5, row
        assert row["loss"] == pytest.approx(row["expected_loss"], rel=1e-5), row


@pytest.mark.parametrize("there", [True, False])
def test_nvme_needs_a_library_that_few_machines_have(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self: there)
    file = str(ROOT / "cluster" / "deepspeed" / "zero3_nvme_offload.json")
    config = zero3.settings(dtype="float32", micro_batch=1, offload="none", pin_memory=False, file=file)
    with nullcontext() if there else pytest.raises(ConfigError, match=r"nvme needs libaio .* set the device to cpu$"):
        _check_with_deepspeed(config, file)


def test_a_package_is_absent_within_the_block_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_here.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with _absent("only_here"), pytest.raises(ImportError):
        importlib.import_module("only_here")
    found = importlib.import_module("only_here")
    with _absent("only_here"):  # what is there already stays
        assert importlib.import_module("only_here") is found
    del sys.modules["only_here"]


def test_stage_0_needs_no_process_group(tiny: str) -> None:
    model, shards = load_backbone(BackboneConfig(name=tiny), stage=0)
    assert not torch.distributed.is_initialized()
    assert not any(p.requires_grad for p in model.parameters())
    total = sum(p.numel() for p in model.parameters())
    assert shards.total_numel == shards.owned_numel == shards.resident_numel() == total
    with shards.watch() as peak:
        model(input_ids=torch.arange(8)[None])
        shards.release()
    assert peak.numel == total
    with shards.gathered(model.model.norm.weight) as whole:
        assert whole is None


def test_one_process_needs_no_replicas() -> None:
    module = nn.Linear(2, 2)
    assert replicate(module) is module
