"""Ranks, collectives and shards. Without a launcher there is one rank; NCCL on CUDA, gloo on the CPU."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _set_pg_timeout

from common.checks import require

from .launchers import read_place

CPU = torch.device("cpu")
T = TypeVar("T")
MEET_S = 30.0  # for ranks to join, if started without torchrun
START_TIMEOUT_S = 600.0  # until the first step: ranks import, read data lists and compile at different speeds


@dataclass(frozen=True)
class World:
    """This process's place in the run."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init_world(device: str | None = None, timeout_s: float = 1800.0, backend: str | None = None) -> World:
    """Joins the launcher's process group, if there are several processes; returns this one's place.

    Args:
        device: "cpu", "cuda", or None for CUDA if available.
        timeout_s: of each collective; at least START_TIMEOUT_S until `set_timeout`.
        backend: None for NCCL on CUDA, gloo on the CPU.

    Raises: OSError if the other processes do not join; ValueError if the launcher's variables are wrong.
    """
    rank, size, local_rank = read_place(os.environ)
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    target = torch.device(kind)
    if kind == "cuda":
        target = torch.device(kind, select_gpu(local_rank, torch.cuda.device_count()))
        torch.cuda.set_device(target)
    if size == 1:
        return World(device=target)
    if not dist.is_initialized():
        backend = backend or ("nccl" if kind == "cuda" else "gloo")
        timeout = timedelta(seconds=max(timeout_s, START_TIMEOUT_S))
        dist.init_process_group(backend, store=meet(rank, size, timeout), rank=rank, world_size=size, timeout=timeout)
    return World(dist.get_rank(), dist.get_world_size(), target)


def select_gpu(local_rank: int, count: int) -> int:
    """Returns the index of this process's GPU: `local_rank`, or 0 where each task sees only its own GPU (srun)."""
    if count == 1 and not has_agent():
        return 0
    require(
        local_rank < count,
        f"LOCAL_RANK={local_rank}, but this process sees {count} GPU(s): start one process for each GPU.",
    )
    return local_rank


def has_agent() -> bool:
    """Returns whether torchrun started and supervises this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def meet(rank: int, size: int, timeout: timedelta) -> dist.Store:
    """Returns the process group's store. Without torchrun, every rank must join within MEET_S.

    A foreign server at the port may never answer, so torch's own timeout is not enough.
    """
    where = f"MASTER_ADDR:MASTER_PORT={os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    remedy = f"Start all {size} with the same command; if the port is in use, set another MASTER_PORT for all ranks."
    patience = timeout if has_agent() else timedelta(seconds=MEET_S)
    try:
        if not has_agent():
            socket.getaddrinfo(os.environ.get("MASTER_ADDR"), None)  # torch would retry for minutes
        found = call_within(None if has_agent() else 1.5 * MEET_S, open_store, patience)
        # torchrun's store outlives restarts: without its own prefix, a restart may find old addresses
        store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", found)
        if not has_agent():
            store.set(f"rank{rank}", "")
            store.wait([f"rank{each}" for each in range(size)], patience)
    except (dist.DistError, socket.gaierror, TimeoutError) as error:
        reason = (str(error) or "no answer").splitlines()[0].rstrip(".")
        raise OSError(f"rank {rank} of {size} cannot reach the others at {where}: {reason}. {remedy}") from None
    found.set_timeout(timeout)
    return store


def open_store(patience: timedelta) -> dist.Store:
    """Returns the store at MASTER_ADDR and MASTER_PORT."""
    store, _, _ = next(dist.rendezvous("env://", timeout=patience))
    return store


def call_within(seconds: float | None, function: Callable[..., T], *arguments: Any) -> T:
    """Returns `function(*arguments)`, called in a thread that does not keep a process alive; or raises TimeoutError."""
    result: Future[T] = Future()

    def call() -> None:
        try:
            result.set_result(function(*arguments))
        except Exception as error:
            result.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return result.result(seconds)


def set_timeout(timeout_s: float) -> None:
    """Sets the time after which a collective ends the run."""
    if dist.is_initialized():
        getattr(dist, "set_timeout", _set_pg_timeout)(timedelta(seconds=timeout_s))  # torch 2.11 has only the second


def close_world() -> None:
    """Leaves the process group. Do not call it after an error: a rank that failed must not wait for the others."""
    if dist.is_initialized():
        dist.destroy_process_group()


def reduce_over_ranks(values: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.MAX) -> Tensor:
    """Returns the maximum (or another reduction) of `values` over all ranks, on all ranks."""
    if dist.is_initialized():
        dist.all_reduce(values, operation)
    return values


def gather_objects(value: Any) -> list[Any]:
    """Returns `value` of every rank, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def require_same(facts: Mapping[str, Any], problem: str, remedy: str) -> None:
    """Raises ValueError, on every rank, for the first rank whose `facts` differ from those of rank 0. Collective."""
    everyone = gather_objects(dict(facts))
    for rank, own in enumerate(everyone):
        changes = [f"{key} {own[key]!r}, not {first!r}" for key, first in everyone[0].items() if own[key] != first]
        require(not changes, f"rank {rank} {problem} than rank 0 ({'; '.join(changes)}): {remedy}.")


