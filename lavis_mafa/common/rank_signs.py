"""Signs of life of the ranks of a job, and what they say about who died and who holds the others up."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

RUNNING, DONE, STOPPED, FAILED, LOST = "running", "done", "stopped", "failed", "lost"
AGAIN = "Start again from the last checkpoint with --resume auto."
NAMED = 4  # ranks in one message


@dataclass(frozen=True)
class Sign:
    """What a rank says about itself every few seconds."""

    rank: int
    host: str
    place: str  # where its process number means something: host and container
    pid: int
    beat: int = 0  # number of this sign
    progress: int = 0  # how many marks it passed; ranks pass the same ones in the same order
    phase: str = "starting"  # the last of them
    where: str = ""  # file, line and function it is in
    still: float = 0.0  # seconds it has been at that very place
    state: str = RUNNING  # DONE; STOPPED: was asked to; FAILED: of its own error; LOST: for another's

    @classmethod
    def own(cls, rank: int) -> Sign:
        """The first sign of this process."""
        return cls(rank, socket.gethostname(), own_place(), os.getpid())

    @classmethod
    def read(cls, text: bytes) -> Sign:
        return cls(**json.loads(text))

    def write(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @property
    def name(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"

    @property
    def doing(self) -> str:
        return f"{self.phase}; at {self.where}" if self.where else self.phase

    @property
    def process_is_gone(self) -> bool:
        """Whether this machine knows that the process ended; a rank elsewhere can only fall silent."""
        if self.place != own_place():
            return False
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"  # ended, but not collected
        except (FileNotFoundError, ProcessLookupError):
            return Path("/proc/self/stat").exists()


def own_place() -> str:
    """Host and, where there is such a thing, the container's numbering of processes."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def hang(signs: Sequence[Sign], seconds: float) -> str | None:
    """The message where no running rank has moved for ``seconds``, else None.

    Example:
        >>> hang([Sign(0, "a", "a", 7, progress=9, still=60.0), Sign(1, "b", "b", 8, progress=8, still=61.0)], 60.0)
        'no rank has moved for 60 s. rank 1 (b, pid 8) holds the others up: starting. Rank 0 waits: starting.'
    """
    running = [sign for sign in signs if sign.state == RUNNING]
    if not running or min(sign.still for sign in running) < seconds:
        return None
    return f"no rank has moved for {min(sign.still for sign in running):.0f} s. {who_is_behind(running)}"


def who_is_behind(running: Sequence[Sign]) -> str:
    """Who passed the fewest marks, and what it does; in a collective all others wait for it.

    Where all passed the same ones, each rank's place is told.
    """
    fewest = min(sign.progress for sign in running)
    behind = [sign for sign in running if sign.progress == fewest]
    waiting = [sign for sign in running if sign.progress > fewest]
    more = f" and {len(behind) - NAMED} more" if len(behind) > NAMED else ""
    if not waiting:
        return f"All passed the same marks: {', '.join(f'{sign.name} is {sign.doing}' for sign in behind[:NAMED])}{more}."
    names = ", ".join(sign.name for sign in behind[:NAMED]) + more
    verb = "holds" if len(behind) == 1 else "hold"
    return f"{names} {verb} the others up: {behind[0].doing}. Rank {waiting[0].rank} waits: {waiting[0].doing}."


def death(sign: Sign, silent: float | None = None) -> str:
    """The message about a rank that is no more, or has not been heard of for ``silent`` seconds."""
    if sign.state == FAILED:
        return f"{sign.name} ended with an error while {sign.phase}; its own message says which."
    if sign.state == STOPPED:
        return f"{sign.name} was stopped while {sign.phase}."
    if silent is None:
        return f"{sign.name} died, last seen {sign.phase}. The system's log may say why (out of memory?)."
    return f"{sign.name} died or cannot be reached: last sign of life {silent:.0f} s ago, {sign.phase}."
