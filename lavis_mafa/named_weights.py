"""Weights by name: a run's folder, those that come with the package, and LAVIS's registered ones (``lavis:albef_retrieval/coco``)."""

from __future__ import annotations

import fcntl
import os
import sys
import urllib.request
import warnings
from pathlib import Path
from urllib.parse import urlparse

import torch

from lavis_mafa.errors import UserError, did_you_mean
from lavis_mafa.files import numbered_checkpoints, run_checkpoint
from lavis_mafa.progress import Bar
from lavis_mafa.weights import damage, not_a_checkpoint, shipped

PREFIX = "lavis:"


def by_name(text: str, key: str) -> str:
    """Where weights are: at this path, of a run's folder in its best checkpoint or its last; or, where there is nothing, those of
    this name that come with the package or lie in LAVIS's cache. A name whose file is still to be downloaded stays as it is.

    Args:
        key: the setting or flag, for the message.

    Raises:
        UserError: a run without a checkpoint, or a name that LAVIS has not registered.
    """
    path = Path(text).expanduser()
    if path.exists():
        return str(run_checkpoint(path, key)) if path.is_dir() else text
    if text.startswith(PREFIX):
        _, file = registered(text, key)
        return str(file) if file.is_file() else text
    return str(shipped(text)) if shipped(text).is_file() else text


def resumable(text: str, key: str) -> str:
    """The checkpoint itself, or of a run's folder the newest one that is whole; raises UserError where it has none that resumes."""
    if text == "auto" or not Path(text).is_dir():
        return text
    last = run_checkpoint(Path(text), key, resumes=True)
    if not last.is_file():
        return text
    return str(next((path for path in numbered_checkpoints(last.parent) if damage(path) is None), last))


def registered(name: str, key: str) -> tuple[str, Path]:
    """The address that LAVIS has for ``lavis:ARCH/TYPE``, and where it keeps what it downloads from there.

    Raises:
        UserError: no such model or type, or one without an address; the message names those that there are.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lavis.models  # noqa: F401 - fills the registry
        from lavis.common.registry import registry
        from lavis.common.utils import get_abs_path
        from omegaconf import OmegaConf

    classes = registry.mapping["model_name_mapping"]
    known = {
        f"{arch}/{kind}": get_abs_path(file)
        for arch, model in classes.items()
        if model.__module__.startswith("lavis.")
        for kind, file in getattr(model, "PRETRAINED_MODEL_CONFIG_DICT", {}).items()
    }
    wanted = name.removeprefix(PREFIX)
    if wanted not in known:
        types = [PREFIX + one for one in known if one.split("/")[0] == wanted.split("/")[0]]
        near = f" Its types: {', '.join(types)}." if types else did_you_mean(name, [PREFIX + one for one in known])
        raise UserError(f"{key} is {name!r}, but LAVIS has registered no such model; allowed: lavis:ARCH/TYPE.{near}")
    block = OmegaConf.load(known[wanted]).model
    address = block.get("load_finetuned", True) and block.get("finetuned") or block.get("pretrained")
    if "://" not in str(address):
        raise UserError(f"{key} is {name!r}, for which LAVIS has no address.")
    return str(address), Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(urlparse(address).path)


def fetched(text: str, key: str) -> str:
    """As :func:`by_name`, downloaded into LAVIS's cache where it is not there yet; of several processes one does it.

    Raises:
        UserError: besides, it cannot be downloaded; the message has the address, and where to put the file by hand.
    """
    found = by_name(text, key)
    if not found.startswith(PREFIX):
        return found
    address, file = registered(found, key)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file.with_name(f".{file.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.is_file():
                _download(found, address, file)
    except OSError as error:  # urllib's too
        reason = getattr(error, "reason", None) or error.strerror or error
        raise UserError(
            f"{key} is {found!r}, but {address} cannot be downloaded ({reason}). Where there is no network, download it elsewhere and "
            f"put it here: {file}"
        ) from error
    return str(file)


def _download(name: str, address: str, file: Path) -> None:
    """Whole or not at all, with its size and a bar on stderr; raises OSError, also for what is no checkpoint."""
    part = file.with_name(f".{file.name}.part")
    try:
        with urllib.request.urlopen(address, timeout=60) as answer, part.open("wb") as content:  # noqa: S310 - an address of LAVIS's own
            size = int(answer.headers.get("Content-Length") or 0)
            print(f"{name}: {f'{size / 1e6:,.0f} MB' if size else 'a file'} from {address} to {file}", file=sys.stderr, flush=True)
            with Bar(total=size or None, desc=file.name, unit="B", unit_scale=True) as bar:
                while piece := answer.read(1 << 20):
                    bar.update(content.write(piece))
        with part.open("rb") as content:
            beginning = content.read(32)
        if size and part.stat().st_size != size:
            raise OSError(f"{part.stat().st_size:,} of {size:,} bytes arrived")
        if (what := not_a_checkpoint(beginning)) is not None:
            raise OSError(f"there is {what}")
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
