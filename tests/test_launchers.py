"""Which rank a process is, by what launchers leave in the environment: torchrun, srun, mpirun, a cluster that sets half of it."""

from __future__ import annotations

import os

import pytest

from lavis_mafa.distributed import first_node, is_one_of_several, own_gpu, rank_and_size
from lavis_mafa.errors import UserError

SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "2"}
SLURM |= {"SLURM_NNODES": "4", "SLURM_JOB_NODELIST": "gpu[03,07-09]-ib"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
BY_HAND = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1234"}
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def joined(monkeypatch):
    """What PyTorch would read after that environment was looked at; None where the process is alone."""

    def look(environment: dict[str, str], url: str = "env://") -> tuple[str | None, ...] | None:
        monkeypatch.setattr(os, "environ", dict(environment))
        if not is_one_of_several(url):
            return None
        assert is_one_of_several(url), "looking again changes nothing"
        return tuple(os.environ.get(name) for name in NAMES)

    return look


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        (BY_HAND, ("1", "2", None, "a", "1234")),
        ({**BY_HAND, "LOCAL_RANK": "1"}, ("1", "2", "1", "a", "1234")),
        ({**BY_HAND, **SLURM}, ("1", "2", "1", "a", "1234")),  # torchrun below srun
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "a"}, ("0", "1", None, "a", "29500")),
        (SLURM, ("3", "8", "1", "gpu03-ib", str(20_000 + (123456 + 202) % 10_000))),
        ({**SLURM, "WORLD_SIZE": "8"}, ("3", "8", "1", "gpu03-ib", str(20_000 + (123456 + 202) % 10_000))),
        ({**SLURM, "SLURM_NNODES": "1", "MASTER_PORT": "1"}, ("3", "8", "1", "127.0.0.1", "1")),
        ({**SLURM, "MASTER_ADDR": "b", "MASTER_PORT": "1"}, ("3", "8", "1", "b", "1")),
        (OPEN_MPI, ("1", "2", "1", "127.0.0.1", "29500")),
        (MPICH, ("1", "2", "1", "127.0.0.1", "29500")),
    ],
)
def test_a_process_finds_its_place(joined, environment, wanted, monkeypatch):
    assert joined(environment) == wanted
    monkeypatch.setattr(os, "environ", dict(environment))
    assert rank_and_size() == tuple(map(int, wanted[:2]))
    assert os.environ == environment, "looking alone writes nothing"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "0"},
        {"WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {**SLURM, "RANK": "0", "WORLD_SIZE": "1"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
        {**SLURM, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # `srun --pty bash` in a job of eight tasks
        {"SLURM_NTASKS": "8"},  # salloc
    ],
)
def test_a_single_process_stays_alone(joined, environment):
    assert joined(environment) is None


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK is 1 and WORLD_SIZE 2 in the environment, but MASTER_ADDR is not set"),
        ({**BY_HAND, "MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({**BY_HAND, "MASTER_PORT": "abc"}, "MASTER_PORT is 'abc' in the environment; allowed: a number from 1 to 65535"),
        ({**BY_HAND, "MASTER_PORT": "70000"}, "MASTER_PORT is '70000'"),
        ({**BY_HAND, "RANK": ""}, "RANK is '' in the environment; allowed: a whole number from 0"),
        ({**BY_HAND, "RANK": "-1"}, "RANK is '-1'"),
        ({**BY_HAND, "WORLD_SIZE": "0"}, "WORLD_SIZE is '0' in the environment; allowed: a whole number from 1"),
        ({**BY_HAND, "LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
        ({**BY_HAND, "RANK": "2"}, "RANK is 2 and WORLD_SIZE 2"),
        ({"RANK": "1"}, "RANK is 1 and WORLD_SIZE not set"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "RANK is not set and WORLD_SIZE 2 in the environment"),
        ({**SLURM, "SLURM_PROCID": ""}, "SLURM_PROCID is ''"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "srun started 2 processes, but MASTER_ADDR is not set"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "mpirun started 2 processes, but MASTER_ADDR is not set"),
    ],
)
def test_half_an_environment_is_one_message(joined, environment, message):
    with pytest.raises(UserError) as raised:
        joined(environment)
    assert message in str(raised.value) and "torchrun --nproc_per_node" in str(raised.value) or "MASTER_PORT" in message


def test_another_url_needs_no_address(joined):
    assert joined({"RANK": "1", "WORLD_SIZE": "2"}, "tcp://a:1") == ("1", "2", None, None, None)


def test_rank_0_says_whom_it_waits_for(joined, capsys):
    joined({**SLURM, "SLURM_PROCID": "0"})
    assert capsys.readouterr().err.count("rank 0 of the 8 tasks that srun says there are; waiting for the others at gpu03-ib:2") == 1


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[003-006,010]-ib,cpu1", "gpu003-ib"), ("a-1,b", "a-1"), ("node7", "node7"), ("n[2,1]", "n2"), ("r[1-2]n[3-4]", "r1n3")],
)
def test_the_first_of_slurms_nodes(nodes, first):
    assert first_node(nodes) == first


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    assert [own_gpu(rank, 4) for rank in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]
    monkeypatch.setattr(os, "environ", {"LOCAL_RANK": "3"})
    assert own_gpu(5, 4) == 3 and own_gpu(5, 1) == 0
    with pytest.raises(UserError, match="LOCAL_RANK is 3, but 2 GPUs are visible"):
        own_gpu(5, 2)
