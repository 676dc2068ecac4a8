"""Reading weights without running code from the file, and writing files that are never torn."""

from __future__ import annotations

import contextlib
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lavis_mafa.common.errors import UserError
from lavis_mafa.common.hugging_face import lavis_names
from lavis_mafa.common.layouts import not_a_checkpoint, state_dict_in, unwrapped, weight_files


def read_checkpoint(path: str | Path, key: str = "checkpoint", names_only: bool = False) -> dict[str, Any]:
    """Read a ``.pth``/``.pt``/``.bin`` (``weights_only``) or ``.safetensors`` file onto the CPU.

    Args:
        path: the file.
        key: the setting it was named by, for the message.
        names_only: onto the ``meta`` device: names and shapes, without the values.

    Raises:
        UserError: the file is missing, is no checkpoint, or would have to run code to load.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{key} is {str(path)!r}, but there is no such file.")
    if not path.stat().st_size:
        raise UserError(f"{key}: {path} is empty.")
    with open(path, "rb") as file:
        beginning = file.read(32)
    if path.suffix == ".safetensors" or beginning[8:9] == b"{":
        return _read_safetensors(path, key, names_only)
    if (what := not_a_checkpoint(beginning)) is not None:
        raise UserError(f"{key}: {path} is {what}.")
    if not names_only and (wrong := damage(path)) is not None:
        raise UserError(f"{key}: {path} is damaged: {wrong}. Use another checkpoint, or copy it again.")
    try:
        content = torch.load(path, map_location="meta" if names_only else "cpu", weights_only=True)
    except Exception as error:  # a torn pickle can raise anything
        raise UserError(
            f"{key}: {path} cannot be loaded as plain weights{_reason(error)}. Files that hold other Python objects are refused, "
            "since loading them can run code; save its state dict alone, or as safetensors."
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{key}: {path} holds a {type(content).__name__}, not a dictionary of weights.")
    return content


def _read_safetensors(path: Path, key: str, names_only: bool) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        if names_only:
            with safe_open(path, framework="pt") as file:
                return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in file.keys()}  # noqa: SIM118
        return dict(load_file(path))
    except SafetensorError as error:
        raise UserError(f"{key}: {path} is not a readable safetensors file ({error}).") from error


def _reason(error: Exception) -> str:
    """Why torch refused a file. Its own words are left out where they advise to load the file all the same."""
    text = str(error).strip()
    if refused := re.search(r"unsupported (?:global: )?(?:global|class) ([\w.]+)", text, re.IGNORECASE):
        return f" ({refused[1].rstrip('.')} is refused)"
    if "weights_only" in text or not text:
        return ""
    return f" ({text.splitlines()[0].rstrip('.')})"


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file: a part whose checksum is not right, or its end missing; None for a good one.

    ``torch.save`` stores a CRC-32 of each tensor that ``torch.load`` never looks at: it takes a flipped bit for a weight. Files
    that are no such archive (safetensors, PyTorch before 1.6) have none, and pass.
    """
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            return "it ends too early" if file.read(4) == b"PK\x03\x04" or not path.stat().st_size else None
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        return str(error)
    return None if part is None else f"the checksum of {part} is wrong"


def read_weights(path: str | Path, key: str = "checkpoint", names_only: bool = False) -> dict[str, Tensor]:
    """The weights of a checkpoint by LAVIS's names, however it is laid out.

    Taken are a file of LAVIS, ours, plain torch or Lightning (``model``, ``state_dict``, ... in it; ``module.``, ``model.``, ... before
    the names), a sharded one by its index, and a Hugging Face folder; transformers' names of BLIP, BLIP-2 and ViT become LAVIS's.

    Raises:
        UserError: it cannot be read, or holds no weights.
    """
    weights: dict[str, Tensor] = {}
    for file in weight_files(Path(path).expanduser(), key):
        source = f"{key}: {file}"
        state = state_dict_in(read_checkpoint(file, key, names_only), source)
        part = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        _check_weights(part, source, names_only)
        weights |= part
    return lavis_names(unwrapped(weights))


def _check_weights(state: dict[str, Tensor], source: str, names_only: bool = False) -> None:
    """Texts for names, and real numbers in memory for values; raises UserError."""
    for name, value in state.items():
        if not isinstance(name, str):
            raise UserError(f"{source} names a tensor {name!r}; allowed: texts, such as 'temp'.")
        if value.layout is not torch.strided or value.is_quantized:
            raise UserError(f"{source}: {name} is a sparse or quantized tensor; allowed: dense ones.")
        if value.is_complex():
            raise UserError(f"{source}: {name} is a tensor of {value.dtype}; allowed: real numbers.")
        if value.is_meta and not names_only:
            raise UserError(f"{source}: {name} has a shape but no values (it was saved from the meta device); save real weights.")


def write_atomically(content: dict[str, Any], path: Path) -> None:
    """Save to a temporary sibling and rename, so that a reader sees the old file or the new one, never half of it.

    Raises:
        UserError: it cannot be written; what was there before still is.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_folder(path.parent)  # the new name too must survive a power cut
    except (OSError, RuntimeError) as error:
        # torch closes its half-written archive on the way out, which fails in its own words
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"cannot write {path}: {cause.strerror or cause}. What was saved before is kept.") from error
    finally:
        part.unlink(missing_ok=True)  # still there after a full disk or ctrl-C alone: a finished save has renamed it


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):  # some network file systems have no such call
        os.fsync(descriptor)
    os.close(descriptor)


def load_exactly(module: nn.Module, state: dict[str, Tensor], source: str, may_miss: tuple[str, ...] = ()) -> Any:
    """Load a state dict; anything missing, left over or of another size is an error that lists the keys.

    A tensor with two names (a tied head) may come under one of them, as safetensors store it.

    Args:
        may_miss: parts of names that the source cannot know (cross-attention in a text-only BERT).

    Returns:
        what ``load_state_dict`` says: the names that were missing.

    Raises:
        UserError: what does not fit.
    """
    _check_weights(state, source)
    own = module.state_dict()
    sizes = [
        f"{name} {list(value.shape)} (wanted {list(own[name].shape)})"
        for name, value in state.items()
        if name in own and value.shape != own[name].shape
    ]
    given = {_place(own[name]) for name in state if name in own}
    missing = [
        n
        for n, value in own.items()
        if n not in state and _place(value) not in given and not n.endswith("position_ids") and not any(p in n for p in may_miss)
    ]
    extra = [n for n in state if n not in own and not n.endswith("position_ids")]
    problems = [("other size", sizes), ("missing", missing), ("left over", extra)]
    if any(names for _, names in problems):
        raise UserError(f"{source} does not fit the model: " + "; ".join(_few(k, n) for k, n in problems if n) + ".")
    return module.load_state_dict(state, strict=False)


def _place(value: Tensor) -> tuple[Any, ...]:
    """The same for two names of one tensor."""
    return (value.data_ptr(), *value.shape) if value.numel() and not value.is_meta else (id(value),)


def _few(kind: str, names: list[str], at_most: int = 8) -> str:
    more = f", and {len(names) - at_most} more" if len(names) > at_most else ""
    return f"{len(names)} {kind}: {', '.join(names[:at_most])}{more}"
