"""`explore` in a real browser, on a phone's width: a script presses keys as a reader would, and the marks are in the file."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import threading

import pytest

import run_folder
from lavis_mafa.tools.explore import Explorer, Reply, _policy
from lavis_mafa.tools.marks import read_marks
from lavis_mafa.tools.run_files import open_runs

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH (Debian: apt install chromium)"),
]

CATCH = """<script>
  window.wrong = [];
  addEventListener("error", (e) => { if (e.message) wrong.push(e.message); });
  addEventListener("securitypolicyviolation", (e) => wrong.push("policy: " + e.violatedDirective));
  addEventListener("unhandledrejection", (e) => wrong.push(String(e.reason)));
</script>"""
DRIVE = """<script>addEventListener("load", async () => {
  const at = (id) => document.getElementById(id), seen = {}, cards = () => [...document.querySelectorAll("#cards > li")];
  const rest = () => new Promise((done) => setTimeout(done, 25));
  const until = async (holds) => { for (let n = 0; n < 400 && !holds(); n++) await rest(); };
  const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
  const place = () => cards().indexOf(document.activeElement);
  const set = (id, value) => { at(id).value = value; at(id).dispatchEvent(new Event("input", { bubbles: true })); };
  const marked = () => cards().map((e) => e.dataset.mark).join("").length;
  try {
    await until(() => cards().length);
    seen.start = [cards().length, at("count").textContent];
    press("j"); seen.first = place();
    press("ArrowDown"); press("ArrowDown"); seen.down = place();
    press("k"); seen.up = place();
    const outline = getComputedStyle(document.activeElement); seen.outline = [outline.outlineStyle, outline.outlineWidth];
    press("a"); seen.after_a = place();                     // card 1 (and 0, the same pair the other way)
    press("r"); seen.after_r = place();                     // card 2 (and 3)
    seen.said = cards()[2].getAttribute("aria-label");
    seen.pressed = [...cards()[2].querySelectorAll("button")].map((e) => e.getAttribute("aria-pressed"));
    press("a"); press("u"); seen.after_u = place();         // card 3 too is rejected again
    cards()[6].querySelector("button.accept").click();      // by the mouse
    cards()[8].querySelector("button.reject").click();
    cards()[8].querySelector("button.reject").click();      // and off again
    at("find").focus(); press("a"); seen.typing = marked(); // typing into the search is no mark
    await until(() => at("factor").textContent.includes("2 accepted, 1 rejected"));
    seen.factor = at("factor").textContent;
    set("marked", "reject"); await until(() => cards().length < 48); seen.rejected = cards().map((e) => e.dataset.mark);
    set("marked", ""); set("kind", ""); set("find", "onerror"); await until(() => cards().length > 2);
    seen.bites = [cards().length, cards().every((e) => e.textContent.includes("<script>window.bitten"))];
    at("reset").click(); await until(() => cards().length === 48);
    set("kind", ""); await until(() => at("count").textContent.startsWith("400"));
    while (!at("more").hidden) { const before = cards().length; at("more").click(); await until(() => cards().length > before); }
    seen.all = cards().length;
    for (const image of document.querySelectorAll("#cards img")) image.loading = "eager";
    await until(() => [...document.querySelectorAll("#cards img")].every((e) => e.complete && e.naturalWidth));
    seen.placeholders = [...new Set([...document.querySelectorAll("#cards .pic.none")].map((e) => e.textContent))].sort();
    seen.hash = location.hash;
    seen.unlabelled = [...document.querySelectorAll("input, select")].filter((e) => !e.labels.length).length;
    seen.width = [innerWidth, document.documentElement.scrollWidth];
    seen.bitten = window.bitten === true;
    const paper = () => getComputedStyle(document.body).backgroundColor, auto = paper();
    seen.colours = new Set([1, 2].map(() => { at("theme").click(); return paper(); })).size;
  } catch (error) { wrong.push(String(error)); }
  const p = document.createElement("p");
  p.id = "said";
  p.textContent = JSON.stringify({ seen, wrong });
  document.body.append(p);
});</script>"""


@pytest.fixture(scope="module")
def driven(tmp_path_factory) -> tuple[dict, list[dict]]:
    """What the script saw, and the marks that were in the file after it."""
    work = tmp_path_factory.mktemp("explored")
    run_folder.write_data(work / "data")
    run = run_folder.write_run(work / "output" / "20250101000000", run_folder.many(400), metrics=False)
    with Explorer(open_runs([run])[0], work / "marks.parquet", 0) as explorer:
        page = explorer.page.content.decode().replace("</head>", CATCH + "</head>").replace("</body>", DRIVE + "</body>")
        explorer.page = Reply(page.encode(), explorer.page.kind, policy=_policy(page))
        thread = threading.Thread(target=explorer.serve_forever, args=(0.01,))
        thread.start()
        try:
            switches = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
            switches += [f"--user-data-dir={work}/profile", "--virtual-time-budget=60000", "--window-size=500,900"]
            done = subprocess.run([str(CHROMIUM), *switches, "--dump-dom", explorer.url], capture_output=True, text=True, timeout=120)
        finally:
            explorer.shutdown()
            thread.join()
    found = re.search(r'<p id="said">(.*?)</p>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1])), read_marks(work / "marks.parquet").to_pylist()


def test_nothing_goes_wrong(driven):
    assert driven[0]["wrong"] == [] and driven[0]["seen"]["start"] == [48, "80 of 400 connections"]


def test_keys_move_mark_and_undo(driven):
    seen = driven[0]["seen"]
    assert [seen[name] for name in ("first", "down", "up", "after_a", "after_r", "after_u")] == [0, 2, 1, 2, 3, 3]
    assert seen["said"] == "positive, score 0.995, rejected" and seen["pressed"] == ["false", "true"]
    assert seen["outline"][0] == "solid" and seen["outline"][1] != "0px"


def test_the_marks_are_in_the_file(driven):
    said = [(row["mark"], round(row["probability"], 4), row["verdict"]) for row in driven[1]]
    scores = [round(1 - n / 400, 4) for n in range(10)]
    assert sorted(said) == sorted(
        [("accept", scores[1], "positive"), ("reject", scores[3], "positive"), ("accept", scores[6], "positive")]
    )
    assert "2 accepted, 1 rejected: factor 0.67 (95 %: 0.21 to 0.94)" in driven[0]["seen"]["factor"]
    assert driven[0]["seen"]["rejected"] == ["reject", "reject"], "a pair that was found both ways"


def test_captions_are_text_and_images_come(driven):
    seen = driven[0]["seen"]
    assert not seen["bitten"] and seen["bites"][0] > 2 and seen["bites"][1]
    assert seen["all"] == 400 and seen["placeholders"] == ["image is missing row 4", "image is unreadable row 5"]


def test_a_phone_both_colours_and_a_view_to_link_to(driven):
    seen = driven[0]["seen"]
    assert seen["width"][1] <= seen["width"][0] <= 500 and seen["unlabelled"] == 0 and seen["colours"] == 2
    assert seen["hash"] == "#kind="
