"""`count-false-negatives` and `mine` on features that are given: as with a checkpoint, against plain loops, without LAVIS, and what
they refuse."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from lavis_mafa.cli.main import main
from lavis_mafa.tools.candidates import Encoder, ReadableRows, blocks_of, encoded_blocks, match_probabilities, shuffled
from lavis_mafa.tools.judges import PicturelessPairs
from lavis_mafa.tools.training_data import check_pass, opened_pass

pytestmark = pytest.mark.slow

ROWS = 26
DOCS = Path(__file__).resolve().parents[2] / "docs"
YAML = """
model: {arch: albef_mafa, model_type: tiny, ecm: {enabled: true}, discriminator: {arch: albef_mafa, checkpoint: null}}
datasets:
  grit_pairs:
    build_info: {annotations: {train: {storage: FOLDER/pairs.jsonl}}, images: {storage: FOLDER/images}}
    vis_processor:
      train: {name: albef_image_train, image_size: 16, randaugment: null}
      eval: {name: albef_image_eval, image_size: 16}
run: {task: mafa_pretrain, runner: runner_mafa, num_workers: 0, device: cpu}
"""
SIZES = ["--batch-size", "4", "--search-space", "12"]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory, models):
    """Pairs in files, two to an image, a checkpoint and its YAML; its features as .npy, and its block of all rows, which judges."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "images").mkdir()
    random = np.random.default_rng(3)
    words = "red green blue round small big dog cat flag".split()
    rows = []
    for row in range(ROWS):
        image = f"{row // 2}.png"
        Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / "images" / image)
        rows.append({"image": image, "caption": f"{' '.join(random.choice(words, 1 + row % 4))} {row // 3}"})
    write_jsonl(folder / "pairs.jsonl", rows)
    model = models["albef_mafa"]
    config = OmegaConf.create(YAML.replace("FOLDER", str(folder)))
    parts = {name: vars(getattr(model.settings, name)) for name in ("image_encoder", "text_encoder")}
    config.model = OmegaConf.merge(config.model, parts, {"max_text_length": 12, "embed_dim": 8})
    OmegaConf.save(config, folder / "con_d.yaml")
    torch.save({"model": model.state_dict()}, folder / "con_d.pth")
    args = str(folder / "con_d.yaml"), [], str(folder / "con_d.pth")
    with opened_pass(check_pass(*args), *args) as opened:
        encoder = Encoder(opened.con_d, opened.device)
        (block,) = encoded_blocks(encoder, ReadableRows(opened.dataset), blocks_of(torch.arange(ROWS), ROWS))
    features = {"image": block.image_features.numpy(), "text": block.text_features.numpy()}
    for side, array in features.items():
        np.save(folder / f"{side}.npy", 3 * array)  # a length of its own, which nothing depends on
    pq.write_table(pa.table({f"{side}_features": list(array) for side, array in features.items()}), folder / "both.parquet")
    given = ["--annotations", folder / "pairs.jsonl", "--features", folder / "image.npy", folder / "text.npy", *SIZES, "--force"]
    con_d = ["--cfg-path", folder / "con_d.yaml", "--con-d", folder / "con_d.pth", *SIZES, "--force"]
    return SimpleNamespace(folder=folder, rows=rows, encoder=encoder, block=block, given=given, con_d=con_d)


def call(*arguments):
    return main([str(argument) for argument in arguments])


def judge(world, asked, scores):
    """What a user does between --write-pairs and --scores, with Con-D as the judge."""
    table = pq.read_table(asked)
    image, text = (torch.from_numpy(table[name].to_numpy().copy()) for name in ("image_row", "text_row"))
    table = table.append_column("probability", pa.array(match_probabilities(world.encoder, world.block, image, text).numpy()))
    (pyarrow.csv.write_csv if scores.suffix == ".csv" else pq.write_table)(table, scores)
    return table


def connections(folder):
    table = pq.read_table(folder / "connections.parquet")
    return {name: table[name].to_pylist() for name in table.column_names}


def alike(one, other):
    assert one.keys() == other.keys()
    for name, column in one.items():
        if name == "similarity" or name.endswith("probability"):
            np.testing.assert_allclose(np.array(column, float), np.array(other[name], float), atol=1e-5)
        else:
            assert column == other[name], name


