"""Signals, and workers that are killed: what a run does at once, saves, and says. (That it goes on with the same bits: tests/runs.)"""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from lavis_mafa import signals as interrupt
from lavis_mafa.cli.main import main
from lavis_mafa.errors import death_of_a_worker
from lavis_mafa.runners.step import Stepper

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def as_before_any_signal(monkeypatch):
    """Below nohup SIGHUP would be ignored; and the tests that follow in this process have got no signal."""
    monkeypatch.setattr(interrupt, "_first", None)
    monkeypatch.setattr(interrupt, "_leaving", threading.Event())
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def train(run_yaml, monkeypatch):
    """Five steps an epoch; in the step named, the function is called."""
    plain = Stepper.__call__

    def start(name: str, *options: str, in_step: int = 0, do=lambda: None) -> int:
        steps = 0

        def step(self, *arguments):
            nonlocal steps
            steps += 1
            if steps == in_step:
                do()
            return plain(self, *arguments)

        monkeypatch.setattr(Stepper, "__call__", step)
        common = ["run.num_workers=2", f"run.output_dir={name}", "run.max_epoch=2", "run.grit.collect=training"]
        return main(["train", "--cfg-path", str(run_yaml), "--resume", "auto", "--options", *common, *options])

    return start


def kill_the_workers() -> None:
    """The news arrive in the middle of this step: the workers are dead, and it is for PyTorch to bury them."""
    children = multiprocessing.active_children()
    for child in children:
        child.kill()
    for child in children:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)


def the_run(folder: Path) -> Path:
    (run,) = folder.glob("2*")
    return run


@pytest.mark.parametrize(("window", "in_step", "saved"), [(2, 3, "0_4"), (1, 4, "0"), (1, 5, "1_1")])
def test_a_killed_worker_costs_no_step(train, tmp_path, capsys, window, in_step, saved):
    """With accumulation the rest of the window is read by the main process. The run that goes on ends as one without a loss."""
    options = [f"run.accum_grad_iters={window}"]
    code = train("parts", *options, in_step=in_step, do=kill_the_workers)
    said = capsys.readouterr().err
    (line,) = said.splitlines()
    assert code == 3 and "a data loader worker (pid" in line and "run.num_workers" in line and f"checkpoint_{saved}.pth" in line
    assert train("parts", *options) == 0 and train("whole", *options) == 0
    one, other = (torch.load(the_run(tmp_path / name) / "checkpoint_1.pth", weights_only=True)["model"] for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("in_step", "saved"), [(3, "0_3"), (5, "0")])
def test_a_signal_saves_where_no_checkpoint_was_due(train, tmp_path, in_step, saved):
    options = ["run.num_workers=0", "run.save_every_epochs=5"]
    assert train("run", *options, in_step=in_step, do=lambda: os.kill(os.getpid(), signal.SIGUSR1)) == 138
    assert [path.name for path in the_run(tmp_path / "run").glob("checkpoint*.pth") if "rank" not in path.name] == [
        f"checkpoint_{saved}.pth"
    ]


def test_a_worker_that_dies_elsewhere_is_one_message(capsys, monkeypatch):
    from lavis_mafa.cli import ls

    def die(_):
        raise RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly")

    monkeypatch.setattr(ls, "run", die)
    assert main(["ls"]) == 3
    assert capsys.readouterr().err.startswith("lavis-mafa ls: a data loader worker (pid(s) 7, 8) exited unexpectedly; the system's log")
    assert death_of_a_worker(RuntimeError("something else")) is None and death_of_a_worker(OSError("DataLoader worker (pid 1)")) is None


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP])
def test_what_others_have_taken_stays_theirs(number):
    """nohup ignores SIGHUP; submitit has a handler of its own for SIGUSR1."""
    came = []
    for handler in (signal.SIG_IGN, lambda *_: came.append(1)):
        before = signal.signal(number, handler)
        try:
            with interrupt.postponed():
                os.kill(os.getpid(), number)
                assert interrupt.asked() == 0
        finally:
            signal.signal(number, before)
    assert came == [1]


def test_a_terminal_that_is_gone_does_not_keep_a_run_from_saving(monkeypatch):
    moved = []

    def gone(descriptor: int, text: bytes) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "write", gone)
    monkeypatch.setattr(os, "dup2", lambda _, to: moved.append(to))
    with pytest.raises(KeyboardInterrupt), interrupt.postponed():
        os.kill(os.getpid(), signal.SIGHUP)
        assert interrupt.asked() == signal.SIGHUP
    assert moved == [1, 2]


@pytest.mark.parametrize(("again", "seconds"), [(True, 30.0), (False, 0.5)], ids=["a second ctrl-C", "a swallowed one"])
def test_ctrl_c_ends_for_sure(again, seconds):
    """The second at once, whatever is being written; one that Python swallows after ``PATIENCE``."""
    script = f"""
import contextlib, os, signal, threading, time
from lavis_mafa import signals as interrupt
interrupt.PATIENCE, interrupt.ONCE_MORE = {seconds}, 0.1
interrupt.watch("goodbye")
def write():
    with interrupt.finished_first():
        time.sleep(60)
if {again}:
    threading.Thread(target=write).start()
    time.sleep(0.3)
with contextlib.suppress(KeyboardInterrupt):
    os.kill(os.getpid(), signal.SIGINT)
time.sleep(0.3)
if {again}:
    os.kill(os.getpid(), signal.SIGINT)
time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=25)
    assert (done.returncode, done.stderr) == (130, "goodbye\n")


def test_workers_outlive_what_a_cluster_sends_to_all_processes_and_end_with_their_owner():
    script = """
import os, signal, time
from lavis_mafa.signals import IF_FREE, patient_worker
patient_worker(0)
for number in (signal.SIGINT, *IF_FREE):
    os.kill(os.getpid(), number)
os.kill(os.getpid(), signal.SIGTERM)
print("here", flush=True)
time.sleep(30)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None and worker.stdout.readline() == "here\n"
        time.sleep(0.2)
        assert worker.poll() is None
        worker.terminate()
        assert worker.wait(10) == 0


def test_without_sigwaitinfo_a_worker_is_ended_by_its_owner_all_the_same(monkeypatch):
    monkeypatch.delattr(signal, "sigwaitinfo")
    before = {number: signal.getsignal(number) for number in (*interrupt.ALWAYS, *interrupt.IF_FREE)}
    try:
        interrupt.patient_worker(0)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
