"""Arrow's compute functions. They are made when pyarrow is imported, so a type checker cannot see them: hence ``Any``.

Ids and concepts of annotations: texts or whole numbers, which stay what they are; an empty one is none.

In a table they are texts, so that one of any length fits; ``numbers`` in the table's metadata names the columns that held numbers.

Rows of .csv and .tsv files as people have them: nothing is swallowed by a quotation mark, and a wrong row is named.

Arrow's reader is faster, but a quotation mark that nobody closes makes it put whole rows into one text, without a word.

One reader per annotation format: each gives the columns it found, and ``read_annotations`` checks and unifies them.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.compute
import pyarrow.json
import pyarrow.parquet
import torch
from torch.utils.data import default_collate

from lavis_mafa.config.data import ending
from lavis_mafa.errors import UserError, did_you_mean

pc: Any = pyarrow.compute


# what pandas, R and SQL write for a value that is not there, and pandas reads as such
MISSING = ("", "#N/A", "#NA", "<NA>", "N/A", "NA", "NULL", "NaN", "NaT", "None", "n/a", "nan", "null", "-NaN", "-nan", "\\N")
PATTERN = rf"^[\s\pZ]*({'|'.join(map(re.escape, MISSING))})[\s\pZ]*$"
EXACT = 1 << 53  # a float holds whole numbers up to here; beyond, several become one
NUMBERS = b"numbers"
ALLOWED = "allowed: text or a whole number"
Id = int | str


def is_missing(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Bool [N], null where a text is null: it is blank, or how a program writes a value that is not there (``nan``, ``None``, ...)."""
    return pc.match_substring_regex(texts, PATTERN)


def is_missing_text(text: str) -> bool:
    """The same of one text."""
    return text.strip() in MISSING


def id_texts(path: Path, table: pa.Table, name: str) -> tuple[pa.ChunkedArray, bool]:
    """A column of ids or concepts as texts, null where there is none; and whether all of them are whole numbers by their type.

    Floats, which pandas makes of whole numbers with gaps, are the whole numbers that they were.

    Raises:
        UserError: a value is neither; the message names file and row.
    """
    column = table[name]
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_integer(kind):
        return column.cast(pa.string()), True
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return _whole_numbers(path, name, column.cast(kind)), True
    if not is_text(kind):
        raise UserError(f"{path}: column '{name}' holds {kind}; {ALLOWED}.")
    texts = column.cast(pa.string())
    texts = pc.if_else(pc.fill_null(is_missing(texts), True), pa.scalar(None, pa.string()), texts)
    return texts, name in number_columns(table)


