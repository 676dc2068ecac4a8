"""Mined connections for a page, as in the paper's Figures 7 and 8: anchor, its own positive, the new one with its ITM score."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from lavis_mafa.reports.run_files import Run
from lavis_mafa.reports.thumbnails import Thumbnails
from lavis_mafa.reports.training_rows import TrainingRows

DIRECTIONS = ("text for image", "image for text")
VERDICTS = ("negative", "ambiguous", "positive")
DISAGREEMENTS = 60  # of each kind


@dataclass(frozen=True)
class Candidate:
    """One image-text pair that Con-D was asked about, at its last sighting; image and text are rows of the training data."""

    run: int
    direction: int
    image: int
    text: int
    probability: float
    verdict: int
    epoch: int
    times: int
    true: bool | None = None


def distinct_candidates(run: int, connections: Any, rows: TrainingRows) -> list[Candidate]:
    """Every pair once, the surest first: Con-D is frozen, so its sightings differ by augmentation alone."""
    columns = {n: connections[n].to_numpy() for n in ("image", "text", "probability", "epoch", "step")}
    for name, words in (("direction", DIRECTIONS), ("verdict", VERDICTS)):
        columns[name] = np.array([words.index(word) for word in connections[name].to_pylist()], dtype=np.int64)
    latest_first = np.lexsort((columns["step"], columns["epoch"]))[::-1]
    pairs = np.stack([columns[n][latest_first] for n in ("direction", "image", "text")], axis=1)
    _, first, times = np.unique(pairs, axis=0, return_index=True, return_counts=True)
    chosen = {n: c[latest_first][first].tolist() for n, c in columns.items()}
    match = rows.matches(chosen["image"], chosen["text"])
    names = ("direction", "image", "text", "probability", "verdict", "epoch")
    columns_in_order: list[list[Any]] = [*(chosen[n] for n in names), times.tolist(), match]
    found = [Candidate(run, *row) for row in zip(*columns_in_order, strict=True)]
    return sorted(found, key=lambda c: -c.probability)


def gallery_data(runs: list[Run], data: list[TrainingRows], candidates: list[list[Candidate]], at_most: int) -> dict[str, Any]:
    """What the page's script shows.

    Args:
        runs: all runs. data: their training rows. candidates: of each run, the surest first; empty where none was recorded.
        at_most: how many go into the gallery, half of them from each direction.
    """
    everyone = sorted((c for found in candidates for c in found), key=lambda c: -c.probability)
    doubted = [c for c in everyone if c.verdict == 2 and c.true is False][:DISAGREEMENTS]
    missed = [c for c in reversed(everyone) if c.verdict == 0 and c.true][:DISAGREEMENTS]
    pack = _Pack(runs, data)
    lists = {"gallery": list(_alternating(everyone, at_most)), "doubted": doubted, "missed": missed}
    # pictures are bounded: those of the surest come first, then those of the disagreements
    order = [*lists["gallery"][:400], *doubted, *missed, *lists["gallery"][400:]]
    for candidate in order:
        pack.add(candidate)
    return {
        "lists": {name: [pack.add(c) for c in chosen] for name, chosen in lists.items()},
        "connections": pack.connections,
        "rows": pack.rows,
        "images": pack.thumbnails.entries,
        "runs": [run.name for run in runs],
        "problems": {run.name: rows.problem for run, rows in zip(runs, data, strict=True) if rows.problem},
        "candidates": len(everyone),
    }


def _alternating(candidates: list[Candidate], at_most: int) -> Iterator[Candidate]:
    """The surest of both directions in turn; where one has too few, the other fills up."""
    sides = ([c for c in candidates if c.direction == d] for d in range(2))
    both = (c for pair in zip_longest(*sides) for c in pair if c is not None)
    yield from (c for c, _ in zip(both, range(at_most), strict=False))


class _Pack:
    """Numbers rows, images and connections, so that each is in the page once."""

    def __init__(self, runs: list[Run], data: list[TrainingRows]) -> None:
        self.data = data
        # runs on the same data share their rows
        self.sources = [next(i for i, d in enumerate(data) if d is own) for own in data]
        self.thumbnails = Thumbnails()
        self.rows: list[list[Any]] = []
        self.connections: list[list[Any]] = []
        self.row_numbers: dict[tuple[int, int], int] = {}
        self.numbers: dict[Candidate, int] = {}

    def add(self, candidate: Candidate) -> int:
        if candidate not in self.numbers:
            c = candidate
            anchor, other = (c.image, c.text) if c.direction == 0 else (c.text, c.image)
            places = [self._row(c.run, anchor), self._row(c.run, other)]
            true = None if c.true is None else int(c.true)
            self.numbers[c] = len(self.connections)
            self.connections.append([c.direction, *places, round(c.probability, 4), c.verdict, true, c.epoch, c.times, c.run])
        return self.numbers[candidate]

    def _row(self, run: int, row: int) -> int:
        source = self.sources[run]
        if (source, row) not in self.row_numbers:
            captions = self.data[run].captions(row)
            image = self.thumbnails.add(self.data[run].image_path(row), f"row {row} of the training data")
            self.row_numbers[source, row] = len(self.rows)
            self.rows.append([image, captions[0] if captions else None, max(0, len(captions) - 1), row])
        return self.row_numbers[source, row]
