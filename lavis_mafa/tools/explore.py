"""A place to look at connections: a server for one person's browser, on the loopback address alone, that keeps what they mark.

Nobody else is to read or to mark: a name other than that of this machine (DNS rebinding) and a post from another page are refused,
no path comes from the browser, and the page runs no script but its own. Every caption is put in as text.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import secrets
import sys
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pyarrow as pa

from lavis_mafa import __version__
from lavis_mafa.datasets.images import thumbnail
from lavis_mafa.errors import UserError
from lavis_mafa.tools.connections import MARKED, ORDERS, Connections, Query
from lavis_mafa.tools.marks import MARKS, SCHEMA, Confirmed, confirmed, fitted, read_marks, write_marks
from lavis_mafa.tools.render import render
from lavis_mafa.tools.run_files import Run

LOOPBACK = "127.0.0.1"
NAMES = (LOOPBACK, "localhost")
SIDE = 320  # pixels of an image
LARGEST = 10_000  # bytes of what is posted


class KeptMarks:
    """What is marked so far, on the disk before anybody is told that it is; another program may write the same file meanwhile.

    Args:
        path: the file, which need not be there yet.

    Raises:
        UserError: it is there, but no file of marks, or of other data (as far as ``connections`` know their data).
    """

    def __init__(self, path: Path, connections: Connections) -> None:
        self.path, self.connections = path, connections
        self._rows: dict[tuple[int, int], dict[str, Any]] = {}
        self._lock, self._seen = threading.Lock(), (0, 0)
        if path.suffix.lower() not in (".parquet", ".csv"):
            raise UserError(f"--marks is {path}; allowed: a .parquet or .csv file.")
        self._read()

    def words(self) -> dict[tuple[int, int], str]:
        """(image, text) -> accept or reject."""
        with self._lock:
            return {pair: row["mark"] for pair, row in self._rows.items()}

    def put(self, number: int, mark: str | None) -> None:
        """Mark the pair of a connection, or take its mark away; raises OSError where it cannot be saved, and then it is not."""
        with self._lock:
            self._read()
            row = self.connections.mark_row(number, mark or "")
            rows = dict(self._rows)
            rows.pop(pair := (row["image"], row["text"]), None)
            if mark is not None:
                rows[pair] = row
            write_marks(pa.Table.from_pylist([*rows.values()], SCHEMA), self.path)
            self._rows, self._seen = rows, self._stamp()

    def confirmed(self) -> Confirmed:
        with self._lock:
            return confirmed(pa.Table.from_pylist([*self._rows.values()], SCHEMA))

    def _read(self) -> None:
        """What is in the file, where it is another one than before."""
        if not self.path.exists() or (stamp := self._stamp()) == self._seen:
            return
        marks, rows = read_marks(self.path, "--marks"), self.connections.rows
        if rows.parts:
            captions = pa.chunked_array([chunk for part in rows.parts for chunk in part.table["caption"].chunks])
            images = pa.chunked_array([chunk for part in rows.parts for chunk in part.table["image"].chunks])
            fitted(marks, images, captions, f"--marks: {self.path}")
        self._rows = {(row["image"], row["text"]): row for row in marks.to_pylist()}
        self._seen = stamp

    def _stamp(self) -> tuple[int, int]:
        status = self.path.stat()
        return status.st_mtime_ns, status.st_ino


@dataclass(frozen=True)
class Reply:
    """What the browser gets."""

    content: bytes
    kind: str = "text/plain; charset=utf-8"
    status: int = 200
    policy: str = "default-src 'none'"
    cache: str = "no-store"

    @classmethod
    def of_json(cls, value: Any) -> Reply:
        return cls(json.dumps(value).encode(), "application/json")

    @classmethod
    def refusal(cls, status: int, why: str) -> Reply:
        return cls(why.encode(), status=status)


class Explorer(ThreadingHTTPServer):
    """Serves the connections of a run from its construction on, once ``serve_forever`` is called.

    Args:
        run: as ``open_runs`` gives it. marks: the file of marks. port: of the loopback address; 0 takes any that is free.

    Raises:
        UserError: no connections, a file that is none of marks, or a port that cannot be taken (the message names a free one).

    Attributes:
        url: what to open.
    """

    daemon_threads = True

    def __init__(self, run: Run, marks: Path, port: int) -> None:
        try:  # first: that another has the port is known before the data are read
            super().__init__((LOOPBACK, port), _Handler)
        except OSError as error:
            raise UserError(f"--port {port} cannot be taken ({error.strerror}); free is, for example, {_free_port()}.") from error
        self.url = f"http://{LOOPBACK}:{self.server_address[1]}/"
        try:
            self._open(run, marks)
        except UserError:
            self.server_close()
            raise

    def _open(self, run: Run, marks: Path) -> None:
        self.connections = Connections(run)
        self.marks = KeptMarks(marks, self.connections)
        self.key = secrets.token_hex(4)  # of image addresses, which browsers keep: the next data have the same rows
        self.shown = self.connections.images
        page = render(
            "explore.html",
            run=run,
            connections=self.connections,
            kinds=self.connections.kinds,
            lowest=-1 if self.connections.probability.min() < 0 else 0,  # a guide's cosines
            marks=marks,
            key=self.key,
            version=__version__,
        )
        self.page = Reply(page.encode(), "text/html; charset=utf-8", policy=_policy(page))

    def get(self, path: str, given: dict[str, str]) -> Reply:
        """The page, or one of the things that its script asks for."""
        if path == "/":
            return self.page
        if path == "/connections":
            return Reply.of_json(self.connections.find(_query(given), self.marks.words()))
        if path == "/factor":
            return Reply.of_json(self.marks.confirmed().as_json())
        if (match := re.fullmatch(rf"/image/{self.key}/(\d{{1,15}})", path)) and int(match[1]) in self.shown:
            return self._image(int(match[1]))
        return Reply.refusal(404, "not found")

    def post(self, path: str, body: bytes) -> Reply:
        """``{"connection": 3, "mark": "accept"}`` to ``/mark``; a mark of null takes it away."""
        if path != "/mark":
            return Reply.refusal(404, "not found")
        try:
            asked = json.loads(body)
            number, mark = asked["connection"], asked["mark"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return Reply.refusal(400, "no mark")
        if type(number) is not int or not 0 <= number < len(self.connections) or mark not in (*MARKS, None):
            return Reply.refusal(400, "no such connection or mark")
        try:
            self.marks.put(number, mark)
        except (OSError, UserError) as error:
            return Reply.refusal(500, str(error))
        return Reply.of_json({"saved": True})

    def handle_error(self, *request: Any) -> None:
        """A browser that does not wait for an answer is no error."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(*request)

    def _image(self, row: int) -> Reply:
        source = self.connections.rows.image_path(row)
        if source is None or not source.is_file():
            return Reply.refusal(404, "image not known" if source is None else "image is missing")
        try:
            picture = thumbnail(source, SIDE)
        except OSError:
            return Reply.refusal(404, "image is unreadable")
        content = io.BytesIO()
        picture.save(content, format="WEBP", quality=80, method=2)
        return Reply(content.getvalue(), "image/webp", cache="private, max-age=86400, immutable")


