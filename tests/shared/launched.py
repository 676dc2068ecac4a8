"""Processes that begin with LAVIS imported: forked from one server, each costs its work and not five seconds of imports.

What a test says of starting itself (`python -m lavis_mafa`, torchrun, a launcher of LAVIS's own), it starts with `subprocess`.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["lavis.tasks", "lavis.runners", "lavis_mafa.cli.train", "torch.utils.tensorboard"])
GRACE = 3.0  # seconds that ranks have to end after one of them failed


class Process:
    """`python ARGUMENTS`, which name a script or ``-m MODULE``; with the part of `subprocess.Popen` that tests use."""

    def __init__(self, arguments: Sequence[Any], cwd: Path, env: dict[str, str] | None = None, start_new_session: bool = False) -> None:
        self.arguments = [str(argument) for argument in arguments]
        self._said = [_new_file(), _new_file()]
        given = (self.arguments, str(cwd), {**os.environ, **(env or {})}, self._said, start_new_session)
        self._process = SERVER.Process(target=_begin, args=given)
        self._process.start()
        assert self._process.pid is not None
        self.pid, self.sentinel, self.kill = self._process.pid, self._process.sentinel, self._process.kill

    def poll(self) -> int | None:
        return self._process.exitcode

    def end(self) -> subprocess.CompletedProcess[str]:
        """Kill it if it still runs; its code and what it said."""
        self.kill()
        self._process.join()
        out, err = (path.read_text(errors="replace") for path in self._said)
        for path in self._said:
            path.unlink()
        code = self.poll()
        assert code is not None
        return subprocess.CompletedProcess(self.arguments, code, out, err)

    def communicate(self, timeout: float) -> subprocess.CompletedProcess[str]:
        self._process.join(timeout)
        late, done = self.poll() is None, self.end()
        if late:
            raise subprocess.TimeoutExpired(self.arguments, timeout, done.stdout, done.stderr)
        return done


def start_ranks(count: int, *arguments: Any, cwd: Path, env: dict[str, str] | None = None) -> list[Process]:
    """Start a group by hand, as a cluster does."""
    group = {**(env or {}), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [Process(arguments, cwd, {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(count)]


def run(
    *arguments: Any, cwd: Path, processes: int = 1, env: dict[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run one process to its end, or several as ranks of a group: the first code that is not 0, and what all said."""
    if processes == 1:
        return Process(arguments, cwd, env).communicate(timeout)
    started, until = start_ranks(processes, *arguments, cwd=cwd, env=env), time.monotonic() + timeout
    while (running := [one.sentinel for one in started if one.poll() is None]) and (left := until - time.monotonic()) > 0:
        connection.wait(running, left)
        if any(one.poll() for one in started):  # the others wait for it
            until = min(until, time.monotonic() + GRACE)
    code = next((code for one in started if (code := one.poll())), None if running else 0)
    done = [one.end() for one in started]
    out, err = "".join(one.stdout for one in done), "".join(one.stderr for one in done)
    if code is None:
        raise subprocess.TimeoutExpired(done[0].args, timeout, out, err)
    return subprocess.CompletedProcess(done[0].args, code, out, err)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _new_file() -> Path:
    with tempfile.NamedTemporaryFile(delete=False) as file:
        return Path(file.name)


def _begin(arguments: list[str], cwd: str, environment: dict[str, str], said: list[Path], new_session: bool) -> None:
    gc.freeze()  # or it visits, and so copies, all that the server imported: two seconds of each process
    if new_session:
        os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in enumerate(said, start=1):
        os.dup2(os.open(path, os.O_WRONLY), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method("fork", force=True)  # of data loaders; a child of the server has the server's
    if "wandb" in sys.modules:  # timm imports it; the folder that it makes for that goes with the first child that ends
        from wandb.sdk.data_types._private import MEDIA_TMP

        os.makedirs(MEDIA_TMP.name, exist_ok=True)
    code: Any = 0
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    ctypes.pythonapi.Py_Exit(code)  # as any interpreter ends; a child of the server would leave at once
