"""The annotations behind a training set, whichever builder made it, as one Arrow table: what mined pairs are written from."""

from __future__ import annotations

import bisect
import itertools
from pathlib import Path
from typing import Any

import pyarrow as pa

from lavis_mafa.datasets.annotations import TEXTS
from lavis_mafa.datasets.ids import pc
from lavis_mafa.errors import UserError


class SourceRows:
    """Images, captions and concepts of N samples as they were written, by data set row.

    Attributes:
        table: ``image`` string, ``caption`` list<string> and, where known, ``concept`` string; N rows.
        root: the folder the image paths start from; None where they are absolute, since several data sets have several folders.

    Raises:
        UserError: a data set keeps no annotations that are known here.
    """

    def __init__(self, dataset: Any) -> None:
        self.children = list(getattr(dataset, "datasets", [dataset]))
        self.ends = list(itertools.accumulate(len(child) for child in self.children))
        roots = {Path(child.vis_root).absolute() for child in self.children}
        self.root = roots.pop() if len(roots) == 1 else None
        self.table = pa.concat_tables([self._rows(child) for child in self.children], promote_options="default")

    def __len__(self) -> int:
        return self.table.num_rows

    def caption(self, index: int, as_read: str) -> str:
        """The caption of a row that the text processor turned into ``as_read``; the first one where none is recognised."""
        captions: list[str] = self.table["caption"][index].as_py()
        if len(captions) == 1:
            return captions[0]
        process = self.children[bisect.bisect_right(self.ends, index)].text_processor
        return next((c for c in captions if process(c) == as_read), captions[0])

    def _rows(self, child: Any) -> pa.Table:
        table = getattr(child, "table", None)
        if table is None:
            table = _from_list(child)
        image = table["image"]
        if self.root is None:
            below = pc.binary_join_element_wise(str(Path(child.vis_root).absolute()), image, "/")
            image = pc.if_else(pc.starts_with(image, "/"), image, below)
        columns = {"image": image, "caption": table["caption"]}
        if "concept" in table.column_names:
            columns["concept"] = table["concept"]
        return pa.table(columns)


def _from_list(child: Any) -> pa.Table:
    """LAVIS's annotations: a list of dicts with ``image`` and ``caption``."""
    annotation = getattr(child, "annotation", None)
    if not annotation or not all(isinstance(a.get("image"), str) and "caption" in a for a in annotation):
        raise UserError(
            f"the data set {type(child).__name__} keeps no list of images and captions, from which mined pairs could be written; "
            "give the data as grit_pairs."
        )
    captions = [a["caption"] if isinstance(a["caption"], list) else [a["caption"]] for a in annotation]
    return pa.table({"image": pa.array([a["image"] for a in annotation], pa.string()), "caption": pa.array(captions, TEXTS)})
