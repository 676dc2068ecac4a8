"""`lavis-mafa audit` and `init`: one page before any training, and a YAML that is valid and trains."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lavis_mafa.cli.main import main
from lavis_mafa.tools.own_data import FIXED_GB, LEAST, fitted

GIVEN = ["--data", "data/pairs.jsonl", "--images", "data/images"]


@given(
    rows=st.integers(LEAST, 10_000_000),
    model=st.sampled_from([*FIXED_GB]),
    size=st.sampled_from(["tiny", "base"]),
    memory=st.none() | st.floats(4, 200),
    cores=st.integers(1, 256),
)
def test_sizes_fit_each_other_the_rows_and_the_machine(rows, model, size, memory, cores):
    fit = fitted(rows, model, size, memory, cores)
    assert 2 <= fit.batch <= fit.space <= fit.queue <= rows and fit.queue % fit.space == 0
    assert 10 <= fit.epochs <= 50 and 1 <= fit.warmup <= fit.epochs * fit.steps and fit.steps == rows // fit.batch >= 4
    assert fit.workers <= max(1, cores - 1) and fit.precision == ("fp32" if memory is None else "bf16")
    if memory is not None and size == "base" and fit.batch > 2:
        assert FIXED_GB[model] + fit.batch * 0.17 <= memory


def test_the_papers_sizes_for_the_papers_data():
    fit = fitted(5_000_000, "albef", "base", 80.0, 64)
    assert (fit.batch, fit.space, fit.queue, fit.warmup) == (96, 4800, 48000, 1000)


@pytest.fixture(scope="module")
def work(tmp_path_factory, written_pairs):
    """A folder with data, a YAML for a Con-D, and a few steps of it."""
    folder = tmp_path_factory.mktemp("work")
    written_pairs(folder / "data", 32)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["init", *GIVEN, "--model", "albef", "--size", "tiny", "--output", "con_d.yaml", "--val", "data/pairs.jsonl"]) == 0
        assert main(["train", "--cfg-path", "con_d.yaml", "--options", "run.max_steps=2", "run.num_workers=0"]) == 0
    return folder


@pytest.fixture(autouse=True)
def here(work, monkeypatch):
    monkeypatch.chdir(work)


def test_mafa_with_a_run_as_con_d_trains(work, capsys):
    call = ["init", *GIVEN, "--model", "albef", "--size", "tiny", "--con-d", "output/con_d/latest", "--output", "mafa.yaml"]
    assert main([*call, "--test", "data/pairs.jsonl"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[0] == "mafa.yaml: ALBEF, tiny, 32 rows: 50 epochs of 16 steps with 2 pairs"
    block = yaml.safe_load((work / "mafa.yaml").read_text())
    assert block["model"]["discriminator"] == {"arch": "albef_mafa", "checkpoint": "output/con_d/latest", "precision": "fp32"}
    assert block["run"]["grit"] == {"enabled": True, "queue_size": 32, "search_space": 4} and block["run"]["test_splits"] == ["test"]
    assert main(["validate", "con_d.yaml", "mafa.yaml"]) == 0
    assert main(["train", "--cfg-path", "mafa.yaml", "--options", "run.max_steps=2", "run.num_workers=0"]) == 0
    assert (work / "output/mafa/latest/checkpoint_0_2.pth").is_file()
    (work / "output/con_d").rename(work / "output/moved")
    assert main(["evaluate", "output/mafa/latest"]) == 0, "an evaluation asks no Con-D"
    (work / "output/moved").rename(work / "output/con_d")


@pytest.mark.parametrize("model", ["blip", "blip2"])
@pytest.mark.parametrize("size", ["tiny", "base"])
@pytest.mark.parametrize("con_d", [[], ["--con-d", "output/con_d/latest"]])
def test_every_model_and_size_is_valid(work, model, size, con_d):
    name = f"{model}-{size}-{len(con_d)}.yaml"
    assert main(["init", *GIVEN, "--model", model, "--size", size, *con_d, "--output", name]) == 0
    assert main(["validate", name]) == 0, "the Con-D of another family has its own sizes"
    assert ("randaugment: null" in Path(name).read_text()) == (size == "tiny"), "Con-D judges what the crop leaves"


def test_a_con_d_with_words_of_its_own(work, tmp_path, refused):
    """It is in the run's settings; the model that it judges for has the same."""
    words = tmp_path / "vocab.txt"
    words.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "square", "red", "green", "blue"]) + "\n")
    options = [f"model.tokenizer={words}", "model.text_encoder.init=null", "run.output_dir=output/words", "run.max_steps=1"]
    assert main(["train", "--cfg-path", "con_d.yaml", "--options", *options, "run.num_workers=0"]) == 0
    call = ["init", *GIVEN, "--model", "albef", "--size", "tiny", "--con-d", "output/words/latest", "--output", "words.yaml"]
    assert main(call) == 0 and main(["validate", "words.yaml"]) == 0
    assert yaml.safe_load((work / "words.yaml").read_text())["model"]["tokenizer"] == str(words)
    call = ["audit", "data/pairs.jsonl", "--images", "data/images", "--con-d", "output/words/latest", "--workers", "0"]
    assert main([*call, "--samples", "8", "--output", str(tmp_path / "audit")]) == 0
    bare = next((work / "output/words/latest/").glob("checkpoint_*1.pth"))
    bare = shutil.copy(bare, tmp_path / "bare.pth")  # without the run's settings
    call = ["audit", "data/pairs.jsonl", "--images", "data/images", "--con-d", str(bare), "--output", str(tmp_path / "none")]
    assert "embeddings of 1" in refused(*call) and not (tmp_path / "none").exists()


