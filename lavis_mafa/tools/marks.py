"""What people say of connections, accept or reject, as a file: written by ``explore`` and by a page's export, read by ``mine``."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lavis_mafa.datasets.ids import pc
from lavis_mafa.errors import UserError
from lavis_mafa.files import replacing, write_bytes

ACCEPT, REJECT = MARKS = ("accept", "reject")
NEEDED = ("image", "text", "mark")
SCHEMA = pa.schema(
    {
        "image": pa.int64(),  # row of the training data whose image it is
        "text": pa.int64(),  # and whose text
        "direction": pa.string(),  # that was looked at; the mark holds for both
        "mark": pa.string(),
        "image_path": pa.string(),
        "caption": pa.string(),
        "probability": pa.float64(),
        "verdict": pa.string(),  # Con-D's: positive, ambiguous or negative
    }
)
# a spreadsheet takes a cell that begins so for a formula: it gets a ' before it, and so does what would be mistaken for such a cell
FORMULA, ESCAPED = re.compile(r"'*[=+\-@\t\r]"), re.compile(r"'+[=+\-@\t\r]")

# --- files --------------------------------------------------------------------------------------------------------------


def read_marks(path: Path, flag: str = "--reviewed") -> pa.Table:
    """The columns of ``SCHEMA``, null where a file has not all of them; each pair once.

    Raises:
        UserError: it cannot be read, lacks one of ``NEEDED``, or a row has no row numbers or another mark; or two rows contradict.
    """
    where = f"{flag}: {path}"
    if path.suffix.lower() not in (".parquet", ".csv"):
        raise UserError(f"{flag} is {path}; allowed: a .parquet or .csv file of marks.")
    try:
        table = _read_csv(path) if path.suffix.lower() == ".csv" else pq.read_table(path)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{where} cannot be read: {' '.join(str(error).split())}") from error
    if missing := [name for name in NEEDED if name not in table.column_names]:
        raise UserError(f"{where} has no column {missing[0]!r}; it needs {', '.join(NEEDED)}, and has {', '.join(table.column_names)}.")
    if twice := [name for name in SCHEMA.names if table.column_names.count(name) > 1]:
        raise UserError(f"{where} has two columns {twice[0]!r}; keep one.")
    columns = [_column(where, table[field.name], field) if field.name in table.column_names else None for field in SCHEMA]
    columns = [pa.nulls(len(table), field.type) if one is None else one for one, field in zip(columns, SCHEMA, strict=True)]
    marks = pa.table(columns, schema=SCHEMA)
    said: dict[tuple[int, int], tuple[int, str]] = {}
    for row, (image, text, mark) in enumerate(zip(*(marks[name].to_pylist() for name in NEEDED), strict=True)):
        if image is None or text is None or min(image, text) < 0:
            raise UserError(f"{where}, row {row + 1}: image is {image} and text is {text}; allowed: row numbers of the data, from 0.")
        if mark not in MARKS:
            raise UserError(f"{where}, row {row + 1}: mark is {mark!r}; allowed: {' or '.join(MARKS)}.")
        first, before = said.setdefault((image, text), (row, mark))
        if before != mark:
            raise UserError(
                f"{where}, rows {first + 1} and {row + 1}: image {image} with text {text} is marked {before} and {mark}; keep one."
            )
    return marks.take(pa.array([row for row, _ in said.values()], pa.int64()))


def write_marks(marks: pa.Table, path: Path) -> None:
    """As .parquet or, by its name, as .csv; whole or not at all."""
    if path.suffix.lower() == ".csv":
        rows = io.StringIO(newline="")
        lines = csv.writer(rows)
        lines.writerow(marks.column_names)
        lines.writerows([_escaped(value) for value in row.values()] for row in marks.to_pylist())
        write_bytes(path, rows.getvalue().encode("utf-8-sig"))  # a spreadsheet takes it for Latin-1 without the sign
        return
    with replacing(path) as part:
        pq.write_table(marks, part)


def _read_csv(path: Path) -> pa.Table:
    with path.open(newline="", encoding="utf-8-sig") as file:
        head, *rows = [row for row in csv.reader(file, strict=True) if row] or [[]]
    for number, row in enumerate(rows, 1):
        if len(row) != len(head):
            raise ValueError(f"row {number} has {len(row)} values, not {len(head)}")
    cells = [[cell[1:] if ESCAPED.match(cell) else cell for cell in column] for column in zip(*rows, strict=True)] or [[] for _ in head]
    return pa.table([pa.array([cell or None for cell in column], pa.string()) for column in cells], names=head)


def _escaped(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and FORMULA.match(value) else value


def _column(where: str, column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    try:
        return column.cast(field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"{where}: column {field.name!r} holds {column.type}, not {field.type}: {error}") from error


# --- of which data ------------------------------------------------------------------------------------------------------


def fitted(marks: pa.Table, images: pa.ChunkedArray, captions: pa.ChunkedArray, where: str) -> pa.Table:
    """The marks of these data, every one with a caption: where a file does not say which of a row's, the first.

    Args:
        images: [N] paths. captions: [N] list<string>. where: the file's name for messages.

    Raises:
        UserError: they are of other data: a row number beyond, another image or another caption.
    """
    count, filled = len(images), []
    for row in marks.to_pylist():
        pair = f"{where}: the pair of image {row['image']} and text {row['text']}"
        if max(row["image"], row["text"]) >= count:
            raise UserError(f"{pair} is not of these data, which have {count:,} rows (from 0).")
        image, texts = images[row["image"]].as_py(), captions[row["text"]].as_py()
        if row["image_path"] is not None and not _same_path(row["image_path"], image):
            raise UserError(f"{pair} is not of these data: the image is {image!r} here, and {row['image_path']!r} there.")
        if row["caption"] is not None and row["caption"].split() not in [text.split() for text in texts]:
            raise UserError(f"{pair} is not of these data: the caption is {texts[0]!r} here, and {row['caption']!r} there.")
        filled.append(row["caption"] if row["caption"] is not None else texts[0])
    return marks.set_column(SCHEMA.get_field_index("caption"), "caption", pa.array(filled, pa.string()))


def _same_path(one: str, other: str) -> bool:
    """One may start from a folder further up."""
    return one == other or one.endswith(f"/{other}") or other.endswith(f"/{one}")


# --- the human correction factor ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Confirmed:
    """How many of Con-D's positives people confirm: the factor that the paper's Table 1 multiplies its count by (0.83 there)."""

    accepted: int
    rejected: int

    @property
    def factor(self) -> float | None:
        return self.accepted / (self.accepted + self.rejected) if self.accepted + self.rejected else None

    def interval(self) -> tuple[float, float]:
        """95 %, Wilson's; it holds if the marked pairs are a random part of the positives."""
        from scipy.stats import binomtest  # takes longer to import than all else here

        if self.factor is None:
            return 0.0, 1.0
        low, high = binomtest(self.accepted, self.accepted + self.rejected).proportion_ci(method="wilson")
        return float(low), float(high)

    def as_json(self) -> dict[str, Any]:
        low, high = self.interval()
        return {"accepted": self.accepted, "rejected": self.rejected, "factor": self.factor, "low": low, "high": high}

    def __str__(self) -> str:
        if self.factor is None:
            return "No positive of Con-D is marked, so there is no correction factor."
        low, high = self.interval()
        count = f"{self.accepted:,} of {self.accepted + self.rejected:,} marked positives are accepted"
        return f"Human correction factor: {self.factor:.3f} (95 %: {low:.3f} to {high:.3f}), since {count}."


def confirmed(marks: pa.Table, above: float | None = None) -> Confirmed:
    """Of the positives among the marks: those of Con-D's verdict or, with ``above``, of a probability above it. Where a file tells
    neither, all of them."""
    verdict, probability = marks["verdict"], marks["probability"]
    if above is not None and probability.null_count < len(probability):
        marks = marks.filter(pc.greater(probability, above))
    elif verdict.null_count < len(verdict):
        marks = marks.filter(pc.equal(verdict, "positive"))
    accepted = int(np.sum(pc.equal(marks["mark"], ACCEPT).to_numpy()))
    return Confirmed(accepted, len(marks) - accepted)


def factor_of(path: Path, above: float | None) -> Confirmed:
    """The factor that a file of marks tells; raises UserError where it tells none."""
    found = confirmed(read_marks(path, "--correction"), above)
    if found.factor is None:
        what = "of Con-D's positives" if above is None else f"with a probability above {above:g}"
        raise UserError(f"--correction: {path} has no mark of a pair {what}, so that it tells no factor.")
    return found
