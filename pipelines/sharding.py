"""Lays the frozen backbone out over the workers: whole on each (stage 0), or split between them (stage 3).

DeepSpeed ZeRO-3 holds the frozen weights and nothing else: no optimizer, no engine step, no ZeRO checkpoint. The
sidecars stay ordinary parameters, kept in step by DDP (`replicate`).
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from cortex_core.backbone import load
from cortex_core.backbone.attach import chosen_layers
from cortex_core.backbone.load_parts import part_by_part
from cortex_core.backbone.shape import decoder_layers
from cortex_core.config import BackboneConfig, FastWeightsConfig
from cortex_core.errors import ConfigError
from pipelines import zero3
from pipelines.residency import Peak, Residency

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Shards:
    """This rank's part of the frozen weights. Keep it as long as the model is used."""

    def __init__(self, model: PreTrainedModel, engine: Any = None) -> None:
        parameters = list(model.parameters())
        self.total_numel = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
        """Elements of the whole backbone."""
        self.owned_numel = sum(getattr(p, "ds_tensor", p).numel() for p in parameters)
        """Elements that rest on this rank, padding included: the parts of a tensor are equally long."""
        self._engine = engine  # takes its hooks along when it is garbage collected
        self._residency = Residency(model, decoder_layers(model), engine.optimizer) if engine else None

    def release(self) -> None:
        """Call after every backward pass: lets go what is still gathered. Without shards it does nothing."""
        if self._residency is not None:
            self._residency.release()

    def resident_numel(self) -> int:
        """Frozen elements in this rank's memory now: its own shard, and what is gathered at the moment."""
        return self.owned_numel + (self._residency.gathered_numel() if self._residency is not None else 0)

    def watch(self) -> AbstractContextManager[Peak]:
        """Measures within the block, after every gather. Costs a walk over all parameters each time."""
        if self._residency is None:
            return nullcontext(Peak(self.total_numel, self.total_numel))
        return self._residency.watch(self.owned_numel)

    def gathered(self, parameter: nn.Parameter) -> AbstractContextManager[Any]:
        """Makes a parameter whole for reading; every rank enters together. Without shards it does nothing."""
        if not hasattr(parameter, "ds_id"):
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters([parameter])


def load_backbone(
    backbone: BackboneConfig,
    *,
    stage: int,
    micro_batch: int = 1,
    offload: Literal["none", "cpu"] = "none",
    deepspeed_file: str | None = None,
    memory: FastWeightsConfig | None = None,
) -> tuple[PreTrainedModel, Shards]:
    """The frozen backbone on this worker's device, and this rank's share of it.

    Stage 0 loads it whole. Stage 3 loads it split over the process group; without one it makes one of a
    single process. Every rank must call this together, and from then on every rank must make the same
    sequence of calls to the model. `memory` tells which layers will carry one: the others are gathered as a whole,
    without a look at each module in them.

    Raises DataError, IncompatibleError: as `cortex_core.backbone.load.load_backbone`; ConfigError: a type
    that this machine cannot compute in; both as `pipelines.zero3.read` and where DeepSpeed refuses the file.
    """
    if stage == 0:
        with _no_progress_bars():
            model = load.load_backbone(backbone).to(_device())  # type: ignore[arg-type]
        return model, Shards(model)
    deepspeed = _quiet_deepspeed()
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    dtype = _weights_dtype(backbone)
    if dtype == "float16" and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
        raise ConfigError(
            "backbone.dtype = float16: sharded weights of this type need a GPU. "
            "Set backbone.dtype=bfloat16 (or float32), or sharding.stage=0"
        )
    config = zero3.settings(
        dtype=dtype, micro_batch=micro_batch, offload=offload, pin_memory=torch.cuda.is_available(), file=deepspeed_file
    )
    if deepspeed_file is not None:
        _check_with_deepspeed(config, deepspeed_file)
    active = HfDeepSpeedConfig(config)  # transformers shards while this is alive
    try:
        with _no_progress_bars(), part_by_part():
            model = load.load_backbone(backbone.model_copy(update={"dtype": dtype}))
    finally:
        unset_hf_deepspeed_config()
        del active
    if memory is not None:
        layers = decoder_layers(model)
        for number in set(range(len(layers))) - {*chosen_layers(memory, len(layers))}:
            # Gradients reach such a layer through its output alone: hooks of the modules below would only cost time.
            layers[number]._z3_leaf = True  # type: ignore[assignment]
    engine, *_ = deepspeed.initialize(model=model, config=config)
    functional.linear = frozen_linear
    return model.eval(), Shards(model, engine)


