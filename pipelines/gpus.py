"""GPUs that a cluster can be planned with, by name, as their makers describe them. No torch: help lists them.

Sources. Memory: what `nvidia-smi` shows, in MiB. The rest, NVIDIA's public documents: "H100 Tensor Core GPU Datasheet"
(SXM5), "H200 Tensor Core GPU Datasheet" (SXM), "A100 Tensor Core GPU Datasheet" (SXM4, 40 and 80 GB), "L40S GPU
Datasheet", and, for the RTX 4090, "NVIDIA Ada GPU Architecture" (whitepaper, appendix A). TFLOP/s are dense, without
sparsity, with sums in float32: bfloat16 on tensor cores, float32 outside of them, as torch multiplies unless told
otherwise. Links are one direction: half of what the documents give for NVLink (900 and 600 GB/s), and of PCIe 4.0 x16
(64 GB/s), which is also what a host's memory is read through (PCIe 5.0 x16, 128 GB/s, for H100 and H200).
"""

from __future__ import annotations

from typing import NamedTuple

MIB = 1 << 20


class Gpu(NamedTuple):
    """What one GPU can do at most."""

    memory_bytes: float
    bfloat16_tflops: float
    float32_tflops: float
    memory_gb_s: float
    """Its own memory, read or written."""
    link_gb_s: float
    """To the other GPUs of its node, one direction."""
    host_gb_s: float
    """From the memory of its node, one direction."""


GPUS = {
    "h100": Gpu(81559 * MIB, 989.4, 66.9, 3350.0, 450.0, 64.0),
    "h200": Gpu(143771 * MIB, 989.4, 66.9, 4800.0, 450.0, 64.0),
    "a100-80": Gpu(81920 * MIB, 312.0, 19.5, 2039.0, 300.0, 32.0),
    "a100-40": Gpu(40960 * MIB, 312.0, 19.5, 1555.0, 300.0, 32.0),
    "l40s": Gpu(46068 * MIB, 362.05, 91.6, 864.0, 32.0, 32.0),
    "rtx4090": Gpu(24564 * MIB, 165.2, 82.6, 1008.0, 32.0, 32.0),
}


class Hardware(NamedTuple):
    """The cluster that a run is planned for, and how much of it a run gets out."""

    gpu: Gpu
    nodes: int
    gpus_per_node: int
    network_gbit_s: float
    """Of one node, one direction, all its cards together."""
    flops_share: float
    """Share of the GPU's TFLOP/s that a step achieves (model FLOP utilisation)."""
    bandwidth_share: float
    """Share of every bandwidth that transfers achieve."""
    context_bytes: float
    """Taken on every GPU before anything is loaded: CUDA context, NCCL's and cuBLAS's buffers."""
    margin_frac: float
    """What the allocator loses between blocks, as a share of what it is asked for."""

    @property
    def workers(self) -> int:
        return self.nodes * self.gpus_per_node
