"""docs/python.md runs as it stands there, and leaves the program as it was; the notebook runs."""

from __future__ import annotations

import base64
import io
import logging
import os
import random
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lavis_mafa import api as mafa
from lavis_mafa import signals
from lavis_mafa.cli.main import main
from lavis_mafa.runners import job
from lavis_mafa.tools.gallery import Thumbnails
from lavis_mafa.weights import shipped

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(scope="module")
def work(tmp_path_factory, scenes) -> Path:
    """What the page takes for granted: pairs.csv, images, and a run whose model can judge them."""
    folder = tmp_path_factory.mktemp("python")
    (folder / "images").symlink_to(scenes / "images")
    rows = pq.read_table(scenes / "train.parquet", columns=["image", "caption"]).to_pandas()
    rows = rows.assign(image=rows["image"].str.removeprefix("images/"), caption=rows["caption"].str[0])
    rows.to_csv(folder / "pairs.csv", index=False)
    run = folder / "output/con_d/latest"
    (run / "result").mkdir(parents=True)
    torch.save({"model": load_file(shipped("scenes_con_d"))}, run / "checkpoint_best.pth")
    (run / "config.yaml").write_text(f"model: {{arch: albef_mafa, model_type: tiny, tokenizer: {scenes}/vocab.txt}}\n")
    return folder


def state() -> dict:
    """What a program has for itself, and a function must not take or change."""
    root, ours = logging.getLogger(), logging.getLogger("lavis_mafa")
    return {
        # but for SIGCHLD, by which PyTorch's data loader watches its workers from then on
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals() - {signal.SIGCHLD}},
        "logging": [root.level, ours.level, list(root.handlers), list(ours.handlers)],
        "random": [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()],
        "torch": [torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(), torch.distributed.is_initialized()],
        "process": [os.getcwd(), dict(os.environ), sys.unraisablehook, list(sys.argv), list(sys.path)],
    }


@pytest.fixture(scope="module")
def page(work) -> dict:
    """The names that the page's code leaves, with the state of the program before and after it."""
    first, *blocks = re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        exec(first, names)
        job._quiet_imports()  # of LAVIS, which does as it likes
        names["before"], threads = state(), threading.enumerate()
        for number, block in enumerate(blocks):
            exec(compile(block, f"python.md, block {number}", "exec"), names)
        new = [thread for thread in threading.enumerate() if thread not in threads and not thread.daemon]
        for thread in new:
            thread.join(10)  # it was told to end
        names["after"], names["left"] = state(), [thread.name for thread in new if thread.is_alive()]
    return names


@pytest.mark.slow
def test_the_page_shows_what_it_says(page, work, capsys):
    counted, mined, found, run = (page[name] for name in ("counted", "mined", "found", "run"))
    assert len(page["data"]) == 64 and page["data"].image(0, side=32).size == (32, 32)
    assert counted.frame()["sampling"].tolist() == ["random", "random", "GRIT", "GRIT"]
    assert str(counted).startswith("False negatives among") and counted._repr_png_().startswith(b"\x89PNG")
    new = pq.read_table(work / mined.pairs).to_pandas().query("source == 'mined'")
    assert len(new) == mined.results["mined"] > 0
    assert {(i, t) for i, t in zip(new["image_sample"], new["text_sample"], strict=True)} <= set(
        page["sure"][["image", "text"]].itertuples(index=False, name=None)
    )
    assert run.metrics[-1]["step"] == 16 and len(mafa.connections(run)) > 0
    assert set(run.evaluations) == {"test"} and (work / "report.html").is_file()


@pytest.mark.slow
def test_a_connection_is_a_pair_of_rows(page):
    """Captions, paths and images of the frame are those of the data that were opened."""
    found, data = page["found"], page["data"].frame
    for row in found.frame.to_dict("records"):
        assert row["caption"] == data["caption"][row["text"]] and row["own_caption"] == data["caption"][row["image"]]
        assert row["image_path"].endswith(f"images/{data['image_path'][row['image']]}")
        assert row["own_image_path"].endswith(f"images/{data['image_path'][row['text']]}")
    assert (found.frame["probability"].diff().dropna() <= 0).all() and set(found.frame["epoch"]) == {-1}
    first = found.frame.iloc[0]
    assert found.image(first["image"]) == Image.open(first["image_path"]).convert("RGB")
    shown = found.show(most=3)
    assert shown.count("<tr>") == 4 and shown.count("data:image/webp;base64,") == 6


