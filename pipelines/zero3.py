"""What DeepSpeed is told: ZeRO-3 for the frozen weights and nothing else, from the settings or from a user's file.

Nothing here imports torch or DeepSpeed: a file that cannot work is refused before they are.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any, Literal

from cortex_core.errors import ConfigError, DataError
from pipelines.config import ShardingConfig

STAGE_3: dict[str, Any] = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,  # no weight stays gathered, however small
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_reuse_distance": 0,
    "memory_efficient_linear": False,  # `frozen_linear` is, and does no more than frozen weights need
}
"""What holds where neither a setting nor a file says otherwise: the least memory."""
NOT_IN_A_FILE = {
    "optimizer": "optimizer.*",
    "scheduler": "optimizer.*",
    "gradient_clipping": "optimizer.clip_norm",
    "fp16": "backbone.dtype",
    "bf16": "backbone.dtype",
    "amp": "backbone.dtype",
    "torch_autocast": "backbone.dtype",
    "train_batch_size": "training.batch_size",
    "train_micro_batch_size_per_gpu": "training.batch_size",
    "gradient_accumulation_steps": "training.accumulation_steps",
    "steps_per_print": "training.report_every_steps",
    "zero_optimization.offload_optimizer": "optimizer.*",
}
"""Keys that Cortex answers for, and the settings that do it."""


def settings(
    *, dtype: str, micro_batch: int, offload: Literal["none", "cpu"], pin_memory: bool, file: str | None = None
) -> dict[str, Any]:
    """DeepSpeed's configuration for weights of this type.

    `file` stands in place of `offload`: what it says goes before `STAGE_3`, which holds for the rest and for `"auto"`.
    Raises as `read`.
    """
    given = {} if file is None else read(file)
    stage_3 = STAGE_3 | {k: v for k, v in given.pop("zero_optimization", {}).items() if v != "auto"}
    if offload == "cpu":
        stage_3["offload_param"] = {"device": "cpu", "pin_memory": pin_memory}
    return given | {
        "train_micro_batch_size_per_gpu": micro_batch,
        "steps_per_print": 2**31,
        "zero_optimization": stage_3,
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
    }


def offload_of(sharding: ShardingConfig) -> Literal["none", "cpu", "nvme"]:
    """Where shards rest between uses, by the setting or by the file. Raises as `read`."""
    if sharding.deepspeed is None:
        return sharding.offload
    given = read(sharding.deepspeed)["zero_optimization"].get("offload_param")
    device = given.get("device") if isinstance(given, dict) else None
    return device if device in ("cpu", "nvme") else "none"


def read(file: str) -> dict[str, Any]:
    """The content of `sharding.deepspeed`, checked for what can be known without DeepSpeed.

    Raises:
        DataError: the file is not there. Workers read it as well, so it says on which machine.
        ConfigError: it is not JSON, asks for something else than ZeRO-3, or for what Cortex sets.
    """
    what = f'sharding.deepspeed = "{file}"'
    try:
        given = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{what}: cannot be read on {socket.gethostname()} ({error.strerror}). Give a DeepSpeed configuration that "
            "every node sees under this path, or leave it out: sharding.deepspeed=null"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{what}: is not JSON ({error}). DeepSpeed's configurations are") from None
    zero = given.get("zero_optimization") if isinstance(given, dict) else None
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if not isinstance(zero, dict) or isinstance(stage, bool) or stage != 3:
        raise ConfigError(
            f"{what}: zero_optimization.stage = {json.dumps(stage)}: must be 3, which splits the backbone. Set it "
            "to 3 in the file, or leave the file out and set sharding.stage=0 to copy the backbone"
        )
    names = [*given, *(f"zero_optimization.{name}" for name in zero)]
    taken = {name: NOT_IN_A_FILE[name] for name in names if name in NOT_IN_A_FILE}
    if taken:
        raise ConfigError(
            f"{what}: {', '.join(taken)}: must not be in the file, for Cortex sets it. Take it out, and use "
            f"{', '.join(dict.fromkeys(taken.values()))} instead"
        )
    return given
