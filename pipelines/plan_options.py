"""The command line of `cortex plan`. Apart from `pipelines.plan`, so that help comes without what that imports."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cortex_core.errors import ConfigError
from pipelines.cli import Parser
from pipelines.gpus import GPUS, Gpu, Hardware

if TYPE_CHECKING:
    from pipelines.config import RunConfig

EPILOG = f"""\
Nothing is loaded: the backbone is built without its weights, and one training step is rehearsed on tensors
that have sizes only. backbone.name may be a folder that holds config.json alone. docs/plan.md says what is
counted.

Workers: with --nodes or --gpus-per-node their product (1 and 8 unless given), one for each GPU, in the place
of cluster.num_workers; without either, cluster.num_workers GPUs of one node.

GPUs: {", ".join(GPUS)}.
For others give --memory-gib, --tflops and --link-gb-s, which also correct a named one.

Examples:
  cortex plan demo backbone.name=meta-llama/Llama-3.1-8B --gpus-per-node 1
  cortex plan demo backbone.name=Qwen/Qwen3-30B-A3B --gpu h200 --nodes 2 --gpus-per-node 2
  cortex plan demo backbone.name=shapes/70b --gpu rtx4090 --gpus-per-node 4 sharding.offload=cpu --json

Exit codes: 0 it fits, 1 it does not, 2 wrong input.
"""
DEFAULT_GPU, DEFAULT_NETWORK_GBIT_S, DEFAULT_GPUS_PER_NODE = "h100", 400.0, 8
DEFAULT_FLOPS_SHARE, DEFAULT_BANDWIDTH_SHARE = 0.4, 0.7
DEFAULT_CONTEXT_GIB, DEFAULT_MARGIN_FRAC = 1.5, 0.1


def main(arguments: Sequence[str]) -> int:
    """Run `cortex plan`. Raises ConfigError, DataError, IncompatibleError for wrong input."""
    given = _parser().parse_intermixed_args(arguments)

    from pipelines.config import load_config, located
    from pipelines.preflight import check_against_backbone

    workers = workers_of(given)
    shaped = [] if workers is None else [f"cluster.num_workers={workers}", "cluster.min_workers=null"]
    config = load_config(given.recipe, [*given.overrides, *shaped])
    hardware = hardware_of(given, config.cluster.num_workers)
    check_against_backbone(config, whole=False)
    check_disk(located(config), given.host_gb_s)
    from pipelines import plan

    return plan.run(located(config), hardware, as_json=given.json)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "cortex plan", usage="cortex plan RECIPE [KEY=VALUE ...] [options]", epilog=EPILOG, allow_abbrev=False,
        description="Say whether a run fits a cluster of GPUs, and how long a step takes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("recipe", metavar="RECIPE", help="a TOML file, or the name of one that ships")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="settings that differ this time")
    shape = parser.add_argument_group("the cluster")
    for name, kind, metavar, text in (
        ("--nodes", _count, "N", "machines [1]"),
        ("--gpus-per-node", _count, "N", f"GPUs in each [{DEFAULT_GPUS_PER_NODE}]"),
        ("--gpu", str, "NAME", f"see below [{DEFAULT_GPU}]"),
        ("--network-gbit-s", _positive, "X", f"of a node to the others, one direction [{DEFAULT_NETWORK_GBIT_S:g}]"),
    ):
        shape.add_argument(name, type=kind, metavar=metavar, help=text)
    own = parser.add_argument_group("figures of a GPU of your own")
    for name, text in (
        ("--memory-gib", "memory of a GPU, GiB"),
        ("--tflops", "dense TFLOP/s of the type that is computed in"),
        ("--memory-gb-s", "bandwidth of its memory, GB/s"),
        ("--link-gb-s", "to the other GPUs of the node, one direction, GB/s"),
        ("--host-gb-s", "from the memory of the node, or its disk, for offloaded weights, GB/s"),
    ):
        own.add_argument(name, type=_positive, metavar="X", help=text)
    rest = parser.add_argument_group("assumptions")
    for name, kind, default, text in (
        ("--mfu", _share, DEFAULT_FLOPS_SHARE, "share of the TFLOP/s that a step achieves"),
        ("--bandwidth-share", _share, DEFAULT_BANDWIDTH_SHARE, "share of every bandwidth that transfers achieve"),
        ("--context-gib", _number, DEFAULT_CONTEXT_GIB, "CUDA context and communication buffers, GiB"),
        ("--margin", _number, DEFAULT_MARGIN_FRAC, "lost by the allocator, as a share of the rest"),
    ):
        rest.add_argument(name, type=kind, default=default, metavar="X", help=f"{text} [{default:g}]")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    return parser


def check_disk(config: RunConfig, host_gb_s: float | None) -> None:
    """How fast a disk is no list tells. Raises ConfigError where it has to be said, DataError for a file not there."""
    from pipelines.zero3 import offload_of

    if offload_of(config.sharding) == "nvme" and host_gb_s is None:
        raise ConfigError(
            f'sharding.deepspeed = "{config.sharding.deepspeed}": weights rest on a disk, whose speed is not known. '
            "Give --host-gb-s, the GB/s that each GPU gets from it, or set offload_param.device to cpu in the file"
        )


def workers_of(given: argparse.Namespace) -> int | None:
    """Workers that the options ask for; None where they leave that to the recipe."""
    if given.nodes is None and given.gpus_per_node is None:
        return None
    return (given.nodes or 1) * (given.gpus_per_node or DEFAULT_GPUS_PER_NODE)


def hardware_of(given: argparse.Namespace, num_workers: int) -> Hardware:
    """The cluster of `num_workers` GPUs, at least one. Raises ConfigError for a GPU that is not known."""
    name = given.gpu or DEFAULT_GPU
    if name not in GPUS:
        from pipelines.explain import nearest

        hint = nearest(name, GPUS)
        raise ConfigError(
            f"--gpu {name}: no such GPU. There are {', '.join(GPUS)}"
            + (f"; did you mean {hint}?" if hint else "")
            + ". For another, give --memory-gib, --tflops and --link-gb-s"
        )
    gpu, nodes = _corrected(GPUS[name], given), given.nodes or 1
    context = given.context_gib * 2**30
    if context >= gpu.memory_bytes:
        raise ConfigError(
            f"--context-gib {given.context_gib:g}: must be below {gpu.memory_bytes / 2**30:.4g}, the memory of the "
            "GPU. Lower it, or raise --memory-gib"
        )
    return Hardware(
        gpu, nodes, max(num_workers, 1) // nodes, given.network_gbit_s or DEFAULT_NETWORK_GBIT_S, given.mfu,
        given.bandwidth_share, context, given.margin,
    )  # fmt: skip


def _corrected(gpu: Gpu, given: argparse.Namespace) -> Gpu:
    own = {
        "memory_bytes": given.memory_gib and given.memory_gib * 2**30,
        "bfloat16_tflops": given.tflops,
        "float32_tflops": given.tflops,
        "memory_gb_s": given.memory_gb_s,
        "link_gb_s": given.link_gb_s,
        "host_gb_s": given.host_gb_s,
    }
    return gpu._replace(**{name: value for name, value in own.items() if value is not None})


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100_000:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 1 to 100000")
    return int(text)


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0.0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number, at least 0")
    return number


def _positive(text: str) -> float:
    if not (number := _number(text)):
        raise argparse.ArgumentTypeError(f"{text!r} must be above 0")
    return number


def _share(text: str) -> float:
    if (number := _positive(text)) > 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} must be at most 1")
    return number
