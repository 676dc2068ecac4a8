"""Files that are whole or absent, folders that hold nobody else's result, digests, and what lies in a run's folder or beside it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lavis_mafa.errors import UserError

SETTINGS = "settings.json"  # in the folder of a pass that can be gone on with: what was begun there


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A sibling of ``path`` to write to. At the end it is on the disk and takes ``path``'s place: a reader sees the old file or the
    new one, never half of it, and so it is after a power cut. Where the writing fails, the old file stays.

    Example:
        >>> with replacing(folder / "pairs.parquet") as part:
        ...     pq.write_table(table, part)
    """
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        _sync(part)
        os.replace(part, path)
        _sync(path.parent)  # the new name too
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def built_folder(folder: Path) -> Iterator[Path]:
    """A sibling of ``folder``, absent or empty, to build in; at the end it takes its place, and where the building fails it is gone:
    the folder is either absent or complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    with replacing(path) as part:
        part.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Whole or not at all, in UTF-8."""
    write_bytes(path, text.encode())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def new_folder(wanted: Path, key: str = "--output") -> Path:
    """Make the folder ``wanted``, or ``wanted_2``, ``wanted_3``, ... where it exists: nothing is ever overwritten.

    Raises:
        UserError: it cannot be made.
    """
    folder, number = wanted, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
            folder = wanted.with_name(f"{wanted.name}_{number}")
        except OSError as error:
            raise UserError(f"{key}: cannot write {folder}: {error.strerror}.") from error


def check_unfinished(folder: Path, result: str) -> None:
    """Before anything heavy: ``folder`` holds no ``result`` yet, and nothing of something else.

    Raises:
        UserError: it does, or is no folder.
    """
    if (folder / result).exists():
        raise UserError(f"--output: {folder} holds a finished result ({result}), which is never overwritten; choose another folder.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output is {str(folder)!r}, but that is a file; give a folder.")
    if folder.is_dir() and not (folder / SETTINGS).exists() and any(folder.iterdir()):
        raise UserError(f"--output: {folder} holds files of something else; choose another folder.")


def digest(settings: Any) -> str:
    """16 hexadecimal digits that change with anything that JSON tells of ``settings``, but not with the order of keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def file_digest(paths: Iterable[Path]) -> str:
    """16 hexadecimal digits that change with the content of any of the files."""
    from lavis_mafa.progress import Bar  # with torch, for which light commands need not wait

    found = hashlib.sha256()
    for path in paths:
        bar = Bar(total=path.stat().st_size, desc=f"digest of {path.name}", unit="B", unit_scale=True, delay=1)
        with bar, path.open("rb") as file:
            while piece := file.read(1 << 24):
                found.update(piece)
                bar.update(len(piece))
    return found.hexdigest()[:16]


def position(checkpoint: Path) -> tuple[int, int]:
    """The epoch and the step that come next: ``checkpoint_4.pth`` ends epoch 4, ``checkpoint_4_37.pth`` is in the middle of it.

    Example:
        >>> position(Path("checkpoint_4.pth")), position(Path("checkpoint_4_37.pth"))
        ((5, 0), (4, 37))
    """
    epoch, *step = map(int, checkpoint.stem.split("_")[1:])
    return (epoch, step[0]) if step else (epoch + 1, 0)


def numbered_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run's folder, the last one first; without the best one, which does not resume."""
    files = [path for path in run.glob("checkpoint_*.pth") if re.fullmatch(r"checkpoint_\d+(_\d+)?\.pth", path.name)]
    return sorted(files, key=position, reverse=True)


def last_checkpoint(run: Path) -> Path:
    """The checkpoint after most epochs and steps, whenever its file was written. Raises UserError: there is none."""
    found = numbered_checkpoints(run)
    if not found:
        raise UserError(f"{run} has no checkpoint.")
    return found[0]


LATEST = "latest"  # beside the runs of a folder: a link to the one that was trained last


def point_latest(run: Path) -> None:
    """Let the link ``latest`` beside a run lead to it; nothing happens where something else has that name, or links cannot be made."""
    link, part = run.with_name(LATEST), run.with_name(f".{LATEST}.{os.getpid()}")
    if os.path.lexists(link) and not (link.is_symlink() and os.readlink(link) == Path(os.readlink(link)).name):
        return
    with contextlib.suppress(OSError):
        part.symlink_to(run.name, target_is_directory=True)
        try:
            os.replace(part, link)
        finally:
            part.unlink(missing_ok=True)


def runs_with(folder: Path, name: str) -> list[Path]:
    """The runs below ``folder`` that have a file ``name`` (or that matches it), the oldest name first"""
    return sorted({file.parent for file in folder.glob(f"*/{name}") if not file.parent.is_symlink()})


def run_checkpoint(folder: Path, key: str, resumes: bool = False) -> Path:
    """The checkpoint that a run's folder stands for: its best one, else its last; a path that is no run's folder is returned as it is.

    Args:
        key: the setting or flag that names the folder, for the message.
        resumes: the last one, since the best does not resume.

    Raises:
        UserError: it is a run without one, or a folder of runs.
    """
    if not folder.is_dir():
        return folder
    if folder.is_symlink():  # `latest` is another run tomorrow
        folder = folder.parent / os.readlink(folder)
    best, numbered = folder / "checkpoint_best.pth", numbered_checkpoints(folder)
    if best.is_file() and not resumes:
        return best
    if numbered:
        return numbered[0]
    if (folder / "config.yaml").is_file() and (folder / "result").is_dir():
        but = "only its best checkpoint, which does not resume" if best.is_file() else "no checkpoint"
        raise UserError(f"{key}: the run {folder} has {but}.")
    if runs := runs_with(folder, "checkpoint_*.pth"):
        raise UserError(f"{key}: {folder} is a folder of runs; name one of them, such as {runs[-1]}.")
    return folder
