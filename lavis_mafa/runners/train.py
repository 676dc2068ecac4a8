"""To train and to evaluate, as one call each; the program that calls goes on as before: what a job seeds and logs is undone."""

from __future__ import annotations

import contextlib
import json
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lavis_mafa.config.checkpoints import COVERED
from lavis_mafa.config.read import at, read_settings
from lavis_mafa.config.schema import MODEL_BLOCKS
from lavis_mafa.errors import UserError
from lavis_mafa.files import run_checkpoint, runs_with
from lavis_mafa.runners.job import run_job


def train(name: str, options: Sequence[str], resume: str | None = None, make_page: Callable[[Path], Path] | None = None) -> Any:
    """Train as a YAML says. Returns the runner.

    Args:
        resume: ``auto``, a checkpoint or a run's folder, to go on from.
        make_page: writes a page about the finished run, for trackers that keep files.

    Raises: as :func:`lavis_mafa.runners.job.run_job`.
    """
    resumed = [] if resume is None else [f"run.resume_ckpt_path={resume}"]
    for option in options:
        if resumed and option.startswith("run.resume_ckpt_path=") and option not in resumed:
            raise UserError(f"--resume is {resume}, but --options has {option}; give one of them.")
    return _run(name, [*options, *resumed], make_page)


def evaluate(what: str | Path, options: Sequence[str]) -> Any:
    """Evaluate without training: a run's folder (a ``Path``), or as a YAML (its name) says. Returns the runner.

    Raises: as :func:`lavis_mafa.runners.job.run_job`.
    """
    for option in options:
        if option.startswith("run.evaluate=") and option != "run.evaluate=true":
            raise UserError(f"--options has {option}, but this command evaluates; `lavis-mafa train` trains.")
    if isinstance(what, Path):
        name, of_run = _of_run(what)
        return _run(name, [*of_run, *options])
    return _run(what, [*options, "run.evaluate=true"])


def _of_run(folder: Path) -> tuple[str, list[str]]:
    """The file of a run's settings, and what is set to evaluate it; raises UserError where it has none, or no checkpoint."""
    file = folder / "config.yaml"
    if not file.is_file():
        runs = runs_with(folder, "checkpoint_*.pth")
        hint = f" Did you mean {runs[-1]}?" if runs else ""
        raise UserError(f"{folder} is no folder of a run: it has no config.yaml, which a run writes.{hint}")
    settings, checkpoint = read_settings(file, []), run_checkpoint(folder, "RUN")
    if checkpoint.suffix != ".pth":
        raise UserError(f"the run {folder} has no checkpoint.")
    checkpoint = checkpoint.absolute()
    arch = at(settings, "model.arch")
    options = ["run.evaluate=true", "run.resume_ckpt_path=null", f"run.output_dir={json.dumps(str(checkpoint.parent.parent))}"]
    # what it was trained from and with need no longer be there
    options += [f"{key}=null" for key in ("model.stage_1", "model.discriminator") if at(settings, key) is not None]
    if arch in MODEL_BLOCKS:
        options += [f"model.pretrained={json.dumps(str(checkpoint))}", *(f"model.{part}.init=null" for part in COVERED.get(arch, ()))]
    else:
        options += [f"model.finetuned={json.dumps(str(checkpoint))}", "model.load_finetuned=true"]
    return str(file), [*options, *(["run.valid_splits=[]"] if at(settings, "run.test_splits") else [])]


def _run(name: str, options: list[str], make_page: Callable[[Path], Path] | None = None) -> Any:
    with as_before():
        return run_job(name, options, make_page)


@contextlib.contextmanager
def as_before() -> Iterator[None]:
    """At the end random numbers go on as if nothing had been drawn inside, and logging is as it was."""
    python, numpy = random.getstate(), np.random.get_state()
    loggers = logging.getLogger(), logging.getLogger("lavis_mafa")
    levels, handlers = [logger.level for logger in loggers], list(loggers[0].handlers)
    try:
        with torch.random.fork_rng(devices=()):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for handler in set(loggers[0].handlers).difference(handlers):
            loggers[0].removeHandler(handler)
