"""Pairs and connections as pandas DataFrames, whose numbers of rows lead to the images."""

from __future__ import annotations

import html
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from lavis_mafa.config.data import AnnotationFile, files_of
from lavis_mafa.datasets.annotations import read_annotations
from lavis_mafa.datasets.ground_truth import GroundTruth
from lavis_mafa.datasets.images import load_rgb, thumbnail
from lavis_mafa.errors import UserError
from lavis_mafa.tools.gallery import DIRECTIONS, VERDICTS, TrainingRows, distinct_candidates, rows_of_all, webp_url
from lavis_mafa.tools.run_files import open_runs
from lavis_mafa.tools.training_data import Annotated, read_annotated


@dataclass(frozen=True)
class Data:
    """Image-text pairs of files, or the training data of a YAML; N rows.

    Attributes:
        where: the fields of :class:`lavis_mafa.tools.passes.Pass` that name them.
    """

    rows: TrainingRows = field(repr=False)
    where: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def frame(self) -> pd.DataFrame:
        """``image_path`` and ``caption`` of each row; of a row with several captions the first one, and all of them as ``captions``."""
        parts = [
            {"image_path": part.table["image"].to_pylist(), "captions": part.table["caption"].to_pylist()} for part in self.rows.parts
        ]
        frame = pd.concat([pd.DataFrame(part) for part in parts], ignore_index=True)
        frame.insert(1, "caption", frame["captions"].str[0])
        return frame if (frame["captions"].str.len() > 1).any() else frame.drop(columns="captions")

    def image(self, row: int, side: int | None = None) -> Image.Image:
        """The image of a row, fitted into ``side`` pixels; raises UserError: there is no such row, or it cannot be read."""
        return _image(self.rows, row, side)


def _image(rows: TrainingRows, row: int, side: int | None) -> Image.Image:
    source = rows.image_path(row)
    if source is None:
        raise UserError(rows.problem or f"there is no row {row}; allowed: 0 to {len(rows) - 1}.")
    try:
        return load_rgb(source) if side is None else thumbnail(source, side)
    except OSError as error:
        raise UserError(f"{source}: {' '.join(str(error).split())}.") from error


def open_files(files: Sequence[Path], images: Path | None, columns: Mapping[str, str]) -> Data:
    """Pairs of annotation files; without ``images`` their image paths must be absolute. Raises UserError."""
    if images is not None and not images.is_dir():
        raise UserError(f"images is {str(images)!r}, but there is no such folder.")
    named = [AnnotationFile(file, columns=columns) for path in files for file in files_of(path, "data")]
    table = read_annotations(named, allow_absolute_paths=images is None)
    truth = GroundTruth.from_table(table)  # now: what is wrong with it is told here
    rows = TrainingRows([Annotated((images or Path()).absolute(), table, lambda: truth)])
    return Data(rows, {"annotations": files, "images": images, "columns": columns})


def open_yaml(name: str, options: Sequence[str]) -> Data:
    """The training pairs of a YAML; raises UserError."""
    from lavis_mafa.runners import job  # here: of LAVIS, which files of pairs do not need

    _, cfg = job.prepare(name, list(options), files=False, device=False)
    read = (read_annotated(str(key), block) for key, block in cfg.datasets_cfg.items())
    return Data(TrainingRows([part for part in read if part is not None]), {"cfg_path": name, "options": options})


# --- connections --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Connections:
    """Image-text pairs that Con-D, or another judge, was asked about.

    Attributes:
        frame: a row a connection, the surest first: ``direction`` (what was found for what), ``probability``, ``verdict`` (positive,
            ambiguous, negative), ``image_path`` and ``caption`` of the pair that was judged, ``own_caption`` (the image's) and
            ``own_image_path`` (the caption's), ``true`` (does it match, where that is known), ``epoch`` of the last sighting (-1 of
            mining), ``times`` it was seen, and ``image`` and ``text``: rows of the training data.
        rows: the training data.
    """

    frame: pd.DataFrame
    rows: TrainingRows = field(repr=False)

    def __len__(self) -> int:
        return len(self.frame)

    def image(self, row: int, side: int | None = None) -> Image.Image:
        """The image of a row of the training data (``image`` or ``text`` of the frame), fitted into ``side`` pixels; raises UserError.

        Example:
            >>> found.frame.head(8)["image"].map(found.image)  # as a column of PIL images
        """
        return _image(self.rows, row, side)

    def show(self, frame: pd.DataFrame | None = None, most: int = 20) -> Html:
        """The first ``most`` pairs of ``frame`` (a part of this one, or all of it) as a table with images, for a notebook; one that
        was found from both sides is there once."""
        heads = ("image", "caption", "probability", "verdict", "image's own caption", "caption's own image")
        lines = ["".join(f"<th>{head}</th>" for head in heads)]
        for row in (self.frame if frame is None else frame).drop_duplicates(["image", "text"]).head(most).to_dict("records"):
            texts = [_text(row["caption"]), f"{row['probability']:.3f}", row["verdict"], _text(row["own_caption"])]
            cells = [self._thumbnail(row["image"]), *texts, self._thumbnail(row["text"])]
            lines.append("".join(f"<td style='text-align: left'>{cell}</td>" for cell in cells))
        return Html(f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>")

    def _repr_html_(self) -> str:
        return self.show()._repr_html_()

    def _thumbnail(self, row: int) -> str:
        try:
            return f"<img src='{webp_url(self.image(row))}'>"
        except UserError as error:
            return _text(error)


def _text(value: Any) -> str:
    return html.escape(str(value))


class Html(str):
    """A table that a notebook shows."""

    def _repr_html_(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return f"Html({len(self):,} characters)"


def read_connections(folder: Path) -> Connections:
    """Those that a run recorded, or that ``mine`` found; raises UserError: there are none."""
    (run,) = open_runs([folder])
    if run.connections is None:
        raise UserError(f"{folder} has no connections/*.parquet; they are written while model.ecm.enabled is true.")
    (rows,) = rows_of_all([run])
    if rows.problem is not None:
        warnings.warn(f"{folder}: {rows.problem}", stacklevel=3)

    def caption(row: int) -> str | None:
        return next(iter(rows.captions(row)), None)

    def path(row: int) -> str | None:
        return None if (source := rows.image_path(row)) is None else str(source)

    records = [
        {
            "direction": DIRECTIONS[one.direction],
            "probability": one.probability,
            "verdict": VERDICTS[one.verdict],
            "image_path": path(one.image),
            "caption": caption(one.text) if one.caption is None else one.caption,
            "own_caption": caption(one.image),
            "own_image_path": path(one.text),
            "true": one.true,
            "epoch": one.epoch,
            "times": one.times,
            "image": one.image,
            "text": one.text,
        }
        for one in distinct_candidates(0, run.connections, rows)
    ]
    columns = "direction probability verdict image_path caption own_caption own_image_path true epoch times image text".split()
    return Connections(pd.DataFrame(records, columns=columns), rows)
