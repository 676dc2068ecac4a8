"""The annotations without what training would refuse or replace; every column of the other rows means what it did."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from tqdm import tqdm

from lavis_mafa.analysis.data_check.judging import Verdicts
from lavis_mafa.analysis.data_check.records import read_records
from lavis_mafa.analysis.data_check.rows import Numbers, Rows
from lavis_mafa.config.data import ending
from lavis_mafa.datasets.annotations import ids_of_other_images, read_rows
from lavis_mafa.datasets.formats import PAIRS, SAME_IMAGE, Id, one_message, typed_ids
from lavis_mafa.errors import UserError, did_you_mean

SUFFIXES = (".jsonl", ".json")


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


def check_ids(rows: Rows) -> None:
    """An ``image_id`` counts within its file, but the cleaned rows are one.

    Raises:
        UserError: two files give the same one to different images.
    """
    table = pa.table({"image": pa.chunked_array([np.char.mod("%d", rows.image_of)]), "image_id": rows.image_id})
    for row in ids_of_other_images(table)[0]:
        if rows.id_of_another[row] < 0 and rows.image_of[row] >= 0:
            file, number = rows.where(int(row))
            raise UserError(
                f"--clean writes one file, but the image_id {rows.image_id[int(row)].as_py()!r} of {file}, row {number} is that of "
                "another image in another file; clean them one at a time."
            )


def check_columns(files: Sequence[Path]) -> None:
    """Nothing heavy may start for rows that JSON cannot hold.

    Raises:
        UserError: a Parquet file has a column of bytes.
    """
    for file in files:
        if file.suffix.lower() == ".parquet" and file.is_file():
            with one_message(file):
                schema = pyarrow.parquet.read_schema(file)
            for field in schema:
                if _holds_bytes(field.type):
                    raise UserError(f"--clean: column '{field.name}' of {file} holds {field.type}, which JSON cannot; leave it out.")


def write_clean(path: Path, rows: Rows, verdicts: Verdicts) -> int:
    """Write the good rows; of a row with several captions the good ones, and null for numbers that JSON has not. Whole or not at all.

    Returns:
        the number of rows written; without any, no file is.

    Raises:
        UserError: an annotation file was changed since it was checked, or a column that training ignores cannot be read.
    """
    bad_image = (rows.image_of < 0) | (verdicts.image != 0)[rows.image_of] if len(rows.path) else np.ones(len(rows), bool)
    written, part = 0, path.with_name(f".{path.name}.part")
    try:
        # half a character, which JSON can escape, is escaped again
        with part.open("w", encoding="utf-8", errors="backslashreplace") as file:
            good = _good_records(rows, bad_image | rows.lists | (rows.id_of_another >= 0), verdicts.caption)
            for record in tqdm(good, desc="clean", unit="row", file=sys.stderr):
                text = _as_json(record)
                if path.suffix == ".json":
                    text = ("[\n" if not written else ",\n") + text
                file.write(text if path.suffix == ".json" else text + "\n")
                written += 1
            file.write("\n]\n" if path.suffix == ".json" else "")
        if written:
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return written


def _as_json(record: dict[str, Any]) -> str:
    try:
        try:
            return json.dumps(record, ensure_ascii=False, default=str, allow_nan=False)
        except ValueError:
            return json.dumps(_without_nan(record), ensure_ascii=False, default=str)
    except RecursionError as error:
        raise UserError(f"--clean: the row of image {record['image']!r} is nested too deeply to be written.") from error


def _without_nan(value: Any) -> Any:
    """NaN and the infinities, which Python writes and other readers of JSON refuse, become None."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _holds_bytes(kind.value_type)
    binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
    return binary or any(_holds_bytes(kind.field(number).type) for number in range(kind.num_fields))


def _ids(rows: Rows, number: int) -> dict[str, list[Id | None]]:
    """What training takes for ids, where a record does not say it: the 7.0 of a .csv may be a number; ``same_image`` is a file's."""
    several = len(rows.files) > 1
    if not several and ending(rows.files[number].path) not in (".csv", ".tsv", ".parquet"):
        return {}
    table = read_rows(rows.files[number].path)
    ids = {name: typed_ids(table, name) for name in PAIRS.optional if name in table.column_names}
    if several and SAME_IMAGE in ids:
        ids[SAME_IMAGE] = [None if one is None else f"{number}/{one}" for one in ids[SAME_IMAGE]]
    return ids


def _good_records(rows: Rows, bad_image: Numbers, bad_caption: Numbers) -> Iterator[dict[str, Any]]:
    """Each good record once; ``rows`` may hold only some of a file."""
    after = np.cumsum(rows.captions)
    row = 0
    for number, file in enumerate(rows.files):
        end, ids = int(np.searchsorted(rows.file_of, number, side="right")), _ids(rows, number)
        for at, record in enumerate(read_records(file.path)):
            if row == end:
                break
            if at != rows.number[row]:
                continue  # not among the rows that the data set keeps
            bad = bad_caption[after[row] - rows.captions[row] : after[row]]
            if not bad_image[row] and not bad.all():
                if bad.any():
                    record["caption"] = [text for text, is_bad in zip(record["caption"], bad, strict=True) if not is_bad]
                yield record | {name: values[at] for name, values in ids.items()}
            row += 1
        if row != end:
            raise UserError(f"{file} has fewer rows than when it was checked; check it again.")