def test_the_same_connections_as_with_the_checkpoint(world, tmp_path, capsys):
    for name, features in (("miner", []), ("npy", world.given[2:5]), ("parquet", ["--features", world.folder / "both.parquet"])):
        assert call("mine", *world.con_d, *features, "--threshold", "0.3", "--output", tmp_path / name) == 0, capsys.readouterr().err
    whole = connections(tmp_path / "miner")
    assert whole["outcome"].count("mined") > 3
    alike(connections(tmp_path / "npy"), whole)
    alike(connections(tmp_path / "parquet"), whole)
    for end in (".parquet", ".csv"):
        asked, scores, output = tmp_path / "asked.parquet", tmp_path / f"scores{end}", tmp_path / f"scored{end}"
        assert call("mine", *world.given, "--write-pairs", asked, "--output", tmp_path / "nothing") == 0
        written = judge(world, asked, scores)
        assert call("mine", *world.given, "--scores", scores, "--threshold", "0.3", "--output", output) == 0, capsys.readouterr().err
        alike(connections(output), whole)
        pairs = pq.read_table(tmp_path / "miner" / "pairs.parquet")
        assert pq.read_table(output / "pairs.parquet").drop(["score"]).equals(pairs.drop(["score"]))
    assert not (tmp_path / "nothing").exists()
    assert len({(row["image_row"], row["text_row"]) for row in written.to_pylist()}) == written.num_rows
    for row in written.to_pylist():
        assert (row["image"], row["caption"]) == (world.rows[row["image_row"]]["image"], world.rows[row["text_row"]]["caption"])
    results = json.loads((output / "mine.json").read_text())
    assert results["judge"] == "the judge" and results["con_d"] is None and results["given"]["scores"] == [str(scores)]


def test_counts_as_with_the_checkpoint(world, tmp_path, capsys):
    assert call("count-false-negatives", *world.con_d, "--output", tmp_path / "con_d") == 0
    assert call("count-false-negatives", *world.con_d, *world.given[2:5], "--output", tmp_path / "features") == 0
    assert call("count-false-negatives", *world.given, "--write-pairs", tmp_path / "asked.parquet") == 0
    judge(world, tmp_path / "asked.parquet", tmp_path / "scores.parquet")
    scored = ["--scores", tmp_path / "scores.parquet", "--output", tmp_path / "scored"]
    assert call("count-false-negatives", *world.given, *scored) == 0, capsys.readouterr().err
    found = [json.loads((tmp_path / name / "count.json").read_text())["ways"] for name in ("con_d", "features", "scored")]
    assert found[0] == found[1] == found[2] and found[0][1]["false_negatives"][0]["wrt_image"] > 0


# --- against plain loops ------------------------------------------------------------------------------------------------


