"""The server of `explore`: what it finds, what it keeps, and whom it refuses; over real HTTP, in this process."""

from __future__ import annotations

import http.client
import io
import json
import random
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from urllib.parse import urlencode

import pytest
from PIL import Image

import run_folder
from lavis_mafa.cli.main import main
from lavis_mafa.tools.connections import PAGE
from lavis_mafa.tools.explore import Explorer, _policy
from lavis_mafa.tools.gallery import DIRECTIONS
from lavis_mafa.tools.marks import SCHEMA, read_marks, write_marks
from lavis_mafa.tools.run_files import open_runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    work = tmp_path_factory.mktemp("explored")
    run_folder.write_data(work / "data")
    rows = [*run_folder.many(400), {**run_folder.many(400)[0], "probability": 0.01, "verdict": "negative", "epoch": -1}]
    return run_folder.write_run(work / "output" / "20250101000000", rows, metrics=False)


@contextmanager
def served(folder, marks):
    with Explorer(open_runs([folder])[0], marks, 0) as explorer:
        thread = threading.Thread(target=explorer.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield explorer
        finally:
            explorer.shutdown()
            thread.join()


@pytest.fixture
def explorer(folder, tmp_path):
    with served(folder, tmp_path / "marks.parquet") as explorer:
        yield explorer


def ask(explorer, path, method="GET", body=None, **headers):
    connection = http.client.HTTPConnection(*explorer.server_address)
    connection.request(method, path, body, headers)
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    return reply, content


def find(explorer, **query):
    reply, content = ask(explorer, f"/connections?{urlencode(query)}")
    assert reply.status == 200 and reply.headers["Content-Type"] == "application/json"
    return json.loads(content)


def mark(explorer, number, word):
    body = json.dumps({"connection": number, "mark": word})
    reply, content = ask(explorer, "/mark", "POST", body, Origin=explorer.url.rstrip("/"))
    return reply.status, content.decode()


def everything(explorer, **query):
    """All pages, one after the other."""
    items, after = [], -1
    while after is not None:
        found = find(explorer, **query, after=after)
        items, after = items + found["items"], found["after"]
        assert len(found["items"]) == PAGE or after is None
    return items


def test_filters_equal_the_loop(explorer):
    everyone = everything(explorer)
    assert len(everyone) == 400 and [c["score"] for c in everyone] == sorted((c["score"] for c in everyone), reverse=True)
    assert everyone[0]["score"] == 1 and everyone[0]["times"] == 2, "the last sighting of a pair counts"
    for c in everyone[:20:3]:
        assert mark(explorer, c["number"], "reject" if c["number"] % 2 else "accept")[0] == 200
    said = {(c["image"], c["text"]): c["mark"] for c in read_marks(explorer.marks.path).to_pylist()}
    chance = random.Random(0)

    def pair(c):
        own, found = c["own"][3], c["found"][3]
        return (own, found) if c["way"] == 0 else (found, own)

    for _ in range(40):
        way, kind, marked, order = (
            chance.choice(x) for x in (["", 0, 1], ["", 0, 1, 2], ["", "no", "yes", "accept"], ["down", "up", "random"])
        )
        low, high, words = chance.choice([0, 0.4]), chance.choice([0.6, 1]), chance.choice(["", "DOG", "picture pizza", "zebra"])
        verdict = "" if kind == "" else ["positive", "ambiguous", "negative"][kind]
        wanted = [
            c["number"]
            for c in everyone
            if way in ("", c["way"])
            and verdict in ("", c["kind"])
            and low <= c["score"] <= high
            and {"": True, "no": pair(c) not in said, "yes": pair(c) in said, "accept": said.get(pair(c)) == "accept"}[marked]
            and all(word in f"{c['own'][1]} {c['found'][1]}".lower() for word in words.lower().split())
        ]
        query = {"way": way, "kind": kind, "from": low, "to": high, "find": words, "marked": marked, "order": order}
        items = everything(explorer, **query)
        assert sorted(c["number"] for c in items) == wanted and find(explorer, **query)["total"] == len(wanted)
        if order != "random":
            assert [c["number"] for c in items] == wanted[:: 1 if order == "down" else -1]
        assert all(c["mark"] == said.get(pair(c)) for c in items)


def test_random_is_the_same_at_every_start_and_what_is_marked_meanwhile_skips_nothing(folder, tmp_path):
    with served(folder, tmp_path / "m.parquet") as explorer:
        first = find(explorer, order="random", marked="no")
        for c in first["items"]:
            mark(explorer, c["number"], "accept")
        second = find(explorer, order="random", marked="no", after=first["after"])
    with served(folder, tmp_path / "m.parquet") as explorer:
        again = [c["number"] for c in everything(explorer, order="random")]
    seen = [c["number"] for c in first["items"] + second["items"]]
    pairs = {(c["own"][3], c["found"][3]) if c["way"] == 0 else (c["found"][3], c["own"][3]) for c in first["items"]}
    assert len(set(seen)) == 2 * PAGE and seen[:PAGE] == again[:PAGE] and again != sorted(again)
    assert len(read_marks(tmp_path / "m.parquet")) == len(pairs)


@pytest.mark.parametrize("name", ["marks.parquet", "marks.csv"])
def test_a_mark_is_on_the_disk_when_it_is_answered(folder, tmp_path, name):
    path = tmp_path / name
    with served(folder, path) as explorer, served(folder, path) as other:
        assert mark(explorer, 0, "accept") == (200, '{"saved": true}')
        (row,) = read_marks(path).to_pylist()
        c = find(explorer)["items"][0]
        assert (row["mark"], row["verdict"], row["probability"], row["direction"]) == ("accept", "positive", 1.0, DIRECTIONS[c["way"]])
        assert (row["image"], row["text"], row["caption"]) == (c["own"][3], c["found"][3], run_folder.caption(c["found"][3]))
        assert row["image_path"] == f"{row['image']}.jpg"
        assert mark(other, 3, "reject")[0] == 200, "another window's server adds to it"
        assert mark(explorer, 5, "accept")[0] == 200 and [r["mark"] for r in read_marks(path).to_pylist()] == [
            "accept",
            "reject",
            "accept",
        ]
        factor = json.loads(ask(explorer, "/factor")[1])
        assert (factor["accepted"], factor["rejected"]) == (2, 1) and 0 < factor["low"] < factor["factor"] < factor["high"] < 1
        assert mark(explorer, 0, None)[0] == 200 and len(read_marks(path)) == 2
    with served(folder, path) as explorer:
        assert [c["mark"] for c in find(explorer)["items"][:6]] == [None, None, "reject", "reject", "accept", "accept"], "both ways"


def test_many_at_once_lose_nothing(folder, tmp_path):
    with served(folder, tmp_path / "m.parquet") as explorer:
        threads = [threading.Thread(target=mark, args=(explorer, number, "accept")) for number in range(0, 24, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(read_marks(tmp_path / "m.parquet")) == 12


def test_what_cannot_be_saved_is_not_marked(folder, tmp_path):
    (tmp_path / "gone").mkdir()
    with served(folder, tmp_path / "gone" / "m.parquet") as explorer:
        (tmp_path / "gone").rmdir()
        status, why = mark(explorer, 0, "accept")
        assert status == 500 and "gone" in why and find(explorer)["items"][0]["mark"] is None


def test_others_are_refused(explorer):
    port = explorer.server_address[1]
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", ""):
        assert ask(explorer, "/connections", Host=host)[0].status == 403
    for host in (f"localhost:{port}", "127.0.0.1:9999"):  # 9999: ssh brought it here
        assert ask(explorer, "/", Host=host)[0].status == 200
    body = json.dumps({"connection": 0, "mark": "accept"})
    for origin in ({}, {"Origin": "null"}, {"Origin": "http://evil.example"}, {"Origin": f"http://localhost:{port}"}):
        assert ask(explorer, "/mark", "POST", body, **origin)[0].status == 403
    assert not explorer.marks.path.exists() and explorer.server_address[0] == "127.0.0.1"


def test_nonsense_is_refused(explorer):
    for path in (
        "/nothing",
        "/image/1",
        f"/image/{explorer.key}/24",
        f"/image/{explorer.key}/-1",
        f"/image/{explorer.key}/../../config.yaml",
        "//etc/passwd",
        "ftp://[",
    ):
        assert ask(explorer, path)[0].status == 404
    explorer.shown.remove(7)  # a row that no connection has
    assert [ask(explorer, f"/image/{explorer.key}/{row}")[0].status for row in (6, 7)] == [200, 404]
    origin = {"Origin": explorer.url.rstrip("/")}
    bodies = ["", "[", "[]", "{}", '{"connection": 0}', '{"connection": "0", "mark": "accept"}', "[" * 9000]
    bodies += [
        json.dumps({"connection": n, "mark": m}) for n, m in [(-1, "accept"), (400, "accept"), (True, "accept"), (0, "maybe"), (0, 3)]
    ]
    assert {ask(explorer, "/mark", "POST", body, **origin)[0].status for body in bodies} == {400}
    assert (
        ask(explorer, "/mark", "POST", "x" * 20_000, **origin)[0].status == 413
        and ask(explorer, "/", "POST", "", **origin)[0].status == 404
    )
    assert find(explorer, way="x", kind="y", after="z", order="sideways", marked="perhaps", **{"from": "nan?"})["total"] == 400
    assert find(explorer, after="9" * 5000)["total"] == 400, "more digits than Python takes"
    for query in ({"after": "9" * 40}, {"way": "9" * 40}, {"kind": "-" + "9" * 40}):
        assert find(explorer, **query)["items"] == []


def test_images_are_read_on_demand(explorer):
    def image(row):
        return ask(explorer, f"/image/{explorer.key}/{row}")

    reply, content = image(1)
    with Image.open(io.BytesIO(content)) as picture:
        assert reply.headers["Content-Type"] == "image/webp" and picture.size == (128, 96)
    assert "private" in reply.headers["Cache-Control"] and "max-age" in reply.headers["Cache-Control"]
    for row, why in ((run_folder.MISSING, b"image is missing"), (run_folder.TORN, b"image is unreadable")):
        assert image(row)[0].status == 404 and image(row)[1] == why


def test_the_page_runs_its_own_scripts_alone_and_has_no_caption_in_it(explorer):
    reply, content = ask(explorer, "/")
    page, policy = content.decode(), reply.headers["Content-Security-Policy"]
    assert run_folder.BITES not in page and "picture 1" not in page and "http-equiv" not in page
    assert "unsafe" not in policy and "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert policy.startswith(_policy(page)) and policy.count("sha256-") == len(re.findall("<script>|<style>", page)) >= 4
    assert not re.findall(r"\son\w+=|\sstyle=|https?://", page)
    assert any(run_folder.BITES in (c["own"][1], c["found"][1]) for c in everything(explorer)), "as data, for textContent"


def test_what_the_command_refuses(folder, tmp_path, capsys, monkeypatch):
    def says(*flags):
        assert main(["explore", *map(str, flags)]) == 2
        return capsys.readouterr().err

    with served(folder, tmp_path / "m.parquet") as explorer:
        port = explorer.server_address[1]
        assert re.search(rf"--port {port} cannot be taken .*in use.*; free is, for example, \d+\.", says(folder, "--port", port))
    assert "allowed: 0 to 65535" in says(folder, "--port", 70000)
    (tmp_path / "count").mkdir()
    (tmp_path / "count" / "count.json").write_text("{}")
    assert "keeps no pairs" in says(tmp_path / "count")
    assert "is no folder" in says(tmp_path / "nowhere", "--marks", tmp_path / "m.parquet")
    assert "no folder" in says(folder, "--marks", tmp_path / "nowhere" / "m.parquet")
    assert "allowed: a .parquet or .csv file" in says(folder, "--marks", tmp_path / "m.txt")
    bad = SCHEMA.empty_table().to_pylist() + [
        {**dict.fromkeys(SCHEMA.names), "image": 0, "text": 0, "mark": "accept", "caption": "other data"}
    ]
    write_marks(type(SCHEMA.empty_table()).from_pylist(bad, SCHEMA), tmp_path / "other.csv")
    assert "not of these data" in says(folder, "--marks", tmp_path / "other.csv")
    empty = run_folder.write_run(tmp_path / "empty", None, metrics=False)
    assert "no connections to look at" in says(empty)


def test_without_the_data_there_are_row_numbers(tmp_path):
    run = run_folder.write_run(tmp_path / "output" / "20250101000000", run_folder.many(4), metrics=False)
    with served(run, tmp_path / "m.csv") as explorer:
        assert "could not be read again" in ask(explorer, "/")[1].decode()
        (c, *others) = find(explorer)["items"]
        assert len(others) == 3 and c["own"][1] is None and find(explorer, find="dog")["items"] == []
        assert ask(explorer, f"/image/{explorer.key}/{c['own'][3]}")[1] == b"image not known" and mark(explorer, 0, "accept")[0] == 200
    assert read_marks(tmp_path / "m.csv")["caption"].to_pylist() == [None]


def test_ctrl_c_says_where_the_marks_are(folder, tmp_path, capsys, monkeypatch):
    def serve(explorer):
        explorer.marks.put(0, "accept")
        raise KeyboardInterrupt

    monkeypatch.setattr(Explorer, "serve_forever", serve)
    assert main(["explore", str(folder), "--port", "0", "--marks", str(tmp_path / "m.csv")]) == 0
    said = capsys.readouterr().out
    assert "400 connections, 0 pairs marked: http://127.0.0.1:" in said and f"The marks: {tmp_path / 'm.csv'}" in said


def test_it_opens_without_torch():
    """Which takes as long to import as all else together."""
    code = "import sys, lavis_mafa.cli.explore, lavis_mafa.tools.explore; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
