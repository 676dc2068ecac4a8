"""``lavis-mafa explore``: look at a run's connections in a browser, and say which are right."""

from __future__ import annotations

import argparse
from pathlib import Path
from shlex import quote

from lavis_mafa.cli.options import count
from lavis_mafa.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Nobody but this machine's users can open the page; from elsewhere: ssh -L 8765:127.0.0.1:8765 MACHINE. "
        "The marks are for `lavis-mafa mine --reviewed` and `count-false-negatives --correction`."
    )
    add = parser.add_argument
    add("run_folder", type=Path, metavar="RUN", help="folder of a run, of `mine` or of `audit`")
    add("--port", type=_port, default=8765, metavar="N", help="of the address 127.0.0.1 (default: 8765; 0: any that is free)")
    add(
        "--marks",
        type=Path,
        metavar="FILE",
        help="where marks are kept, .parquet or .csv (default: RUN/marks.parquet, or those that `mine` chose with)",
    )
    add("--open", action="store_true", help="open a browser too")


def run(arguments: argparse.Namespace) -> int:
    from lavis_mafa.tools.explore import Explorer
    from lavis_mafa.tools.run_files import MINED, open_runs

    folder: Path = arguments.run_folder
    if (folder / "mine" / MINED).is_file():  # of an audit
        folder = folder / "mine"
    if (folder / "count.json").is_file():
        raise UserError(f"{folder} is a result of count-false-negatives, which keeps no pairs; `lavis-mafa mine` does.")
    (found,) = open_runs([folder])
    reviewed = (found.mined or {}).get("reviewed")
    before = None if reviewed is None else Path(reviewed["marks"])  # what is marked now is added to what the result was chosen with
    marks: Path = arguments.marks or (before if before is not None and before.is_file() else folder / "marks.parquet")
    if not marks.parent.is_dir():
        raise UserError(f"--marks is {marks}, but there is no folder {marks.parent}.")
    with Explorer(found, marks, arguments.port) as explorer:
        if explorer.connections.rows.problem:
            print(explorer.connections.rows.problem)
        marked = len(explorer.marks.words())
        print(f"{len(explorer.connections):,} connections, {marked:,} pairs marked: {explorer.url} (ctrl-C ends it)", flush=True)
        if arguments.open:
            import webbrowser

            webbrowser.open(explorer.url)
        try:
            explorer.serve_forever()
        except KeyboardInterrupt:  # the way to end it
            print(f"\nThe marks: {marks}" if marks.exists() else "\nNothing was marked.")
            if marks.exists() and (folder / MINED).is_file():
                print(f"Next: lavis-mafa mine --again {quote(str(folder))} --reviewed {quote(str(marks))} --output output/reviewed")
    return 0


def _port(text: str) -> int:
    port = count(text)
    if port > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; allowed: 0 to 65535")
    return port
