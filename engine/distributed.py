"""Rank facts and collectives. Answers rank 0 of 1 without torchrun; NCCL on CUDA, gloo on CPU."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

CPU = torch.device("cpu")


@dataclass(frozen=True)
class World:
    """This process's place in the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = CPU

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init_world(device: str | None = None, timeout_s: float = 1800.0) -> World:
    """Join the process group that torchrun announces; a single process needs none.

    `device` is "cpu", "cuda" or None for CUDA where there is one.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    target = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(target)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(device=target)
    if not dist.is_initialized():
        backend = "nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return World(dist.get_rank(), dist.get_world_size(), local_rank, target)


def close_world() -> None:
    """Leave the process group, after a clean end only: a rank that failed must not wait for the others."""
    if dist.is_initialized():
        dist.destroy_process_group()


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of `values` over all ranks, on all ranks."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value`, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gather_rows(values: Tensor) -> Tensor:
    """Concatenate equally shaped `values` (B, ...) of all ranks in rank order."""
    if not dist.is_initialized():
        return values
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def data_parallel(model: nn.Module, world: World) -> nn.Module:
    """`model` under DistributedDataParallel where there are several ranks, else itself."""
    if world.size == 1:
        return model
    device_ids = [world.device] if world.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(
        model, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True
    )