def test_a_con_d_of_lavis_is_named_and_not_downloaded(work, tmp_path, monkeypatch, refused):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    call = ["init", *GIVEN, "--model", "albef", "--size", "tiny", "--output", "lavis.yaml", "--con-d"]
    assert "has no matching head; allowed: lavis:albef_retrieval/..., lavis:blip_" in refused(*call, "lavis:albef_vqa/vqav2")
    assert main([*call, "lavis:albef_retrieval/coco"]) == 0 and main(["validate", "lavis.yaml"]) == 0
    con_d = yaml.safe_load((work / "lavis.yaml").read_text())["model"]["discriminator"]
    assert con_d == {
        "arch": "albef_mafa",
        "checkpoint": "lavis:albef_retrieval/coco",
        "model_type": "base",
        "image_size": 256,
        "precision": "fp32",
    }


def test_odd_names_are_written_so_that_they_are_read_again(work):
    folder = work / 'it\'s "odd": #1'
    folder.mkdir()
    rows = (work / "data/pairs.jsonl").read_text().replace('"image"', '"file: name"').replace('"caption"', '"# text"')
    (folder / "pärs.jsonl").write_text(rows)
    call = ["init", "--data", f"{folder}/pärs.jsonl", "--images", "data/images", "--columns", "image=file: name", "caption=# text"]
    assert main([*call, "--model", "albef", "--size", "tiny", "--output", "odd.yaml"]) == 0
    info = yaml.safe_load((work / "odd.yaml").read_text())["datasets"]["grit_pairs"]["build_info"]
    assert info["annotations"]["train"]["storage"] == f"{folder}/pärs.jsonl"
    assert info["columns"] == {"image": "file: name", "caption": "# text"} and main(["validate", "odd.yaml"]) == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--output": "con_d.yaml"}, "--output: con_d.yaml exists already and is never overwritten"),
        ({"--output": "my.txt"}, "allowed: a file that ends in .yaml"),
        ({"--output": "none/my.yaml"}, "there is no folder none"),
        ({"--images": "none"}, "--images is 'none', but there is no such folder"),
        ({"--images": "output"}, "--images: output has none of the first ten rows' images, such as '0.png'"),
        ({"--data": "none.csv"}, "none.csv: no such annotation file"),
        ({"--columns": "image=path"}, "no column 'path', which columns names for image; its columns are image, caption, concept"),
        ({"--con-d": "output/con_d"}, "--con-d: output/con_d is a folder of runs; name one of them"),
        ({"--con-d": "data/pairs.jsonl"}, "--con-d: data/pairs.jsonl is a JSON file, not a checkpoint"),
        ({"--size": "huge"}, "invalid choice: 'huge'"),
    ],
)
def test_a_mistake_is_one_message_and_writes_nothing(work, refused, changed, message):
    flags = {"--data": GIVEN[1], "--images": GIVEN[3], "--model": "albef", "--size": "tiny", "--output": "my.yaml"} | changed
    assert message in refused("init", *(text for pair in flags.items() for text in pair))
    assert not (work / "my.yaml").exists()


# --- audit ----------------------------------------------------------------------------------------------------------------


def data_of(page: str) -> dict:
    """What the page's script shows."""
    return json.loads(re.search(r'<script type="application/json" id="connections">(.*?)</script>', page, re.S)[1])


def test_audit_without_a_con_d_checks_and_says_what_one_would_tell(work, tmp_path, capsys):
    assert main(["audit", "data/pairs.jsonl", "--images", "data/images", "--workers", "0", "--output", str(tmp_path / "a")]) == 0
    page = (tmp_path / "a/audit.html").read_text()
    assert "What a Con-D would tell" in page and "Training can use all rows as they are" in page and 'id="connections"' not in page
    assert json.loads((tmp_path / "a/audit.json").read_text())["count"] is None
    said = capsys.readouterr().out
    assert "image and caption of another row" in said
    following = shlex.split(said.splitlines()[-1].removeprefix("Next: lavis-mafa "))
    assert main([*following[:-1], str(tmp_path / "next.yaml")]) == 0


