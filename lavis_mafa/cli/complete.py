"""Tab completion (docs/install.md), by argcomplete where it is installed: commands, flags, choices, names of YAMLs, files."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

YAMLS = ("cfg_path", "yaml", "name", "base")  # arguments that are YAMLs: a file, or a name that `lavis-mafa ls` shows


def complete(build: Callable[[str], argparse.ArgumentParser]) -> None:
    """Answer the shell that asks what its line may go on with, and end the process; without argcomplete nothing happens.

    Args:
        build: the parser, with the arguments of one command.
    """
    try:
        import argcomplete
        from argcomplete.lexers import split_line
    except ImportError:
        return
    before = split_line(os.environ["COMP_LINE"], int(os.environ["COMP_POINT"]))[3]
    words = before[int(os.environ["_ARGCOMPLETE"]) :]  # after `lavis-mafa`, `python script` or `python -m lavis_mafa`
    parser = build(words[0] if words else "")
    _name_yamls(parser, argcomplete.FilesCompleter(("yaml", "yml")))
    argcomplete.autocomplete(parser, always_complete_options="long")


def _name_yamls(parser: argparse.ArgumentParser, files: Callable[..., Any]) -> None:
    def names(prefix: str, **others: Any) -> list[str]:
        from lavis_mafa.config.read import project_files

        return [*files(prefix, **others), *project_files()]

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in set(action.choices.values()):
                _name_yamls(command, files)
        elif action.dest in YAMLS:
            action.completer = names  # type: ignore[attr-defined]
