"""The annotations without what training would refuse or replace; every column of the other rows stays as it is."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet

from lavis_mafa.analysis.data_check.judging import Verdicts
from lavis_mafa.analysis.data_check.rows import Numbers, Rows
from lavis_mafa.common.errors import UserError, did_you_mean
from lavis_mafa.datasets.annotation_formats import PAIRS, objects_in_lines, objects_in_list

SUFFIXES = (".jsonl", ".json")
LONGEST_CELL = 1 << 30  # characters; Python's own limit is that of a caption of twenty thousand words


def check_target(path: Path) -> None:
    """Nothing heavy may start for a file that cannot be written.

    Raises:
        UserError: it exists, has an ending that is not written, or its folder does not exist.
    """
    if path.suffix not in SUFFIXES:
        hint = did_you_mean(path.suffix, SUFFIXES)
        raise UserError(f"--clean is {str(path)!r}; allowed: a file that ends in {' or '.join(SUFFIXES)}.{hint}")
    if path.exists():
        raise UserError(f"--clean: {path} exists already and is never overwritten; choose another name.")
    if not path.parent.is_dir():
        raise UserError(f"--clean: the folder {path.parent} does not exist.")


def write_clean(path: Path, rows: Rows, verdicts: Verdicts) -> int:
    """Write the good rows; of a row with several captions the good ones. Whole or not at all.

    Returns:
        the number of rows written; without any, no file is.

    Raises:
        UserError: an annotation file was changed since it was checked.
    """
    bad_image = (rows.image_of < 0) | (verdicts.image != 0)[rows.image_of] if len(rows.path) else np.ones(len(rows), bool)
    written, part = 0, path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        for record in _good_records(rows, bad_image, verdicts.caption):
            text = json.dumps(record, ensure_ascii=False, default=str)
            if path.suffix == ".json":
                text = ("[\n" if not written else ",\n") + text
            file.write(text if path.suffix == ".json" else text + "\n")
            written += 1
        file.write("\n]\n" if path.suffix == ".json" else "")
    if written:
        os.replace(part, path)
    else:
        part.unlink()
    return written


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of an annotation file with all their columns, one at a time."""
    suffix = path.suffix.lower()
    if suffix == ".json":
        yield from objects_in_list(path, PAIRS)
    elif suffix == ".jsonl":
        with path.open(encoding="utf-8-sig") as file:
            yield from objects_in_lines(path, PAIRS, file)
    elif suffix == ".parquet":
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    else:
        csv.field_size_limit(LONGEST_CELL)
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ",")


def _good_records(rows: Rows, bad_image: Numbers, bad_caption: Numbers) -> Iterator[dict[str, Any]]:
    """Each good record once; ``rows`` may hold only the first of a file."""
    after = np.cumsum(rows.captions)
    row = 0
    for file, end in zip(rows.files, rows.ends, strict=True):
        for record in read_records(file):
            if row == end:
                break
            bad = bad_caption[after[row] - rows.captions[row] : after[row]]
            if not bad_image[row] and not bad.all():
                if bad.any():
                    record["caption"] = [text for text, is_bad in zip(record["caption"], bad, strict=True) if not is_bad]
                yield record
            row += 1
        if row != end:
            raise UserError(f"{file} has fewer rows than when it was checked; check it again.")
