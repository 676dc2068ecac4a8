"""The page in a real browser: a script types, clicks and drags as a reader would, on a phone's width."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest

import run_folder
from lavis_mafa.cli.main import main
from lavis_mafa.tools.gallery import DIRECTIONS, VERDICTS
from lavis_mafa.tools.marks import read_marks

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH (Debian: apt install chromium)"),
]

CATCH = """<script>
  window.wrong = [];
  addEventListener("error", (e) => wrong.push(String(e.message)));
  addEventListener("securitypolicyviolation", (e) => wrong.push("policy: " + e.violatedDirective));
  addEventListener("unhandledrejection", (e) => wrong.push(String(e.reason)));
  for (const name of ["error", "warn"]) console[name] = (...said) => wrong.push(said.join(" "));
</script>"""
DRIVE = """<script>addEventListener("load", async () => {
  localStorage.clear();
  const at = (id) => document.getElementById(id), seen = {};
  const look = (name) => seen[name] = {
    count: at("count").textContent,
    cards: document.querySelectorAll("#gallery-cards > li").length,
    scores: [...document.querySelectorAll("#gallery-cards .score")].map((e) => +e.textContent),
    texts: [...document.querySelectorAll("#gallery-cards > li")].map((e) => e.textContent),
  };
  const set = (id, value) => { at(id).value = value; at(id).dispatchEvent(new Event("input", { bubbles: true })); };
  const start = location.hash;
  look("start");
  set("verdict", ""); look("any verdict");
  at("gallery-more").click(); look("more");
  set("find", "PIZZA picture"); look("search");
  set("find", "no such words"); look("nothing");
  at("reset").click(); look("reset");
  set("verdict", ""); set("from", "0.3"); set("to", "0.6"); look("scores");
  set("order", "up"); look("upwards"); seen.hash = location.hash;
  document.querySelector("[name=way][value='1']").click(); look("images");
  at("reset").click(); set("verdict", ""); set("find", "onerror"); look("bites");
  at("reset").click(); set("verdict", "");
  while (!at("gallery-more").hidden) at("gallery-more").click();
  seen.placeholders = [...document.querySelectorAll("#gallery-cards .pic.none")].map((e) => e.textContent);
  seen.pictures = [...document.querySelectorAll("#gallery-cards img")].every((e) => e.src.startsWith("data:image/"));
  const first = [...document.querySelectorAll("#gallery-cards .pair > div:first-child .pic")];
  seen.sizes = first.every((e) => e.getBoundingClientRect().width > 90);
  seen.unlabelled = [...document.querySelectorAll("input, select")].filter((e) => !e.labels.length).length;
  const controls = [...document.querySelectorAll("input, select, button, summary, .scroll")];
  seen.unfocusable = controls.filter((e) => e.tabIndex < 0).length;
  seen.live = at("count").getAttribute("aria-live");
  const paper = () => getComputedStyle(document.body).backgroundColor;
  seen.tables = [...document.querySelectorAll(".scroll")].filter((e) => e.scrollWidth > e.clientWidth).map((e) => {
    const name = e.querySelector("tbody th"), before = name.getBoundingClientRect();
    e.scrollLeft = 60;
    const after = name.getBoundingClientRect(), words = name.scrollWidth <= name.clientWidth;
    return { shade: getComputedStyle(e).backgroundImage.split("linear-gradient").length - 1, moved: after.left - before.left, words };
  });
  seen.colours = [1, 2, 3].map(() => { at("theme").click(); return [at("theme").textContent, paper()]; });
  seen.width = [innerWidth, document.documentElement.scrollWidth];
  seen.bitten = window.bitten === true;
  at("reset").click(); set("verdict", ""); set("find", "a");
  const press = (n, word) => document.querySelectorAll("#gallery-cards > li")[n].querySelector("button." + word).click();
  seen.disabled = at("export").disabled;
  press(0, "accept"); press(1, "reject"); press(2, "accept"); press(2, "accept"); set("find", "onerror"); press(0, "reject");
  seen.marked = at("marked").textContent;
  URL.createObjectURL = (blob) => { window.blob = blob; return "#"; };
  HTMLAnchorElement.prototype.click = function () { seen.download = this.download; };
  at("export").click();
  seen.csv = await blob.text();
  seen.stored = Object.entries(localStorage).filter(([name]) => name.startsWith("lavis-mafa-marks:"));
  seen.disagreements = ["doubted", "missed"].map((name) => at(name + "-cards").children.length);
  setTimeout(() => parent.postMessage({ start, seen, wrong }, "*"), 50);
});</script>"""
FRAMES = """<!doctype html><title>driver</title><body><script>
  const said = [], hashes = ["", "#gallery?verdict=&find=dog&from=0.25"];
  function open() { // one after the other, since they share the marks
    const frame = document.createElement("iframe");
    frame.width = 400; frame.height = 800; frame.src = "driven.html" + hashes[said.length];
    document.body.append(frame);
  }
  addEventListener("message", (e) => {
    said.push(e.data);
    if (said.length < hashes.length) return open();
    const p = document.createElement("p");
    p.id = "said";
    p.textContent = JSON.stringify(said);
    document.body.append(p);
  });
  open();
