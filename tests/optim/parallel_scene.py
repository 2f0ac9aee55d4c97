"""One of some data-parallel workers that train a small network with APOLLO; run by test_apollo.py in fresh processes."""

from __future__ import annotations

import os

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cortex_core.optim.apollo import Apollo
from cortex_core.optim.scaling import ScaleType

STEPS, ROWS = 12, 8


def trajectories() -> list[list[list[float]]]:
    """All weights after every step, in one row each, of APOLLO and of APOLLO-Mini."""
    torch.set_num_threads(1)
    world, place = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world > 1:
        torch.distributed.init_process_group("gloo")
    found = [_trajectory(scale_type, rank, place, world) for scale_type, rank in (("channel", 3), ("tensor", 1))]
    if world > 1:
        torch.distributed.barrier()  # nobody leaves while another still listens
        torch.distributed.destroy_process_group()
    return found


def _trajectory(scale_type: ScaleType, rank: int, place: int, world: int) -> list[list[float]]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 5))
    optimizer = Apollo(network.named_parameters(), 0.05, rank, scale_type, update_proj_gap=5, seed=3)
    replica = DistributedDataParallel(network) if world > 1 else network
    torch.manual_seed(place)  # what a worker draws for itself must not matter
    rows = []
    for step in range(STEPS):
        batch = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(step)).chunk(world)[place]
        optimizer.zero_grad()
        (replica(batch) - batch[:, :5].sin()).square().mean().backward()
        optimizer.step()
        torch.rand(place + 1)
        rows.append(torch.cat([p.detach().flatten() for p in network.parameters()]).tolist())
    return rows
