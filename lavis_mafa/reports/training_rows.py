"""The rows a run was trained on: captions, image paths and truth by the indices that its connections name.

They are read again from the data sets that ``config.yaml`` names. No processor, image or weight is touched, and nothing is
downloaded, so that a report also works where only the annotations are left.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lavis_mafa.config.data import own_files
from lavis_mafa.datasets.annotations import read_annotations
from lavis_mafa.datasets.emoji.truth import first_concepts, load_emoji_truth, read_truth
from lavis_mafa.datasets.formats import pc
from lavis_mafa.datasets.ground_truth import GroundTruth
from lavis_mafa.errors import UserError


@dataclass
class Part:
    """One data set's training rows: an annotation table, or the list that LAVIS's data sets keep."""

    root: Path
    rows: Any
    truth: GroundTruth | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, row: int) -> str:
        return str(self.rows[row]["image"] if isinstance(self.rows, list) else self.rows["image"][row].as_py())

    def captions(self, row: int) -> list[str]:
        value = self.rows[row]["caption"] if isinstance(self.rows, list) else self.rows["caption"][row].as_py()
        return [value] if isinstance(value, str) else list(value)


@dataclass
class TrainingRows:
    """All rows a run was trained on, by global index. An index beyond them has no caption and no path.

    Attributes:
        parts: the data sets, in the order of the YAML. problem: why there are none, or that they do not fit; None if all is well.
    """

    parts: list[Part] = field(default_factory=list)
    problem: str | None = None

    def __post_init__(self) -> None:
        self.starts = [sum(len(p) for p in self.parts[:i]) for i in range(len(self.parts) + 1)]

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def truth(self) -> GroundTruth | None:
        """Known only while there is one data set: two truths number their concepts differently."""
        return self.parts[0].truth if len(self.parts) == 1 else None

    def captions(self, index: int) -> list[str]:
        """As they were written; which of several a training step drew is not recorded."""
        place = self._find(index)
        return place[0].captions(place[1]) if place else []

    def image_path(self, index: int) -> Path | None:
        place = self._find(index)
        return place[0].root / place[0].image(place[1]) if place else None

    def matches(self, images: list[int], texts: list[int]) -> list[bool | None]:
        """[P] rows of images and of texts -> whether they truly match; None where that is not known.

        Of a row with several captions it is known only if all of them match, or none.
        """
        truth = self.truth
        if truth is None or "concept" not in self.parts[0].rows.column_names:
            return [None] * len(images)
        rows = sorted({row for row in (*images, *texts) if row < len(self)})
        concepts = dict(
            zip(rows, truth.concepts.find_all(self.parts[0].rows["concept"].take(pa.array(rows, pa.int64()))).tolist(), strict=True)
        )
        keys = {row: [truth.text_key(caption) for caption in self.captions(row)] for row in rows}
        pairs = [(p, concepts.get(i, -1), key) for p, (i, t) in enumerate(zip(images, texts, strict=True)) for key in keys.get(t, [])]
        found: list[set[bool]] = [set() for _ in images]
        if pairs:
            place, concept, key = torch.tensor(pairs).T
            for p, c, k, match in zip(place.tolist(), concept, key, truth.matches(concept, key).tolist(), strict=True):
                if c >= 0 and k >= 0:
                    found[p].add(match)
        return [next(iter(answers)) if len(answers) == 1 else None for answers in found]

    def _find(self, index: int) -> tuple[Part, int] | None:
        if not 0 <= index < len(self):
            return None
        part = bisect_right(self.starts, index) - 1
        return self.parts[part], index - self.starts[part]


def read_training_rows(folder: Path, config: DictConfig) -> TrainingRows:
    """What the run in ``folder`` was trained on, as far as it is still there; a problem is told, not raised."""
    base = working_directory(folder, config)
    parts: list[Part] = []
    try:
        with _inside(base):
            for name, block in (config.get("datasets") or {}).items():
                parts += {"grit_pairs": _pairs, "grit_emoji": _emoji}.get(name, partial(_of_lavis, name))(block.build_info, block)
    except (UserError, OSError, ValueError, KeyError, AttributeError, OmegaConfBaseException) as error:
        return TrainingRows(problem=f"The training data could not be read again: {error}")
    for part in parts:
        part.root = base / part.root
    if not parts:
        return TrainingRows(problem="config.yaml names no training data, so captions and images are not known.")
    return TrainingRows(parts)


def _pairs(info: DictConfig, block: DictConfig) -> list[Part]:
    files, root, select = own_files("datasets.grit_pairs.build_info", info, ("train", "val", "test"))
    if "train" not in files:
        return []
    absolute = bool(OmegaConf.select(info, "images.allow_absolute_paths"))
    table = select(read_annotations(files["train"], allow_absolute_paths=absolute))
    return [Part(root, table, GroundTruth.from_table(table))]


def _emoji(info: DictConfig, block: DictConfig) -> list[Part]:
    root, first = Path(info.root).expanduser(), info.get("max_concepts")
    file = "train.jsonl" if info.get("captions", "fixed") == "fixed" else "train_captions.jsonl"
    table = read_annotations([root / file])
    table = table.filter(pc.is_in(table["concept"], value_set=first_concepts(read_truth(root), first)))
    return [Part(root, table, load_emoji_truth(root, first))]


def _of_lavis(name: str, info: DictConfig, block: DictConfig) -> list[Part]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lavis.tasks  # noqa: F401 - fills the registry
        from lavis.common.registry import registry

    registry.mapping["paths"]["cache_root"] = os.environ.get("LAVIS_CACHE", str(Path.cwd() / ".lavis_cache"))
    builder = registry.get_builder_class(name)
    if builder is None:
        raise UserError(f"datasets.{name} is not registered with LAVIS.")
    config: Any = OmegaConf.create(OmegaConf.to_container(block))
    config.build_info.annotations = {k: v for k, v in info.annotations.items() if k == "train"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = builder(config).build().get("train")  # not build_datasets, which downloads
    annotation = getattr(dataset, "annotation", None)
    if not isinstance(annotation, list) or (annotation and not {"image", "caption"} <= set(annotation[0])):
        raise UserError(f"datasets.{name} has no captions to show.")
    return [Part(Path(dataset.vis_root), annotation)]


def working_directory(folder: Path, config: DictConfig) -> Path:
    """Where the run was started, which its relative paths start from: the run is at ``<there>/<run.output_dir>/<job id>``."""
    output, parent = Path(str(OmegaConf.select(config, "run.output_dir") or "output")), folder.resolve().parent
    wanted = [part for part in output.parts if part != "."]
    if not output.is_absolute() and ".." not in wanted and list(parent.parts[-len(wanted) :]) == wanted:
        return Path(*parent.parts[: len(parent.parts) - len(wanted)])
    return Path.cwd()


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
