"""How we speak to a user whose input is wrong: one message, no traceback, exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave us. The command line prints its message alone and exits with code 2.

    The message names the key or file, the value, what is allowed and, where there is one, the nearest right name.
    """


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """`` Did you mean 'nearest'?`` or an empty string.

    Example:
        >>> did_you_mean("treshold", ["threshold", "enabled"])
        " Did you mean 'threshold'?"
    """
    nearest = difflib.get_close_matches(name, list(allowed), n=1)
    return f" Did you mean '{nearest[0]}'?" if nearest else ""