@pytest.mark.slow
def test_the_program_goes_on_as_before(page):
    assert page["after"] == page["before"] and not page["left"]


@pytest.mark.slow
def test_the_command_line_gives_the_same_numbers(page, work, monkeypatch, capsys):
    monkeypatch.chdir(work)
    call = ["--annotations", "pairs.csv", "--images", "images", "--con-d", "output/con_d/latest"]
    assert main(["count-false-negatives", *call, "--batch-size", "8", "16", "--search-space", "32", "--output", "counted"]) == 0
    assert capsys.readouterr().out.startswith(str(page["counted"]))
    assert main(["mine", *call, "--threshold", "0.5", "--output", "mined"]) == 0
    names = ("connections.parquet", "pairs.parquet")
    assert all(pq.read_table(work / "mined" / name) == pq.read_table(work / page["mined"].folder / name) for name in names)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda data: mafa.open_data("nothere.csv", images="images"), "nothere.csv"),
        (lambda data: mafa.open_data("my.yaml", images="images"), "images and columns belong to files of pairs"),
        (lambda data: mafa.open_data("pairs.csv", images="images", columns={"caption": "title"}), "no column 'title'"),
        (lambda data: data.image(64), "there is no row 64; allowed: 0 to 63"),
        (lambda data: mafa.count_false_negatives(data), "nobody judges"),
        (lambda data: mafa.count_false_negatives(data, con_d="nothere.pth"), "--con-d is 'nothere.pth', but there is no such file"),
        (lambda data: mafa.count_false_negatives(data, con_d="output/con_d/latest", batch_size=1), "--batch-size is 1"),
        (lambda data: mafa.mine(data, con_d="output/con_d/latest", output="output/mined"), "holds a finished result (mine.json)"),
        (lambda data: mafa.connections("output/con_d/latest"), "has no metrics.jsonl with records"),
        (lambda data: mafa.init(data, "my.yaml", model="albef", size="tiny"), "my.yaml exists already"),
        (lambda data: mafa.init(data, "new.yaml", model="clip", size="tiny"), "--model is 'clip'; allowed: albef, blip, blip2"),
        (lambda data: mafa.evaluate("images"), "images is no folder of a run"),
    ],
)
def test_a_mistake_is_a_user_error(page, work, monkeypatch, call, message):
    monkeypatch.chdir(work)
    with pytest.raises(mafa.UserError, match=re.escape(message)):
        call(page["data"])


def test_features_and_a_guide_need_no_model(tmp_path):
    """Pairs 2k and 2k + 1 are alike to those who mine and to the guide: each is the other's hardest negative, and a false one."""
    (tmp_path / "pairs.csv").write_text("image,caption\n" + "".join(f"{n}.png,number {n}\n" for n in range(16)))
    alike = np.repeat(np.eye(8, 16), 2, axis=0) + np.eye(16) / 10
    np.save(tmp_path / "features.npy", alike.astype(np.float32))
    both = [tmp_path / "features.npy"] * 2
    data = mafa.open_data(tmp_path / "pairs.csv")
    call = {"features": both, "guide_features": both, "guide_margin": 0.1, "search_space": 16, "force": True}
    counted = mafa.count_false_negatives(data, **call, batch_size=np.int64(16), random_only=False)
    assert set(counted.frame()["wrt_image"]) == set(counted.frame()["wrt_text"]) == {16.0} and counted.folder is None
    mined = mafa.mine(data, **call, batch_size=np.int64(16), output=tmp_path / "mined")
    with pytest.warns(UserWarning, match="changed since then|could not be read"):
        (tmp_path / "mined/pairs.parquet").unlink()
        found = mafa.connections(mined)
    assert set(zip(found.frame["image"], found.frame["text"], strict=True)) == {(n, n ^ 1) for n in range(16)}
    assert mined.results["mined"] == 16 and found.frame["own_caption"].isna().all()
    assert found.frame["caption"].tolist() == [f"number {n}" for n in found.frame["text"]], "which is beside what was found"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"threshold": 80}, "--threshold is 80; allowed: 0 to 1"),
        ({"samples": 0}, "--samples is 0; allowed: a whole number from 1"),
        ({"margin": -0.1}, "--margin is -0.1"),
        ({"per_image": 1.5}, "--per-image is 1.5"),
        ({"at_most": 0}, "--at-most is 0"),
    ],
)
def test_numbers_are_those_that_flags_take(tmp_path, given, message):
    with pytest.raises(mafa.UserError, match=re.escape(message)):
        mafa.mine("my.yaml", con_d="con_d.pth", output=tmp_path / "mined", **given)


