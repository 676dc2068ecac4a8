"""Which rank of how many this process is, from the environment: as torchrun writes it, or as Slurm and MPI do.

Rank, world size and gathering that work with and without a process group.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lavis_mafa.errors import RankLost, UserError

PORT = 29500  # torchrun's own
HOW = "torchrun --nproc_per_node=GPUS -m lavis_mafa train --cfg-path YAML"


@dataclass(frozen=True)
class Launcher:
    """How a launcher that knows nothing of PyTorch numbers its processes."""

    name: str
    rank: str
    world_size: tuple[str, ...]  # the first one that is set counts
    local_rank: str
    local_size: str

    @property
    def size(self) -> int:
        return next((number for name in self.world_size if (number := _number(name, 1)) is not None), 1)


LAUNCHERS = (
    # of a step's own number of tasks: `srun --pty bash` in a job of eight starts one
    Launcher("srun", "SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    Launcher("mpirun", "OMPI_COMM_WORLD_RANK", ("OMPI_COMM_WORLD_SIZE",), "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    Launcher("mpirun", "PMI_RANK", ("PMI_SIZE",), "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


def is_one_of_several(url: str = "env://") -> bool:
    """Look at the environment, and write into it what PyTorch reads: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.

    What torchrun or the user set stays. A single process that only says so (RANK=0 WORLD_SIZE=1, which clusters export) is none.

    Args:
        url: ``run.dist_url``; with another than ``env://`` nobody needs MASTER_ADDR.

    Raises:
        UserError: numbers that are none or do not fit, or nobody knows where rank 0 is.
    """
    environment, by_name = os.environ, url == "env://"
    launcher, rank, size = _place()
    local = _number("LOCAL_RANK", 0)
    if (rank or 0) >= (size or 1) or (rank is None and (size or 1) > 1):
        shown = ["not set" if number is None else number for number in (rank, size)]
        raise UserError(
            f"RANK is {shown[0]} and WORLD_SIZE {shown[1]} in the environment, but ranks count from 0 to WORLD_SIZE - 1. "
            f"`{HOW}` sets both; for a single process unset them."
        )
    if size is None or rank is None or (size == 1 and by_name and not environment.get("MASTER_ADDR")):
        return False
    numbered = "RANK" in environment and "WORLD_SIZE" in environment
    if launcher is not None and local is None and (local := _number(launcher.local_rank, 0)) is not None:
        environment["LOCAL_RANK"] = str(local)
    if by_name:
        environment["MASTER_ADDR"] = environment.get("MASTER_ADDR") or _address(launcher, rank, size)
        port = environment["MASTER_PORT"] = environment.get("MASTER_PORT") or str(_port(launcher))
        if not port.isdecimal() or not 0 < int(port) < 65536:
            raise UserError(f"MASTER_PORT is {port!r} in the environment; allowed: a number from 1 to 65535, such as {PORT}.")
    environment["RANK"], environment["WORLD_SIZE"] = str(rank), str(size)
    if launcher is not None and not numbered and rank == 0:
        place = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}" if by_name else url
        print(
            f"lavis-mafa: this is rank 0 of the {size} tasks that {launcher.name} says there are; waiting for the others at {place}. "
            "(In a batch script every task is started by `srun lavis-mafa ...`; RANK=0 WORLD_SIZE=1 in the environment trains alone.)",
            file=sys.stderr,
        )
    return True


def rank_and_size() -> tuple[int, int]:
    """The same two numbers for a command that runs in one process alone, which writes nothing and waits for nobody."""
    _, rank, size = _place()
    return rank or 0, size or 1


def _place() -> tuple[Launcher | None, int | None, int | None]:
    """What started this process beside others, if it is none of PyTorch's; rank and world size, its own where PyTorch's are not set."""
    launcher = next((one for one in LAUNCHERS if one.rank in os.environ and one.size > 1), None)
    rank, size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if launcher is not None and (rank is None or size is None):
        rank, size = _number(launcher.rank, 0), launcher.size
    return launcher, rank, size


def _number(name: str, least: int) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not re.fullmatch(r"\d+", text.strip(), re.ASCII) or int(text) < least:
        raise UserError(f"{name} is {text!r} in the environment; allowed: a whole number from {least}, or unset it. `{HOW}` sets it.")
    return int(text)


def _address(launcher: Launcher | None, rank: int, size: int) -> str:
    """Of rank 0's machine."""
    slurm, get = launcher is LAUNCHERS[0], os.environ.get
    if slurm and get("SLURM_STEP_NUM_NODES", get("SLURM_NNODES")) == "1":
        return "127.0.0.1"
    if slurm and (nodes := get("SLURM_STEP_NODELIST") or get("SLURM_JOB_NODELIST") or get("SLURM_NODELIST")):
        return first_node(nodes)
    if launcher is not None and get(launcher.local_size) == str(size):
        return "127.0.0.1"
    started = f"{launcher.name} started {size} processes" if launcher else f"RANK is {rank} and WORLD_SIZE {size} in the environment"
    raise UserError(
        f"{started}, but MASTER_ADDR is not set, so that they cannot find each other. Set it to rank 0's machine (and MASTER_PORT), "
        f"or start with `{HOW}`; for a single process unset RANK and WORLD_SIZE, or start one task."
    )


