"""Rows of .csv and .tsv files as people have them: nothing is swallowed by a quotation mark, and a wrong row is named.

Arrow's reader is faster, but a quotation mark that nobody closes makes it put whole rows into one text, without a word.
"""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from lavis_mafa.errors import UserError

LONGEST_CELL = 1 << 30  # characters; Python's own limit is that of a caption of twenty thousand words
LINES_OF_A_TEXT = 1000  # of a quoted text in a .tsv; where no end is found, its quotation mark is part of the text
SHOWN = 60
WHOLE = re.compile(r'"((?:[^"]|"")*)"')
PICTURE = re.compile(r"\.(avif|bmp|gif|jp2|jpe?g|jfif|png|p[bgpn]m|tiff?|webp)$", re.IGNORECASE)


def separated_rows(path: Path, file: TextIO, tabs: bool, image: str = "image") -> Iterator[list[str]]:
    """The header, then all rows, each with as many values as the header; blank lines are left out. ``image``: the column of paths.

    CSV is quoted as everybody quotes it. A text may hold line breaks, but no line that looks like a row of the file.
    TSV as of CC3M is not quoted at all, that of pandas is. So a value is unquoted where the quotation marks enclose it whole and
    those within it are doubled, also over several lines; any other quotation mark is part of the text.

    The ``file`` is opened with newline "\\n" (TSV) or "" (CSV): line breaks must arrive as they are, and in a text without quotation
    marks, a lone ``\\r`` is none.

    Raises:
        UserError: a row has too many or too few values, or a quotation mark that is not closed where its text ends.
    """
    csv.field_size_limit(LONGEST_CELL)
    return _tsv_rows(path, file) if tabs else _csv_rows(path, file, image)


def other_separator(line: str, own: str, wanted: tuple[str, ...]) -> str | None:
    """The separator by which a header does have the columns ``wanted``, if it is not its own; None if there is none."""
    line = " ".join(line.splitlines())  # a name may hold a line break
    for separator in ",\t;|":
        if separator != own and set(wanted) <= set(next(csv.reader([line], delimiter=separator), [])):
            return separator
    return None


def _csv_rows(path: Path, file: TextIO, image: str) -> Iterator[list[str]]:
    taken: list[str] = []  # the lines of the row that is being read
    header: list[str] = []
    row = 0
    example = ""

    def lines() -> Iterator[str]:
        for line in file:
            example_or_own = example or _image_of(taken, header)
            if taken and header and _looks_like_a_row(line, header, example_or_own) and not _ends_a_text(taken, line, header):
                raise UserError(
                    f"{path}, row {row}: a quotation mark in {_shown(taken[0])} is not closed before the next row, {_shown(line)}; "
                    'close it, or write "" for one that belongs to a quoted text.'
                )
            taken.append(line)
            yield line

    reader = csv.reader(lines(), strict=True)
    while True:
        taken.clear()
        try:
            values = next(reader, None)
        except csv.Error as error:
            what = "is never closed" if "end of data" in str(error) else "ends a text after which more follows"
            raise UserError(
                f"{path}, {f'row {row}' if header else 'the header'}: a quotation mark in {_shown(taken[0])} {what}; "
                f'write "" for one that belongs to a quoted text. ({error})'
            ) from error
        if values is None:
            return
        if not values:
            continue
        if header:
            _check_count(path, row, header, values, ",")
            example = values[header.index("image")] if "image" in header else ""
        else:
            header = ["image" if name == image else name for name in values]
        row += 1
        yield values


def _image_of(taken: list[str], header: list[str]) -> str:
    """The picture's path in a row of which the lines ``taken`` are read; nothing if it is in the text that they open, or behind it."""
    place, values = header.index("image") if "image" in header else len(header), next(csv.reader(taken), [])
    return values[place] if place < len(values) - 1 else ""


def _looks_like_a_row(line: str, header: list[str], example: str) -> bool:
    """Whether a line within a quoted text may be a row of the file: as many values, and a path like ``example`` in the right place."""
    if "image" not in header:
        return False
    values = next(csv.reader([line]), [])
    place = header.index("image")
    if len(values) != len(header):
        return False
    image, like = Path(values[place]), Path(example)
    if PICTURE.search(image.name):
        return True
    same_kind = image.suffix == like.suffix and not re.search(r"\s", str(image)) and image.name != ""
    return same_kind and (image.suffix != "" or (bool(re.search(r"\d", image.name)) and bool(re.search(r"\d", like.name))))


def _ends_a_text(taken: list[str], line: str, header: list[str]) -> bool:
    """Whether the picture's path in a line stands behind a text that the line ends: the row that began in ``taken`` ends here."""
    begun = len(next(csv.reader(taken), [])) - 1
    if begun > header.index("image"):
        return False
    try:
        return len(next(csv.reader(['"' + line], strict=True))) == len(header) - begun
    except csv.Error:
        return False


def _tsv_rows(path: Path, file: TextIO) -> Iterator[list[str]]:
    ahead: deque[str] = deque()
    header: list[str] = []
    row = 0
    while (line := ahead.popleft() if ahead else file.readline()) != "":
        text = line.rstrip("\r\n")
        if not text:
            continue
        values = text.split("\t")
        if not header:
            header = [_unquoted(value) for value in values]
            yield header
            continue
        row += 1
        if any(value.startswith('"') for value in values):
            values = _quoted(line, values, len(header), ahead, file)
        _check_count(path, row, header, values, "\t")
        yield values


def _quoted(line: str, values: list[str], count: int, ahead: deque[str], file: TextIO) -> list[str]:
    """The values of a row where one begins with a quotation mark; lines that belong to it are taken, others put ``ahead``."""
    if len(values) != count and (parsed := _parsed([line], count)) is not None:
        return parsed  # a tab within the quotation marks
    if values[-1].startswith('"') and not WHOLE.fullmatch(values[-1]):
        lines = [line]
        for number in range(LINES_OF_A_TEXT):
            if number == len(ahead):
                ahead.append(file.readline())
            more = ahead[number]
            if not more or (len(values) == count and more.count("\t") == count - 1):
                break  # the file's end, or the next row
            lines.append(more)
            if '"' in more and (parsed := _parsed(lines, count)) is not None and not any("\t" in value for value in parsed):
                for _ in lines[1:]:
                    ahead.popleft()
                return parsed
    return [_unquoted(value) for value in values]


def _parsed(lines: list[str], count: int) -> list[str] | None:
    try:
        rows = list(csv.reader(lines, delimiter="\t", strict=True))
    except csv.Error:
        return None
    return rows[0] if len(rows) == 1 and len(rows[0]) == count else None


def _unquoted(value: str) -> str:
    whole = WHOLE.fullmatch(value) if value.startswith('"') else None
    return whole[1].replace('""', '"') if whole else value


def _check_count(path: Path, row: int, header: list[str], values: list[str], separator: str) -> None:
    if len(values) != len(header):
        rule = "a text with a comma stands in quotation marks, directly behind the comma before it"
        raise UserError(
            f"{path}, row {row}: {_shown(separator.join(values))} has {len(values)} values, but the header names {len(header)} "
            f"columns; {rule if separator == ',' else 'no text may hold a tab'}."
        )


def _shown(text: str) -> str:
    text = text.rstrip("\r\n")
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "…")