def pairs_of_things(folder, count, several=False):
    """Pairs without pictures, their features, and a guide's, as .npy; the same image or the same caption now and then."""
    random = np.random.default_rng(count)
    rows = []
    for row in range(count):
        image, thing = row // 2 if row % 5 == 0 else row, row // 3 if row % 4 == 0 else row
        rows.append({"image": f"{image}.jpg", "caption": f"thing {thing}"})
    if several:  # the last two captions are of one row
        rows = [*rows[:-2], {"image": rows[-1]["image"], "caption": [rows[-2]["caption"], rows[-1]["caption"]]}]
    write_jsonl(folder / "pairs.jsonl", rows)
    essence = random.normal(size=(count, 6))[np.arange(count) // 3]
    units = {}
    for name, noise in {"i": 0.8, "t": 0.8, "gi": 0.4, "gt": 0.4}.items():
        array = essence + noise * random.normal(size=essence.shape)
        np.save(folder / f"{name}.npy", array.astype(np.float32))
        units[name] = array / np.linalg.norm(array, axis=1)[:, None]
    given = ["--annotations", folder / "pairs.jsonl", "--features", folder / "i.npy", folder / "t.npy"]
    return given, ["--guide-features", folder / "gi.npy", folder / "gt.npy"], units


def hardest(batch, images, texts, known):
    """(direction, anchor, image, text) of each anchor of a batch that has a negative."""
    for direction in (0, 1):
        for anchor in batch:
            others = [(anchor, o) if direction == 0 else (o, anchor) for o in batch if not known(anchor, o)]
            if others:
                yield direction, anchor, *max(others, key=lambda pair: float(images[pair[0]] @ texts[pair[1]]))


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("margin", [None, 0.15])
def test_random_batches_count_what_a_loop_counts(tmp_path, margin, several):
    count, size = 47, 6
    given, guide, f = pairs_of_things(tmp_path, count, several)
    judged = f["gi"] @ f["gt"].T
    if margin is None:
        judged = np.clip(judged, 0, 1).astype(np.float32)
        image, text = np.divmod(np.arange(count * count), count)
        table = pa.table({"probability": judged.flatten(), "text_row": text.astype(np.int32), "image_row": image})
        pq.write_table(table, tmp_path / "scores.parquet")
        guide = ["--scores", tmp_path / "scores.parquet", "--threshold", "0.6"]
    more = [*(["--guide-margin", margin] if margin else []), "--random-only", "--batch-size", size, "--seed", 5]
    assert call("count-false-negatives", *given, *guide, *more, "--output", tmp_path / "out") == 0
    (way,) = json.loads((tmp_path / "out" / "count.json").read_text())["ways"]
    data = PicturelessPairs([tmp_path / "pairs.jsonl"])
    image, text = data.table["image"].to_pylist(), data.table["caption"].to_pylist()
    assert len(text) == count and all(len(captions) == 1 for captions in text)
    order = shuffled(count, 5).tolist()
    found = [0, 0]
    total = [0, 0]
    for start in range(0, count, size):
        known = lambda a, b: image[a] == image[b] or text[a] == text[b]  # noqa: E731
        for direction, anchor, i, t in hardest(order[start : start + size], f["i"], f["t"], known):
            total[direction] += 1
            found[direction] += judged[i, t] > (0.6 if margin is None else judged[anchor, anchor] - margin)
    assert [way["negatives"][f"wrt_{side}"] for side in ("image", "text")] == total
    assert [way["false_negatives"][0][f"wrt_{side}"] for side in ("image", "text")] == found and 0 < min(found) < total[0]


def test_a_guide_mines_what_scores_above_the_own_pair(tmp_path):
    given, guide, f = pairs_of_things(tmp_path, 48)
    assert call("mine", *given, *guide, "--guide-margin", "0.05", *SIZES, "--output", tmp_path / "out") == 0
    judged = f["gi"] @ f["gt"].T
    table = pq.read_table(tmp_path / "out" / "connections.parquet").to_pylist()
    assert len(table) == 2 * 48
    for row in table:
        if row["outcome"] != "no candidate in the batch":
            anchor = row["image"] if row["direction"] == "text for image" else row["text"]
            assert row["probability"] == pytest.approx(judged[row["image"], row["text"]], abs=1e-5)
            above = judged[row["image"], row["text"]] > judged[anchor, anchor] - 0.05
            assert above == (row["outcome"] != "not above the threshold")
    assert sum(row["outcome"] == "mined" for row in table) > 5


# --- without LAVIS ------------------------------------------------------------------------------------------------------


def test_neither_lavis_nor_an_image_is_needed(tmp_path):
    given, guide, _ = pairs_of_things(tmp_path, 48)
    commands = [
        ["mine", *given, *SIZES, *guide, "--output", tmp_path / "mine"],
        ["count-false-negatives", *given, *SIZES, "--write-pairs", tmp_path / "asked.csv"],
    ]
    code = f"""
import sys
from lavis_mafa.cli.main import main
assert [main(arguments) for arguments in {[[str(a) for a in command] for command in commands]}] == [0, 0]
assert not {{"lavis", "transformers", "timm"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine" / "pairs.parquet").exists() and (tmp_path / "asked.csv").exists()


def test_the_page_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    """docs/false-negatives.md: what it makes, what it calls, and that it counts what it says."""
    page = (DOCS / "false-negatives.md").read_text(encoding="utf-8")
    section = page.split("## With embeddings you have already\n")[1].split("\n## ")[0]
    monkeypatch.chdir(tmp_path)
    said = ""
    for language, block in re.findall(r"```(python|bash)\n(.*?)```", section, re.DOTALL):
        if language == "python":
            (tmp_path / "block.py").write_text(block)
            runpy.run_path("block.py")
        for line in block.replace("\\\n", " ").splitlines() if language == "bash" else ():
            program, *arguments = shlex.split(line)
            assert program == "lavis-mafa" and main(arguments) == 0, capsys.readouterr().err
            said += capsys.readouterr().out
    shares = {row[0]: row[1:] for row in re.findall(r"^  (random|GRIT) .*\(([\d.]+)%\) .*\(([\d.]+)%\)", said, re.MULTILINE)}
    assert {name: [float(share) for share in row] for name, row in shares.items()} == {
        "random": [pytest.approx(1.1, abs=0.1)] * 2,
        "GRIT": [pytest.approx(11.3, abs=0.5)] * 2,
    }
    assert said.count("By the known truth 100.0% of them match") == 2


# --- refused ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(capsys):
    def run(*arguments):
        capsys.readouterr()
        assert call(*arguments) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]  # after the bar
        assert said.startswith(f"lavis-mafa {arguments[0]}: "), said
        return said

    return run


@pytest.mark.parametrize("command", ["count-false-negatives", "mine"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nobody judges: give --con-d with --cfg-path; or, for --features, --scores"),
        (["--con-d", "a", "--scores", "b"], "--con-d and --scores exclude each other: only one can judge"),
        (["--guide-features", "a", "--scores", "b"], "--scores and --guide-features exclude each other"),
        (["--con-d", "a"], "--con-d needs --cfg-path"),
        (["--con-d", "a", "--cfg-path", "b", "--annotations", "c"], "--con-d and --annotations exclude each other"),
        (["--scores", "a", "--features", "b"], "--scores needs --annotations"),
        (["--write-pairs", "a", "--annotations", "b"], "--write-pairs needs --features"),
        (["--guide-features", "a", "--annotations", "b"], "--guide-features needs --features"),
        (["--scores", "a", "--annotations", "b", "--features", "c", "--cfg-path", "d"], "--scores and --cfg-path exclude each other"),
        (["--scores", "a", "--guide-margin", "0.1"], "--guide-margin belongs to --guide-features"),
        (["--guide-features", "a", "--threshold", "0.1"], "--threshold and --guide-features exclude each other"),
        (["--guide-features", "a", "--annotations", "b", "--features", "c", "--write-pairs", "d"], "--write-pairs exclude each other"),
    ],
)
def test_flags_that_do_not_go_together(refused, command, arguments, message):
    assert message in refused(command, *arguments)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image_row": [0]}, "has no column text_row, but image_row, probability; needed: image_row, text_row, probability"),
        ({"image_row": [12], "text_row": [0]}, "image_row is 12 in row 1"),
        ({"image_row": [0], "text_row": [-1]}, "text_row is -1 in row 1"),
        ({"image_row": [0], "text_row": np.array([2**64 - 1], np.uint64)}, "text_row is 18446744073709551615 in row 1"),
        ({"image_row": ["0"], "text_row": [0]}, "image_row in .* holds string"),
        ({"image_row": [0], "text_row": [None]}, "text_row in .* or nulls"),
        ({"image_row": [0], "text_row": [0], "probability": [1.5]}, "probability is 1.5 in row 1 of .*--guide-features"),
        ({"image_row": [0], "text_row": [0], "probability": [float("nan")]}, "probability is nan in row 1"),
        ({"image_row": [1, 0], "text_row": [0, 0], "probability": [0.1, None]}, "probability is nan in row 2"),
        ({"image_row": [0], "text_row": [0], "probability": [2**63 - 1]}, "probability is 9.2.* in row 1"),
        ({"image_row": [0], "text_row": [0], "probability": ["high"]}, "probability in .* holds string"),
        ({"image_row": [0, 0], "text_row": [1, 1], "probability": [0.5, 0.6]}, "two probabilities of image_row 0 with text_row 1"),
        ({"image_row": [0], "text_row": [0]}, r"no probability of (\d+) pairs that are asked about.*--write-pairs FILE writes them"),
    ],
)
def test_scores_that_are_none(tmp_path, refused, columns, message):
    given, _, _ = pairs_of_things(tmp_path, 12)
    pq.write_table(pa.table({**columns, "probability": columns.get("probability", [0.5])}), tmp_path / "s.parquet")
    assert re.search(message, refused("mine", *given, *SIZES, "--force", "--scores", tmp_path / "s.parquet"))


def test_missing_scores_are_written_and_asked_for_once(tmp_path, refused):
    given, _, f = pairs_of_things(tmp_path, 24)
    given = [*given, *SIZES]
    parts = [tmp_path / name for name in ("all.parquet", "first.parquet", "rest.parquet")]
    assert call("mine", *given, "--write-pairs", parts[0]) == 0

    def scored(table):
        near = (f["gi"][table["image_row"].to_numpy()] * f["gt"][table["text_row"].to_numpy()]).sum(1)
        return table.append_column("probability", pa.array(np.clip(near, 0, 1)))

    every = pq.read_table(parts[0])
    pq.write_table(scored(every.slice(7)), parts[1])
    assert "no probability of 7 pairs" in refused("mine", *given, "--scores", parts[1])
    assert call("mine", *given, "--scores", parts[1], "--write-pairs", parts[2]) == 0
    rest = pq.read_table(parts[2])
    assert rest.equals(every.slice(0, 7))
    assert "may hold what was judged" in refused("mine", *given, "--scores", parts[1], "--write-pairs", parts[2])
    assert "allowed: a .parquet or .csv file" in refused("mine", *given, "--write-pairs", tmp_path / "a.txt")
    pq.write_table(scored(rest), parts[2])
    assert call("mine", *given, "--scores", parts[1], parts[2], "--output", tmp_path / "out") == 0


def test_data_that_do_not_fit(world, tmp_path, refused):
    given, guide, f = pairs_of_things(tmp_path, 24)
    np.save(tmp_path / "short.npy", f["gi"][:23])
    message = refused("mine", *given, "--guide-features", tmp_path / "short.npy", tmp_path / "gt.npy")
    assert "--guide-features: " in message and "23 rows of image features, but there are 24 pairs" in message
    np.save(tmp_path / "i.npy", f["i"][::-1])
    assert "--features: image and text of a pair are hardly more alike" in refused("mine", *given, *guide)
    assert "no such folder" in refused("mine", *given, *guide, "--images", tmp_path / "nowhere")
    write_jsonl(tmp_path / "pairs.jsonl", [{"image": "/a.jpg", "caption": "a"}])
    assert "image is '/a.jpg'" in refused("mine", *given, *guide, "--images", tmp_path)
    rows = [{**world.rows[0], "caption": ["one", "two"]}, *world.rows[1:]]
    write_jsonl(tmp_path / "lists.jsonl", rows)
    storage = f"datasets.grit_pairs.build_info.annotations.train.storage={tmp_path / 'lists.jsonl'}"
    message = refused("mine", *world.con_d, *world.given[2:5], "--output", tmp_path / "lists", "--options", storage)
    assert "--features has a row a pair, but row 1 of the training data has 2 captions" in message


def test_captions_of_a_row_are_pairs_with_their_own_truth(tmp_path):
    rows = [
        {"image": "a.jpg", "caption": ["a dog", "a thing"], "facts": ["dog", "red"], "caption_facts": [["dog"], []]},
        {"image": "b.jpg", "caption": ["a cat"]},
        {"image": "c.jpg", "caption": ["a red cat", "a cat"], "facts": ["cat", "red"], "caption_facts": [["cat", "red"], ["cat"]]},
    ]
    data = PicturelessPairs([write_jsonl(tmp_path / "a.jsonl", rows)])
    assert data.table["image"].to_pylist() == ["a.jpg", "a.jpg", "b.jpg", "c.jpg", "c.jpg"]
    assert data.table["caption"].to_pylist() == [["a dog"], ["a thing"], ["a cat"], ["a red cat"], ["a cat"]]
    assert data.image_keys.tolist() == [0, 0, 1, 2, 2]
    claims = data.table["caption_facts"].to_pylist()
    assert [claims[0], claims[3], claims[4]] == [[["dog"]], [["cat", "red"]], [["cat"]]] and not (claims[2] or [None])[0]
    matches = [[bool(data.truth.matches(data.concepts[i], data.text_keys[t])) for t in (0, 3, 4)] for i in (0, 3)]
    assert matches == [[True, False, False], [False, True, True]]
