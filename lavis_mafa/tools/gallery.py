"""Mined connections for a page, as in the paper's Figures 7 and 8: anchor, its own positive, the new one with its ITM score.

A recorded connection names rows of the training data by their numbers. Captions and images are read again from the data sets that the
run's ``config.yaml`` names, as far as they are still there: without them the page shows the numbers.
"""

from __future__ import annotations

import base64
import io
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, islice, zip_longest
from pathlib import Path
from typing import Any

import pyarrow as pa
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image, ImageFile

from lavis_mafa.datasets.images import thumbnail
from lavis_mafa.datasets.stored import Source
from lavis_mafa.errors import UserError
from lavis_mafa.files import digest
from lavis_mafa.progress import Bar
from lavis_mafa.tools.run_files import Run
from lavis_mafa.tools.training_data import Annotated, read_annotated

DIRECTIONS = ("text for image", "image for text")
VERDICTS = ("negative", "ambiguous", "positive")
DISAGREEMENTS = 60  # of each kind
SIDE = 96  # pixels of a thumbnail
AS_IT_IS = 8_000  # bytes; a file that is small enough already is not encoded again
FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}


@dataclass
class TrainingRows:
    """All rows a run was trained on, by global index. An index beyond them has no caption and no path.

    Attributes:
        parts: the data sets, in the order of the YAML. problem: why there are none, or that they do not fit; None if all is well.
    """

    parts: list[Annotated]
    problem: str | None = None

    def __post_init__(self) -> None:
        self.starts = [0, *accumulate(map(len, self.parts))]

    def __len__(self) -> int:
        return self.starts[-1]

    def captions(self, index: int) -> list[str]:
        """As they were written; which of several a training step drew is not recorded."""
        place = self._find(index)
        return place[0].table["caption"][place[1]].as_py() if place else []

    def image_path(self, index: int) -> Source | None:
        place = self._find(index)
        return place[0].image(place[1]) if place else None

    def image_name(self, index: int) -> str | None:
        """The path as it was written."""
        place = self._find(index)
        return place[0].table["image"][place[1]].as_py() if place else None

    def matches(self, images: list[int], texts: list[int]) -> list[bool | None]:
        """[P] rows of images and of texts -> whether they truly match; None where that is not known.

        Of a row with several captions it is known only if all of them match, or none. Two data sets have two truths, which number
        their concepts differently, so nothing is known of their pairs.
        """
        part = self.parts[0] if len(self.parts) == 1 else None
        if part is None or part.truth is None or (concepts := part.truth.images(part.table)) is None:
            return [None] * len(images)
        keys = {row: [part.truth.text_key(caption) for caption in self.captions(row)] for row in set(texts)}
        asked = [(p, i, key) for p, (i, t) in enumerate(zip(images, texts, strict=True)) if i < len(self) for key in keys[t]]
        found: list[set[bool]] = [set() for _ in images]
        if asked:
            import torch

            place, image, key = torch.tensor(asked).T
            known, match = part.truth.knows(concepts[image], key), part.truth.matches(concepts[image], key)
            for p, true in zip(place[known].tolist(), match[known].tolist(), strict=True):
                found[p].add(true)
        return [answers.pop() if len(answers) == 1 else None for answers in found]

    def _find(self, index: int) -> tuple[Annotated, int] | None:
        if not 0 <= index < len(self):
            return None
        part = bisect_right(self.starts, index) - 1
        return self.parts[part], index - self.starts[part]


def read_training_rows(run: Run) -> TrainingRows:
    """What a run was trained on, as far as it is still there; a problem is told, not raised."""
    try:
        read = (read_annotated(str(k), block, _started_in(run)) for k, block in (run.config.get("datasets") or {}).items())
        rows = TrainingRows([part for part in read if part is not None])
    except (UserError, OSError, ValueError, KeyError, AttributeError, OmegaConfBaseException) as error:
        return TrainingRows([], f"The training data could not be read again: {error}")
    if not rows.parts:
        rows.problem = "config.yaml names no training data, so captions and images are not known."
    return rows