def is_text(kind: pa.DataType) -> bool:
    """Any of Arrow's types of text."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def written_numbers(table: pa.Table, names: Iterable[str]) -> pa.Table:
    """Of texts alone (CSV, TSV): which of the columns are whole numbers throughout, written as everybody writes them.

    ``7.0`` in a column of such is 7, as pandas writes whole numbers with gaps; ``007`` stays a text.
    """
    found = []
    for name in names:
        if name not in table.column_names:
            continue
        texts = table[name]
        there = pc.invert(pc.fill_null(is_missing(texts), True))
        if _all(pc.match_substring_regex(texts, r"^\s*-?(0|[1-9]\d*)\.0\s*$"), there):
            table = table.set_column(table.schema.get_field_index(name), name, pc.replace_substring_regex(texts, r"\.0(\s*)$", ""))
            texts = table[name]
        if _all(pc.match_substring_regex(texts, r"^(0|-?[1-9]\d*)$"), there):
            found.append(name)
    return with_numbers(table, found)


def id_of_json(what: str, value: Any) -> tuple[str | None, bool]:
    """An id of a JSON object as a text, None if there is none; and whether it is a number.

    Raises:
        UserError: it is neither a text nor a whole number.
    """
    if isinstance(value, str) or value is None:
        return value, False
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value), True
    if isinstance(value, float) and value != value:
        return None, True
    if isinstance(value, float) and value.is_integer() and abs(value) < EXACT:
        return str(int(value)), True
    try:
        shown = json.dumps(value)[:60]
    except RecursionError:
        shown = f"a deeply nested {type(value).__name__}"
    raise UserError(f"{what} is {shown}; {ALLOWED}{_lost_digits(value)}.")


def with_numbers(table: pa.Table, names: Iterable[str]) -> pa.Table:
    """The table, with these columns noted as numbers."""
    return table.replace_schema_metadata({NUMBERS: ",".join(names)})


def number_columns(table: pa.Table) -> set[str]:
    """Those that :func:`with_numbers` noted."""
    return set((table.schema.metadata or {}).get(NUMBERS, b"").decode().split(",")) - {""}


def typed_ids(table: pa.Table, name: str) -> list[Id | None]:
    """[N] ids as they were: whole numbers where the column held them, else texts."""
    texts = table[name].to_pylist()
    return [None if text is None else int(text) for text in texts] if name in number_columns(table) else texts


def collate_with_ids(samples: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """A batch whose ids are an int64 tensor where they fit into one, else a list: a text stays a text, and none overflows."""
    ids = [sample[name] for sample in samples]
    fit = all(isinstance(one, int) and -(1 << 63) <= one < 1 << 63 for one in ids)
    batch = default_collate([{key: value for key, value in sample.items() if key != name} for sample in samples])
    return {**batch, name: torch.tensor(ids, dtype=torch.int64) if fit else ids}


def _all(holds: pa.ChunkedArray, where: pa.ChunkedArray) -> bool:
    """Whether something holds wherever there is a value, and there is one."""
    return bool(pc.any(where).as_py()) and bool(pc.all(pc.or_(holds, pc.invert(where))).as_py())


def _whole_numbers(path: Path, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_decimal(column.type):
        texts = pc.replace_substring_regex(column.cast(pa.string()), r"\.0*$", "")
        wrong = pc.index(pc.fill_null(pc.match_substring_regex(texts, r"^-?\d+$"), True), False).as_py()
    else:
        column = pc.if_else(pc.is_nan(column.cast(pa.float64())), pa.scalar(None, pa.float64()), column.cast(pa.float64()))
        whole = pc.and_(pc.equal(pc.trunc(column), column), pc.less(pc.abs(column), float(EXACT)))
        wrong = pc.index(pc.fill_null(whole, True), False).as_py()
    if wrong >= 0:
        value = column[wrong].as_py()
        raise UserError(f"{path}, row {wrong + 1}: '{name}' is {value}; {ALLOWED}{_lost_digits(value)}.")
    return texts if pa.types.is_decimal(column.type) else column.cast(pa.int64()).cast(pa.string())


def _lost_digits(value: Any) -> str:
    lost = isinstance(value, float) and EXACT <= abs(value) < float("inf")
    return ", and a float this large has lost its last digits" if lost else ""


LONGEST_CELL = 1 << 30  # characters; Python's own limit is that of a caption of twenty thousand words
LINES_OF_A_TEXT = 1000  # of a quoted text in a .tsv; where no end is found, its quotation mark is part of the text
SHOWN = 60
WHOLE = re.compile(r'"((?:[^"]|"")*)"')
PICTURE = re.compile(r"\.(avif|bmp|gif|jp2|jpe?g|jfif|png|p[bgpn]m|tiff?|webp)$", re.IGNORECASE)


def separated_rows(path: Path, file: TextIO, tabs: bool) -> Iterator[list[str]]:
    """The header, then all rows, each with as many values as the header; blank lines are left out.

    CSV is quoted as everybody quotes it. A text may hold line breaks, but no line that looks like a row of the file.
    TSV as of CC3M is not quoted at all, that of pandas is. So a value is unquoted where the quotation marks enclose it whole and
    those within it are doubled, also over several lines; any other quotation mark is part of the text.

    Args:
        path: for messages.
        file: opened by :func:`newline_of`.
        tabs: TSV.

    Raises:
        UserError: a row has too many or too few values, or a quotation mark that is not closed where its text ends.

    Example:
        >>> list(separated_rows(Path("a.tsv"), io.StringIO('image\\tcaption\\na.jpg\\t"hello\\n'), tabs=True))
        [['image', 'caption'], ['a.jpg', '"hello']]
    """
    csv.field_size_limit(LONGEST_CELL)
    return _tsv_rows(path, file) if tabs else _csv_rows(path, file)


def newline_of(tabs: bool) -> str:
    """How to open a file: line breaks must arrive as they are, and in a text without quotation marks, a lone ``\\r`` is none."""
    return "\n" if tabs else ""


def other_separator(line: str, own: str, wanted: tuple[str, ...]) -> str | None:
    """The separator by which a header does have the columns ``wanted``, if it is not its own; None if there is none."""
    line = " ".join(line.splitlines())  # a name may hold a line break
    for separator in ",\t;|":
        if separator != own and set(wanted) <= set(next(csv.reader([line], delimiter=separator), [])):
            return separator
    return None


def _csv_rows(path: Path, file: TextIO) -> Iterator[list[str]]:
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
            header = values
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


ROWS_AT_ONCE = 1 << 16
CHARACTERS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Columns:
    """What a kind of annotations consists of.

    Every row has the columns ``single`` (a text each) and ``several`` (a text or a list of texts); ``optional`` ones (see
    :mod:`lavis_mafa.datasets.formats`) may be there, and all others are ignored.
    """

    single: tuple[str, ...]
    several: str
    optional: tuple[str, ...]

    @property
    def required(self) -> tuple[str, ...]:
        return (*self.single, self.several)


SAME_IMAGE = "same_image"
PAIRS = Columns(single=("image",), several="caption", optional=("image_id", "concept", SAME_IMAGE))
QUESTIONS = Columns(single=("image", "question"), several="answer", optional=("question_id",))


@contextlib.contextmanager
def one_message(path: Path) -> Iterator[None]:
    """What reading a broken file raises becomes a UserError of one line that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as {ending(path)}: its texts are not UTF-8 ({error}); save it as UTF-8.") from error
    except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read as {ending(path)}: {' '.join(str(error).split())}") from error


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """A text file, or a compressed one that ends in ``.gz``."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline=newline)
    return path.open(encoding="utf-8-sig", newline=newline)


def known_columns(path: Path, columns: Columns, found: Iterable[str]) -> list[str]:
    """Which of ``columns`` are among ``found``; a missing required one, or one that is there twice, is a UserError."""
    found = list(found)
    for name in columns.optional + columns.required:
        if found.count(name) > 1:
            raise UserError(f"{path}: column '{name}' is there {found.count(name)} times; allowed: once.")
    for name in columns.required:
        if name not in found:
            shown = [" ".join(other.split()) for other in found]
            raise UserError(f"{path}: no column '{name}'; its columns are {', '.join(shown)}.{did_you_mean(name, shown)}")
    return [name for name in (*columns.required, *columns.optional) if name in found]


def read_parquet(path: Path, columns: Columns) -> pa.Table:
    names = pyarrow.parquet.read_schema(path).names
    table = pyarrow.parquet.read_table(path, columns=known_columns(path, columns, names))
    table.validate(full=True)  # of what some writers take for text, for which nothing else looks until it is used
    return table


def read_separated(path: Path, columns: Columns) -> pa.Table:
    rows = separated_values(path, columns)
    header = next(rows, None)
    if header is None:
        return pa.table({})
    names = known_columns(path, columns, header)
    schema = pa.schema({name: pa.string() for name in names})
    places = [header.index(name) for name in names]
    tables: list[pa.Table] = []
    while chunk := list(islice(rows, ROWS_AT_ONCE)):
        tables.append(pa.table([[row[place] for row in chunk] for place in places], schema=schema))
    return written_numbers(pa.concat_tables(tables), columns.optional) if tables else pa.table({})


def separated_values(path: Path, columns: Columns) -> Iterator[list[str]]:
    """The header of a .csv or .tsv file, which has the required columns, then its rows."""
    tabs = ending(path) == ".tsv"
    with open_text(path, newline_of(tabs)) as file:
        rows = separated_rows(path, file, tabs)
        header = next(rows, None)
        if header is not None:
            _check_header(path, columns, header, "\t" if tabs else ",")
            yield header
            yield from rows


def _check_header(path: Path, columns: Columns, header: list[str], own: str) -> None:
    """A required column that is missing may mean another separator, or that the file begins with its first row."""
    if own == "\t" and any("\r" in name for name in header):
        raise UserError(f"{path}: its header holds \\r, which ends lines in files of old programs; allowed: \\n or \\r\\n.")
    names = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
    other = other_separator(own.join(header), own, columns.required)
    if other is not None:
        remedy = {"\t": "name it .tsv", ",": "name it .csv"}.get(other, "save it with commas as .csv")
        raise UserError(f"{path}: its columns are separated by {names[other]}, but {ending(path)} means {names[own]}; {remedy}.")
    if not any(name in header or did_you_mean(name, header) for name in columns.required):
        raise UserError(
            f"{path}: no column {' or '.join(map(repr, columns.required))} in its first line, {own.join(header)[:60]!r}; "
            f"the first line must be a header that names them."
        )


def read_json_lines(path: Path, columns: Columns) -> pa.Table:
    with open_text(path) as file:
        first = next(objects_in_lines(path, columns, file), None)
    if first is None:
        return pa.table({})
    known_columns(path, columns, first)
    # Arrow's parser is several times faster than Python's, but it needs one type for a column. What the first row shows nearly
    # always holds for the others; where it does not (texts and lists of texts mixed, a wrong type, a torn line), Python reads
    # the file again and can name the row that is wrong.
    fields: dict[str, pa.DataType] = {name: pa.string() for name in columns.single}
    fields[columns.several] = pa.list_(pa.string()) if isinstance(first[columns.several], list) else pa.string()
    fields |= {name: pa.int64() if type(first.get(name)) is int else pa.string() for name in columns.optional}
    options = pyarrow.json.ParseOptions(explicit_schema=pa.schema(fields), unexpected_field_behavior="ignore")
    try:
        table = pyarrow.json.read_json(path, parse_options=options)
        table.validate(full=True)  # the parser takes any bytes for text
        return table
    except pa.ArrowInvalid:
        with open_text(path) as file:
            return _table_of(path, columns, objects_in_lines(path, columns, file))


def read_json_list(path: Path, columns: Columns) -> pa.Table:
    return _table_of(path, columns, objects_in_list(path, columns))


FORMATS: dict[str, Callable[[Path, Columns], pa.Table]] = {
    ".json": read_json_list,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".csv": read_separated,
    ".tsv": read_separated,
    ".parquet": read_parquet,
}


def objects_in_lines(path: Path, columns: Columns, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The objects of JSON lines, empty lines left out; a line that is none is a UserError naming its row."""
    row, decode = 0, json.JSONDecoder(object_pairs_hook=_each_once(columns)).decode
    for line in lines:
        if line.strip():
            row += 1
            try:
                value = decode(line)
            except (ValueError, RecursionError) as error:
                raise _no_json(path, row, error) from error
            yield _object(path, columns, row, value)


