"""A pass without a model: features that are there already mine, and a judge whose word is given as well says what matches.

The judge is a table of scores, whoever gave them, or a guide: a second dual encoder's features (GISTEmbed's). No image is opened.
Neither needs a model who chooses again from what ``mine`` found before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch
from torch import Tensor

from lavis_mafa.config.data import AnnotationFile, files_of
from lavis_mafa.datasets.annotations import image_keys, read_annotations
from lavis_mafa.datasets.facts import one_each
from lavis_mafa.datasets.formats import PAIRS
from lavis_mafa.datasets.ground_truth import GroundTruth
from lavis_mafa.datasets.ids import pc
from lavis_mafa.errors import UserError
from lavis_mafa.files import replacing
from lavis_mafa.tools.candidates import Block, Blocks, Progress, ReadableRows
from lavis_mafa.tools.features import Features, unit_rows
from lavis_mafa.tools.run_files import MINED
from lavis_mafa.tools.training_data import annotated

PAIRS_AT_ONCE = 1 << 16
COLUMNS = ("image_row", "text_row", "probability")

# --- pairs --------------------------------------------------------------------------------------------------------------


class PicturelessPairs:
    """Pairs as annotation files tell them, without a look at their images. Of a row with several captions each is a pair of its own.

    Args:
        files: files, folders or patterns, joined in this order.
        images: the folder that image paths start from, and stay below; None: they are kept as they are.
        columns: what the files call ours, where that differs.

    Attributes: as of :class:`lavis_mafa.datasets.pairs.ImageTextPairs`; ``text_keys`` [N], numbers of the captions by the truth.
    """

    text_processor = str

    def __init__(self, files: Sequence[Path], images: Path | None = None, columns: Mapping[str, str] | None = None) -> None:
        if images is not None and not images.is_dir():
            raise UserError(f"--images is {str(images)!r}, but there is no such folder.")
        named = [AnnotationFile(file, columns=columns or {}) for entry in files for file in files_of(entry, "--annotations")]
        self.table = caption_a_row(read_annotations(named, replace(PAIRS, hint=""), allow_absolute_paths=images is None))
        self.vis_root = images or Path()
        self.image_keys = image_keys(self.table)
        self.truth = GroundTruth.from_table(self.table)
        self.concepts = None if self.truth is None else self.truth.images(self.table)
        self.text_keys = None if self.truth is None else self.truth.texts.find_all(pc.list_element(self.table["caption"], 0))

    def __len__(self) -> int:
        return int(self.table.num_rows)


def caption_a_row(table: pa.Table) -> pa.Table:
    """The same pairs of image and caption, those of a row one after the other, each a row."""
    size = pc.list_value_length(table["caption"]).to_numpy()
    if size.max() == 1:
        return table
    flat = table.take(np.repeat(np.arange(len(size)), size))
    parts = {"caption": pc.list_flatten(table["caption"])}
    if "caption_facts" in table.column_names:
        told = np.repeat(table["caption_facts"].is_valid().to_numpy(), size)
        parts["caption_facts"] = pc.list_flatten(table["caption_facts"]).take(pa.array(told.cumsum() - 1, mask=~told))
    for name, column in parts.items():
        flat = flat.set_column(flat.schema.get_field_index(name), name, one_each(column))
    return flat


def check_caption_a_row(dataset: Any, flag: str) -> None:
    """Raises UserError where a row of a training set has several captions, of which a sample draws one: features have a row a pair."""
    start = 0
    for part in getattr(dataset, "datasets", [dataset]):
        size = pc.list_value_length(annotated(part).table["caption"]).to_numpy()
        if len(several := np.flatnonzero(size > 1)):
            raise UserError(
                f"{flag} has a row a pair, but row {start + several[0] + 1} of the training data has {size[several[0]]} captions; "
                "write annotations with one caption a row."
            )
        start += len(size)


# --- judges -------------------------------------------------------------------------------------------------------------


class ScoreTable:
    """Probabilities of pairs, from whatever judge, as files tell them; pairs that they lack are remembered.

    Args:
        paths: .parquet or .csv files with the columns ``image_row``, ``text_row`` (rows from 0) and ``probability``; none: nothing is
            known.
        count: rows of the data.

    Raises:
        UserError: a file cannot be read; no such rows; a probability that is none, or two of one pair.
    """

    name = "the judge"
    margin: float | None = None  # what is above a threshold matches

    def __init__(self, paths: Sequence[Path], count: int) -> None:
        self.count = count
        self.missing: list[Tensor] = []
        nobody = np.array([-1]), np.zeros(1, np.float32)  # so that there is always a pair to compare with
        codes, probability = map(np.concatenate, zip(nobody, *(_read_scores(path, count) for path in paths), strict=True))
        order = np.argsort(codes, kind="stable")
        codes, probability = codes[order], probability[order]
        if len(twice := np.flatnonzero((codes[1:] == codes[:-1]) & (probability[1:] != probability[:-1]))):
            image, text = divmod(int(codes[twice[0]]), count)
            raise UserError(f"--scores: there are two probabilities of image_row {image} with text_row {text}; allowed: one.")
        self.codes, self.probability = torch.from_numpy(codes), torch.from_numpy(probability)

    def __call__(self, image: Tensor, text: Tensor) -> Tensor:
        """Probabilities of pairs, LongTensor[P] rows each -> [P] fp32; 0 where there is none, which :meth:`check` does not let pass."""
        codes = image * self.count + text
        place = torch.searchsorted(self.codes, codes).clamp(max=len(self.codes) - 1)
        there = self.codes[place] == codes
        if not there.all():
            self.missing.append(codes[~there].unique())
        return torch.where(there, self.probability[place], 0.0)

    def missing_pairs(self) -> tuple[Tensor, Tensor]:
        """LongTensor[m] rows of images and of texts of all pairs that were asked about and have no score, each pair once."""
        codes = torch.cat([torch.empty(0, dtype=torch.long), *self.missing]).unique()
        return codes // self.count, codes % self.count

    def check(self) -> None:
        """Raises UserError if any pair that was asked about has no probability."""
        image, text = self.missing_pairs()
        if len(image):
            raise UserError(
                f"--scores: there is no probability of {len(image):,} pairs that are asked about, the first image_row "
                f"{int(image[0])} with text_row {int(text[0])}; the same command with --write-pairs FILE writes them."
            )


class Guide:
    """Cosines of another dual encoder's features, as a guide in :class:`lavis_mafa.objectives.MafaItcLoss`: what is above the own
    pair's cosine less ``margin`` matches."""

    name = "the guide"

    def __init__(self, features: Features, margin: float) -> None:
        self.features, self.margin = features, margin

    def __call__(self, image: Tensor, text: Tensor) -> Tensor:
        """Cosines of pairs, LongTensor[P] rows each -> [P] fp32."""
        parts = zip(image.split(PAIRS_AT_ONCE), text.split(PAIRS_AT_ONCE), strict=True)
        return torch.cat([(unit_rows(self.features.image, i) * unit_rows(self.features.text, t)).sum(dim=1) for i, t in parts])


