"""`lavis-mafa init`: sizes that GRIT takes, whatever the data; a YAML that is valid and trains."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lavis_mafa.cli.init import FIXED_GB, LEAST, fitted
from lavis_mafa.cli.main import main

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


@pytest.mark.parametrize("model", ["blip", "blip2"])
@pytest.mark.parametrize("size", ["tiny", "base"])
@pytest.mark.parametrize("con_d", [[], ["--con-d", "output/con_d/latest"]])
def test_every_model_and_size_is_valid(work, model, size, con_d):
    name = f"{model}-{size}-{len(con_d)}.yaml"
    assert main(["init", *GIVEN, "--model", model, "--size", size, *con_d, "--output", name]) == 0
    assert main(["validate", name]) == 0, "the Con-D of another family has its own sizes"


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
