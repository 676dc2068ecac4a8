"""One reader per annotation format: each gives the columns it found, and ``read_annotations`` checks and unifies them."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet

from lavis_mafa.config.data import ENTAILMENT, STATEMENT, ending
from lavis_mafa.datasets.arrow_files import read_mapped
from lavis_mafa.datasets.facts import FACTS, TEXTS, claims_of_json, facts_of_cell, facts_of_json
from lavis_mafa.datasets.ids import id_of_json, shown_json, with_numbers, written_numbers
from lavis_mafa.datasets.separated_values import other_separator, separated_rows
from lavis_mafa.datasets.stored import PLACE
from lavis_mafa.errors import UserError, did_you_mean
from lavis_mafa.progress import Bar

ROWS_AT_ONCE = 1 << 16
CHARACTERS_AT_ONCE = 1 << 20
LONG = 3.0  # seconds of reading


@dataclass(frozen=True)
class Columns:
    """A kind of annotations: columns ``single`` (a text), ``several`` (a text or a list of texts), ``optional`` (ids) and ``facts``
    (see :mod:`lavis_mafa.datasets.facts`). A file without the column ``several`` may call it ``or_else``; ``labels`` are what a column
    ``label`` may hold, ``images`` the columns among ``single`` that are paths of images; ``hint`` says what to do where one is called
    otherwise.
    """

    single: tuple[str, ...]
    several: str
    optional: tuple[str, ...]
    images: tuple[str, ...] = ("image",)
    facts: tuple[str, ...] = ()
    or_else: str = ""
    labels: tuple[str, ...] = ()
    hint: str = " A column of another name is told by columns ({{{0}: NAME}} in build_info, or --columns {0}=NAME)."

    @property
    def known(self) -> tuple[str, ...]:
        return (*self.required, *self.optional, *self.facts)

    @property
    def required(self) -> tuple[str, ...]:
        return (*self.single, self.several)


SAME_IMAGE = "same_image"
PAIRS = Columns(single=("image",), several="caption", optional=("image_id", "concept", SAME_IMAGE), facts=tuple(FACTS))
QUESTIONS = Columns(single=("image", "question"), several="answer", optional=("question_id",))
SENTENCES = Columns(single=("image", "label"), several="sentence", optional=("sentence_id",), or_else="caption", labels=ENTAILMENT)
TWO = ("image0", "image1")
STATEMENTS = Columns(single=(*TWO, "label"), several="sentence", optional=("sentence_id",), images=TWO, labels=STATEMENT)


@contextlib.contextmanager
def one_message(path: Path) -> Iterator[None]:
    """What reading a broken file raises becomes a UserError of one line that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as {ending(path)}: its texts are not UTF-8 ({error}); save it as UTF-8.") from error
    except (pa.ArrowException, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read as {ending(path)}: {' '.join(str(error).split())}") from error


def read_records(path: Path, columns: Columns = PAIRS, names: Mapping[str, str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of an annotation file as they were written, with all their columns, one at a time; ``names`` as of ``read_rows``."""
    kind = ending(path)
    with one_message(path):
        columns = as_named(path, columns, names)[0] if names else columns
        if kind == ".json":
            yield from objects_in_list(path, columns)
        elif kind in (".jsonl", ".ndjson"):
            with open_text(path) as file:
                yield from objects_in_lines(path, columns, file)
        elif kind == ".arrow":
            for batch in read_mapped(path, columns.single[0]).to_batches(ROWS_AT_ONCE):
                yield from batch.to_pylist()
        elif kind == ".parquet":
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
                yield from batch.to_pylist()
        else:
            values = separated_values(path, columns)
            header = next(values, [])
            for row in values:
                yield dict(zip(header, row, strict=True))


@contextlib.contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """A text file, compressed where it ends in ``.gz``; where reading it takes long, a bar tells how far it is."""
    bar = Bar(total=path.stat().st_size, desc=f"reading {path.name}", unit="B", unit_scale=True, delay=LONG, leave=False)
    with bar, io.BufferedReader(_Counted(path, bar.update)) as raw:
        content: Any = gzip.open(raw) if path.suffix.lower() == ".gz" else raw
        with io.TextIOWrapper(content, encoding="utf-8-sig", newline=newline) as text:
            yield text


class _Counted(io.FileIO):
    """Tells how many bytes were read each time."""

    def __init__(self, path: Path, tell: Callable[[int], object]) -> None:
        super().__init__(path)
        self.tell_bytes = tell

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer)
        self.tell_bytes(count)
        return count


def as_named(path: Path, columns: Columns, names: Mapping[str, str] | None = None) -> tuple[Columns, dict[str, str]]:
    """The columns as a file names them, and its names -> ours of those that are called otherwise.

    Args:
        names: ours -> the file's, where somebody told; those of other kinds of annotations are passed over.

    Raises:
        UserError: the file has no such column.
    """
    given = {ours: theirs for ours, theirs in (names or {}).items() if ours in columns.known and ours != theirs}
    if not given and not columns.or_else:
        return columns, {}
    found = column_names(path, columns)
    for ours, theirs in given.items():
        if theirs not in found:
            shown = [" ".join(other.split()) for other in found]
            raise UserError(
                f"{path}: no column '{theirs}', which columns names for {ours}; its columns are {', '.join(shown)}."
                f"{did_you_mean(theirs, shown)}"
            )
    if columns.or_else in found and columns.several not in given and columns.several not in found:
        given[columns.several] = columns.or_else
    single, optional = (tuple(given.get(name, name) for name in names) for names in (columns.single, columns.optional))
    named = replace(columns, single=single, several=given.get(columns.several, columns.several), optional=optional)
    return named, {theirs: ours for ours, theirs in given.items()}


def column_names(path: Path, columns: Columns) -> list[str]:
    """The columns of a file, of JSON those of its first row."""
    kind = ending(path)
    if kind == ".parquet":
        return list(pyarrow.parquet.read_schema(path).names)
    if kind == ".arrow":
        return read_mapped(path).column_names
    if kind in (".csv", ".tsv"):
        with open_text(path, "\n" if kind == ".tsv" else "") as file:
            return next(separated_rows(path, file, kind == ".tsv"), [])
    if kind == ".json":
        return list(next(objects_in_list(path, columns), {}))
    with open_text(path) as file:
        return list(next(objects_in_lines(path, columns, file), {}))


def known_columns(path: Path, columns: Columns, found: Iterable[str]) -> list[str]:
    """Which of ``columns`` are among ``found``; a missing required one, or one that is there twice, is a UserError."""
    found = list(found)
    for name in columns.known:
        if found.count(name) > 1:
            raise UserError(f"{path}: column '{name}' is there {found.count(name)} times; allowed: once.")
    for name in columns.required:
        if name not in found:
            shown = [" ".join(other.split()) for other in found]
            hint = did_you_mean(name, shown) or columns.hint.format(name)
            raise UserError(f"{path}: no column '{name}'; its columns are {', '.join(shown)}.{hint}")
    return [name for name in columns.known if name in found]


def read_parquet(path: Path, columns: Columns) -> pa.Table:
    names = pyarrow.parquet.read_schema(path).names
    table = pyarrow.parquet.read_table(path, columns=[*known_columns(path, columns, names), *_places(names)])
    table.validate(full=True)  # of what some writers take for text, for which nothing else looks until it is used
    return table


def read_arrow(path: Path, columns: Columns) -> pa.Table:
    table = read_mapped(path, columns.single[0])
    table = table.select([*known_columns(path, columns, table.column_names), *_places(table.column_names)])
    table.validate(full=True)
    return table


def _places(names: list[str]) -> list[str]:
    return [*PLACE] if set(PLACE) <= set(names) else []


def read_separated(path: Path, columns: Columns) -> pa.Table:
    rows = separated_values(path, columns)
    header = next(rows, None)
    if header is None:
        return pa.table({})
    names = known_columns(path, columns, header)
    schema = pa.schema({name: TEXTS if name in columns.facts else pa.string() for name in names})
    places = {name: header.index(name) for name in names}
    tables: list[pa.Table] = []
    read = 0
    while chunk := list(islice(rows, ROWS_AT_ONCE)):
        cells: dict[str, list[Any]] = {name: [row[place] for row in chunk] for name, place in places.items()}
        for name in places.keys() & columns.facts:
            cells[name] = [facts_of_cell(f"{path}, row {row}: '{name}'", cell) for row, cell in enumerate(cells[name], read + 1)]
        tables.append(pa.table(cells, schema=schema))
        read += len(chunk)
    return written_numbers(pa.concat_tables(tables), columns.optional) if tables else pa.table({})


def separated_values(path: Path, columns: Columns) -> Iterator[list[str]]:
    """The header of a .csv or .tsv file, which has the required columns, then its rows."""
    tabs = ending(path) == ".tsv"
    with open_text(path, "\n" if tabs else "") as file:
        rows = separated_rows(path, file, tabs, columns.single[0])
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
            f"the first line must be a header that names them.{columns.hint.format(columns.required[0])}"
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
    several = isinstance(first[columns.several], list)
    fields[columns.several] = TEXTS if several else pa.string()
    fields |= {name: FACTS[name] if several else TEXTS for name in columns.facts}
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
    ".arrow": read_arrow,
}


def objects_in_lines(path: Path, columns: Columns, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The objects of JSON lines, empty lines left out; a line that is none is a UserError naming its row."""
    decode = json.JSONDecoder(object_pairs_hook=_each_once(columns)).decode
    for row, line in enumerate(filter(str.strip, lines), 1):
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
                rest = text[at + 1 :]
                while not rest.strip() and (more := file.read(CHARACTERS_AT_ONCE)):
                    rest = more
                if rest.strip():
                    raise UserError(f"{path}: {rest.strip()[:20]!r} after the end of the list; allowed: one JSON list of objects.")
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

    def made(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            for name in columns.known:
                if sum(key == name for key, _ in pairs) > 1:
                    raise ValueError(f"'{name}' is there twice")
        return value

    return made


def _no_json(path: Path, row: int, error: ValueError | RecursionError) -> UserError:
    """Besides broken ones, there are numbers of thousands of digits and lists a thousand deep."""
    why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    return UserError(f"{path}, row {row}: not valid JSON ({why}).")


def _object(path: Path, columns: Columns, row: int, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        form = ", ".join(f"'{name}': ..." for name in columns.required)
        raise UserError(f"{path}, row {row}: {shown_json(value, 40)} is not an object; allowed: {{{form}}}.")
    return value


def _table_of(path: Path, columns: Columns, objects: Iterator[dict[str, Any]]) -> pa.Table:
    several = columns.several
    types = {name: pa.string() for name in (*columns.required, *columns.optional)}
    schema = pa.schema(types | {several: TEXTS} | {name: FACTS[name] for name in columns.facts})
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
                raise UserError(f"{path}, row {row}: '{several}' is {shown_json(texts)}; allowed: text or a list of texts.")
            for name in columns.optional:
                text, is_number = id_of_json(f"{path}, row {row}: '{name}'", record.get(name))
                cells[name].append(text)
                numbers[name] &= is_number or text is None
            if columns.facts:
                cells["facts"].append(facts_of_json(f"{path}, row {row}: 'facts'", record.get("facts")))
                cells["caption_facts"].append(claims_of_json(f"{path}, row {row}: 'caption_facts'", record.get("caption_facts"), value))
        try:
            tables.append(pa.table(cells, schema=schema))
        except UnicodeEncodeError as error:  # JSON can escape half of a pair of UTF-16 (``\ud83d``), which is no text
            for number, record in enumerate(chunk, row - len(chunk) + 1):
                for name, value in record.items():
                    if name in schema.names and error.object in _flat(value):
                        half = f"{json.dumps(value)[:60]}, with half of a character; allowed: whole ones."
                        raise UserError(f"{path}, row {number}: '{name}' is {half}") from error
            raise
    return with_numbers(pa.concat_tables(tables), [name for name, all_are in numbers.items() if all_are]) if tables else pa.table({})


def _flat(value: Any) -> list[Any]:
    return [text for one in value for text in _flat(one)] if isinstance(value, list) else [value]


def _typed(path: Path, row: int, record: dict[str, Any], name: str, kind: type | tuple[type, ...], allowed: str) -> Any:
    value = record.get(name)
    if value is not None and not isinstance(value, kind):
        raise UserError(f"{path}, row {row}: '{name}' is {shown_json(value)}; allowed: {allowed}.")
    return value
