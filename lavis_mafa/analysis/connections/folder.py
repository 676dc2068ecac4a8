"""The folder of an offline pass: never another result's, gone on with only under the same settings, files whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from lavis_mafa.distributed import barrier, broadcast_object, rank
from lavis_mafa.errors import UserError
from lavis_mafa.runners.agreement import data_record
from lavis_mafa.weights import weight_files

SETTINGS = "settings.json"


def check_unfinished(folder: Path, result: str) -> None:
    """Nothing heavy may start for a folder that holds a result already.

    Raises:
        UserError: it does, or is no folder.
    """
    if (folder / result).exists():
        raise UserError(f"--output: {folder} holds a finished result ({result}), which is never overwritten; choose another folder.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output is {str(folder)!r}, but that is a file; give a folder.")
    if folder.is_dir() and not (folder / SETTINGS).exists() and any(folder.iterdir()):
        raise UserError(f"--output: {folder} holds files of something else; choose another folder.")


def begin(folder: Path, settings: dict[str, Any], result: str) -> bool:
    """Make the folder and write down what is to be done there, or check that this is what was begun there.

    Returns:
        whether it goes on with what was begun earlier. All ranks agree.

    Raises:
        UserError: it holds a result, or was begun with other settings (the message names the first).
    """
    answer = broadcast_object(_begin(folder, settings, result) if rank() == 0 else None)
    barrier()
    if isinstance(answer, str):
        raise UserError(answer)
    return bool(answer)


def _begin(folder: Path, settings: dict[str, Any], result: str) -> bool | str:
    """A message instead of an error, so that the other ranks hear of it."""
    try:
        check_unfinished(folder, result)
        if not (folder / SETTINGS).exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")
            return False
        begun = json.loads((folder / SETTINGS).read_text())
    except UserError as error:
        return str(error)
    except (OSError, ValueError) as error:
        return f"--output: {folder}: {error}."
    for name, value in settings.items():
        if begun.get(name) != value:
            return (
                f"--output: {folder} was begun with {name} {_short(begun.get(name))}, not {_short(value)}; "
                "go on with that, or choose another folder."
            )
    return True


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)


def fingerprint(dataset: Any, keys: Tensor, settings: str) -> str:
    """Changes with any row's texts or image path, with which rows share an image, and with the settings of the data."""
    content = json.dumps(data_record(dataset), sort_keys=True)
    digest = hashlib.sha256(f"{len(dataset)}\n{content}\n{settings}\n".encode())
    digest.update(keys.numpy().tobytes())
    return f"of {len(dataset)} rows, fingerprint {digest.hexdigest()[:16]}"


def file_digest(path: str) -> str:
    """sha256 of a checkpoint's files, its beginning."""
    digest = hashlib.sha256()
    for part in weight_files(Path(path).expanduser(), "--con-d"):
        with open(part, "rb") as file:
            while piece := file.read(1 << 24):
                digest.update(piece)
    return digest.hexdigest()[:16]


def _short(value: Any) -> str:
    return str(value) if value is not None else "none"
