"""Models and tokenizers by hub name or local folder, with one message where there is neither, or half of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lavis_mafa.common.errors import UserError

Loaded = TypeVar("Loaded")


def from_hub(load: Callable[[str], Loaded], name: str, key: str, what: str) -> Loaded:
    """``load(name)``, which is a ``from_pretrained`` of transformers.

    Args:
        key: the setting that holds ``name``; what: what is expected there, for the message.

    Raises:
        UserError: ``name`` is neither such a folder nor reachable as a hub name.
    """
    try:
        return load(name)
    except (OSError, ValueError, TypeError) as error:  # what transformers says of a wrong or incomplete folder
        raise UserError(f"{key} is {name!r}, which is neither {what} nor reachable as a hub name.") from error


def model_from_hub(model_class: Any, name: str, key: str, what: str, kind: str, may_miss: tuple[str, ...] = (), **settings: Any) -> Any:
    """A model of transformers with every one of its weights: transformers fills what is missing with random numbers.

    Args:
        kind: the ``model_type`` that its config must have, such as ``opt``.
        may_miss: beginnings of names that the source need not have.

    Raises:
        UserError: no such model, one of another kind, or one without some of its weights.
    """
    check_kind_on_hub(name, key, what, kind)
    model, told = from_hub(lambda n: model_class.from_pretrained(n, output_loading_info=True, **settings), name, key, what)
    missing = [n for n in told["missing_keys"] if not n.startswith(may_miss) and not n.endswith("position_ids")]
    wrong = [*missing, *(entry[0] for entry in told["mismatched_keys"])]
    if wrong:
        raise UserError(f"{key} is {name!r}, which lacks {len(wrong)} of its weights, or has them in another size: {wrong[0]}, ...")
    return model


def check_kind_on_hub(name: str, key: str, what: str, kind: str) -> None:
    """A look at the config alone; raises UserError."""
    from transformers import AutoConfig  # here: `validate` must not wait for transformers

    found = from_hub(AutoConfig.from_pretrained, name, key, what).model_type
    if found != kind:
        raise UserError(f"{key} is {name!r}, which holds a model of type {found!r}, but must be {what}.")


def is_path(name: str) -> bool:
    """Is it meant as a path? A hub name is ``name`` or ``owner/name``.

    Example:
        >>> is_path("facebook/opt-2.7b"), is_path("./opt-2.7b"), is_path("/models/opt-2.7b")
        (False, True, True)
    """
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()