Judge = ScoreTable | Guide


def _read_scores(path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Int64 [P] image_row * count + text_row, and fp32 [P] probabilities."""
    table = _table(path)
    if absent := [name for name in COLUMNS if name not in table.column_names]:
        there = ", ".join(table.column_names)
        raise UserError(f"--scores: {path} has no column {absent[0]}, but {there}; needed: {', '.join(COLUMNS)}.")
    if twice := [name for name in COLUMNS if table.column_names.count(name) > 1]:
        raise UserError(f"--scores: {path} has two columns {twice[0]}; allowed: one.")
    rows = []
    for name in COLUMNS[:2]:
        column = table[name]
        if not pa.types.is_integer(column.type) or column.null_count:
            raise UserError(f"--scores: {name} in {path} holds {column.type}, or nulls; allowed: numbers of rows, from 0.")
        row = column.to_numpy()
        if len(wrong := np.flatnonzero((row < 0) | (row >= count))):
            allowed = f"0 to {count - 1}, the rows of the data"
            raise UserError(f"--scores: {name} is {row[wrong[0]]} in row {wrong[0] + 1} of {path}; allowed: {allowed}.")
        rows.append(row.astype(np.int64))
    column = table["probability"]
    if not pa.types.is_floating(column.type) and not pa.types.is_integer(column.type):
        raise UserError(f"--scores: probability in {path} holds {column.type}; allowed: numbers from 0 to 1.")
    probability = column.cast(pa.float32(), safe=False).to_numpy()  # null is NaN
    if len(wrong := np.flatnonzero(~((probability >= 0) & (probability <= 1)))):
        raise UserError(
            f"--scores: probability is {probability[wrong[0]]} in row {wrong[0] + 1} of {path}; allowed: 0 to 1. Cosines of a second "
            "model are judged by --guide-features."
        )
    return rows[0] * count + rows[1], probability


def _table(path: Path) -> pa.Table:
    if not path.is_file():
        raise UserError(f"--scores is {str(path)!r}, but there is no such file.")
    if path.suffix.lower() not in (".parquet", ".csv"):
        raise UserError(f"--scores is {path}; allowed: a .parquet or .csv file.")
    try:
        return pq.read_table(path) if path.suffix.lower() == ".parquet" else pyarrow.csv.read_csv(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"--scores: {path} cannot be read: {' '.join(str(error).split())}") from error


def write_pairs(pairs: tuple[Tensor, Tensor], dataset: PicturelessPairs, path: Path) -> None:
    """For whoever judges: ``image_row``, ``text_row``, ``image`` (path) and ``caption`` of each pair, by image."""
    image, text = (rows.numpy() for rows in pairs)
    paths, captions = dataset.table["image"].take(image), pc.list_element(dataset.table["caption"], 0).take(text)
    table = pa.table({"image_row": image, "text_row": text, "image": paths, "caption": captions})
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        (pyarrow.csv.write_csv if path.suffix.lower() == ".csv" else pq.write_table)(table, part)


# --- the pass -----------------------------------------------------------------------------------------------------------


class Given:
    """In the place of :class:`lavis_mafa.tools.candidates.Encoder`: blocks of features, and the judge's word, both given.

    Args:
        dataset: the pairs, as ``features`` has them row by row.
    """

    def __init__(self, features: Features, dataset: PicturelessPairs, judge: Judge) -> None:
        self.features, self.dataset, self.judge = features, dataset, judge
        self.judge_name, self.margin = judge.name, judge.margin

    def blocks(self, rows: ReadableRows, blocks: Blocks, progress: Progress = lambda _: None) -> Iterator[Block]:
        """As :func:`lavis_mafa.tools.candidates.encoded_blocks`, without token states."""
        data = self.dataset
        captions = pc.list_element(data.table["caption"], 0)
        for number, index in blocks:
            image, text = self.features.rows(index)
            truth = {}
            if data.concepts is not None and data.text_keys is not None:
                truth = {"concept": data.concepts[index], "text_key": data.text_keys[index]}
            yield Block(
                number=number,
                index=index,
                image_key=rows.image_keys[index],
                captions=captions.take(index.numpy()).to_pylist(),
                images=torch.empty(0),
                texts=(),
                image_features=image,
                text_features=text,
                truth=truth,
            )
            progress(len(index))

    def probabilities(self, block: Block, image: Tensor, text: Tensor) -> Tensor:
        """[P] rows of the block each -> [P] fp32."""
        return self.judge(block.index[image], block.index[text])


# --- what was found before -----------------------------------------------------------------------------------------------

ORIGIN = ("cfg_path", "options", "con_d", "given")


class Mined:
    """A finished result of ``mine``, opened to choose from again: the data that were searched, as a data set without images, and what
    was found in them. Its candidates are judged, so that no model is asked.

    Raises:
        UserError: ``folder`` holds no whole result.

    Attributes:
        candidates: as :func:`lavis_mafa.tools.mine.judged` writes them. bad: samples that could not be read.
        settings, origin: what ``mine.json`` says of the pass, and of where its data and judge are from. reviewed: its file of marks.
    """

    text_processor = str

    def __init__(self, folder: Path) -> None:
        try:
            results = json.loads((folder / MINED).read_text(encoding="utf-8"))
            self.settings, self.judge_name, count, images = (results[name] for name in ("settings", "judge", "data", "images"))
            self.origin = {name: results[name] for name in ORIGIN}
            reviewed = results["reviewed"]
            self.reviewed = None if reviewed is None else Path(reviewed["marks"])
            self.candidates = pq.read_table(folder / "connections.parquet").drop_columns(["outcome"])
            bad = folder / "bad_samples.jsonl"
            self.bad = [json.loads(line) for line in bad.read_text(encoding="utf-8").splitlines()] if bad.is_file() else []
        except (pa.ArrowInvalid, OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--again: {folder} holds no whole result of mine: {' '.join(str(error).split())}") from error
        self.table = read_annotations([folder / "pairs.parquet"], allow_absolute_paths=True).slice(0, count)
        self.root = None if images is None else Path(images)
        self.vis_root = self.root or folder  # absolute paths start from nowhere
        self.image_keys = image_keys(self.table)
        told = "mined_truly_match" in results and ("facts" in self.table.column_names or self.origin["given"]["annotations"])
        self.truth = GroundTruth.from_table(self.table) if told else None  # concepts of a YAML's data may have a truth of their own
        self.concepts = None if self.truth is None else self.truth.images(self.table)

    def __len__(self) -> int:
        return int(self.table.num_rows)
