"""What training could not use, found before it: each row, each distinct image and each distinct caption is looked at once."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from torch.utils.data import DataLoader, Dataset

from lavis_mafa.config.data import SPLITS, AnnotationFile, ending, files_of
from lavis_mafa.datasets.annotations import (
    clean_caption,
    ids_of_other_images,
    in_folder,
    is_printed_list,
    leaves,
    path_hint,
    read_rows,
    shortened,
    shown,
    told_apart,
)
from lavis_mafa.datasets.arrow_files import read_mapped
from lavis_mafa.datasets.boxes import EXPRESSIONS
from lavis_mafa.datasets.facts import TEXTS, check_facts
from lavis_mafa.datasets.formats import (
    PAIRS,
    ROWS_AT_ONCE,
    SAME_IMAGE,
    SENTENCES,
    STATEMENTS,
    TWO,
    Columns,
    one_message,
    read_records,
)
from lavis_mafa.datasets.ids import is_missing, pc, typed_ids
from lavis_mafa.datasets.images import ImageTooLargeError, ImageTooSmallError, load_rgb
from lavis_mafa.datasets.stored import StoredImage, has_places, image_source, places_from
from lavis_mafa.errors import EmptyCaption, UserError, did_you_mean
from lavis_mafa.files import replacing
from lavis_mafa.progress import Bar
from lavis_mafa.tools.index_shards import arrow_file
from lavis_mafa.tools.training_data import split_files

BAD = {
    "leaves_folder": "image path leaves the folder",
    "no_image": "no image path",
    "missing": "missing image",
    "unreadable": "unreadable image",
    "too_large": "image too large",
    "too_small": "image too small",
    "empty_caption": "empty caption",
    "list_of_captions": "list of captions",
    "id_of_another": "image_id of another image",
    "unknown_label": "unknown label",
}
TWICE = {
    "duplicate_image": "image with the bytes of another",
    "duplicate_row": "image and caption of another row",
    "duplicate_caption": "caption of another image",
}
KINDS = {**BAD, **TWICE}
OF_ROW = {
    "leaves_folder": "the path is absolute or holds '..'",
    "no_image": "the row names no image",
    "empty_caption": "The row has no caption.",
    "list_of_captions": "LAVIS's own data sets take one text for a caption, no list",
}
IMAGE_KINDS = ("", "missing", "unreadable", "too_large", "too_small")
EXAMPLES, AT_ONCE = 3, 32
SUFFIXES = (".jsonl", ".json", ".arrow")  # of cleaned annotations
TEXT_OF = {"grit_vqa": "question", "grit_entailment": "sentence", "grit_statements": "statement", "grit_boxes": "text"}
ASKED = {
    "question": Columns(single=("image",), several="question", optional=()),
    "sentence": replace(SENTENCES, optional=()),
    "statement": replace(STATEMENTS, optional=()),
    "text": EXPRESSIONS,
}
LABELS = {text: columns.labels for text, columns in ASKED.items() if columns.labels}
SCHEMA = pa.schema(
    [("image", pa.string()), ("caption", TEXTS), ("image_id", pa.string()), ("path", pa.large_string()), ("leaves", pa.bool_())]
    + [("lists", pa.bool_()), ("id_of_another", pa.int64()), ("file_of", pa.int64()), ("number", pa.int64())]
    + [("shard", pa.large_string()), ("offset", pa.int64()), ("size", pa.int64()), ("label", pa.string())]
)
Process = Callable[[str], str]
Numbers = np.ndarray


# --- which files ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Annotation files that share a text processor."""

    files: list[AnnotationFile]  # each with its image folder
    process: Process
    allow_absolute_paths: bool = False
    select: Callable[[pa.Table], pa.Table] = lambda rows: rows  # those that the data set keeps
    one_caption: bool = False  # a list of captions is none to this data set
    text: str | None = "caption"  # or of ASKED, or None where there is none of them
    image_ending: str = ""  # which image paths are written without

    def __post_init__(self) -> None:
        for root in {file.images for file in self.files if file.images is not None}:
            if not root.is_dir():
                raise UserError(f"The image folder {root} does not exist; give the folder that the image paths start from.")


