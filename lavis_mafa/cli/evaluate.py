"""``lavis-mafa evaluate RUN``, the best checkpoint of a run as it was trained; or ``--cfg-path X.yaml``, without training."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lavis_mafa.cli.train import add_options
from lavis_mafa.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    text = "folder of a run: its best checkpoint, else its last, with its own settings, on its test splits, else those it validated on"
    what.add_argument("folder", nargs="?", type=Path, metavar="RUN", help=text)
    what.add_argument("--cfg-path", metavar="YAML", help="or this: a file, or a name that `lavis-mafa ls` shows")
    add_options(parser)


def run(arguments: argparse.Namespace) -> int:
    from lavis_mafa.runners.job import run_job

    for option in arguments.options:
        if option.startswith("run.evaluate=") and option != "run.evaluate=true":
            raise UserError(f"--options has {option}, but this command evaluates; `lavis-mafa train` trains.")
    if arguments.folder is not None:
        name, of_run = _of_run(arguments.folder)
        run_job(name, [*of_run, *arguments.options])
    else:
        run_job(arguments.cfg_path, [*arguments.options, "run.evaluate=true"])
    return 0


def _of_run(folder: Path) -> tuple[str, list[str]]:
    """The file of a run's settings, and what is set to evaluate it; raises UserError where it has none, or no checkpoint."""
    from lavis_mafa.config.checkpoints import COVERED
    from lavis_mafa.config.read import at, read_settings
    from lavis_mafa.config.schema import MODEL_BLOCKS
    from lavis_mafa.files import run_checkpoint, runs_with

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