def _started_in(run: Run) -> Path:
    """The folder that a run's relative paths start from: the run is at ``<there>/<run.output_dir>/<job id>``."""
    output, parent = Path(str(OmegaConf.select(run.config, "run.output_dir") or "output")), run.folder.resolve().parent
    wanted = [part for part in output.parts if part != "."]
    if not output.is_absolute() and ".." not in wanted and list(parent.parts[-len(wanted) :]) == wanted:
        return Path(*parent.parts[: len(parent.parts) - len(wanted)])
    return Path.cwd()


def rows_of_all(runs: list[Run]) -> list[TrainingRows]:
    """Of each run; runs on the same data share them. Other data have other captions, which must not be shown as if they were right."""
    known: dict[str, TrainingRows] = {}
    found = []
    for run in runs:
        if run.connections is None:
            found.append(TrainingRows([]))
            continue
        key = f"{_started_in(run)} {run.config.get('datasets')}"
        if key not in known:
            known[key] = read_training_rows(run)
        rows = known[key]
        highest = max((int(run.connections[name].to_numpy().max(initial=-1)) for name in ("image", "text")), default=-1)
        if rows.problem is None and highest >= len(rows):
            rows = TrainingRows([], f"The data have {len(rows)} rows now, but the run saw row {highest}: they changed since then.")
        found.append(rows)
    return found


# --- connections --------------------------------------------------------------------------------------------------------


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
    caption: str | None = None  # that was judged; None where a row may have several, of which it is not known


def distinct_candidates(run: int, connections: pa.Table, rows: TrainingRows) -> list[Candidate]:
    """Every pair once, the surest first: Con-D is frozen, so its sightings differ by augmentation alone."""
    last: dict[tuple[int, int, int], dict[str, Any]] = {}
    times: Counter[tuple[int, int, int]] = Counter()
    for sighting in connections.sort_by([("epoch", "ascending"), ("step", "ascending")]).to_pylist():
        pair = DIRECTIONS.index(sighting["direction"]), sighting["image"], sighting["text"]
        last[pair] = sighting
        times[pair] += 1
    pairs = sorted(last)
    match = rows.matches([image for _, image, _ in pairs], [text for _, _, text in pairs])
    found = []
    for pair, true in zip(pairs, match, strict=True):
        seen = last[pair]
        said = seen["probability"], VERDICTS.index(seen["verdict"]), seen["epoch"], times[pair]
        found.append(Candidate(run, *pair, *said, true, seen.get("caption")))
    return sorted(found, key=lambda c: -c.probability)


def gallery_data(runs: list[Run], data: list[TrainingRows], candidates: list[list[Candidate]], at_most: int) -> dict[str, Any]:
    """What the page's script shows: ``at_most`` connections in the gallery, half of them from each direction, and disagreements.

    ``data`` and ``candidates``, the surest first, are those of each run.
    """
    everyone = sorted((c for found in candidates for c in found), key=lambda c: -c.probability)
    doubted = [c for c in everyone if c.verdict == 2 and c.true is False][:DISAGREEMENTS]
    missed = [c for c in reversed(everyone) if c.verdict == 0 and c.true][:DISAGREEMENTS]
    lists = {"gallery": list(islice(_alternating(everyone), at_most)), "doubted": doubted, "missed": missed}
    connections, rows, images, sets = _Once(), _Once(), Thumbnails(), _Once()

    def row(run: int, index: int, judged: str | None = None) -> int:
        captions = data[run].captions(index) if judged is None else [judged]
        path = data[run].image_path(index)
        image = images.add(path, f"row {index} of the training data")
        # runs on the same data share their rows
        entry = [image, captions[0] if captions else None, max(0, len(captions) - 1), index, data[run].image_name(index)]
        return rows.number((id(data[run]), index, judged), entry)

    def add(c: Candidate) -> int:
        places = [row(c.run, c.image), row(c.run, c.text, c.caption)][:: 1 if c.direction == 0 else -1]  # the anchor first
        true = None if c.true is None else int(c.true)
        return connections.number(c, [c.direction, *places, round(c.probability, 4), c.verdict, true, c.epoch, c.times, c.run])

    # pictures are bounded: those of the surest come first, then those of the disagreements
    ordered = (*lists["gallery"][:400], *doubted, *missed, *lists["gallery"][400:])
    for candidate in Bar(ordered, desc="pictures", unit="connection", delay=1):
        add(candidate)
    return {
        "lists": {name: [add(c) for c in chosen] for name, chosen in lists.items()},
        "connections": connections.entries,
        "rows": rows.entries,
        "images": images.entries,
        "runs": [run.name for run in runs],
        "sets": [sets.number(id(rows), None) for rows in data],  # runs on the same data have the same number
        # of marks that a browser keeps: a folder of the same name may come to hold other data
        "key": digest([[str(run.folder.resolve()), *_some_rows(of)] for run, of in zip(runs, data, strict=True)]),
        "problems": {run.name: of.problem for run, of in zip(runs, data, strict=True) if of.problem},
        "candidates": len(everyone),
    }


