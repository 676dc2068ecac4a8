"""Whatever a run's files say is text in its page: the elements of the page are those of a harmless run."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markupsafe import Markup
from omegaconf import OmegaConf
from PIL import Image

import run_folder
from lavis_mafa.cli.main import main
from lavis_mafa.tools.curves import Plot
from lavis_mafa.tools.findings import Section
from lavis_mafa.tools.render import TEMPLATES, Table, render

BITES = [
    "<script>window.bitten = 1</script>",
    "</script><script>window.bitten = 1</script>",
    "</title></style></svg><img src=x onerror='window.bitten = 1'>",
    '"><img src=x onerror="window.bitten = 1">',
    "' autofocus onfocus='window.bitten = 1",
    "<!--<script>",
    "]]></script>",
    "<a href=javascript:alert(1)>here</a>",
    "javascript:alert(1)",
    "{{ 7 * 7 }} {% raw %} ${1+1}",
    "&lt;script&gt; \u2028 \u2029 \x0b",
]
# a name on disk has no slash
NAMES = [bite.replace("/", "\\") for bite in BITES]


class Outline(HTMLParser):
    """The elements of a page with the names of their attributes, and where its links lead."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.links: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(name for name, _ in attrs)))
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "xlink:href", "srcdoc", "formaction")]


def make_run(folder: Path, text: Callable[[int], str], name: Callable[[int], str]) -> Path:
    """A run in which everything that can be a text is one."""
    images = folder / "data/images"
    images.mkdir(parents=True)
    rows = []
    for row in range(run_folder.ROWS):
        path = f"{row} {name(row)}.png"
        if row % 3:
            Image.new("RGB", (8, 8), "red").save(images / path, format="PNG")
        rows.append({"image": path, "caption": f"{text(row)} {row}", "concept": run_folder.CONCEPTS[row % 4] + text(row % 4)})
    (folder / "data/pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = run_folder.write_run(folder / "output" / f"run {name(0)}", run_folder.many(60), metrics=False)
    config = OmegaConf.load(run / "config.yaml")
    info = config.datasets.grit_pairs.build_info
    info.annotations.train.storage, info.images.storage = str(folder / "data/pairs.jsonl"), str(images)
    config.model.pretrained, config.model.tokenizer = text(1), text(2)
    config.run.output_dir = text(3)
    config.run[text(4)] = text(5)
    config[text(6)] = {text(7): text(8)}
    OmegaConf.save(config, run / "config.yaml")
    figures = {"epoch": 0, "step": 1, "samples_seen": 8, "loss": 2.0, "learning_rate": 0.1, text(10): 3.0}
    figures |= {f"loss_{text(n)}": 1.0 for n in (0, 1, 3)}
    (run / "metrics.jsonl").write_text(json.dumps(figures) + "\n" + json.dumps({**figures, "step": 2, "samples_seen": 16}) + "\n")
    evaluation = {"split": text(0), "epoch": text(1), "tr_r1": 40.0, text(2): 30.0, "agg_metrics": 35.0}
    (run / "evaluation.jsonl").write_text(json.dumps(evaluation) + "\n")
    return run


def outline(run: Path, to: Path) -> Outline:
    assert main(["report", str(run), "--output", str(to)]) == 0
    return Outline(to.read_text())


def test_a_hostile_run_has_the_page_of_a_harmless_one(tmp_path):
    harmless = make_run(tmp_path / "a", lambda n: f"word {n}", lambda n: f"word {n}")
    hostile = make_run(tmp_path / "b", lambda n: BITES[n % len(BITES)], lambda n: NAMES[n % len(NAMES)])
    expected, found = outline(harmless, tmp_path / "a.html"), outline(hostile, tmp_path / "b.html")
    assert found.elements == expected.elements
    assert all(link.startswith(("#", "data:image/")) for link in found.links)
    assert not [name for _, names in found.elements for name in names if name.startswith("on")]


def test_the_data_in_a_script_are_those_that_went_in(tmp_path):
    run = make_run(tmp_path, lambda n: BITES[n % len(BITES)], lambda n: NAMES[n % len(NAMES)])
    outline(run, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    start = page.index(">", page.index('id="connections"')) + 1
    block = page[start : page.index("</script>", start)]
    assert not set("<>&'") & set(block)  # nothing in it can end the script or begin a comment
    captions = {row[1] for row in json.loads(block)["rows"]}
    assert captions and all(any(caption.startswith(bite) for bite in BITES) for caption in captions)


@pytest.mark.parametrize("bite", BITES)
def test_the_quickstart_page_shows_text(bite):
    def page(text: str) -> Outline:
        table = Table([text, text], [[text, text]], text)
        gallery = {
            "lists": {"gallery": [0], "doubted": [], "missed": []},
            "connections": [[0, 0, 0, 0.9, 2, None, 0, 1, 0]],
            "rows": [[0, text, 0, 0, text]],
            "images": [{"name": text, "problem": text}],
            "runs": [text],
            "sets": [0],
            "key": text,
            "problems": {text: text},
            "candidates": 1,
        }
        values = {"tables": {"batches": table, "con_d": table, "matching": table}, "about": {text: text}, "gallery": gallery}
        values |= {"runs": [{"name": text, "folder": text}], "summary": table, "settings": table, "evaluations": {text: [table]}}
        section = Section(text, text, [text], [table], [Plot(text, text, Markup("<svg></svg>"), text)])
        values |= {
            "files": {text: text},
            "counted": [section],
            "mined": [section],
            "judge": text,
            "queries": {text: [1, 2]},
            "meaning": {text: text},
            "words": {text: [text]},
        }
        return Outline(render("quickstart.html", **values, legend=[{"name": text, "colour": "red", "dashes": ""}] * 2))

    found = page(bite)
    assert found.elements == page("word").elements
    assert all(link.startswith("#") for link in found.links)


@pytest.mark.parametrize("bite", BITES)
def test_the_page_of_pictures_shows_text(bite):
    def page(text: str) -> Outline:
        negative = {"row": 0, "image": 0, "caption": text, "kind": text, "cosine": 0.5, "matching": 0.5, "true": True}
        word = {"before": text, "word": text, "after": text, "expected": [(text, 0.5)]}
        texts = [{"caption": text, "cosine": 0.5, "own": False, "true": False}]
        anchor = {"row": 0, "image": 0, "caption": text, "negatives": {"text for image": [negative], "image for text": [negative]}}
        about = {"checkpoint": text, "yaml": text, "options": [text], "split": text, "pairs": 2, "batch_size": 2, "search_space": 2}
        values = {"about": about | {"teacher": text, "seed": 0}, "table": Table([text], [[text]], text), "kinds": [text], "top": 1}
        images = [{"name": text, "problem": text}]
        values |= {"looks": [[{"word": text, "cam": "data:image/webp;", "mask": "data:image/webp;"}]], "why_not": text}
        return Outline(render("pictures.html", **values, images=images, anchors=[anchor | {"texts": texts, "word": word}]))

    found = page(bite)
    assert found.elements == page("word").elements and all(link.startswith(("#", "data:image/")) for link in found.links)


def test_the_templates_and_scripts_never_turn_text_into_markup():
    """``|safe`` in a template, or a way to write markup in a script, would undo the escaping."""
    for path in sorted(TEMPLATES.glob("*.html")):
        source = path.read_text()
        for word in ("|safe", "| safe", "autoescape", "innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert word not in source, f"{path.name} has {word}"
