"""Where a run writes and goes on: its folder, ``resume_ckpt_path: auto``, and the folder put back to its checkpoint's moment."""

from __future__ import annotations

import errno
import fcntl
import fnmatch
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lavis_mafa.config.read import flat, plain
from lavis_mafa.config.schema import RunBlock
from lavis_mafa.errors import UserError
from lavis_mafa.files import new_folder, numbered_checkpoints, point_latest, position, runs_with, write_text
from lavis_mafa.runners.checkpoint import rank_file
from lavis_mafa.weights import damage, read_checkpoint

logger = logging.getLogger(__name__)
# a run stays the same when these change: they say where, how long and how closely watched it runs
MAY_DIFFER = {
    *("resume_ckpt_path", "rank", "gpu", "world_size", "distributed", "dist_backend", "dist_url", "device", "find_unused_parameters"),
    *("num_workers", "max_steps", "log_freq", "save_every_epochs", "save_every_steps", "keep_checkpoints", "record_connections"),
    *("max_bad_share", "max_nonfinite_steps", "rank_timeout_minutes", "test_splits", "output_dir", "trackers"),
}
# what a checkpoint's weights stand in for
ONLY_AT_THE_START = ("model.temperature", "model.pretrained", "model.stage_1", "model.finetuned", "model.load_*", "model.*.init")
SHOWN = 12

_locks: dict[Path, int] = {}


def open_run(parent: Path, name: str, settings: RunBlock, config: dict[str, Any]) -> tuple[Path, Path | None]:
    """The folder of a run, locked, and the checkpoint to go on from, if any.

    With ``resume_ckpt_path: auto`` that is the newest good one of the newest run with these settings, in that run's folder, which is
    put back to the checkpoint's moment; else the folder is a new one. The link ``latest`` beside it leads to a training.

    Raises:
        UserError: the folder cannot be made, or is in use.
    """
    given = None if settings.evaluate else settings.resume_ckpt_path
    for folder in same_runs(parent, config) if given == "auto" else ():
        lock(folder)  # before looking: who has it may be saving
        if (checkpoint := newest_good(folder)) is not None:
            rewind(folder, checkpoint)
            point_latest(folder)
            return folder, checkpoint
        unlock(folder)
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.output_dir: cannot write in {parent}: {error.strerror}.") from error
    folder = new_folder(parent / name, "run.output_dir")
    (folder / "result").mkdir()
    lock(folder)
    if not settings.evaluate:  # which leaves no checkpoint
        point_latest(folder)
    return folder, None if given in (None, "auto") else Path(given)


