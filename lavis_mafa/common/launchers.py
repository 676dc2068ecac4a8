"""Which rank of how many this process is, from the environment: as torchrun writes it, or as Slurm and MPI do."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass

from lavis_mafa.common.errors import UserError

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
    launcher = _launcher()
    asked = {name: _number(name, least) for name, least in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))}
    rank, size, local = asked.values()
    of_launcher = launcher is not None and (rank is None or size is None)
    if launcher is not None and of_launcher:
        rank, size = _number(launcher.rank, 0), _size(launcher)
    if (rank or 0) >= (size or 1):
        raise UserError(
            f"RANK is {rank} and WORLD_SIZE {'not set' if size is None else size} in the environment, but ranks count from 0 to "
            f"WORLD_SIZE - 1. `{HOW}` sets both; for a single process unset them."
        )
    if size is not None and size > 1 and rank is None:
        raise UserError(f"WORLD_SIZE is {size} in the environment, but RANK is not set. `{HOW}` sets both; else unset it.")
    if size is None or rank is None or (size == 1 and by_name and not environment.get("MASTER_ADDR")):
        return False

    if local is None and launcher is not None and (number := _number(launcher.local_rank, 0)) is not None:
        environment["LOCAL_RANK"] = str(number)
    if by_name:
        if not environment.get("MASTER_ADDR"):
            environment["MASTER_ADDR"] = _address(launcher, rank, size)
        if not environment.get("MASTER_PORT"):
            environment["MASTER_PORT"] = str(_port(launcher))
        port = environment["MASTER_PORT"]
        if not port.isdecimal() or not 0 < int(port) < 65536:
            raise UserError(f"MASTER_PORT is {port!r} in the environment; allowed: a number from 1 to 65535, such as {PORT}.")
    environment["RANK"], environment["WORLD_SIZE"] = str(rank), str(size)
    if launcher is not None and of_launcher and rank == 0:
        place = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}" if by_name else url
        print(
            f"lavis-mafa: this is rank 0 of the {size} tasks that {launcher.name} says there are; waiting for the others at {place}. "
            f"(In a batch script every task is started by `srun lavis-mafa ...`; RANK=0 WORLD_SIZE=1 in the environment trains alone.)",
            file=sys.stderr,
        )
    return True


def rank_and_size() -> tuple[int, int]:
    """The same two numbers for a command that runs in one process alone, which writes nothing and waits for nobody.

    Raises:
        UserError: one is none.
    """
    launcher, rank, size = _launcher(), _number("RANK", 0), _number("WORLD_SIZE", 1)
    if launcher is not None and (rank is None or size is None):
        rank, size = _number(launcher.rank, 0), _size(launcher)
    return rank or 0, size or 1


def _launcher() -> Launcher | None:
    """What started this process beside others, if it is none of PyTorch's."""
    return next((one for one in LAUNCHERS if one.rank in os.environ and _size(one) > 1), None)


def _number(name: str, least: int) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not re.fullmatch(r"\d+", text.strip(), re.ASCII) or int(text) < least:
        raise UserError(f"{name} is {text!r} in the environment; allowed: a whole number from {least}, or unset it. `{HOW}` sets it.")
    return int(text)


def _size(launcher: Launcher) -> int:
    return next((number for name in launcher.world_size if (number := _number(name, 1)) is not None), 1)


def _address(launcher: Launcher | None, rank: int, size: int) -> str:
    """Of rank 0's machine."""
    if launcher is not None:
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST") or os.environ.get("SLURM_NODELIST")
        one_machine = os.environ.get("SLURM_STEP_NUM_NODES", os.environ.get("SLURM_NNODES")) == "1"
        if launcher.name == "srun" and nodes and not one_machine:
            return first_node(nodes)
        if (launcher.name == "srun" and one_machine) or os.environ.get(launcher.local_size) == str(size):
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
    name = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", re.match(r"(?:[^\[,]|\[[^\]]*\])*", nodes.strip()).group())  # type: ignore[union-attr]
    return name


def _port(launcher: Launcher | None) -> int:
    """The same on all ranks, and most likely another one for each of Slurm's jobs and steps on a machine."""
    job, step = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_STEP_ID", "0")
    if launcher is None or launcher.name != "srun" or not job.isdecimal() or not step.isdecimal():
        return PORT
    return 20_000 + (int(job) + 101 * int(step)) % 10_000
