"""Saves a checkpoint over and over and is killed at another moment each time: at every line and every write of a save.

Prints one line of JSON for each moment: what the newest good checkpoint holds after it.
"""

from __future__ import annotations

import builtins
import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from lavis_mafa import weights
from lavis_mafa.runners.checkpoint import CheckpointFolder, rank_file
from lavis_mafa.runners.resume import newest_good

TRACED = ("runners/checkpoint.py", "lavis_mafa/weights.py", "lavis_mafa/files.py")


class Doom:
    """Kills this process, as a power cut would, at the chosen moment."""

    def __init__(self, moment: int) -> None:
        self.moment = moment

    def __call__(self, *_: Any) -> Any:
        self.moment -= 1
        if self.moment == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return self

    def trace(self, frame: Any, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.endswith(TRACED):
            return None
        if event == "line":
            self()
        return self.trace

    def open(self, *arguments: Any, **named: Any) -> Any:
        file = builtins.open(*arguments, **named)
        if "w" not in file.mode:
            return file
        write = file.write

        class Doomed:
            """Half of what is written is on the disk when the end comes."""

            mode = file.mode

            def write(_, data: Any) -> int:
                view = memoryview(data)
                write(view[: len(view) // 2])
                file.flush()
                self()
                return len(view) // 2 + write(view[len(view) // 2 :])

            def __getattr__(_, name: str) -> Any:
                return getattr(file, name)

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: Any) -> None:
                file.close()

        return Doomed()


def content(value: int) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"model": {"w": torch.full((1000,), float(value))}, "optimizer": {}, "epoch": value}, {"queue": torch.full((500,), value)}


def save(folder: Path, value: int, keep: int) -> None:
    checkpoints = CheckpointFolder(folder, keep)
    model, state = content(value)
    checkpoints.save(str(value), model, lambda: state, rank=0)
    checkpoints.wait()


def doomed_save(folder: Path, moment: int, keep: int) -> bool:
    """Whether the save was over before its moment came."""
    child = os.fork()
    if child == 0:
        doom = Doom(moment)
        weights.open = doom.open  # type: ignore[attr-defined]
        threading.settrace(doom.trace)
        save(folder, 1, keep)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def main(folder: Path, keep: int) -> None:
    moment, over = 0, False
    while not over:
        moment += 1
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        save(folder, 0, keep)
        over = doomed_save(folder, moment, keep)
        path = newest_good(folder)
        found = None
        if path is not None:
            model = torch.load(path, weights_only=True)["model"]["w"]
            state = torch.load(rank_file(path, 0), weights_only=True)["queue"]
            found = [path.stem.split("_")[1], model.unique().tolist(), state.unique().tolist()]
        print(json.dumps({"moment": moment, "over": over, "found": found, "files": sorted(os.listdir(folder))}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
