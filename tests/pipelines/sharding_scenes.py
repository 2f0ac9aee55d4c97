"""What the tests of sharding run in processes of their own: `python sharding_scenes.py SCENE MODEL OUT`."""

from __future__ import annotations

import copy
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cortex_core.config import BackboneConfig, FastWeightsConfig
from cortex_core.errors import ConfigError, DataError
from pipelines.sharding import Shards, load_backbone, replicate

WIDTH, VOCAB, SEGMENT = 32, 96, 12
DEEPSPEED = Path(__file__).parents[2] / "cluster" / "deepspeed"
# What each optimizer step does with the backbone: f = whole model, with loss; v = only the first three layers, whose
# output nobody uses, for the state they leave; n = bare model without gradients. No two steps visit the same modules.
PLANS = ("f", "vf", "nf", "fff", "vvnf", "fnf")
MODES = ("plain", "checkpointing", "accumulation")


class WithSidecars(nn.Module):
    """Two linear sidecars on the attention of layers 1 and 2 of a frozen model.

    Gradients reach them, and the frozen weights before them, through the model's output, through a penalty on what
    they add, and through a state that is carried from call to call past any module's output.
    """

    def __init__(self, backbone: Any, seed: int) -> None:
        super().__init__()
        self.backbone = backbone
        torch.manual_seed(seed)
        self.sidecars = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
        self.sidecars.register_buffer("scale", torch.tensor(0.5))
        self._added: list[Tensor] = []
        for layer, sidecar in zip(backbone.model.layers[1:3], self.sidecars, strict=True):
            layer.self_attn.register_forward_hook(self._adds(sidecar), with_kwargs=True)
        view = copy.copy(backbone.model)
        view._modules = dict(backbone.model._modules, layers=backbone.model.layers[:3])
        self._reader = (view,)

    def _adds(self, sidecar: nn.Module) -> Any:
        def hook(module: Any, args: Any, kwargs: dict[str, Any], out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            carry = kwargs.get("carry")
            if carry is None:
                return out
            added = sidecar(out[0] + kwargs["hidden_states"] + carry[:, None]) * self.sidecars.scale
            self._added.append(added)
            return out[0] + added, *out[1:]

        return hook

    def forward(self, tokens: Tensor, plan: str) -> Tensor:
        carry, total = tokens.new_zeros(len(tokens), WIDTH, dtype=torch.float32), torch.zeros(())
        for kind, part in zip(plan, tokens.split(SEGMENT, 1), strict=False):
            self._added = []
            if kind == "n":
                with torch.no_grad():
                    self.backbone(input_ids=part, use_cache=False)
            elif kind == "v":
                self._reader[0](input_ids=part, use_cache=False, carry=carry)
                carry = carry + torch.stack(self._added).mean((0, 2))
            else:
                logits = self.backbone(input_ids=part, use_cache=False, carry=carry).logits
                carry = carry + torch.stack(self._added).mean((0, 2))
                total = total + nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), part[:, 1:].flatten())
                total = total + torch.stack(self._added).square().mean()
        return total


def _step(model: nn.Module, shards: Shards, tokens: Tensor, plan: str, accumulate: bool) -> tuple[float, list[Tensor]]:
    for p in model.parameters():
        p.grad = None
    parts = tokens.chunk(2) if accumulate else (tokens,)
    total = 0.0
    for n, part in enumerate(parts):
        last = n == len(parts) - 1
        with nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync():
            loss = model(part, plan) / len(parts)
            loss.backward()
        shards.release()
        total += loss.item()
    return total, [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]


def _checkpointing(backbone: Any, on: bool) -> None:
    backbone.train(on)
    if on:
        backbone.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        backbone.activation_checkpointing_disable()


def told(folder: str) -> dict[str, Any]:
    """The same as `pair`, and it is known beforehand which layers have sidecars."""
    return pair(folder, FastWeightsConfig(layers=(1, 2)))