def from_files(
    files: Sequence[Path], root: Path | None, allow_absolute_paths: bool = False, columns: Mapping[str, str] | None = None
) -> list[Source]:
    """Files without a YAML; captions are cleaned as ``grit_pairs`` does by default. ``columns``: ours -> theirs. Without ``root``
    paths start from the folder of each file."""
    with warnings.catch_warnings():  # of LAVIS's dependencies
        warnings.simplefilter("ignore")
        from lavis_mafa.processors import AlbefCaptionProcessor

    found = [AnnotationFile(path, root or path.parent, columns or {}) for file in files for path in files_of(file, "--annotations")]
    return [Source(found, AlbefCaptionProcessor(), allow_absolute_paths)]


def from_yaml(name: str, options: list[str]) -> list[Source]:
    """The data of every split that the YAML's run names, with their text processors. No model is built, so any device will do."""
    from lavis_mafa.runners import job

    _, cfg = job.prepare(name, [*options, "run.device=cuda"], files=False, device=False)
    from lavis.common.registry import registry

    run = cfg.run_cfg
    keys = ("test_splits",) if run.get("evaluate") is True else ("train_splits", "valid_splits", "test_splits")
    defaults: dict[str, list[str]] = {"train_splits": ["train"]}
    splits = list(dict.fromkeys(split for key in keys for split in run.get(key, defaults.get(key)) or []))
    sources = []
    for dataset, config in cfg.datasets_cfg.items():
        builder = registry.get_builder_class(dataset)(config)
        builder.build_processors()
        of_dataset = [source_of(dataset, config, split, builder.text_processors) for split in splits]
        if not any(of_dataset):
            wanted = ", ".join(splits) or "none"
            raise UserError(f"datasets.{dataset}.build_info names no annotations for the splits of this run ({wanted}).")
        sources += [source for source in of_dataset if source is not None]
    return sources


def source_of(name: str, config: Any, split: str, processors: dict[str, Process]) -> Source | None:
    """One split of a data set; None where it has no such split."""
    found, mode = split_files(name, config, split), "train" if split == "train" else "eval"
    if found is None:
        return None
    if processors[mode] is None:
        raise UserError(f"datasets.{name}.text_processor.{mode} is missing; give it a name, such as albef_caption.")
    files = [file._replace(images=file.images or found.root) for file in found.files]
    text = TEXT_OF.get(name, "caption") if name in SPLITS else _text_of(files[0].path)
    one = name not in SPLITS and split == "train" and text == "caption"
    ending_of_images = ".jpg" if name == "snli_ve" else ""
    select = _of_both(found.select) if text == "statement" else found.select
    return Source(files, processors[mode], found.allow_absolute_paths, select, one, text, ending_of_images)


def _text_of(path: Path) -> str | None:
    """What the rows of a data set of LAVIS's hold beside images."""
    first = next(read_records(path), {}) if path.is_file() else {"caption": ""}
    if "images" in first:
        return "statement"
    return next((text for text in ("caption", "question", "sentence") if text in first), "caption" if "image" not in first else None)


# --- their rows ----------------------------------------------------------------------------------------------------------


