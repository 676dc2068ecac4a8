"""`count-false-negatives` and `mine` end to end on emoji, with an untrained Con-D, and what they refuse."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from lavis_mafa.cli.main import main
from lavis_mafa.datasets.annotations import read_annotations
from lavis_mafa.errors import UserError
from lavis_mafa.models.con_d import load_con_d
from lavis_mafa.objectives.trust import Medians
from lavis_mafa.tools import mine as mining

pytestmark = pytest.mark.slow

YAML = """
model:
  arch: ARCH
  model_type: tiny
  ecm: {enabled: true}
  discriminator: {arch: ARCH, checkpoint: null}
datasets:
  grit_emoji:
    build_info: {root: EMOJI, max_concepts: 30}
    vis_processor:
      train: {name: albef_image_train, image_size: 16, randaugment: null}
      eval: {name: albef_image_eval, image_size: 16}
run:
  task: mafa_pretrain
  runner: runner_mafa
  batch_size_train: 8
  num_workers: 0
  device: cpu
  grit: {queue_size: 32, search_space: 16}
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory, emoji, models):
    """ARCH.yaml and ARCH.pth for both, without what does not score."""
    folder = tmp_path_factory.mktemp("offline")
    for arch, model in models.items():
        config = OmegaConf.create(YAML.replace("ARCH", arch).replace("EMOJI", str(emoji)))
        sizes = {"max_text_length": 12, "embed_dim": 8, "image_encoder": None, "text_encoder": None, "qformer": None}
        parts = {
            name: vars(getattr(model.settings, name)) if value is None else value
            for name, value in sizes.items()
            if hasattr(model.settings, name)
        }
        config.model = OmegaConf.merge(config.model, parts)
        OmegaConf.save(config, folder / f"{arch}.yaml")
        state = {n: v for n, v in model.state_dict().items() if not n.startswith(("text_encoder.cls.", "Qformer.cls.", "temp"))}
        torch.save({"model": {**state, "image_queue": torch.zeros(2)}}, folder / f"{arch}.pth")
    return folder


def flags(work, arch="albef_mafa", **changes):
    return ["--cfg-path", str(work / f"{arch}.yaml"), "--con-d", str(changes.get("con_d", work / f"{arch}.pth"))]