def test_what_is_not_given_or_not_there(tmp_path):
    (tmp_path / "pairs.csv").write_text("image,caption\na.png,one\n")
    for call, message in (
        (lambda: mafa.report([]), "no run is given"),
        (lambda: mafa.open_data(tmp_path / "pairs.csv", images=tmp_path / "nowhere"), "but there is no such folder"),
        (lambda: mafa.init("my.yaml", tmp_path / "new.yaml", model="albef", size="tiny"), "for files of pairs with a folder of images"),
    ):
        with pytest.raises(mafa.UserError, match=message):
            call()


def test_a_count_takes_what_its_flags_take(tmp_path):
    for given, message in (({"correction": 83}, "--correction is 83"), ({"same_image": "no"}, "allowed: count, exclude")):
        with pytest.raises(mafa.UserError, match=message):
            mafa.count_false_negatives("my.yaml", con_d="con_d.pth", **given)


def test_the_data_of_a_yaml_are_those_of_the_options():
    """They are not opened without them."""
    options = {"datasets.grit_pairs.build_info.images.storage": "elsewhere"}
    assert mafa._pass("none.yaml", options, features=None, scores=None, guide_features=None).options == mafa._overrides(options)


def test_a_caption_is_text_and_an_image_may_be_gone(tmp_path):
    (tmp_path / "pairs.csv").write_text('image,caption\na.png,"<script>alert(1)</script>"\nb.png,two\n')
    Image.new("RGB", (8, 4), "red").save(tmp_path / "a.png")
    from lavis_mafa.tools.frames import Connections

    data = mafa.open_data(tmp_path / "pairs.csv", images=tmp_path)
    row = {"probability": 0.5, "verdict": "positive", "image": 0, "text": 1, "caption": data.frame["caption"][0], "own_caption": "two"}
    shown = Connections(data.frame.assign(**row), data.rows).show()
    assert "&lt;script&gt;" in shown and "<script>" not in shown and "No such file" in shown
    assert shown.count("<tr>") == 2, "the same pair in both rows, below the head"
    with pytest.raises(mafa.UserError, match="b.png"):
        data.image(1)


def test_a_notebook_goes_on_after_its_stop_button():
    """A signal at the end of a training: the next one must not take it for its own."""
    hook = sys.unraisablehook
    with pytest.raises(KeyboardInterrupt), signals.postponed():
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.asked() == signal.SIGINT
    with signals.postponed():
        assert signals.asked() == 0
    assert sys.unraisablehook is hook


def test_importing_costs_nothing():
    code = "import sys; from lavis_mafa import api; print({'torch', 'numpy', 'pandas', 'omegaconf', 'lavis'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("set()\n", "")


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    """In a kernel of its own, as Jupyter would run it; the committed outputs are those of such a run."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(DOCS / "python.ipynb", as_version=4)
    shown = [_kinds(cell) for cell in notebook.cells]
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute(
        env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    assert [_kinds(cell) for cell in notebook.cells] == shown
    html = [
        output.data["text/html"]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "text/html" in output.get("data", {})
    ]
    assert sum(text.count("<img src='data:image/webp;base64,") for text in html) >= 2 * (3 + 3 + 3)


def _kinds(cell) -> list[list[str]]:
    """What a cell shows, but for what goes on."""
    outputs = [output for output in cell.get("outputs", ()) if output.get("name") != "stderr"]
    return [sorted(output.get("data", {"stdout": None})) for output in outputs]


def test_images_are_upright_as_training_reads_them(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera that was held sideways
    Image.new("RGB", (400, 200)).save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "pairs.csv").write_text("image,caption\na.jpg,a dog\n")
    data = mafa.open_data(tmp_path / "pairs.csv", images=tmp_path)
    assert data.image(0).size == (200, 400) and data.image(0, side=100).size == (50, 100)
    images = Thumbnails()
    images.add(data.rows.image_path(0), "")
    content = base64.b64decode(images.entries[0]["src"].partition(",")[2])
    assert Image.open(io.BytesIO(content)).size == (48, 96)