</script>"""


@pytest.fixture(scope="module")
def driven(tmp_path_factory) -> tuple[dict, dict, str]:
    """What the script saw in the plain page and in a linked view, and what Chromium wrote to its console."""
    work = tmp_path_factory.mktemp("browser")
    run_folder.write_data(work / "data")
    run = run_folder.write_run(work / "output" / "20250101000000", run_folder.many(1000))
    assert main(["report", str(run), "--output", str(work / "report.html")]) == 0
    text = (work / "report.html").read_text().replace("</head>", CATCH + "</head>").replace("</body>", DRIVE + "</body>")
    (work / "driven.html").write_text(text)
    (work / "frames.html").write_text(FRAMES)
    switches = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr"]
    switches += [f"--user-data-dir={work}/profile", "--virtual-time-budget=20000", "--window-size=900,900"]
    url = (work / "frames.html").as_uri()
    done = subprocess.run([str(CHROMIUM), *switches, "--dump-dom", url], capture_output=True, text=True, timeout=120)
    found = re.search(r'<p id="said">(.*?)</p>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    plain, linked = sorted(json.loads(html.unescape(found[1])), key=lambda said: said["start"])
    return plain, linked, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def test_nothing_goes_wrong_in_the_console(driven):
    plain, linked, console = driven
    assert plain["wrong"] == linked["wrong"] == [] and console == ""


def test_thousands_of_connections_are_shown_a_page_at_a_time(driven):
    seen = driven[0]["seen"]
    assert seen["start"]["cards"] == 48 and min(seen["start"]["scores"]) > 0.8
    assert seen["any verdict"]["count"] == "500 of 500 connections"
    assert (seen["any verdict"]["cards"], seen["more"]["cards"]) == (48, 96)
    assert all(0 < count <= 9 for count in seen["disagreements"])


def test_search_and_score_filter(driven):
    seen = driven[0]["seen"]
    assert seen["search"]["texts"] and all("pizza" in text for text in seen["search"]["texts"])
    assert seen["nothing"]["count"] == "No connection fits these filters." and seen["nothing"]["cards"] == 0
    assert seen["reset"] == seen["start"]
    assert all(0.3 <= score <= 0.6 for score in seen["scores"]["scores"] + seen["upwards"]["scores"])
    assert seen["scores"]["count"] == seen["upwards"]["count"] == "151 of 500 connections"
    assert seen["upwards"]["scores"] == sorted(seen["upwards"]["scores"])
    assert "own image" in seen["images"]["texts"][0] and "own caption" in seen["start"]["texts"][0]


def test_a_view_can_be_linked_to(driven):
    plain, linked, _ = driven
    assert "from=0.3" in plain["seen"]["hash"] and "order=up" in plain["seen"]["hash"]
    start = linked["seen"]["start"]
    assert start["texts"] and all("dog" in text for text in start["texts"]) and min(start["scores"]) >= 0.25


def test_captions_are_text(driven):
    seen = driven[0]["seen"]
    assert not seen["bitten"]
    assert seen["bites"]["texts"] and all(run_folder.BITES in text for text in seen["bites"]["texts"])


def test_missing_images_are_visible_placeholders(driven):
    seen = driven[0]["seen"]
    assert any("image is missing" in text and "4.jpg" in text for text in seen["placeholders"])
    assert any("image is unreadable" in text and "5.jpg" in text for text in seen["placeholders"])
    assert len(seen["placeholders"]) < 2 * run_folder.ROWS * 4 and seen["pictures"] and seen["sizes"]


def test_a_phone_a_keyboard_and_both_colours(driven):
    seen = driven[0]["seen"]
    assert seen["width"][1] <= seen["width"][0] == 400
    assert seen["unlabelled"] == seen["unfocusable"] == 0 and seen["live"] == "polite"
    (light, paper), (dark, night), (auto, _) = seen["colours"]
    assert (light, dark, auto) == ("Colours: light", "Colours: dark", "Colours: auto") and paper != night


def test_a_table_wider_than_a_phone_says_so_and_keeps_its_first_column(driven):
    tables = driven[0]["seen"]["tables"]
    assert tables and all(table == {"shade": 4, "moved": 0, "words": True} for table in tables)


def test_marks_are_exported_as_mine_reads_them(driven, tmp_path):
    seen = driven[0]["seen"]
    assert seen["disabled"] and seen["marked"] == "3 pairs marked" and seen["download"] == "marks.csv"
    (tmp_path / "marks.csv").write_text("\ufeff" + seen["csv"], newline="")  # Blob.text() takes the sign away
    rows = read_marks(tmp_path / "marks.csv").to_pylist()
    assert sorted(row["mark"] for row in rows) == ["accept", "reject", "reject"] and len(json.loads(seen["stored"][0][1])) == 3
    assert run_folder.BITES in {row["caption"] for row in rows} | {run_folder.caption(row["image"]) for row in rows}
    for row in rows:
        assert row["caption"] == run_folder.caption(row["text"]) and row["image_path"] == f"{row['image']}.jpg"
        assert row["direction"] in DIRECTIONS and 0 <= row["probability"] <= 1 and row["verdict"] in VERDICTS