def objects_in_list(path: Path, columns: Columns) -> Iterator[dict[str, Any]]:
    """The objects of a JSON list, one at a time: ``json.load`` would hold millions of dicts at once."""
    decode = json.JSONDecoder(object_pairs_hook=_each_once(columns)).raw_decode
    with open_text(path) as file:
        text = file.read(CHARACTERS_AT_ONCE).lstrip()
        if not text.startswith("["):
            raise UserError(f"{path}: begins with {text[:20]!r}; allowed: a JSON list of objects, or JSON lines in a .jsonl file.")
        at, row = 1, 0
        while True:
            while at < len(text) and text[at] in ", \t\r\n":
                at += 1
            if at < len(text) and text[at] == "]":
                _check_end(path, text[at + 1 :], file)
                return
            try:
                value, at = decode(text, at)
            except json.JSONDecodeError as error:
                # Either the object goes on behind what was read, or it is broken: doubling keeps the second case linear.
                more = file.read(max(CHARACTERS_AT_ONCE, len(text) - at))
                if not more:
                    raise UserError(f"{path}, row {row + 1}: not valid JSON ({error.msg}).") from error
                text, at = text[at:] + more, 0
                continue
            except (ValueError, RecursionError) as error:
                raise _no_json(path, row + 1, error) from error
            row += 1
            yield _object(path, columns, row, value)


