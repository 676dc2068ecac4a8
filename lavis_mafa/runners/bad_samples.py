"""Counts what could not be read, lists it in ``bad_samples.jsonl``, and stops a run that has too much of it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from lavis_mafa.common.errors import UserError

logger = logging.getLogger(__name__)


class BadSamples:
    """Args: the file to append to, and the share of samples seen above which the run stops (checked from 100 samples on)."""

    def __init__(self, path: Path, max_share: float) -> None:
        self.path, self.max_share = path, max_share
        self.count = self.seen = 0
        self.listed: set[int] = set()

    def add(self, samples: dict[str, Any], batch_size: int) -> None:
        """Take ``bad_samples`` out of a batch and account for it.

        Raises:
            UserError: the share is exceeded, or nothing of the batch could be read.
        """
        bad = samples.pop("bad_samples", [])
        self.seen += batch_size
        self.count += len(bad)
        new = [b for b in bad if b["index"] not in self.listed]
        if new:
            if not self.listed:
                logger.warning("a sample cannot be read, its neighbour stands in: %s (all: %s)", new[0]["reason"], self.path)
            self.listed.update(b["index"] for b in new)
            with open(self.path, "a") as file:
                file.writelines(json.dumps(b) + "\n" for b in new)
        if not samples:
            raise UserError(f"no sample of a whole batch could be read, the first because of {bad[0]['reason']} (all: {self.path}).")
        if self.seen >= 100 and self.count > self.max_share * self.seen:
            raise UserError(
                f"{self.count} of {self.seen} samples could not be read, more than run.max_bad_share ({self.max_share:g}); "
                f"they are listed in {self.path}."
            )