class _Handler(BaseHTTPRequestHandler):
    server: Explorer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "lavis-mafa", ""
    timeout = 120  # seconds that an idle connection keeps its thread

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        self._send(self._refusal() or self.server.get(path, dict(parse_qsl(query))))

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LARGEST:
            self.close_connection = True
            return self._send(Reply.refusal(413, "too long"))
        body = self.rfile.read(int(length))  # also of what is refused: the next request comes after it
        strange = self.headers.get("Origin") != f"http://{self.headers.get('Host')}"
        self._send(self._refusal() or (Reply.refusal(403, "another page's") if strange else self.server.post(self.path, body)))

    def _refusal(self) -> Reply | None:
        """Another name that leads here is that of a page which wants to read what only this machine's user may."""
        name = (self.headers.get("Host") or "").rpartition(":")
        return None if (name[0] or name[2]) in NAMES else Reply.refusal(403, "this server is for 127.0.0.1 alone")

    def _send(self, reply: Reply) -> None:
        self.send_response(reply.status)
        headers = {"Content-Type": reply.kind, "Content-Length": str(len(reply.content)), "Cache-Control": reply.cache}
        headers |= {"Content-Security-Policy": f"{reply.policy}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"}
        headers |= {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
        headers |= {"Cross-Origin-Resource-Policy": "same-origin"}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply.content)

    def log_message(self, *_: Any) -> None:
        """Nothing: requests are nobody's business."""


def _policy(page: str) -> str:
    """The page's own scripts and styles, each by its digest, and nothing else."""
    found: dict[str, list[str]] = {"script": [], "style": []}
    for tag, content in re.findall(r"<(script|style)>(.*?)</\1>", page, re.DOTALL):
        found[tag].append(f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'")
    own = "; ".join(f"{tag}-src {' '.join(digests)}" for tag, digests in found.items())
    return f"default-src 'none'; img-src 'self'; connect-src 'self'; {own}"


def _query(given: dict[str, str]) -> Query:
    """What is asked, without what is no number or no word of ours."""

    def number(name: str, kind: Any) -> Any:
        try:
            return kind(given[name])
        except (KeyError, ValueError):
            return None

    marked, order, after = given.get("marked"), given.get("order"), number("after", int)
    return Query(
        way=number("way", int),
        low=number("from", float),
        high=number("to", float),
        kind=number("kind", int),
        words=given.get("find", ""),
        marked=marked if marked in MARKED else None,
        order=order if order in ORDERS else ORDERS[0],
        after=-1 if after is None else after,
    )


def _free_port() -> int:
    with ThreadingHTTPServer((LOOPBACK, 0), BaseHTTPRequestHandler) as other:
        return int(other.server_address[1])