@pytest.mark.parametrize("arch", ["albef_mafa", "blip2_mafa"])
def test_count(work, tmp_path, arch, capsys):
    more = [
        "--batch-size",
        "4",
        "8",
        "--search-space",
        "8",
        "16",
        "--threshold",
        "0.3",
        "0.6",
        "--correction",
        "0.83",
        "--truth",
        "--force",
    ]
    assert main(["count-false-negatives", *flags(work, arch), *more, "--force", "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "count.json").read_text())
    assert [(w["sampling"], w["batch_size"], w["search_space"]) for w in results["ways"]] == [
        *(("random", b, None) for b in (4, 8)),
        *(("GRIT", b, m) for m in (8, 16) for b in (4, 8)),
    ]
    for way in results["ways"]:
        assert way["negatives"]["wrt_image"] + way["without_negative"]["wrt_image"] == results["samples"]
        for corrected, raw in zip(way["false_negatives"], way["uncorrected"], strict=True):
            assert corrected["wrt_text"] == pytest.approx(0.83 * raw["wrt_text"])
        assert [t["threshold"] for t in way["truth"]["thresholds"]] == [0.3, 0.6]
    medians = results["medians"]
    for way in results["ways"]:
        assert {name: way["medians"][name] for name in medians} == medians
        first, true = way["truth"]["thresholds"][0]["precision"] or 0.0, way["truth"]["true_share"]
        assert way["medians"]["lift"] == (pytest.approx(first / true) if true else None)
        assert way["meaningless"] == Medians(**way["medians"]).why_not()
    assert f"own pairs {medians['own']:.3f}, shuffled pairs {medians['shuffled']:.3f}" in said
    assert said.count("  meaningless\n") == sum(way["meaningless"] is not None for way in results["ways"])
    assert said.startswith("MEANINGLESS, since ") == (results["meaningless"] is not None)
    assert "times 0.83" in said and "Con-D against the known truth" in said and said.count("GRIT") == 8
    assert (tmp_path / "out" / "count.png").read_bytes().startswith(b"\x89PNG")


def test_count_with_a_miner_of_another_family_on_random_batches_larger_than_m(work, models, tmp_path, capsys):
    """The YAML's model mines, what its discriminator block describes judges; B = 24 > M = 16."""
    con_d = models["blip2_mafa"].settings
    sizes = {part: dict(vars(getattr(con_d, part))) for part in ("image_encoder", "qformer")}
    del sizes["image_encoder"]["image_size"]  # the model's
    options = [f"model.discriminator.{part}={json.dumps(size)}" for part, size in sizes.items()]
    options += ["model.discriminator.arch=blip2_mafa", "model.discriminator.model_type=tiny"]
    call = ["count-false-negatives", *flags(work, con_d=work / "blip2_mafa.pth"), "--miner", str(work / "albef_mafa.pth")]
    call += ["--batch-size", "24", "--random-only", "--force", "--options", *options]
    counted = {}
    for same in ("count", "exclude", None):
        more = [] if same is None else ["--same-image", same, "--same-text", same]
        assert main([*call, "--output", str(tmp_path / f"{same}"), *more]) == 0, capsys.readouterr().err
        results = json.loads((tmp_path / f"{same}" / "count.json").read_text())
        assert [(w["sampling"], w["batch_size"]) for w in results["ways"]] == [("random", 24)] and "miner" in results
        counted[same] = results["ways"][0]["medians"]["hardest"], results["same_image"], results["same_text"]
    assert counted["count"][1:] == (False, False) and counted["exclude"][1:] == (True, True) and counted[None][1] is True


@pytest.mark.parametrize("arch", ["albef_mafa", "blip2_mafa"])
def test_mine_then_train_on_what_was_mined(work, tmp_path, arch, capsys, emoji, monkeypatch):
    command = ["mine", *flags(work, arch), "--threshold", "0.1", "--per-image", "2", "--force"]
    assert main([*command, "--output", str(tmp_path / "whole")]) == 0
    said = capsys.readouterr().out
    results = json.loads((tmp_path / "whole" / "mine.json").read_text())
    pairs = pq.read_table(tmp_path / "whole" / "pairs.parquet")
    assert read_annotations([tmp_path / "whole" / "pairs.parquet"]).num_rows == results["data"] + results["mined"]
    assert results["images"] == str(emoji) and all((emoji / path).is_file() for path in pairs["image"].to_pylist())
    assert (
        sum(results["outcomes"].values()) == 2 * results["samples"] == pq.read_metadata(tmp_path / "whole/connections.parquet").num_rows
    )
    assert "what became of the candidates" in said and not (tmp_path / "whole" / "blocks").exists()

    write = mining.write_parquet

    def stop(table, path):
        if path.stem == "block_000001":
            raise KeyboardInterrupt
        write(table, path)

    monkeypatch.setattr(mining, "write_parquet", stop)
    assert main([*command, "--output", str(tmp_path / "stopped")]) == 130
    monkeypatch.setattr(mining, "write_parquet", write)
    assert main([*command, "--output", str(tmp_path / "stopped")]) == 0
    assert "going on in" in (said := capsys.readouterr().out) and ": 1 of " in said
    for file in ("pairs.parquet", "connections.parquet"):
        assert pq.read_table(tmp_path / "stopped" / file).equals(pq.read_table(tmp_path / "whole" / file))


def test_nothing_mined_is_a_result(work, tmp_path, capsys):
    assert main(["mine", *flags(work), "--threshold", "1", "--samples", "9", "--output", str(tmp_path / "out"), "--force"]) == 0
    said = capsys.readouterr().out
    assert "0 new pairs" in said and "Nothing was mined" in said
    table = pq.read_table(tmp_path / "out" / "pairs.parquet")
    assert set(table["source"].to_pylist()) == {"original"}
    assert table["score"].null_count == table.num_rows - 9


@pytest.fixture
def refused(capsys):
    def run(*arguments):
        capsys.readouterr()
        assert main([str(a) for a in arguments]) == 2
        said = capsys.readouterr().err.strip()
        assert len(said.splitlines()) == 1 and said.startswith(f"lavis-mafa {arguments[0]}: "), said
        return said

    return run


COMMANDS = ["count-false-negatives", "mine"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batch-size", "32", "--search-space", "16"], "--batch-size is 32, but must not exceed --search-space (16)"),
        (["--batch-size", "1"], "at least 2 samples"),
        (["--threshold", "1.5"], "--threshold: '1.5' is not a number between 0 and 1"),
        (["--samples", "0"], "--samples: '0' is not a whole number of at least 1"),
        (["--options", "model.arch=albef_retrieval"], "model.arch is albef_retrieval, but Con-D needs a matching head"),
        (["--cfg-path", "mafa/blip2/train/stage_2.yaml"], "model.arch is blip2_opt_mafa, but Con-D needs a matching head"),
        (["--con-d", "nowhere.pth"], "--con-d is 'nowhere.pth', but there is no such file"),
        (["--cfg-path", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_mistakes_are_one_line(work, tmp_path, refused, command, more, message):
    usual = flags(work)
    kept = [one for at in (0, 2) if usual[at] not in more for one in usual[at : at + 2]]
    assert message in refused(command, *kept, "--output", tmp_path / "out", *more)


@pytest.fixture
def says_yes_to_what_is_similar(monkeypatch):
    """A Con-D whose hardest negatives score above own pairs, and those above shuffled ones; told apart by how often they are asked."""
    from lavis_mafa.tools import candidates

    def opinion(encoder, block, image, text, pairs_at_once=512):
        own, after = image == text, (image + 1) % len(block) == text
        return torch.where(own, 0.558, torch.where(after, 0.171, 0.594))

    monkeypatch.setattr(candidates, "match_probabilities", opinion)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_con_d_that_cannot_judge_is_refused_unless_forced(work, tmp_path, command, says_yes_to_what_is_similar, capsys, monkeypatch):
    titles = []
    monkeypatch.setattr("matplotlib.figure.Figure.suptitle", lambda self, text, **how: titles.append(text))
    name = {"mine": "mine.json"}.get(command, "count.json")
    reason = "hardest negatives (median 0.594) score like own pairs (0.558)"
    call = [command, *flags(work), "--output", str(tmp_path / "out")]
    for _ in range(2):
        assert main(call) == 2
        said = capsys.readouterr().err.splitlines()[-1]  # after the bar
        assert f"{reason}; medians: own pairs 0.558, shuffled 0.171, hardest negatives 0.594" in said and "--force" in said
    assert not (tmp_path / "out" / name).exists() and len([*tmp_path.glob("out/blocks/*")]) == (command == "mine")
    assert main([*call, "--force"]) == 0
    assert capsys.readouterr().out.count("MEANINGLESS, since " + reason) == 1
    results = json.loads((tmp_path / "out" / name).read_text())
    assert results["meaningless"].startswith("hardest negatives")
    assert {"own": 0.558, "shuffled": 0.171}.items() <= {k: round(v, 3) for k, v in results["medians"].items() if v is not None}.items()
    assert titles == ([] if command == "mine" else ["MEANINGLESS: " + results["meaningless"]])


def test_flags_of_the_count_alone(work, tmp_path, refused):
    call = ["count-false-negatives", *flags(work), "--output", tmp_path / "out"]
    assert "--miner is 'nowhere.pth', but there is no such file" in refused(*call, "--miner", "nowhere.pth")
    assert "exclude each other" in refused(*call, "--random-only", "--search-space", "16")
    assert "--miner: " in refused(*call, "--miner", work / "blip2_mafa.pth")


def test_a_finished_result_is_never_overwritten(work, tmp_path, refused):
    for command, name in (("count-false-negatives", "count.json"), ("mine", "mine.json")):
        (tmp_path / command).mkdir()
        (tmp_path / command / name).write_text("{}")
        assert "finished result" in refused(command, *flags(work), "--output", tmp_path / command)


def test_truth_needs_a_concept(work, tmp_path, refused):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"image": "x.png", "caption": "a"}) + "\n")
    Image.new("RGB", (16, 16)).save(tmp_path / "x.png")
    config = OmegaConf.load(work / "albef_mafa.yaml")
    config.datasets = {
        "grit_pairs": {
            "build_info": {"annotations": {"train": {"storage": str(tmp_path / "pairs.jsonl")}}, "images": {"storage": str(tmp_path)}},
            "vis_processor": config.datasets.grit_emoji.vis_processor,
        }
    }
    OmegaConf.save(config, tmp_path / "own.yaml")
    command = ["count-false-negatives", "--cfg-path", tmp_path / "own.yaml", "--con-d", work / "albef_mafa.pth"]
    assert "--truth is given, but the training data tell no truth" in refused(*command, "--truth", "--output", tmp_path / "out")


def test_only_what_does_not_score_may_miss_or_be_left_over(work, models, tmp_path):
    model, cpu = models["albef_mafa"], torch.device("cpu")
    loaded = load_con_d(model.settings, str(work / "albef_mafa.pth"), cpu).state_dict()
    scoring = [n for n in loaded if not n.startswith(("text_encoder.cls.", "temp"))]
    assert all(torch.equal(loaded[n], model.state_dict()[n]) for n in scoring)
    state = model.state_dict()
    broken = {
        "itm_head.weight": {n: v for n, v in state.items() if not n.startswith("itm_head.")},
        "text_proj.weight": {n: v for n, v in state.items() if n != "text_proj.weight"},
        "visual_encoder.cls_token": {n: v for n, v in state.items() if n != "visual_encoder.cls_token"},
        "extra.weight": {**state, "extra.weight": torch.zeros(1)},
        "vision_proj.weight": {**state, "vision_proj.weight": torch.zeros(3, 3)},
    }
    for name, weights in broken.items():
        torch.save({"model": weights}, tmp_path / "bad.pth")
        with pytest.raises(UserError, match="no matching head" if name.startswith("itm") else name.replace(".", r"\.")):
            load_con_d(model.settings, str(tmp_path / "bad.pth"), cpu)
    with pytest.raises(UserError, match="is a BLIP-2 stage-1 checkpoint, but model.arch albef_mafa needs an ALBEF checkpoint"):
        load_con_d(model.settings, str(work / "blip2_mafa.pth"), cpu)
    torch.save({"model": {n: v for n, v in models["blip2_mafa"].state_dict().items() if "visual" not in n}}, tmp_path / "blind.pth")
    with pytest.raises(UserError, match="holds no image encoder"):
        load_con_d(models["blip2_mafa"].settings, str(tmp_path / "blind.pth"), cpu)