def pair(folder: str, memory: FastWeightsConfig | None = None) -> dict[str, Any]:
    """One of two ranks: every plan in every mode, against the same step on the whole batch without shards."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    config = BackboneConfig(name=folder)
    sharded, shards = load_backbone(config, stage=3, memory=memory)
    whole, unsplit = load_backbone(config, stage=0)
    stayed_normal = all(p.numel() > 0 for p in whole.parameters())
    reference, mine = WithSidecars(whole, seed=0), WithSidecars(sharded, seed=rank)
    scale = mine.sidecars.scale
    if rank == 1:
        scale.fill_(7.0)  # a buffer among the sidecars starts equal, too
    model = replicate(mine)
    rows: list[dict[str, Any]] = []
    at_rest = shards.resident_numel() / shards.total_numel
    for mode in MODES:
        for backbone in (sharded, whole):
            _checkpointing(backbone, mode == "checkpointing")
        for number, plan in enumerate(PLANS):
            tokens = torch.randint(0, VOCAB, (4, 4 * SEGMENT), generator=torch.Generator().manual_seed(number))
            with shards.watch() as peak:
                loss, grads = _step(model, shards, tokens.chunk(2)[rank], plan, mode == "accumulation")
            share = torch.tensor(loss)
            torch.distributed.all_reduce(share)
            expected_loss, expected = _step(reference, unsplit, tokens, plan, False)
            rows.append({
                "mode": mode, "plan": plan, "loss": share.item() / 2, "expected_loss": expected_loss,
                "error": max(((a - b).norm() / b.norm()).item() for a, b in zip(grads, expected, strict=True)),
                "after": shards.resident_numel() / shards.total_numel,
                "peak_forward": peak.forward_numel / shards.total_numel,
                "peak_backward": peak.backward_numel / shards.total_numel,
            })  # fmt: skip
    with shards.gathered(sharded.model.norm.weight):
        gathered = torch.equal(sharded.model.norm.weight, whole.model.norm.weight)
    layer = sum(p.numel() for p in whole.model.layers[0].parameters())
    outside = max(whole.lm_head.weight.numel(), whole.model.embed_tokens.weight.numel())
    return {
        "rows": rows, "at_rest": at_rest, "owned": shards.owned_numel / shards.total_numel, "stayed_normal": stayed_normal,
        "total": shards.total_numel == sum(p.numel() for p in whole.parameters()), "gathered": gathered,
        "unit": max(layer, outside) / shards.total_numel, "scale": scale.item(), "stack": _stack_depth(),
        "sidecars": [p.sum().item() for p in mine.sidecars.parameters()],
    }  # fmt: skip


def single(folder: str) -> dict[str, Any]:
    """Stage 3 in a lone process, with no process group and none of a launcher's variables."""
    config = BackboneConfig(name=folder, dtype="bfloat16")
    sharded, shards = load_backbone(config, stage=3)
    whole, _ = load_backbone(config, stage=0)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        equal = torch.equal(sharded(input_ids=tokens).logits, whole(input_ids=tokens).logits)
    try:
        load_backbone(config.model_copy(update={"dtype": "float16"}), stage=3)
        refusal = ""
    except ConfigError as error:
        refusal = str(error)
    try:
        load_backbone(BackboneConfig(name=folder + "-missing"), stage=3)
        missing = ""
    except DataError as error:
        missing = str(error)
    after, _ = load_backbone(config, stage=0)
    return {
        "equal": equal, "dtype": str(whole.dtype), "buffers": sorted({str(b.dtype) for b in sharded.buffers()}),
        "resident": shards.resident_numel() / shards.total_numel, "same": replicate(sharded) is sharded,
        "refusal": refusal, "missing": missing, "after": all(p.numel() for p in after.parameters()),
        "mlflow": "mlflow" in sys.modules,
    }  # fmt: skip


def experts(folder: str) -> dict[str, Any]:
    """Stage 3 in a lone process, of experts that have tensors of their own in the files: which differ from no shards."""
    config = BackboneConfig(name=folder, dtype="float32")
    whole, _ = load_backbone(config, stage=0)
    sharded, shards = load_backbone(config, stage=3)
    differing, expected = [], dict(whole.named_parameters())
    for name, parameter in sharded.named_parameters():
        with shards.gathered(parameter):
            if not torch.equal(parameter, expected.pop(name)):
                differing.append(name)
    return {"differing": [*differing, *expected]}


def files(folder: str) -> dict[str, Any]:
    """Stage 3 in a lone process as a file says it, against no shards; or the line that refuses the file."""
    config = BackboneConfig(name=folder)
    tokens = torch.randint(0, VOCAB, (2, SEGMENT), generator=torch.Generator().manual_seed(0))
    whole, unsplit = load_backbone(config, stage=0)
    expected_loss, expected = _step(WithSidecars(whole, seed=0), unsplit, tokens, "f", False)
    typo = Path(folder, "typo.json")
    typo.write_text('{"zero_optimization": {"stage": 3, "stage3_typo": 0}}')
    found: dict[str, Any] = {}
    for path in (DEEPSPEED / "zero3.json", DEEPSPEED / "zero3_cpu_offload.json", typo):
        try:
            sharded, shards = load_backbone(config, stage=3, deepspeed_file=str(path))
        except ConfigError as error:
            found[path.stem] = str(error)
            continue
        with torch.no_grad():
            equal = torch.equal(sharded(input_ids=tokens).logits, whole(input_ids=tokens).logits)
        loss, grads = _step(WithSidecars(sharded, seed=0), shards, tokens, "f", False)
        error = max(((a - b).norm() / b.norm()).item() for a, b in zip(grads, expected, strict=True))
        found[path.stem] = {"equal": equal, "loss": loss, "expected_loss": expected_loss, "error": error}
    return found


def _stack_depth() -> int:
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    return len(FWD_MODULE_STACK)


if __name__ == "__main__":
    torch.set_num_threads(1)
    scene, model, out = sys.argv[1:]
    scenes = {"pair": pair, "told": told, "single": single, "experts": experts, "files": files}
    Path(out).write_text(json.dumps(scenes[scene](model)))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