def same_runs(parent: Path, config: dict[str, Any]) -> Iterator[Path]:
    """The folders of saved runs below ``parent`` with these settings, the newest first. Where there is none, the log says so."""
    others, found = [], False
    for folder in sorted(runs_with(parent, "config.yaml"), key=_last_saved, reverse=True):
        try:
            there, here = _settings(OmegaConf.load(folder / "config.yaml")), _settings(config)
            key = next(iter(_differences(there, here)), None)
            different = f"{key} is {there.get(key, 'not set')} there and {here.get(key, 'not set')} here" if key else ""
        except (YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
            different = f"its config.yaml cannot be read ({' '.join(str(error).split())})"
        if different:
            others.append(f"{folder.name}: {different}")
        elif numbered_checkpoints(folder):
            found = True
            yield folder
    if not found and others:
        logger.warning("resume_ckpt_path: auto starts a new run; the newest one in %s is another: %s", parent, others[0])
    elif not found:
        logger.info("resume_ckpt_path: auto finds no run in %s and starts one", parent)


def newest_good(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run; those that are damaged are named and passed over."""
    for path in numbered_checkpoints(folder):
        problem = _problem(path)
        if not problem:
            return path
        logger.warning("%s is passed over: %s", path, problem)
    return None


def _problem(path: Path) -> str:
    if (wrong := damage(path)) is not None:
        return f"{path.name} is damaged: {wrong}"
    for rank in range(int(read_checkpoint(path, names_only=True).get("world_size", 1))):
        state = rank_file(path, rank)
        if not state.is_file():
            return f"{state.name} is missing"
        if (wrong := damage(state)) is not None:
            return f"{state.name} is damaged: {wrong}"
    return ""


def rewind(folder: Path, checkpoint: Path) -> None:
    """Take back what a run wrote after its checkpoint: records that will be made again, and checkpoints that were damaged."""
    epoch, step = position(checkpoint)
    _keep_lines(folder / "metrics.jsonl", lambda r: (r["epoch"], r["step"]) <= (epoch, step))
    # the checkpoint at an epoch's end is written before the epoch is evaluated
    _keep_lines(folder / "evaluation.jsonl", lambda r: isinstance(r["epoch"], int) and r["epoch"] < (epoch if step else epoch - 1))
    (folder / "bad_samples.jsonl").unlink(missing_ok=True)  # the checkpoint has the list
    for file in (folder / "connections").glob("epoch_*.parquet"):
        numbers = [int(n) for n in re.findall(r"\d+", file.stem)]  # epoch, (first step,) rank
        if (numbers[0], numbers[1] if len(numbers) > 2 else 0) >= (epoch, step):
            file.unlink()
    for path in numbered_checkpoints(folder):
        if position(path) > (epoch, step):
            for file in (path, *folder.glob(f"{path.stem}.rank*.pth")):
                file.rename(file.with_suffix(".damaged"))
    whole = {path.stem for path in numbered_checkpoints(folder)}
    for file in (*folder.glob(".*.part"), *folder.glob("checkpoint_*.rank*.pth")):  # of a save that was killed
        if file.suffix == ".part" or file.name.split(".")[0] not in whole:
            file.unlink()


def _keep_lines(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line a killed run was writing
        if isinstance(record, dict) and wanted(record):
            kept.append(line + "\n")
    write_text(path, "".join(kept))


def lock(folder: Path) -> None:
    """Keep other processes out of a run's folder until :func:`unlock` or the end of this one; raises UserError if one is in it."""
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.read(descriptor, 100).decode(errors="replace").strip()
        os.close(descriptor)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(f"{folder} is still written by {owner or 'another process'}; wait for its end, or stop it.") from error
        logger.warning("%s cannot be locked (%s): do not start two runs in it", folder, error.strerror)
        return
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode())
    _locks[folder] = descriptor


def unlock(folder: Path) -> None:
    """Another process may go on in this folder."""
    if folder in _locks:
        os.close(_locks.pop(folder))


def say_what_differs(there: dict[str, Any], here: dict[str, Any]) -> None:
    """Of a run that goes on with other settings than its checkpoint's: which of them hold from now on, and which never will."""
    if not there:
        return
    before, now = _settings(there), _settings(here)
    different = _differences(before, now)
    kept = [key for key in different if any(fnmatch.fnmatch(key, pattern) for pattern in ONLY_AT_THE_START)]
    applied = [key for key in different if key not in kept]

    def told(keys: list[str]) -> str:
        changes = [f"{key} {before.get(key, 'not set')} -> {now.get(key, 'not set')}" for key in keys[:SHOWN]]
        return ", ".join(changes) + (f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else "")

    if applied:
        logger.info("the run goes on with other settings: %s", told(applied))
    if kept:
        logger.warning("no effect on a resumed run, which goes on with the checkpoint's weights: %s", told(kept))


def _last_saved(folder: Path) -> float:
    return max((path.stat().st_mtime for path in numbered_checkpoints(folder)), default=0.0)


def _settings(config: Any) -> dict[str, Any]:
    """By their dotted keys; a block without any is none."""
    return {key: value for key, value in flat(plain(config)).items() if value != {}}


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """The settings that are not the same, but for those that a run stays the same with."""
    keys = sorted({*there, *here})
    return [key for key in keys if key.removeprefix("run.") not in MAY_DIFFER and there.get(key) != here.get(key)]