def replicate(module: nn.Module) -> nn.Module:
    """Keep the trainable parameters below `module` equal on all ranks; the frozen ones are not touched.

    With one process (or no process group) the module itself. Otherwise DDP, with its defaults but one:
    buffers are broadcast once, at the start, not at every forward, for sidecars do not change theirs while
    they run. `find_unused_parameters` stays off: it walks the graph of the whole backbone at every step to
    forgive a sidecar that got no gradient, which is a fault that should be heard of. `static_graph` stays
    off: the number of backbone calls changes from step to step. `gradient_as_bucket_view` stays off: sidecars
    are too small for it to save anything.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return module
    ignored = [n for n, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad]
    for prefix, part in module.named_modules(remove_duplicate=False):
        if not any(p.requires_grad for p in part.parameters()):
            ignored += [f"{prefix}.{n}" if prefix else n for n, _ in part.named_buffers(recurse=False)]
    module._ddp_params_and_buffers_to_ignore = ignored  # type: ignore[assignment]
    return DistributedDataParallel(module, forward_sync_buffers=False)


_linear = functional.linear


class _FrozenLinear(torch.autograd.Function):
    """A linear map that takes no gradient: holds its weight, not the data, which may be let go until the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return _linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].matmul(ctx.weight.to(grads[0].dtype)), None, None


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, which would keep gathered weights in memory between forward and backward."""
    if weight.requires_grad or not (torch.is_grad_enabled() and x.requires_grad):
        return _linear(x, weight, bias)
    return _FrozenLinear.apply(x, weight, bias)  # type: ignore[return-value]


def _weights_dtype(backbone: BackboneConfig) -> str:
    """What `auto` will be: memory for the shards is laid out before the checkpoint is read."""
    if backbone.dtype == "fast":
        return load.fast_dtype()
    if backbone.dtype != "auto":
        return backbone.dtype
    from transformers import AutoConfig

    try:
        described = AutoConfig.from_pretrained(load.resolve_name(backbone.name), revision=backbone.revision)
    except (OSError, ValueError, KeyError):
        return "float32"  # loading will refuse the same model, with a better message
    return str(described.get_text_config().dtype or torch.float32).removeprefix("torch.")


def _check_with_deepspeed(config: dict[str, Any], file: str) -> None:
    """Keys that DeepSpeed does not know, and what it would have to compile for them here but cannot."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    what = f'sharding.deepspeed = "{file}"'
    try:
        checked = DeepSpeedConfig(config).zero_config
    except Exception as error:  # pydantic's, DeepSpeed's own, assertions
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(error).partition("\n")[0]
        raise ConfigError(f"{what}: DeepSpeed refuses it ({reason}). Correct the file, or leave it out") from error
    device = checked.offload_param.device if checked.offload_param is not None else None
    if device == "nvme" and not _nvme_can_be_read():
        raise ConfigError(
            f"{what}: zero_optimization.offload_param.device = nvme needs libaio with its headers, a C++ compiler and, "
            "beside a GPU, the CUDA toolkit on every worker. Install them (on Debian or Ubuntu: libaio-dev g++), or "
            "set the device to cpu"
        )


def _nvme_can_be_read() -> bool:
    """Whether DeepSpeed could compile here what it reads a disk with; it does so on first use."""
    from deepspeed.ops.op_builder import AsyncIOBuilder  # type: ignore[attr-defined]
    from torch.utils import cpp_extension

    return AsyncIOBuilder().is_compatible() and (cpp_extension.CUDA_HOME is not None or not torch.cuda.is_available())


def _quiet_deepspeed() -> Any:
    """DeepSpeed, with a process group, without a compiler run and without its console output."""
    if _device().type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Each gather of torch 2.13 goes through a function that it deprecates.
    deprecated = r".*(all_gather_into_tensor|reduce_scatter_tensor)"
    warnings.filterwarnings("ignore", message=deprecated, category=FutureWarning)
    with _absent("mlflow"):
        import deepspeed
        import deepspeed.ops

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # Compiled on first use (35 s) for a collective of inference kernels that is never called here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        backend = "gloo" if _device().type == "cpu" else "nccl"
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed looks nowhere else; Ray Train sets it
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return deepspeed


@contextmanager
def _absent(package: str) -> Iterator[None]:
    """Meanwhile the package cannot be imported: DeepSpeed takes MLflow in for its tuner if it finds it, which no worker
    needs and which takes as long as the rest of DeepSpeed."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _device() -> torch.device:
    """Where this worker computes: on the device that Ray Train has chosen, if the workers talk over NCCL."""
    gpu = "nccl" in dist.get_backend() if dist.is_initialized() else torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
