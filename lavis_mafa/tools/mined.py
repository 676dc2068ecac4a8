"""A finished result of ``mine``, opened to choose from again: its candidates are judged, so that no model is asked."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lavis_mafa.datasets.annotations import image_keys, read_annotations
from lavis_mafa.datasets.ground_truth import GroundTruth
from lavis_mafa.errors import UserError
from lavis_mafa.tools.mine import Rules
from lavis_mafa.tools.run_files import MINED

ORIGIN = ("cfg_path", "options", "con_d", "given")


class Mined:
    """The data that were searched, as a data set without images, and what was found in them.

    Raises:
        UserError: ``folder`` holds no whole result.

    Attributes:
        candidates: as :func:`lavis_mafa.tools.mine.judged` writes them. bad: samples that could not be read. rules: which chose.
        settings, origin: what ``mine.json`` says of the pass, and of where its data and judge are from.
    """

    text_processor = str

    def __init__(self, folder: Path) -> None:
        try:
            results = json.loads((folder / MINED).read_text(encoding="utf-8"))
            self.settings, self.judge_name, count, images = (results[name] for name in ("settings", "judge", "data", "images"))
            self.origin = {name: results[name] for name in ORIGIN}
            self.candidates = pq.read_table(folder / "connections.parquet").drop_columns(["outcome"])
            bad = folder / "bad_samples.jsonl"
            self.bad = [json.loads(line) for line in bad.read_text(encoding="utf-8").splitlines()] if bad.is_file() else []
        except (pa.ArrowInvalid, OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--again: {folder} holds no whole result of mine: {' '.join(str(error).split())}") from error
        self.rules = Rules(**{field.name: self.settings[field.name] for field in fields(Rules) if field.name in self.settings})
        self.table = read_annotations([folder / "pairs.parquet"], allow_absolute_paths=True).slice(0, count)
        self.root = None if images is None else Path(images)
        self.vis_root = self.root or folder  # absolute paths start from nowhere
        self.image_keys = image_keys(self.table)
        self.truth = GroundTruth.from_table(self.table)
        self.concepts = None if self.truth is None else self.truth.images(self.table)

    def __len__(self) -> int:
        return int(self.table.num_rows)