def first_node(nodes: str) -> str:
    """The first of Slurm's list of nodes.

    Example:
        >>> first_node("gpu[003-006,010]-ib,cpu1")
        'gpu003-ib'
    """
    first = re.match(r"(?:[^\[,]|\[[^\]]*\])*", nodes.strip()).group()  # type: ignore[union-attr]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def _port(launcher: Launcher | None) -> int:
    """The same on all ranks, and most likely another one for each of Slurm's jobs and steps on a machine."""
    job, step = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_STEP_ID", "0")
    if launcher is not LAUNCHERS[0] or not job.isdecimal() or not step.isdecimal():
        return PORT
    return 20_000 + (int(job) + 101 * int(step)) % 10_000


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
    global _timeout
    url = run.get("dist_url", "env://")
    run.distributed = is_one_of_several(url)
    if not run.distributed:
        return
    run.rank, run.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpu = str(run.get("device", "cuda")).startswith("cuda") and torch.cuda.is_available()
    run.gpu = own_gpu(run.rank, torch.cuda.device_count()) if on_gpu else int(os.environ.get("LOCAL_RANK", 0))
    run.dist_backend = "nccl" if on_gpu else "gloo"
    if on_gpu:
        torch.cuda.set_device(run.gpu)
    from torch.distributed.rendezvous import rendezvous  # not in every build of torch

    # The watchdog knows names and speaks first. This ends what it takes for work: a rank that is busy without end.
    timeout = _timeout = datetime.timedelta(minutes=2 * rank_timeout_minutes(run) + 1)
    try:
        store, _, _ = next(rendezvous(url, run.rank, run.world_size, timeout=timeout))
        check_backends(store, run.rank, run.world_size, run.dist_backend)
        dist.init_process_group(run.dist_backend, init_method=url, world_size=run.world_size, rank=run.rank, timeout=timeout)
        dist.barrier()
    except dist.DistError as error:
        came = f"rank {run.rank} of {run.world_size} waited up to {timeout} h for the others, but not all came"
        raise RankLost(f"{came}: {error}") from error


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


def gather_rows(rows: Tensor, group: Any) -> list[Tensor]:
    """[n] of each rank, of any lengths and one type, in rank order; ``group`` is a :func:`host_group`.

    Every rank's rows go from its memory into that of the others: nothing is padded, pickled or held on a GPU, as
    :func:`gather_objects` would do.
    """
    if world_size() == 1:
        return [rows]
    lengths = torch.zeros(world_size(), dtype=torch.long)
    lengths[rank()] = len(rows)
    dist.all_reduce(lengths, group=group)
    lists = [rows.contiguous() if r == rank() else rows.new_empty(length) for r, length in enumerate(lengths.tolist())]
    for source, of_source in enumerate(lists):
        if len(of_source):
            dist.broadcast(of_source, src=source, group=group)
    return lists


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


def gather_words(ids: Tensor, mask: Tensor, padding: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """LongTensor[B, T], BoolTensor[B, T] of each rank's host -> all ranks' [W*B, longest], own rows first, on the host."""
    if world_size() == 1:
        return ids, mask
    more = largest(ids.shape[1], device) - ids.shape[1]
    both = torch.stack([F.pad(ids, (0, more), value=padding), F.pad(mask, (0, more)).long()], dim=1)
    ids, mask = gather_own_first(both.to(device)).cpu().unbind(dim=1)
    return ids, mask.bool()


def largest(value: int, device: torch.device) -> int:
    """The largest of the ranks' values."""
    if world_size() == 1:
        return value
    box = torch.tensor([value], device=device)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return int(box)
