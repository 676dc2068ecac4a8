"""Models and tokenizers by hub name or local folder, with one message where there is neither."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lavis_mafa.common.errors import UserError

Loaded = TypeVar("Loaded")


def from_hub(load: Callable[[str], Loaded], name: str, key: str, what: str) -> Loaded:
    """``load(name)``, which is a ``from_pretrained`` of transformers.

    Args:
        key: the setting that holds ``name``; what: what is expected there, for the message.

    Raises:
        UserError: ``name`` is neither such a folder nor reachable as a hub name.
    """
    from huggingface_hub.utils import HFValidationError

    try:
        return load(name)
    except (OSError, HFValidationError) as error:
        raise UserError(f"{key} is {name!r}, which is neither {what} nor reachable as a hub name.") from error


def is_path(name: str) -> bool:
    """Is it meant as a path? A hub name is ``name`` or ``owner/name``.

    Example:
        >>> is_path("facebook/opt-2.7b"), is_path("./opt-2.7b"), is_path("/models/opt-2.7b")
        (False, True, True)
    """
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()
