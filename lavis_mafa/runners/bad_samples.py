"""Counts what could not be read, lists it in ``bad_samples.jsonl``, and stops a run that has too much of it."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from lavis_mafa.distributed import rank
from lavis_mafa.errors import UserError

logger = logging.getLogger(__name__)

HINT = "`lavis-mafa check-data` finds all of them, and writes annotations without them."


class BadSamples:
    """The bad samples of one rank, and the file that all ranks list theirs in, each sample once.

    A line is ``{"index": ..., "reason": ..., "image": ..., "rank": ...}``, ``image`` where the data set tells it.

    Args:
        path: the file to append to.
        max_share: share of this rank's samples seen above which the run stops (checked from 100 samples on).

    Attributes:
        count: bad samples so far; one that came in several epochs counts each time, as it does in ``seen``.
        seen: all samples so far.
    """

    def __init__(self, path: Path, max_share: float) -> None:
        self.path, self.max_share = path, max_share
        self.count = self.seen = 0
        self.own: list[dict[str, Any]] = []  # what this rank listed
        self.listed: set[int] = set()  # by whichever rank
        self._read = 0  # bytes of the file that are in `listed`

    def add(self, samples: dict[str, Any], batch_size: int) -> None:
        """Take ``bad_samples`` out of a batch and account for it.

        Raises:
            UserError: the share is exceeded, or nothing of the batch could be read.
        """
        bad = samples.pop("bad_samples", [])
        self.seen += batch_size
        self.count += len(bad)
        if bad:
            if not self.own:
                logger.warning("a sample cannot be read, its neighbour stands in: %s (all: %s)", bad[0]["reason"], self.path)
            self.own += self._list([{**sample, "rank": rank()} for sample in bad])
        if not samples:
            raise UserError(
                f"no sample of a whole batch could be read, the first because of {bad[0]['reason']} (all: {self.path}). {HINT}"
            )
        if self.seen >= 100 and self.count > self.max_share * self.seen:
            raise UserError(
                f"{self.count} of {self.seen} samples could not be read, more than run.max_bad_share ({self.max_share:g}); "
                f"they are listed in {self.path}. {HINT}"
            )

    def state_dict(self) -> dict[str, Any]:
        """``count``, ``seen`` and ``listed``, this rank's lines: whole numbers, texts, lists and dicts."""
        return {"count": self.count, "seen": self.seen, "listed": [dict(sample) for sample in self.own]}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on counting where a run was stopped. What it had listed is listed here too: a resumed run has a folder of its own."""
        if state is None:  # of a checkpoint that was written without
            return
        self.count, self.seen = state["count"], state["seen"]
        self.own = [dict(sample) for sample in state["listed"]]
        self._list(self.own)

    def _list(self, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Append those that are not in the file yet, and return them."""
        self._read_on()
        new = [sample for sample in samples if sample["index"] not in self.listed]
        for sample in new:
            self._append(json.dumps(sample) + "\n")
        self._read_on()
        return new

    def _append(self, line: str) -> None:
        """One write a line: what other ranks append at the same time comes before or after it."""
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    def _read_on(self) -> None:
        """Learn what was listed since; in another epoch a sample may have been on another rank."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                self.listed.add(json.loads(line)["index"])
