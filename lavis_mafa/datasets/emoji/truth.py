"""The truth of a built emoji folder."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from lavis_mafa.datasets.ground_truth import GroundTruth
from lavis_mafa.datasets.ids import pc
from lavis_mafa.errors import UserError


def load_emoji_truth(folder: str | Path, max_concepts: int | None = None) -> GroundTruth:
    """Which drawing matches which text, with the kind of every text (name, alias, keyword, group), from what ``build_emoji`` wrote.

    ``max_concepts`` keeps the first ones only, which are a fair sample. UserError if the folder holds no emoji data.
    """
    table = read_truth(folder)
    names = first_concepts(table, max_concepts)
    table = table.filter(pc.is_in(table["concept"], value_set=names))
    kinds = dict(zip(table["text"].to_pylist(), table["kind"].to_pylist(), strict=True))
    return GroundTruth.from_concepts(table["text"], table["concept"], kinds)


def read_truth(folder: str | Path) -> pa.Table:
    """``truth.parquet``: columns text, kind, concept; the concepts in the order of the build."""
    file = Path(folder) / "truth.parquet"
    if not file.is_file():
        raise UserError(f"{folder} holds no emoji data; build them once with: lavis-mafa build-emoji {folder}")
    return pyarrow.parquet.read_table(file)


def first_concepts(table: pa.Table, count: int | None) -> pa.Array:
    """The names of the first ``count`` concepts of ``truth.parquet``; all of them for None."""
    return pc.unique(table["concept"])[:count]