@dataclass
class Rows:
    """N rows of all files in turn, naming U distinct images, with C captions."""

    image: pa.ChunkedArray  # [N] as written
    image_id: pa.ChunkedArray  # [N] null where there is none
    leaves: Numbers  # Bool [N], the path leaves the image folder
    path: pa.Array  # [U] the distinct images
    place: pa.Table  # [U] where they lie inside larger files: `shard`, `offset`, `size`, null for those that do not
    image_of: Numbers  # [N] into `path`, -1 where there is no path, or one that must not be opened
    caption: pa.ChunkedArray  # [C] as written
    row_of: Numbers  # [C] the row of each caption
    source_of: Numbers  # [C] the number of its source
    captions: Numbers  # [N] how many captions a row has
    text: Numbers  # [N], what kind of text the captions are
    lists: Numbers  # Bool [N], a list of captions where the data set takes none
    id_of_another: Numbers  # [N] the earlier row of the file that gives the image_id to another image, from 0; -1 for none
    label: pa.ChunkedArray  # [N] as written; null where there is none, and where rows have no labels
    files: list[AnnotationFile]  # with the folder that their image paths start from
    file_of: Numbers  # [N] into `files`
    number: Numbers  # [N] of the row in its file, from 0
    # what is wrong, once they are judged
    bad_image: Numbers = field(init=False)  # [U] into IMAGE_KINDS, 0 for a good one
    content: Numbers = field(init=False)  # uint64 [U], equal for files of the same bytes; of good ones
    bad_caption: Numbers = field(init=False)  # Bool [C]
    printed: Numbers = field(init=False)  # Bool [C], which of these are printed lists
    image_reason: dict[int, str] = field(default_factory=dict)
    caption_reason: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        images, captions = len(self.path), len(self.caption)
        self.bad_image, self.content = np.zeros(images, np.uint8), np.zeros(images, np.uint64)
        self.bad_caption, self.printed = np.zeros(captions, bool), np.zeros(captions, bool)

    def __len__(self) -> int:
        return len(self.image)

    @property
    def again(self) -> Numbers:
        """Bool [N]: the second image of a row of its file, whose text and label are those of the first."""
        same = (self.file_of[1:] == self.file_of[:-1]) & (self.number[1:] == self.number[:-1])
        return np.concatenate([[False], same])[: len(self)]

    def where(self, row: int) -> tuple[Path, int]:
        """The file of a row and its number there, from 1."""
        return self.files[self.file_of[row]].path, int(self.number[row]) + 1


def read_sources(sources: Sequence[Source]) -> Rows:
    """Read all files, whatever the rows hold; raises UserError for one that is no list of images and captions."""
    files = [file for source in sources for file in source.files]
    tables, count = [], 0
    for source in sources:
        read = [_read(source, file) for file in source.files]
        check_facts([(file.path, in_folder(table, file.images)) for file, table in zip(source.files, read, strict=True)])
        parts = [
            _rows_of(source, file, table, count + number) for number, (file, table) in enumerate(zip(source.files, read, strict=True))
        ]
        tables.append(source.select(pa.concat_tables(parts)))
        count += len(parts)
    table = told_apart(pa.concat_tables(tables), "path")
    source_of = np.repeat(np.arange(len(sources)), [len(part) for part in tables])  # of each row
    distinct = pc.drop_null(pc.unique(table["path"]))
    captions = pc.fill_null(pc.list_value_length(table["caption"]), 0).to_numpy()
    row_of = np.repeat(np.arange(len(table)), captions)
    image_of = pc.fill_null(pc.index_in(table["path"], value_set=distinct), -1).to_numpy()
    first = np.unique(image_of[image_of >= 0], return_index=True)[1]
    return Rows(
        image_of=image_of,
        path=distinct,
        place=table.select(["shard", "offset", "size"]).take(np.flatnonzero(image_of >= 0)[first]),
        caption=pa.chunked_array([pc.list_flatten(chunk) for chunk in table["caption"].chunks], pa.string()),
        captions=captions,
        row_of=row_of,
        source_of=source_of[row_of],
        text=np.array([source.text for source in sources], dtype=object)[source_of],
        files=files,
        **{name: table[name] for name in ("image", "image_id", "label")},
        **{name: table[name].to_numpy() for name in ("leaves", "lists", "id_of_another", "file_of", "number")},
    )


def _read(source: Source, file: AnnotationFile) -> pa.Table:
    if source.text in ASKED:
        columns = ASKED[source.text]
        table = read_rows(file.path, columns, file.columns).rename_columns({columns.several: "caption"})
        return table if columns.images != TWO else _an_image_each(table)
    if source.text is None:
        images = [image if isinstance(image := record.get("image"), str) else None for record in read_records(file.path)]
        return pa.table({"image": pa.chunked_array([images], pa.string()), "caption": pa.nulls(len(images), TEXTS)})
    return read_rows(file.path, PAIRS, file.columns)


def _an_image_each(statements: pa.Table) -> pa.Table:
    """Of each statement two rows, with an image each."""
    images = [one for both in zip(*(statements[name].to_pylist() for name in TWO), strict=True) for one in both]
    twice = statements.select(["caption", "label"]).take(np.repeat(np.arange(len(statements)), len(TWO)))
    return twice.append_column("image", pa.array(images, pa.string()))