def _each_once(columns: Columns) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """Objects as ``json`` makes them, where the last of two equal keys wins; but a caption must not be lost so."""
    names = {*columns.required, *columns.optional}

    def made(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            twice = [name for name in names if sum(key == name for key, _ in pairs) > 1]
            if twice:
                raise ValueError(f"'{twice[0]}' is there twice")
        return value

    return made


def _no_json(path: Path, row: int, error: ValueError | RecursionError) -> UserError:
    """Besides broken ones, there are numbers of thousands of digits and lists a thousand deep."""
    why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    return UserError(f"{path}, row {row}: not valid JSON ({why}).")


def _check_end(path: Path, rest: str, file: TextIO) -> None:
    while not rest.strip() and (more := file.read(CHARACTERS_AT_ONCE)):
        rest = more
    if rest.strip():
        raise UserError(f"{path}: {rest.strip()[:20]!r} after the end of the list; allowed: one JSON list of objects.")


def _shown_annotation_formats(value: Any, length: int) -> str:
    """The beginning of a wrong value."""
    try:
        return json.dumps(value)[:length]
    except RecursionError:  # it could just be read
        return f"a deeply nested {type(value).__name__}"


def _object(path: Path, columns: Columns, row: int, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        form = ", ".join(f"'{name}': ..." for name in columns.required)
        raise UserError(f"{path}, row {row}: {_shown_annotation_formats(value, 40)} is not an object; allowed: {{{form}}}.")
    return value


def _table_of(path: Path, columns: Columns, objects: Iterator[dict[str, Any]]) -> pa.Table:
    several = columns.several
    types = {name: pa.string() for name in (*columns.required, *columns.optional)} | {several: pa.list_(pa.string())}
    schema = pa.schema(types)
    tables: list[pa.Table] = []
    numbers = dict.fromkeys(columns.optional, True)
    row = 0
    while chunk := list(islice(objects, ROWS_AT_ONCE)):
        if not tables:
            known_columns(path, columns, chunk[0])
        cells: dict[str, list[Any]] = {name: [] for name in schema.names}
        for record in chunk:
            row += 1
            for name in columns.single:
                cells[name].append(_typed(path, row, record, name, str, "text"))
            value = record.get(several)
            value = None if value != value else _typed(path, row, record, several, (str, list), "text or a list of texts")  # NaN
            texts = [value] if isinstance(value, str) else value
            cells[several].append(texts)
            if texts is not None and not all(text is None or isinstance(text, str) for text in texts):
                raise UserError(
                    f"{path}, row {row}: '{several}' is {_shown_annotation_formats(texts, 60)}; allowed: text or a list of texts."
                )
            for name in columns.optional:
                text, is_number = id_of_json(f"{path}, row {row}: '{name}'", record.get(name))
                cells[name].append(text)
                numbers[name] &= is_number or text is None
        try:
            tables.append(pa.table(cells, schema=schema))
        except UnicodeEncodeError as error:
            raise _half_a_character(path, row - len(chunk), chunk, schema.names) from error
    return with_numbers(pa.concat_tables(tables), [name for name, all_are in numbers.items() if all_are]) if tables else pa.table({})


def _half_a_character(path: Path, before: int, chunk: list[dict[str, Any]], names: list[str]) -> UserError:
    """JSON can escape half of a pair of UTF-16 (``\\ud83d``), which is no text that anything else could hold."""
    for row, record in enumerate(chunk, before + 1):
        for name in names:
            try:
                json.dumps(record.get(name), ensure_ascii=False).encode()
            except UnicodeEncodeError:
                shown = json.dumps(record[name])[:60]
                return UserError(f"{path}, row {row}: '{name}' is {shown}, with half of a character; allowed: whole ones.")
    return UserError(f"{path}: a text holds half of a character; allowed: whole ones.")


def _typed(path: Path, row: int, record: dict[str, Any], name: str, kind: type | tuple[type, ...], allowed: str) -> Any:
    value = record.get(name)
    if value is not None and not isinstance(value, kind):
        raise UserError(f"{path}, row {row}: '{name}' is {_shown_annotation_formats(value, 60)}; allowed: {allowed}.")
    return value
