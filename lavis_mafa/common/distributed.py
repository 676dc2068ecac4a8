"""Rank, world size and gathering that work with and without a process group."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lavis_mafa.common.errors import RankLost, UserError
from lavis_mafa.common.launchers import is_one_of_several

_timeout = datetime.timedelta(minutes=61)  # of collectives; set with the process group


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def barrier() -> None:
    if is_distributed():
        dist.barrier()


def host_group() -> Any:
    """A gloo group of all ranks for what is not the training's; None for one process. Every rank makes the same ones in one order."""
    return dist.new_group(backend="gloo", timeout=_timeout) if is_distributed() else None


def rank_timeout_minutes(run: Any) -> float:
    """``run.rank_timeout_minutes`` of any task's ``run`` block."""
    return float(run.get("rank_timeout_minutes", 30.0))


def init_process_group(run: Any) -> None:
    """What LAVIS's ``init_distributed_mode`` does, with gloo where there is no GPU (LAVIS always asks for nccl), and Slurm's or MPI's
    numbers where those started the processes.

    Args:
        run: the ``run`` block; ``rank``, ``world_size``, ``gpu``, ``distributed`` and ``dist_backend`` are written into it.

    Raises:
        RankLost: some rank did not come.
        UserError: see :func:`check_backends`, :func:`is_one_of_several`, :func:`own_gpu`.
    """
    if not is_one_of_several(run.get("dist_url", "env://")):
        run.distributed = False
        return
    run.rank, run.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpu = str(run.get("device", "cuda")).startswith("cuda") and torch.cuda.is_available()
    run.gpu = own_gpu(run.rank, torch.cuda.device_count()) if on_gpu else int(os.environ.get("LOCAL_RANK", 0))
    run.distributed = True
    run.dist_backend = "nccl" if on_gpu else "gloo"
    if on_gpu:
        torch.cuda.set_device(run.gpu)
    from torch.distributed.rendezvous import rendezvous  # not in every build of torch

    # The watch of the ranks knows names and speaks first. This ends what it takes for work: a rank that is busy without end.
    global _timeout
    timeout = _timeout = datetime.timedelta(minutes=2 * rank_timeout_minutes(run) + 1)
    try:
        url = run.get("dist_url", "env://")
        store, _, _ = next(rendezvous(url, run.rank, run.world_size, timeout=timeout))
        check_backends(store, run.rank, run.world_size, run.dist_backend)
        dist.init_process_group(run.dist_backend, init_method=url, world_size=run.world_size, rank=run.rank, timeout=timeout)
        dist.barrier()
    except dist.DistError as error:
        raise RankLost(
            f"rank {run.rank} of {run.world_size} waited up to {timeout} h for the others, but not all came: {error}"
        ) from error


@contextlib.contextmanager
def group_of_one(wanted: bool) -> Iterator[None]:
    """Inside, a process without a process group has one of its own: LAVIS's models gather without looking whether there is any."""
    if not wanted or is_distributed():
        yield
        return
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)  # of gloo on the host, of nccl on a GPU
    try:
        yield
    finally:
        dist.destroy_process_group()


def own_gpu(rank: int, visible: int) -> int:
    """The GPU of this process: LOCAL_RANK's; where nobody counted the ranks of a machine, as if each used all of its GPUs.

    Raises:
        UserError: there are more ranks on this machine than GPUs.
    """
    local = int(os.environ.get("LOCAL_RANK", rank % visible))
    if visible == 1:  # of several: `srun --gpus-per-task=1` shows each task its own
        return 0
    if local >= visible:
        raise UserError(
            f"LOCAL_RANK is {local}, but {visible} GPUs are visible on {socket.gethostname()}; start at most {visible} processes there."
        )
    return local


def check_backends(store: dist.Store, rank: int, world_size: int, backend: str) -> None:
    """Before anything waits: gloo here and nccl there, as on a machine whose GPUs are not visible, would wait for each other.

    Args:
        store: where the ranks find each other. rank, world_size, backend: of this process.

    Raises:
        UserError: on rank 0 and on each rank that differs from it.
    """
    store = dist.PrefixStore(f"lavis_mafa/backend/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    store.set(str(rank), f"{backend} on rank {rank} ({socket.gethostname()})")
    asked = list(range(world_size)) if rank == 0 else [0, rank]
    everyone = [text.decode() for text in store.multi_get([str(r) for r in asked])]
    different = [text for text in everyone if text.split()[0] != everyone[0].split()[0]]
    if different:
        raise UserError(
            f"the ranks differ in how they talk: {everyone[0]}, {', '.join(different[:4])}. Is a GPU visible to each? "
            "nvidia-smi and CUDA_VISIBLE_DEVICES tell; run.device: cpu trains without."
        )


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in rank order."""
    if not is_distributed():
        return [value]
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value)
    return box


def gather_in_rank_order(tensor: Tensor) -> Tensor:
    """[B, ...] of each rank -> [W*B, ...], without gradient."""
    if world_size() == 1:
        return tensor.detach()
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def gather_own_first(tensor: Tensor, with_gradient: bool = False) -> Tensor:
    """[B, ...] of each rank -> [W*B, ...] where the own rows come first and the other ranks' follow in rank order.

    Own rows first keeps every index below B the batch's own, so that nothing downstream needs to know its rank.
    """
    if world_size() == 1:
        return tensor if with_gradient else tensor.detach()
    if with_gradient:
        from lavis.models.base_model import GatherLayer

        parts = list(GatherLayer.apply(tensor.contiguous()))
    else:
        parts = list(gather_in_rank_order(tensor).split(len(tensor)))
    return torch.cat([parts.pop(rank()), *parts])


def largest(value: int, device: torch.device) -> int:
    """The largest of the ranks' values."""
    if world_size() == 1:
        return value
    box = torch.tensor([value], device=device)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return int(box)