def _of_both(select: Callable[[pa.Table], pa.Table]) -> Callable[[pa.Table], pa.Table]:
    """What keeps so many statements, for tables of their images."""

    def selected(rows: pa.Table) -> pa.Table:
        chosen = select(pa.table({"row": np.arange(len(rows) // len(TWO))}))["row"].to_numpy()
        return rows.take(np.stack([chosen * len(TWO) + image for image in range(len(TWO))], axis=1).ravel())

    return selected


def _rows_of(source: Source, file: AnnotationFile, table: pa.Table, number: int) -> pa.Table:
    count, root = len(table), file.images or Path()
    outside = leaves(file.path, table)
    if "shard" in table.column_names:
        outside = pc.or_(outside, pc.fill_null(leaves(file.path, table, "shard"), False))
    outside = pc.and_(outside, not source.allow_absolute_paths)
    others, (again, first) = np.full(count, -1), ids_of_other_images(table)
    others[again] = first
    lists = np.zeros(count, bool)
    if source.one_caption:  # whether one was written as a list, the table no longer tells
        lists = np.array([isinstance(record.get("caption"), list) for record in read_records(file.path)], bool)
    columns = {
        "image": table["image"],
        "caption": table["caption"],
        "image_id": table["image_id"] if "image_id" in table.column_names else pa.nulls(count, pa.string()),
        "path": _full_paths(root, pc.binary_join_element_wise(table["image"], source.image_ending, ""), outside),
        "leaves": outside,
        "lists": lists,
        "id_of_another": others,
        "file_of": np.full(count, number),
        "number": np.arange(count) // (len(TWO) if source.text == "statement" else 1),
        "label": table["label"] if source.text in LABELS else pa.nulls(count, pa.string()),
    }
    if has_places(table):
        columns |= {"shard": _full_paths(root, table["shard"], outside), "offset": table["offset"], "size": table["size"]}
    else:
        columns |= {name: pa.nulls(count, SCHEMA.field(name).type) for name in ("shard", "offset", "size")}
    return pa.table(columns, schema=SCHEMA)


def _full_paths(root: Path, image: pa.ChunkedArray, leaves: pa.ChunkedArray) -> pa.ChunkedArray:
    """As ``root / image`` would be; null where there is no path, or it must not be opened."""
    image = image.cast(pa.string()).cast(pa.large_string())
    from_root = pc.binary_join_element_wise(pa.scalar(str(root), pa.large_string()), image, pa.scalar("/", pa.large_string()))
    full = pc.if_else(pc.starts_with(image, "/"), image, from_root)
    usable = pc.and_(pc.not_equal(image, ""), pc.invert(leaves))
    return pc.if_else(usable, full, pa.scalar(None, pa.large_string()))


# --- what is wrong with images and captions, by the functions that training uses --------------------------------------------


def judge(rows: Rows, sources: Sequence[Source], min_side: int, workers: int) -> None:
    """Look at everything, with progress bars on stderr; ``workers`` processes open images, 0 opens them here."""
    for number, source in enumerate(sources):
        _judge_captions(rows, number, source.process)
    # its workers die with the command, read ahead no further than needed, and share the Arrow column
    loader = DataLoader(_Images(rows, min_side), batch_size=AT_ONCE, num_workers=workers, collate_fn=list)
    looked_at = Bar(itertools.chain.from_iterable(loader), total=len(rows.path), desc="images", unit="image")
    for number, (kind, reason, content) in enumerate(looked_at):
        rows.bad_image[number], rows.content[number] = IMAGE_KINDS.index(kind), content
        if reason:
            rows.image_reason[number] = reason


class _Images(Dataset):
    """Of each distinct image: kind of ``IMAGE_KINDS``, reason, digest of its bytes; the first two are empty for a good image."""

    def __init__(self, rows: Rows, min_side: int) -> None:
        self.table, self.min_side = rows.place.append_column("image", rows.path), min_side

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[str, str, int]:
        source = image_source(Path(), self.table, index)
        try:
            size = load_rgb(source).size
            if min(size) < self.min_side:
                return "too_small", f"{size[0]}x{size[1]} pixels, but a side needs at least {self.min_side}", 0
            digest = hashlib.blake2b(source.read_bytes(), digest_size=8)
            return "", "", int.from_bytes(digest.digest(), "big")
        except FileNotFoundError:
            return "missing", f"no shard {shown(source.file)}" if isinstance(source, StoredImage) else "", 0
        except OSError as error:
            kinds: dict[type, str] = {ImageTooLargeError: "too_large", ImageTooSmallError: "too_small"}
            return kinds.get(type(error), "unreadable"), str(error), 0


def _judge_captions(rows: Rows, source: int, process: Process) -> None:
    first, end = np.searchsorted(rows.source_of, [source, source + 1])
    captions = rows.caption[first:end]
    distinct = pc.unique(captions)
    reasons: dict[int, str] = {}
    for index in Bar(range(len(distinct)), desc="captions", unit="caption"):
        try:
            clean_caption(process, distinct[index].as_py())
        except EmptyCaption as error:
            reasons[index] = str(error)
    if len(distinct) and rows.text[rows.row_of[first]] == "caption":  # what grit_pairs refuses, and LAVIS's data sets would train on
        for wrong, what in ((is_missing, "is how a missing caption is written"), (is_printed_list, "is a printed list")):
            for index in np.flatnonzero(pc.fill_null(wrong(distinct), False).to_numpy(zero_copy_only=False)):
                reasons.setdefault(int(index), f"The caption {shortened(distinct[index].as_py())} {what}.")
    rows.printed[first:end] = pc.fill_null(is_printed_list(captions), False).to_numpy(zero_copy_only=False)
    places = pc.index_in(captions, value_set=distinct).to_numpy()
    for place in np.flatnonzero(np.isin(places, list(reasons))):
        rows.bad_caption[first + place] = True
        rows.caption_reason[int(first + place)] = reasons[int(places[place])]


# --- problems ------------------------------------------------------------------------------------------------------------


class Problems(NamedTuple):
    """In the order of rows."""

    kind: Numbers  # its number in KINDS
    row: Numbers
    about: Numbers  # the number of an image or a caption; -1 where it is the row itself
    first: Numbers  # the image or caption that a duplicate repeats


def find(rows: Rows) -> Problems:
    """What is wrong with images and captions, put to the rows they belong to."""
    parts: list[Numbers] = []
    every = np.arange(len(rows))

    def add(kind: str, row: Numbers, about: Numbers | int = -1, first: Numbers | int = -1) -> None:
        parts.append(np.stack(np.broadcast_arrays(list(KINDS).index(kind), row, about, first)))

    add("leaves_folder", every[rows.leaves])
    add("no_image", every[~rows.leaves & (rows.image_of < 0)])
    with_image = every[rows.image_of >= 0]
    image = rows.image_of[with_image]
    for number, kind in enumerate(IMAGE_KINDS[1:], 1):
        of_kind = rows.bad_image[image] == number
        add(kind, with_image[of_kind], image[of_kind])
    good = np.flatnonzero(rows.bad_image == 0)
    first = _firsts(len(rows.path), good, rows.content[good])[image]  # of the same bytes
    add("duplicate_image", with_image[first != image], image[first != image], first[first != image])
    add("empty_caption", every[(rows.text != None) & (rows.captions == 0)])  # noqa: E711 - of an array
    add("list_of_captions", every[rows.lists])
    add("id_of_another", every[rows.id_of_another >= 0])
    for text, labels in LABELS.items():
        known = pc.is_in(rows.label, value_set=pa.array(labels)).to_numpy()
        add("unknown_label", every[(rows.text == text) & ~known])
    for kind, of_kind in (("empty_caption", ~rows.printed), ("list_of_captions", rows.printed)):
        bad = np.flatnonzero(rows.bad_caption & of_kind)
        add(kind, rows.row_of[bad], bad)
    for kind, firsts in zip(("duplicate_row", "duplicate_caption"), _duplicate_captions(rows), strict=True):
        again = np.flatnonzero(firsts != np.arange(len(firsts)))
        add(kind, rows.row_of[again], again, firsts[again])
    found = np.concatenate(parts, axis=1)
    of_text = np.isin(found[0], [list(KINDS).index(kind) for kind in ("empty_caption", "list_of_captions", "unknown_label")])
    found = found[:, ~(of_text & rows.again[found[1]])]
    kinds, row, about, _ = found
    return Problems(*found[:, np.lexsort((about, kinds, row))])


def _duplicate_captions(rows: Rows) -> tuple[Numbers, Numbers]:
    """[C] the first caption of the same text and the same image; [C] the first of the same text where that is another image's.

    Itself where there is none. Good captions of good images count, as written; many images have one question, which is no duplicate.
    """
    image = rows.image_of[rows.row_of]
    good = (rows.text[rows.row_of] == "caption") & ~rows.bad_caption & (image >= 0)
    good[good] = rows.bad_image[image[good]] == 0
    good = np.flatnonzero(good)
    captions = rows.caption.take(good)
    text = pc.index_in(captions, value_set=pc.unique(captions)).to_numpy().astype(np.int64)
    same_pair = _firsts(len(rows.caption), good, text * len(rows.path) + image[good])
    same_text = _firsts(len(rows.caption), good, text)
    own = np.arange(len(rows.caption))
    other = (image[same_text] != image) & (same_pair == own)
    return same_pair, np.where(other, same_text, own)


def _firsts(count: int, where: Numbers, keys: Numbers) -> Numbers:
    """[count] for each of ``where`` the first one with the same key; itself for all others."""
    firsts = np.arange(count)
    _, at, which = np.unique(keys, return_index=True, return_inverse=True)
    firsts[where] = where[at[which]]
    return firsts


def describe(rows: Rows, problems: Problems, place: int) -> dict[str, Any]:
    """A line of ``problems.jsonl``."""
    number, row, about, first = (int(column[place]) for column in problems)
    kind, (file, line) = list(KINDS)[number], rows.where(row)
    reason = _reason(rows, kind, row, about, first)
    return {"file": str(file), "row": line, "image": rows.image[row].as_py(), "kind": kind, "reason": reason}


def _reason(rows: Rows, kind: str, row: int, about: int, first: int) -> str:
    if kind in ("empty_caption", "list_of_captions") and about >= 0:
        return rows.caption_reason[about]
    if kind in OF_ROW:
        return OF_ROW[kind]
    if kind == "unknown_label":
        return f"the label {rows.label[row].as_py()!r} is none of {', '.join(LABELS[rows.text[row]])}"
    if kind == "id_of_another":
        return f"{rows.image_id[row].as_py()!r} is the image_id of another image in row {rows.id_of_another[row] + 1}"
    if kind == "duplicate_image":
        return f"the same bytes as {shown(rows.path[first].as_py())}"
    if kind in TWICE:
        file, number = rows.where(int(rows.row_of[first]))
        return f"{shortened(rows.caption[first].as_py())} is the caption of {file}, row {number} too"
    hint = path_hint(rows.files[rows.file_of[row]].images or Path(), rows.image[row].as_py())
    return rows.image_reason.get(about) or f"no file {shown(rows.path[about].as_py())}{hint and '; ' + hint}"


def write_problems(path: Path, rows: Rows, problems: Problems) -> None:
    """One JSON object a line, in the order of rows; whole or not at all."""
    with replacing(path) as part, part.open("w", encoding="utf-8") as file:
        for place in Bar(range(len(problems.kind)), desc="problems", unit="row", delay=1):
            file.write(json.dumps(describe(rows, problems, place), ensure_ascii=False) + "\n")


def results(rows: Rows, problems: Problems) -> dict[str, Any]:
    """Counts and first examples of each kind; ``bad_rows`` are those that training would refuse or replace."""
    kinds, once = {}, ~rows.again
    of_file = np.cumsum(once) - 1  # [N] the row of a file that each is of
    count = int(once.sum())
    for number, kind in enumerate(KINDS):
        places = np.flatnonzero(problems.kind == number)
        affected = len(np.unique(of_file[problems.row[places]]))
        examples = [describe(rows, problems, int(place)) for place in places[:EXAMPLES]]
        kinds[kind] = {"rows": affected, "share": affected / count, "examples": examples}
    bad = np.unique(of_file[problems.row[problems.kind < len(BAD)]])
    captions = int(rows.captions[once].sum())
    counts = {"rows": count, "images": len(rows.path), "captions": captions, "bad_rows": len(bad)}
    return {"files": [str(file) for file in rows.files], **counts, "kinds": kinds}


def format_results(results: dict[str, Any]) -> str:
    """A table, and the first examples below it."""
    total = f"{results['rows']:,} rows, {results['images']:,} images, {results['captions']:,} captions"
    lines = [f"{total}: {', '.join(results['files'])}", "", f"{'':34}{'rows':>12}{'share':>10}"]
    for kind, text in KINDS.items():
        of_kind = results["kinds"][kind]
        lines.append(f"{text:34}{of_kind['rows']:>12,}{of_kind['share']:>10.3%}")
    for kind, text in KINDS.items():
        if examples := results["kinds"][kind]["examples"]:
            lines += ["", f"{text}, for example:", *(f"  {e['file']}, row {e['row']}: {e['reason']}" for e in examples)]
    return "\n".join(lines)


# --- the good rows -------------------------------------------------------------------------------------------------------


def check_target(path: Path) -> None:
    """Before anything heavy: ``path`` can be written; raises UserError."""
    if path.suffix not in SUFFIXES:
        hint = did_you_mean(path.suffix, SUFFIXES)
        raise UserError(f"--clean is {str(path)!r}; allowed: a file that ends in {' or '.join(SUFFIXES)}.{hint}")
    if path.exists():
        raise UserError(f"--clean: {path} exists already and is never overwritten; choose another name.")
    if not path.parent.is_dir():
        raise UserError(f"--clean: the folder {path.parent} does not exist.")


def check_sources(sources: Sequence[Source], path: Path) -> None:
    """Before anything heavy: their rows can be written to ``path`` as one file of images and captions; raises UserError."""
    files = [file for source in sources for file in source.files]
    as_arrow = {ending(file.path) == ".arrow" for file in files}
    if as_arrow != {path.suffix == ".arrow"}:
        raise UserError(f"--clean is {str(path)!r}; allowed: of .arrow files another .arrow file, of others .jsonl or .json.")
    if any(source.text != "caption" for source in sources):
        raise UserError("--clean writes images with captions, but the run has splits without; check the others with --annotations.")
    if len({file.images for file in files}) > 1:
        raise UserError("--clean writes one file, but the data sets have several image folders; check them one at a time.")
    check_columns(sources, "--clean")


def check_columns(sources: Sequence[Source], why: str) -> None:
    """Before anything heavy: their rows can be written as JSON; raises UserError, which says ``why`` they are to be."""
    for file in (file.path for source in sources for file in source.files if ending(file.path) == ".parquet" and file.path.is_file()):
        with one_message(file):
            schema = pyarrow.parquet.read_schema(file)
        for column in schema:
            if _holds_bytes(column.type):
                raise UserError(f"{why}: column '{column.name}' of {file} holds {column.type}, which JSON cannot; leave it out.")


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _holds_bytes(kind.value_type)
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
    return binary or any(_holds_bytes(kind.field(number).type) for number in range(kind.num_fields))


def check_ids(rows: Rows) -> None:
    """An ``image_id`` counts within its file, but the cleaned rows are one; raises UserError where two files give it to two images."""
    table = pa.table({"image": pa.chunked_array([np.char.mod("%d", rows.image_of)]), "image_id": rows.image_id})
    for row in ids_of_other_images(table)[0]:
        if rows.id_of_another[row] < 0 and rows.image_of[row] >= 0:
            file, number = rows.where(int(row))
            raise UserError(
                f"--clean writes one file, but the image_id {rows.image_id[int(row)].as_py()!r} of {file}, row {number} is that of "
                "another image in another file; clean them one at a time."
            )


def write_clean(path: Path, rows: Rows, only: int | None = None) -> int:
    """Write the good rows, of a row with several captions the good ones, whole or not at all; returns their number, 0 without a file.

    Args:
        only: the number of a file, whose rows alone are written; None: all rows.

    Raises:
        UserError: an annotation file was changed since it was checked, or a column that training ignores cannot be read.
    """
    numbers = range(len(rows.files)) if only is None else [only]
    records = Bar(_good_records(rows, numbers), desc="clean", unit="row")
    if path.suffix == ".arrow":
        return _write_arrow(path, [rows.files[number] for number in numbers], records)
    good = map(_as_json, records)
    first = next(good, None)
    if first is None:
        return 0
    start, between, end = ("[\n", ",\n", "\n]\n") if path.suffix == ".json" else ("", "\n", "\n")
    # half a character, which JSON can escape, is escaped again
    with replacing(path) as part, part.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(start + first)
        written = 1 + sum(1 for text in good if file.write(between + text))
        file.write(end)
    return written


def _write_arrow(path: Path, files: Sequence[AnnotationFile], records: Iterable[dict[str, Any]]) -> int:
    """Where images lie is written, not their bytes."""
    said = {file.columns.get("caption", "caption") for file in files}
    found = [{name: [one] if name in said and isinstance(one, str) else one for name, one in record.items()} for record in records]
    if not found:
        return 0
    schemas = []
    for file in files:
        schema, caption = read_mapped(file.path, file.columns.get("image", "image")).schema, file.columns.get("caption", "caption")
        schemas.append(schema.set(schema.get_field_index(caption), pa.field(caption, TEXTS)))
    try:
        table = pa.Table.from_pylist(found, pa.unify_schemas(schemas))
    except pa.ArrowTypeError as error:
        raise UserError(f"--clean writes one file, but the files' columns differ ({error}); clean them one at a time.") from error
    table = places_from(files[0].images or Path(), table)
    with arrow_file(path, table.schema) as writer:
        writer.write_table(table, ROWS_AT_ONCE)
    return len(found)


def _good_records(rows: Rows, numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Each good record of these files once, as it was written and with the ids that training reads; ``rows`` may hold only some of a
    file."""
    bad_row = (rows.image_of < 0) | rows.lists | (rows.id_of_another >= 0)
    bad_row[~bad_row] = rows.bad_image[rows.image_of[~bad_row]] != 0
    after = np.cumsum(rows.captions)
    for number in numbers:
        file, typed = rows.files[number], _typed(rows, number)
        row, end = map(int, np.searchsorted(rows.file_of, [number, number + 1]))
        for at, record in enumerate(read_records(file.path, names=file.columns)):
            if row == end:
                break
            if at != rows.number[row]:
                continue  # not among the rows that the data set keeps
            bad = rows.bad_caption[after[row] - rows.captions[row] : after[row]]
            if not bad_row[row] and not bad.all():
                if bad.any():
                    for name in (file.columns.get("caption", "caption"), "caption_facts"):
                        if record.get(name) is not None:
                            record[name] = [one for one, is_bad in zip(record[name], bad, strict=True) if not is_bad]
                yield record | {file.columns.get(name, name): values[at] for name, values in typed.items()}
            row += 1
        if row != end:
            raise UserError(f"{file} has fewer rows than when it was checked; check it again.")


def _typed(rows: Rows, number: int) -> dict[str, list[Any]]:
    """What training takes for ids and facts, where a record does not say it: the 7.0 of a .csv may be a number, and its lists are
    texts; ``same_image`` is a file's."""
    several = len(rows.files) > 1
    if not several and ending(rows.files[number].path) not in (".csv", ".tsv", ".parquet"):
        return {}
    table = read_rows(rows.files[number].path, names=rows.files[number].columns)
    ids = {name: typed_ids(table, name) for name in PAIRS.optional if name in table.column_names}
    if several and SAME_IMAGE in ids:
        ids[SAME_IMAGE] = [None if one is None else f"{number}/{one}" for one in ids[SAME_IMAGE]]
    if "facts" not in table.column_names or ending(rows.files[number].path) not in (".csv", ".tsv"):
        return ids
    return ids | {"facts": table["facts"].to_pylist(), "caption_facts": pc.list_flatten(table["caption_facts"]).to_pylist()}


def _as_json(record: dict[str, Any]) -> str:
    try:
        return json.dumps(_without_nan(record), ensure_ascii=False, default=str)
    except RecursionError as error:
        raise UserError(f"--clean: the row {str(record)[:60]!r} is nested too deeply to be written.") from error


def _without_nan(value: Any) -> Any:
    """NaN and the infinities, which Python writes and other readers of JSON refuse, become None."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