def on_all(action: Callable[[], T]) -> list[T]:
    """Runs `action` on every rank; returns all results in rank order, or raises the first OSError or ValueError."""
    try:
        outcome: tuple[T | None, Exception | None] = action(), None
    except (OSError, ValueError) as error:
        outcome = None, error
    everyone = gather_objects(outcome)
    for _, failure in everyone:
        if failure is not None:
            raise failure
    return [result for result, _ in everyone]


def on_main(action: Callable[[], T]) -> T:
    """Runs `action` on rank 0; returns its result, or raises its OSError or ValueError, on every rank."""
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    return cast(T, on_all(action if is_main else lambda: None)[0])


def broadcast_object(value: Any) -> Any:
    """Returns rank 0's `value`, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Averages gradients over all ranks in place, as DDP does for the parameters of its network. Collective."""
    for parameter in parameters:
        if parameter.grad is not None and dist.is_initialized():
            reduce_over_ranks(parameter.grad, dist.ReduceOp.SUM).div_(dist.get_world_size())


# ---- shards: FSDP2 ---------------------------------------------------------------------------------


def shard(model: nn.Module, world: World, compute_dtype: torch.dtype | None = None) -> None:
    """Shards the parameters of `model` over all ranks in place: FSDP2, by block of `model.blocks`.

    Args:
        compute_dtype: of the gathered parameters; bf16 halves the traffic. Stored parameters and sums of
            gradients are not cast to it. Inputs are not cast: timesteps need their precision.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # slow to import, with all of sympy

    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32 if compute_dtype else None, cast_forward_inputs=False
    )
    mesh = dist.device_mesh.init_device_mesh(world.device.type, (world.size,))
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def reshard(model: nn.Module) -> None:
    """Frees the gathered parameters that the root group keeps after forward passes without a backward pass.

    Also clears the recorded order of these passes; else the next backward pass would prefetch in that order. Uses
    private attributes of torch 2.11.
    """
    state = model._get_fsdp_state()  # type: ignore[operator]
    if state._is_root is None:  # no forward has run yet
        return
    model.reshard()  # type: ignore[operator]
    state._comm_ctx.post_forward_order.clear()
    for each in state._state_ctx.all_states:
        if each._fsdp_param_group:
            each._fsdp_param_group._post_forward_indices.clear()


def is_shard(value: Tensor) -> bool:
    """Returns whether `value` is a DTensor, which only FSDP2 makes; torch.distributed.tensor is slow to import."""
    return hasattr(value, "full_tensor")


def gather_shards(tensors: Mapping[str, Tensor], *, copy: bool = False) -> dict[str, Tensor]:
    """Returns each tensor on the CPU, shards gathered; `copy`: copies CPU tensors too. Collective."""
    return {name: reduce_shards(value).detach().to(CPU, copy=copy) for name, value in tensors.items()}


def shards_like(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns `weights`, each on the device of the tensor of the same name in `own` and sharded like it.

    Weights with no tensor of the same name and shape in `own` are returned unchanged; the loader refuses them.
    """
    placed = dict(weights)
    for name, value in weights.items():
        like = own.get(name)
        if like is None or like.shape != value.shape:
            continue
        placed[name] = value.to(like.device)
        if is_shard(like):
            from torch.distributed.tensor import distribute_tensor  # slow to import

            placed[name] = distribute_tensor(placed[name], like.device_mesh, like.placements)  # type: ignore[attr-defined]
    return placed


def sync_gradients(model: nn.Module, *, last: bool) -> contextlib.AbstractContextManager:
    """Returns a context for a micro-step's backward pass; ranks exchange gradients in the `last` one only."""
    if hasattr(model, "set_requires_gradient_sync"):  # of FSDP2
        model.set_requires_gradient_sync(last)  # type: ignore[operator]
    if isinstance(model, nn.parallel.DistributedDataParallel) and not last:
        return model.no_sync()
    return contextlib.nullcontext()


def local_shard(value: Tensor) -> Tensor:
    """Returns the part of `value` that this rank holds."""
    return value.to_local() if is_shard(value) else value  # type: ignore[attr-defined]


def reduce_shards(value: Tensor) -> Tensor:
    """Returns the full `value` on every rank, gathered or reduced over its shards, if any."""
    return value.full_tensor() if is_shard(value) else value  # type: ignore[attr-defined]
