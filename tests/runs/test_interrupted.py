"""A training that signals end again and again, and that goes on each time, ends with the bits of one that ran through."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import launched
import outputs
from lavis_mafa.cli.main import main
from lavis_mafa.runners.step import Stepper

pytestmark = pytest.mark.slow

STEPS = 9  # of an epoch: batches of 16 from the first 60 concepts
EPOCHS = 2
ALBEF = ["run.valid_splits=[val]"]
MOMENTUM = ["model.itc.momentum_distillation={queue_size: 64, momentum: 0.5}"]
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU]
BLIP2 = ["run.batch_size_train=16", "run.warmup_steps=2", "run.grit.queue_size=64", "run.grit.search_space=32"]
BLIP2 += ["model.image_encoder.width=32", "model.image_encoder.depth=2", "model.image_encoder.heads=2", "model.qformer.init=null"]
BLIP2 += ["model.qformer.width=32", "model.qformer.layers=2", "model.qformer.heads=2", "model.image_encoder.init=null"]
BLIP2 += ["model.image_encoder.freeze=false", "model.discriminator={arch: ground_truth}"]
RUNS = {
    "albef": (None, ALBEF),
    "albef with momentum and accumulation": (None, [*MOMENTUM, "run.accum_grad_iters=2", "run.save_every_steps=4"]),
    "blip2": ("mafa/quickstart/blip2/stage_1.yaml", BLIP2),
}


@pytest.fixture
def train(tmp_path, emoji, tiny_yaml, monkeypatch):
    """Train into a folder below the test's own; a signal comes in the steps named, counted from the start of the process."""
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    plain = Stepper.__call__

    def start(kind: str, name: str, signal_in: int | None = None, resume: str | None = None, number: int = signal.SIGTERM) -> int:
        steps = 0

        def step(self, *arguments):
            nonlocal steps
            steps += 1
            if steps == signal_in:
                os.kill(os.getpid(), number)
            return plain(self, *arguments)

        monkeypatch.setattr(Stepper, "__call__", step)
        yaml, options = RUNS[kind]
        data = f"datasets.grit_emoji.build_info={{root: {emoji}, max_concepts: 60}}"
        common = [data, f"run.output_dir={name}", f"run.max_epoch={EPOCHS}", "run.log_freq=5", "run.test_splits=[]"]
        arguments = ["train", "--cfg-path", str(yaml or tiny_yaml), "--options", *common, *options]
        return main([*arguments, "--resume", resume] if resume else arguments)

    yield start
    signal.signal(signal.SIGHUP, before)


def the_run(folder: Path) -> Path:
    (run,) = folder.glob("2*")
    return run


@pytest.mark.parametrize("kind", RUNS)
def test_stopped_again_and_again_it_ends_with_the_same_bits(train, tmp_path, kind, capsys):
    assert train(kind, "whole") == 0
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")  # shown when the test fails
    chosen = random.Random(seed)
    # the very first step, an epoch's last one, and wherever chance will have it
    plan = [1, STEPS - 1, chosen.randrange(1, STEPS - 2)]
    plan = [-(-count // 2) * 2 for count in plan] if "accumulation" in kind else plan
    for count in plan:
        capsys.readouterr()
        number = chosen.choice(SIGNALS)
        assert train(kind, "parts", signal_in=count, resume="auto", number=number) == 128 + number
        said = capsys.readouterr().err
        assert "stopped after epoch" in said and "--resume auto" in said and "Traceback" not in said
    assert train(kind, "parts", resume="auto") == 0
    outputs.assert_same_run(the_run(tmp_path / "whole"), the_run(tmp_path / "parts"))


# --- real processes ----------------------------------------------------------------------------------------------------


@pytest.fixture
def launch(tmp_path, emoji, tiny_yaml):
    """A training in processes of its own, in a group of its own, with a signal at a chosen moment; what it said."""
    data = f"datasets.grit_emoji.build_info={{root: {emoji}, max_concepts: 60}}"

    def start(
        name: str, *options: str, at: tuple[str, int, str] = ("step", 0, "SIGTERM"), processes: int = 1, yaml: str | None = None
    ) -> tuple[int, str]:
        command = [Path(__file__).with_name("signalling.py"), *map(str, at), "train", "--cfg-path", yaml or tiny_yaml]
        common = [
            data,
            f"run.output_dir={name}",
            "run.max_epoch=2",
            "run.log_freq=5",
            "run.test_splits=[]",
            "run.valid_splits=[val]",
            *options,
        ]
        command += ["--resume", "auto", "--options", *common]
        if processes == 1:
            done = launched.Process(command, tmp_path, start_new_session=True).communicate(240)
        elif at[1] == 0 or at[2] == "SIGKILL":
            done = launched.run(*command, cwd=tmp_path, processes=processes, timeout=240)
        else:
            launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port"]
            done = subprocess.run(
                [*launcher, launched.free_port(), *map(str, command)],
                cwd=tmp_path,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                timeout=240,
                start_new_session=True,
            )
        return done.returncode, done.stderr

    return start


def test_signals_to_a_whole_group_with_workers_in_a_step_and_in_a_validation(launch, tmp_path):
    workers = "run.num_workers=2"
    code, said = launch("whole", workers)
    assert code == 0, said
    code, said = launch("parts", workers, at=("step", 4, "SIGTERM"))
    assert code == 143 and "stopped after epoch 0, step 4" in said and "Traceback" not in said, said
    code, said = launch("parts", workers, at=("validation", 1, "SIGINT"))
    assert code == 130 and "Traceback" not in said, said
    assert said.splitlines()[-1] == "lavis-mafa train: stopped; what was saved before is kept."
    code, said = launch("parts", workers)
    assert code == 0 and "epoch 1, step 0" in said, said
    outputs.assert_same_run(the_run(tmp_path / "whole"), the_run(tmp_path / "parts"))


@pytest.mark.parametrize("kind", ["albef with momentum", "blip2"])
def test_two_processes_terminated_and_killed_end_with_the_same_bits(launch, tmp_path, kind):
    """torchrun passes SIGTERM on to all ranks, at whatever step they are; one that is killed takes the others with it."""
    yaml, options = (RUNS["blip2"][0], BLIP2) if kind == "blip2" else (None, MOMENTUM)
    options = [*options, "run.batch_size_train=8", "run.save_every_steps=2"]
    code, said = launch("whole", *options, processes=2, yaml=yaml)
    assert code == 0, said
    if kind != "blip2":  # three interpreters that import everything; what is saved then is what one process saves
        code, said = launch("parts", *options, at=("step", 3, "SIGTERM"), processes=2, yaml=yaml)
        assert code != 0 and "stopped after epoch 0, step" in said, said
    code, said = launch("parts", *options, at=("step", 9, "SIGKILL"), processes=2, yaml=yaml)
    assert code != 0, said
    code, said = launch("parts", *options, processes=2, yaml=yaml)
    assert code == 0, said
    outputs.assert_same_run(the_run(tmp_path / "whole"), the_run(tmp_path / "parts"))
