"""When a caption says something: the one rule that training and ``lavis-mafa check-data`` share."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import Any

from lavis_mafa.common.errors import EmptyCaption

SHOWN = 60  # characters of a caption in a message


def clean_caption(process: Callable[[str], str], caption: str | None) -> str:
    """What the text processor makes of a caption.

    Args:
        process: str -> str; a ``prompt`` that it puts before every caption does not count.
        caption: as it was written.

    Raises:
        EmptyCaption: it is null, or nothing but punctuation, blanks and control characters is left.

    Example:
        >>> clean_caption(str.lower, "A Dog")
        'a dog'
    """
    if caption is None:
        raise EmptyCaption("The caption is null.")
    try:
        text = process(caption)
    except EmptyCaption:  # its message may hold ten thousand words
        text = ""
    if not says_something(text, process):
        raise EmptyCaption(f"The caption {shortened(caption)} holds no word.")
    return text


def says_something(text: str, process: Any) -> bool:
    """Whether more than punctuation, blanks and control characters is left of a caption that ``process`` made, its prompt aside."""
    return any(map(_is_seen, text.removeprefix(getattr(process, "prompt", ""))))


def shortened(caption: str) -> str:
    """Its representation (control characters visible), cut after ``SHOWN`` characters."""
    return repr(caption if len(caption) <= SHOWN else caption[:SHOWN] + "…")


def _is_seen(character: str) -> bool:
    """A letter, digit, accent or symbol of any script, not punctuation, a blank or a control character."""
    return unicodedata.category(character)[0] in "LMNS"