def test_audit_is_check_count_and_mine_on_one_page(work, tmp_path, capsys):
    """Bad rows are told, and left out of what Con-D is asked about; files of several layouts, each with ids of its own."""
    rows = [json.loads(line) for line in (work / "data/pairs.jsonl").read_text().splitlines()]
    rows[3]["image"], rows[31]["image"], rows[4]["caption"] = "gone.png", "gone.png", "<script>alert(1)</script>"
    named = [{"path": row["image"], "text": row["caption"], "image_id": str(number % 16)} for number, row in enumerate(rows)]
    in_lists = [row | {"text": [row["text"]]} for row in named[:10]]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in in_lists))
    (tmp_path / "p.csv").write_text("path,text\n" + "".join(f"{row['path']},{row['text']}\n" for row in named[10:16]))
    last = pa.Table.from_pylist(named[16:])
    with pa.ipc.new_file(tmp_path / "p.arrow", last.schema) as writer:
        writer.write_table(last)
    files = [str(tmp_path / name) for name in ("p.jsonl", "p.csv", "p.arrow")]
    call = ["audit", *files, "--images", "data/images", "--columns", "image=path", "caption=text", "--workers", "0"]
    folder = tmp_path / "audit"
    assert main([*call, "--con-d", "output/con_d/latest", "--miner", "output/con_d/latest", "--output", str(folder)]) == 1
    page, results = (folder / "audit.html").read_text(), json.loads((folder / "audit.json").read_text())
    assert results["check"]["kinds"]["missing"]["rows"] == 2 and "2 of 32 rows are bad" in page
    assert results["check"]["good_files"] == [f"{folder}/clean_1.jsonl", files[1], f"{folder}/clean_3.arrow"]
    assert f"<code>{files[1]}</code>, <code>{folder}/clean_3.arrow</code>." in page
    assert results["count"]["samples"] == results["mine"]["samples"] == results["check"]["good_rows"] == 30
    said = capsys.readouterr().out
    assert re.search(r"The page: \S+audit.html, \d[\d.]+kB", said) and f"Next: lavis-mafa explore {folder} " in said
    assert "lavis-mafa init" not in said, "two rows are bad"
    assert results["count"] == json.loads((folder / "count/count.json").read_text())
    assert [way["sampling"] for way in results["count"]["ways"]] == ["random", "GRIT"]
    shown = data_of(page)
    judged = {(row["direction"], row["image"], row["text"]) for row in pq.read_table(folder / "mine/connections.parquet").to_pylist()}
    assert len(shown["connections"]) == len({pair for pair in judged if min(pair[1:]) >= 0}) > 10
    assert shown["images"][0]["src"].startswith("data:image/") and "<script>alert(1)</script>" not in page
    assert "cannot judge these data" in page, "two steps make no judge"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--miner", "output/con_d/latest"], "--miner finds candidates for a Con-D to judge; give --con-d too"),
        (["--output", "output"], "--output: output holds files of something else"),
        (["--con-d", "nothere.pth"], "--con-d is 'nothere.pth', but there is no such file"),
        (["--columns", "image=path"], "no column 'path', which columns names for image"),
        (["--images", "nothere"], "The image folder nothere does not exist"),
    ],
)
def test_a_mistake_of_audit_is_one_message(work, refused, flags, message):
    assert message in refused("audit", "data/pairs.jsonl", *([] if "--images" in flags else ["--images", "data/images"]), *flags)
    assert not (work / "output/audit").exists()


# --- the page ---------------------------------------------------------------------------------------------------------------


def test_the_commands_of_the_page_run_as_they_stand(tmp_path, monkeypatch, written_pairs, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [json.loads(line) for line in written_pairs(tmp_path / "data", 32).read_text().splitlines()]
    (tmp_path / "pairs.csv").write_text("image,caption\n" + "".join(f"{row['image']},{row['caption']}\n" for row in rows))
    (tmp_path / "images").symlink_to(tmp_path / "data/images")
    page = (Path(__file__).parents[2] / "docs/own-data.md").read_text()
    commands = [line for block in re.findall(r"```bash\n(.*?)```", page, re.S) for line in block.splitlines()]
    assert len(commands) == 8
    for command in commands:
        _, *flags = shlex.split(command)
        if flags[0] == "train":
            assert main(["validate", flags[-1]]) == 0
            flags += ["--options", "run.max_steps=2", "run.num_workers=0"]
        assert main(flags) == 0, capsys.readouterr().err
    assert (tmp_path / "report.html").is_file()
