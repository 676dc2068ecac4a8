"""All connections of a run or of ``mine``, found by score, direction, verdict, words and marks, a page at a time."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from lavis_mafa.datasets.facts import TEXTS
from lavis_mafa.datasets.ids import pc
from lavis_mafa.errors import UserError
from lavis_mafa.tools.gallery import DIRECTIONS, VERDICTS, rows_of_all
from lavis_mafa.tools.run_files import Run

PAGE = 48
ORDERS = ("down", "up", "random")
MARKED = ("no", "yes", "accept", "reject")


@dataclass(frozen=True)
class Query:
    """What is looked for; None is anything. ``after`` is the place, in this order, of the last connection that was shown."""

    way: int | None = None
    low: float | None = None
    high: float | None = None
    kind: int | None = None
    words: str = ""
    marked: str | None = None
    order: str = "down"
    after: int = -1


class Connections:
    """n distinct candidates, the surest first; of several sightings of a pair the last one counts, since Con-D is frozen.

    Args:
        run: as ``open_runs`` gives it.

    Raises:
        UserError: it has no connections.

    Attributes:
        way, image, text, probability, positive: [n], direction, rows of the training data, Con-D's probability and its yes.
        kinds, kind: what became of a candidate (verdict of a run, outcome of ``mine``), and [n] which.
        rows: the training data, as far as they are still there.
    """

    def __init__(self, run: Run) -> None:
        if run.connections is None or not len(run.connections):
            raise UserError(f"{run.folder} has no connections to look at: a run records them while model.ecm.enabled is true.")
        (self.rows,) = rows_of_all([run])
        table = run.connections.sort_by([("epoch", "ascending"), ("step", "ascending")])
        way = pc.index_in(table["direction"].cast(pa.string()), value_set=pa.array(DIRECTIONS)).to_numpy()
        pairs = np.stack([way, table["image"].to_numpy(), table["text"].to_numpy()])
        _, last, times = np.unique(pairs[:, ::-1], axis=1, return_index=True, return_counts=True)
        last = len(table) - 1 - last
        best = np.argsort(-table["probability"].to_numpy()[last], kind="stable")
        self.times, table = times[best], table.take(last[best])
        self.way, self.image, self.text = pairs[:, last[best]]
        self.probability = table["probability"].to_numpy().astype(np.float64)
        self.epoch = table["epoch"].to_numpy()
        verdict = table["verdict"].cast(pa.string())
        self.verdict = pc.index_in(verdict, value_set=pa.array(VERDICTS)).to_numpy()
        self.positive = self.verdict == VERDICTS.index("positive")
        self.judged = table["caption"] if "caption" in table.column_names else None
        outcome = table["outcome"] if "outcome" in table.column_names else verdict
        named = [*VERDICTS[::-1]] if outcome is verdict else sorted(pc.unique(outcome).to_pylist(), key=lambda name: name != "mined")
        self.kind = pc.index_in(outcome, value_set=pa.array(named)).to_numpy()
        self.kinds = [(number, name) for number, name in enumerate(named) if (self.kind == number).any()]
        self.shuffled = np.random.default_rng(0).permutation(len(self))  # the same at every start: marks are of its first ones

    def __len__(self) -> int:
        return len(self.way)

    @property
    def images(self) -> set[int]:
        """The rows whose images are shown."""
        return {*self.image.tolist(), *self.text.tolist()}

    def find(self, query: Query, marks: dict[tuple[int, int], str]) -> dict[str, Any]:
        """A page of what is looked for: ``total``, ``items`` (see :meth:`item`), and ``after`` for the next page, None at the end."""
        fits = np.ones(len(self), dtype=bool)
        if query.way is not None:
            fits &= self.way == query.way
        if query.low is not None:
            fits &= self.probability >= query.low
        if query.high is not None:
            fits &= self.probability <= query.high
        if query.kind is not None:
            fits &= self.kind == query.kind
        if query.marked is not None:
            fits &= self._marked(query.marked, marks)
        for word in unicodedata.normalize("NFC", query.words).lower().split():
            fits &= pc.match_substring(self.words, word).to_numpy()
        place = np.arange(len(self))
        place = {"down": place, "up": place[::-1], "random": self.shuffled}[query.order]
        found = np.flatnonzero(fits[place])
        page = found[np.searchsorted(found, query.after, side="right") :]
        items = [self.item(number, marks) for number in place[page[:PAGE]].tolist()]
        return {"total": len(found), "items": items, "after": int(page[PAGE - 1]) if len(page) > PAGE else None}

    def item(self, number: int, marks: dict[tuple[int, int], str]) -> dict[str, Any]:
        """What a card shows of a connection; a row is image, caption, how many more captions it has, and row number, as on a report."""
        image, text = int(self.image[number]), int(self.text[number])
        of_image, of_text = self._row(image), self._row(text)
        if self.judged is not None:
            of_text[1:3] = [self.judged[number].as_py(), 0]
        own, found = (of_image, of_text) if self.way[number] == 0 else (of_text, of_image)
        score, times, epoch = round(float(self.probability[number]), 4), int(self.times[number]), int(self.epoch[number])
        parts: dict[str, Any] = {"number": number, "way": int(self.way[number]), "own": own, "found": found, "score": score}
        parts |= {"verdict": int(self.verdict[number]), "kind": dict(self.kinds)[int(self.kind[number])], "times": times}
        return {**parts, "epoch": epoch, "mark": marks.get((image, text))}

    def mark_row(self, number: int, mark: str) -> dict[str, Any]:
        """A row of a file of marks (:data:`lavis_mafa.tools.marks.SCHEMA`)."""
        image, text = int(self.image[number]), int(self.text[number])
        captions = self.rows.captions(text)
        caption = captions[0] if captions else None
        return {
            "image": image,
            "text": text,
            "direction": DIRECTIONS[self.way[number]],
            "mark": mark,
            "image_path": self.rows.image_name(image),
            "caption": caption if self.judged is None else self.judged[number].as_py(),
            "probability": float(self.probability[number]),
            "verdict": VERDICTS[self.verdict[number]],
        }

    @cached_property
    def words(self) -> pa.ChunkedArray:
        """[n] captions of both rows of a connection, to be searched."""
        parts = [part.table["caption"].cast(TEXTS) for part in self.rows.parts]
        captions = pa.chunked_array([chunk for part in parts for chunk in part.chunks], TEXTS)
        of_image, of_text = (
            pc.fill_null(pc.binary_join(captions.take(pa.array(rows, mask=rows >= len(captions))), "\n"), "")
            for rows in (self.image, self.text)
        )
        return pc.utf8_lower(pc.utf8_normalize(pc.binary_join_element_wise(of_image, of_text, "\n"), form="NFC"))

    def _row(self, index: int) -> list[Any]:
        captions = self.rows.captions(index)
        return [index, captions[0] if captions else None, max(0, len(captions) - 1), index]

    def _marked(self, which: str, marks: dict[tuple[int, int], str]) -> np.ndarray:
        said = {pair for pair, mark in marks.items() if which not in MARKED[2:] or mark == which}
        is_said = np.fromiter((pair in said for pair in zip(self.image.tolist(), self.text.tolist(), strict=True)), bool, len(self))
        return ~is_said if which == "no" else is_said