def _some_rows(rows: TrainingRows) -> list[Any]:
    """What tells data from others: how many rows, and three of them."""
    return [len(rows), *((rows.image_name(row), rows.captions(row)) for row in (0, len(rows) // 2, len(rows) - 1))]


def _alternating(candidates: list[Candidate]) -> Iterator[Candidate]:
    """The surest of both directions in turn; where one has too few, the other fills up."""
    sides = ([c for c in candidates if c.direction == direction] for direction in range(2))
    return (c for pair in zip_longest(*sides) for c in pair if c is not None)


class _Once:
    """A list of the page that has each thing once, and the numbers by which others refer to it."""

    def __init__(self) -> None:
        self.entries: list[Any] = []
        self.numbers: dict[Any, int] = {}

    def number(self, key: Any, entry: Any) -> int:
        if key not in self.numbers:
            self.numbers[key] = len(self.entries)
            self.entries.append(entry)
        return self.numbers[key]


class Thumbnails(_Once):
    """Images in the order they are asked for; the first ones are embedded, the others named by their path.

    Args:
        at_most: how many are embedded. at_most_bytes: and how long all of their data URLs may be.
    """

    def __init__(self, at_most: int = 1500, at_most_bytes: int = 10_000_000) -> None:
        super().__init__()
        self.left, self.left_bytes = at_most, at_most_bytes

    def add(self, path: Source | None, otherwise: str) -> int:
        """The image's number; ``otherwise`` says what it is where there is no path."""
        name = str(path) if path is not None else otherwise
        return self.numbers[name] if name in self.numbers else self.number(name, self._entry(path, name))

    def _entry(self, path: Source | None, name: str) -> dict[str, Any]:
        if path is None:
            return {"name": name, "problem": "image not known"}
        if not path.is_file():
            return {"name": name, "problem": "image is missing"}
        if self.left > 0:
            try:
                url = _data_url(path)
            except (OSError, Image.DecompressionBombError, SyntaxError, ValueError):
                return {"name": name, "problem": "image is unreadable"}
            if len(url) <= self.left_bytes:
                self.left, self.left_bytes = self.left - 1, self.left_bytes - len(url)
                return {"src": url}
            self.left = 0
        return {"name": name, "problem": "not embedded"}


def _data_url(path: Source) -> str:
    """The image as a data URL, fitted into ``SIDE`` pixels."""
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # LAVIS sets it for the whole program
    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        kind, small = image.format or "", max(image.size) <= SIDE and len(content) <= AS_IT_IS
        if small and kind in FORMATS:
            image.load()  # of a torn one this says so
            return f"data:{FORMATS[kind]};base64," + base64.b64encode(content).decode()
    return webp_url(thumbnail(path, SIDE))


def webp_url(picture: Image.Image) -> str:
    """A picture as a data URL, fitted into ``SIDE`` pixels, which changes the one given."""
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=72, method=2)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
