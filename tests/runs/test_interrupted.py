"""A training that signals end again and again, and that goes on each time, ends with the bits of one that ran through."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
from pathlib import Path

import pytest

from lavis_mafa.cli.main import main
from lavis_mafa.runners.stepping import Stepper

spec = importlib.util.spec_from_file_location("outputs", Path(__file__).with_name("outputs.py"))
outputs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(outputs)

STEPS = 9  # of an epoch: batches of 16 from the first 60 concepts
EPOCHS = 3
ALBEF = ["run.valid_splits=[val]"]
MOMENTUM = ["model.itc.momentum_distillation={queue_size: 64, momentum: 0.5}"]
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

    return start


def the_run(folder: Path) -> Path:
    (run,) = folder.iterdir()
    return run


@pytest.mark.parametrize("kind", RUNS)
def test_stopped_again_and_again_it_ends_with_the_same_bits(train, tmp_path, kind, capsys):
    assert train(kind, "whole") == 0
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")  # shown when the test fails
    chosen = random.Random(seed)
    # the very first step, an epoch's last one, and wherever chance will have it
    left, plan = EPOCHS * STEPS, [1, STEPS - 1, chosen.randrange(1, STEPS), chosen.randrange(1, STEPS)]
    plan = [-(-count // 2) * 2 for count in plan] if "accumulation" in kind else plan
    for count in plan:
        capsys.readouterr()
        number = chosen.choice([signal.SIGTERM, signal.SIGINT])
        assert train(kind, "parts", signal_in=count, resume="auto", number=number) == 128 + number
        said = capsys.readouterr().err
        assert "stopped after epoch" in said and "--resume auto" in said and "Traceback" not in said
        left -= count
    assert left > 0
    assert train(kind, "parts", resume="auto") == 0
    outputs.assert_same_run(the_run(tmp_path / "whole"), the_run(tmp_path / "parts"))
