"""`lavis-mafa ablate`: rows, seeds and the table, on twenty small pictures; every row as a switch of its base."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
from functools import cache
from pathlib import Path

import pytest

from lavis_mafa.cli import ablate
from lavis_mafa.cli.main import main
from lavis_mafa.config.check import check_yaml
from lavis_mafa.datasets.scenes.build import vocabulary
from lavis_mafa.datasets.scenes.world import World
from lavis_mafa.errors import UserError
from lavis_mafa.runners.job import run_job
from lavis_mafa.tools.ablate import TRUTH, Trial, concrete, expected_seconds, find_table, load_tables, plan_trials, scenes_start
from lavis_mafa.tools.ablation_table import collect, format_terminal
from lavis_mafa.weights import shipped

pytestmark = pytest.mark.slow

SMALL, SCENES = "mafa/quickstart/train/mafa.yaml", "mafa/quickstart/scenes/mafa.yaml"
ROWS = [row for table in load_tables().values() for row in table.rows]


def options_on(base: str, table: str, number: int) -> list[str]:
    return concrete(find_table(table).rows[number - 1].options, check_yaml(base, [], files=False))


# --- the rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [SMALL, SCENES])
@pytest.mark.parametrize("key", load_tables())
def test_a_row_is_a_switch_of_a_small_base_too(key, base):
    table = find_table(key)  # on the paper's base: test_project_yamls.py
    teacher = ["model.language_teacher.init=teacher", "model.mlm.cross_distillation=0.5"] if key.startswith("vilta") else []
    trials = plan_trials(table, [42], base, None, teacher, Path("runs"), TRUTH)
    here = [row for row in table.rows if not any(option.startswith("datasets.") for option in row.options)]
    assert [trial.row for trial in trials] == here
    # emoji's 448 samples leave no room for three search spaces; without fine-tuning ALBEF's last two rows are one
    same = {"mafa-13": 2 * (base == SMALL), "albef-1": 1}.get(key, 0)
    assert len({trial.runs[0].folder for trial in trials}) == len(here) - same  # else no two rows are the same


def test_equal_rows_of_two_tables_share_a_run():
    @cache
    def planned(key: str) -> list[Trial]:
        table = find_table(key)
        return plan_trials(table, [42], table.base, next(iter(table.finetune.values())), [], Path("runs"))

    def folder(key: str, number: int) -> Path:
        return next(trial.runs[0].folder for trial in planned(key) if trial.row.number == number)

    assert folder("mafa-4", 4) == folder("mafa-13", 5)
    assert folder("vilta-4", 3) == folder("vilta-6", 2) != folder("vilta-4", 5)
    assert folder("mafa-4", 1) == folder("mafa-5", 3) == folder("mafa-14", 1) != folder("mafa-4", 3)


def test_sizes_of_the_paper_become_those_of_the_base():
    large, small = find_table("mafa-6").base, SMALL
    queue = "model.itc.momentum_distillation.queue_size"
    assert f"{queue}=48000" in options_on(large, "mafa-6", 5) and f"{queue}=448" in options_on(small, "mafa-6", 5)
    assert "run.max_epoch=10" in options_on(large, "mafa-18", 1) and "run.max_epoch=8" in options_on(small, "mafa-18", 1)
    assert options_on(large, "mafa-15", 1) == ["model.ecm.threshold=0.5"]
    assert options_on(small, "mafa-15", 1) == ["model.ecm.threshold=0.3"]
    space = "run.grit.search_space"
    assert [options_on(large, "mafa-13", n)[-1] for n in (4, 5, 6)] == [f"{space}=960", f"{space}=4800", f"{space}=48000"]
    assert [options_on(small, "mafa-13", n)[-1] for n in (4, 5, 6)] == [f"{space}=64", f"{space}=64", f"{space}=448"]
    assert [options_on(SCENES, "mafa-13", n)[-1] for n in (4, 5, 6)] == [f"{space}=128", f"{space}=1024", f"{space}=8192"]
    grit_vlp = options_on(find_table("grit-vlp-3").base, "grit-vlp-3", 2)
    assert grit_vlp[-2:] == ["run.batch_size_train=128", f"{space}=1920"]
    assert options_on(small, "grit-vlp-3", 2)[-2:] == ["run.batch_size_train=85", f"{space}=112"]  # a divisor of 448 that holds 85


def test_a_row_wins_over_the_users_options():
    table = find_table("mafa-18")
    trial = plan_trials(table, [7], table.base, table.finetune["coco"], ["run.max_epoch=4"], Path("runs"))[0]
    config = check_yaml(table.base, trial.runs[0].options, files=False)
    assert (config.run.max_epoch, config.run.seed, config.model.itc.smoothing) == (2, 7, 0.1)


# --- the command --------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(run_yaml, pairs) -> Path:
    """A MAFA run of two epochs on twenty pictures, scored on them."""
    text = run_yaml.read_text().replace("annotations: {", f"annotations: {{test: {{storage: {pairs}/pairs.jsonl}}, ")
    run_yaml.write_text(text + "  test_splits: [test]\n")
    return run_yaml


@pytest.fixture
def trained(monkeypatch) -> list[list[str]]:
    """The options of every run that was started."""
    started: list[list[str]] = []

    def watched(yaml: str, options: list[str]):
        started.append(options)
        return run_job(yaml, options)

    monkeypatch.setattr(ablate, "run_job", watched)
    return started


def test_two_rows_with_two_seeds_end_with_a_table_and_are_not_trained_again(base, trained, capsys, tmp_path):
    call = ["ablate", "--table", "mafa-4", "--base", str(base), "--rows", "1", "4", "--seeds", "1", "2"]
    assert main(call) == 0 and len(trained) == 4
    said = capsys.readouterr().out
    lines = {line[0]: line for line in said.splitlines() if line[:1].isdigit() and line[1:5] == "    "}
    assert lines["1"].split()[1] == "GRIT-VLP" and lines["1"].count("±") == lines["4"].count("±") == 3
    assert lines["4"].endswith("78.0          61.2               84.2") and "-" in lines["2"].split()
    assert "5" not in lines  # 4M-Clean exchanges data sets that this base does not have
    assert "COCO's 5K test split" in said
    heads = [line for line in said.splitlines() if line.startswith("== ")]
    assert "about" not in heads[0] and [line.split("; ")[1] for line in heads[1:]] == [
        f"about 1 min for {n}" for n in ("3 runs", "2 runs", "1 run")
    ]
    below = [line for line in said.splitlines() if line.strip().startswith("ranked by ITC alone")]
    assert len(below) == 2 and all(line.count("±") == 3 for line in below)

    folder = tmp_path / "output/ablate/mafa-4"
    results = json.loads((folder / "results.json").read_text())
    row = results["rows"][0]
    of_seeds = [row["seeds"][seed]["test"]["tr_r1"] for seed in "12"]
    assert row["mean"]["test"]["tr_r1"] == pytest.approx(sum(of_seeds) / 2)
    assert row["spread"]["test"]["tr_r1"] == pytest.approx(abs(of_seeds[0] - of_seeds[1]) / 2**0.5)
    alone = [row["seeds"][seed]["test"]["itc_tr_r1"] for seed in "12"]
    assert f"{sum(alone) / 2:.1f} ±" in below[0] and "rank_by" not in row["mean"]["test"]
    assert {"tr_r1", "tr_r5", "tr_r10", "ir_r_precision", "ir_map_at_r"} <= set(row["seeds"]["1"]["test"])
    assert row["options"] == find_table("mafa-4").rows[0].options and results["rows"][1]["seeds"] == {}
    assert "| 1 | GRIT-VLP |" in (folder / "table.md").read_text()

    assert main(call) == 0 and len(trained) == 4
    again = capsys.readouterr().out
    assert again.count("finished before") == 4 and lines["1"] in again.splitlines()

    # one run that was interrupted before its figures, and an option that makes it another run
    Path(row["seeds"]["2"]["folder"], "evaluation.jsonl").unlink()
    assert main(call) == 0 and len(trained) == 5 and "run.seed=2" in trained[-1]
    one = [*call[:5], "--rows", "1", "--seeds", "1"]
    assert main([*one, "--options", "run.max_epoch=1"]) == 0 and len(trained) == 6
    # the same row of another table is the same run
    assert main(["ablate", "--table", "mafa-14", "--base", str(base), "--rows", "1", "--seeds", "1", "2"]) == 0 and len(trained) == 6


def test_fine_tuning_starts_from_the_rows_checkpoint_and_gives_its_figures(base, trained, tmp_path):
    tuned = tmp_path / "tuned.yaml"
    shutil.copy(base, tuned)
    base.write_text(base.read_text().replace("  test_splits: [test]\n", ""))
    call = ["ablate", "--table", "mafa-4", "--base", str(base), "--finetune", str(tuned), "--rows", "3", "--seeds", "5"]
    assert main([*call, "--output", "abl"]) == 0 and len(trained) == 2
    first, second = (next(option for option in options if "output_dir" in option).split("=")[1] for options in trained)
    assert second.startswith(f"{first}/finetune_")
    (start,) = (option for option in trained[1] if option.startswith("model.pretrained="))
    assert Path(start.split("=")[1]).parent.parent == Path(first) and start.endswith("checkpoint_1.pth")
    # only the fine-tuning was lost: pre-training is not done again
    shutil.rmtree(second)
    assert main([*call, "--output", "abl"]) == 0 and len(trained) == 3 and trained[2][:1] == trained[1][:1]


def test_a_dry_run_prints_what_a_cluster_is_to_run_con_d_first(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call = ["ablate", "--table", "mafa-4", "--rows", "1", "4", "--dry-run", "--seeds"]
    assert main([*call, "42", "43"]) == 0
    about, first, second, *lines = capsys.readouterr().out.splitlines()
    assert about.startswith("# Con-D") and lines[0] == "# row 1 (GRIT-VLP), seed 42" and len(lines) == 12
    assert "1_discriminator_pretrain.yaml" in first and "2_discriminator_finetune_coco.yaml" in second
    pretrain, finetune = lines[lines.index("# row 4 (MAFA), seed 42") + 1 :][:2]
    assert pretrain.startswith('torchrun --nproc_per_node="${NPROC:-4}" -m lavis_mafa train --cfg-path mafa/albef/train/pretrain.yaml')
    assert "2_discriminator_finetune_coco.yaml" in finetune
    assert "discriminator.checkpoint" not in lines[1] and "discriminator.checkpoint" not in finetune

    # the commands hand the checkpoints on: what each leaves is what the next one names
    folder = re.compile(r"run.output_dir=(\S+)")
    for command, before, key, last in (
        (second, first, "model.pretrained", "19"),
        (pretrain, second, "model.discriminator.checkpoint", "best"),
        (finetune, pretrain, "model.pretrained", "19"),
    ):
        assert f" {key}={folder.search(before)[1]}/latest/checkpoint_{last}.pth" in command
    assert "$(" not in "".join([first, second, *lines])

    # what is finished is printed no more
    (tmp_path / folder.search(second)[1] / "20250101000000").mkdir(parents=True)
    (tmp_path / folder.search(second)[1] / "20250101000000" / "config.yaml").touch()
    scored = json.dumps({"split": "test", "epoch": "best", "tr_r1": 1.0})
    (tmp_path / folder.search(second)[1] / "20250101000000" / "evaluation.jsonl").write_text(scored + "\n")
    assert main([*call, "42", "--options", "run.num_workers=1"]) == 0 and "Con-D" not in capsys.readouterr().out
    # a Con-D of one's own
    (tmp_path / "con_d.pth").touch()
    assert main([*call, "42", "--options", "model.discriminator.checkpoint=con_d.pth"]) == 0
    said = capsys.readouterr().out
    assert "Con-D" not in said and said.count("model.discriminator.checkpoint=con_d.pth") == 2


def test_rows_that_differ_in_fine_tuning_alone_share_their_pre_training(capsys):
    assert main(["ablate", "--table", "albef-6", "--seeds", "1", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    tuned = [line for line in lines if "finetune_flickr.yaml" in line]
    assert [re.findall(r"rank_by=\w+|run.k_test=\d+|negatives=\w+", line) for line in tuned] == [
        ["rank_by=itc"],
        ["run.k_test=16"],
        ["run.k_test=128"],
        ["run.k_test=256"],
        ["run.k_test=128", "negatives=random"],
    ]
    assert len({line for line in lines if line.startswith("torchrun") and "albef.yaml" in line}) == 1
    assert sum(line.startswith("# as above") for line in lines) == 4


def test_another_benchmark_has_its_own_fine_tuning_and_figures(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["ablate", "--table", "mafa-16", "--on", "flickr", "--seeds", "1", "--rows", "1", "--dry-run"]) == 0
    assert "finetune_flickr.yaml" in capsys.readouterr().out
    table = find_table("mafa-16")
    text = format_terminal(collect(table, "flickr", table.base, [], []))
    assert "Flickr30K's 1K test split" in text


def test_an_oracle_is_given_by_name(capsys, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call = ["ablate", "--table", "mafa-16", "--seeds", "1", "--dry-run"]
    assert main(call) == 0 and "oracle" not in capsys.readouterr().out
    assert "which needs --oracle CHECKPOINT" in refused(*call, "--rows", "3")
    assert "--oracle is 'no.pth', but there is no such file" in refused(*call, "--oracle", "no.pth")
    (tmp_path / "blip.pth").touch()
    assert main([*call, "--rows", "3", "--oracle", "blip.pth"]) == 0
    (command,) = [line for line in capsys.readouterr().out.splitlines() if "pretrain.yaml" in line]
    assert "model.discriminator.arch=blip_retrieval model.discriminator.checkpoint=blip.pth" in command


def test_the_figure_over_the_search_space(base, trained, tmp_path):
    """Figure 2: M, mean recall and the known share of false negatives, as the runs have them."""
    call = ["ablate", "--table", "mafa-13", "--base", str(base), "--seeds", "1", "--rows", "4", "6"]
    assert main([*call, "--options", "run.max_epoch=1", "run.max_steps=3"]) == 0 and len(trained) == 2
    folder = tmp_path / "output/ablate/mafa-13"
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert [row["search_space"] for row in rows] == [4, 4, 16] * 2
    assert all(0 <= rows[n]["shares"]["1"]["false_negative_share"] <= 1 for n in (3, 5)) and rows[0]["shares"] == {}
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_calls_are_one_message(refused, base, monkeypatch, capsys):
    assert "'mafa-44', which is none. Did you mean 'mafa-4'?" in refused("ablate", "--table", "mafa-44")
    assert "--table is missing. Known: mafa-4, mafa-5" in refused("ablate")
    assert "--rows has 7, but mafa-4 has the rows 1 to 6" in refused("ablate", "--table", "mafa-4", "--rows", "7")
    said = refused("ablate", "--table", "mafa-4", "--rows", "2")
    assert "row 2 (ECM): model.discriminator.checkpoint is null" in said and "--dry-run prints the two steps" in said
    assert "--rows has 5 (GRIT-VLP, 4M-Clean), which exchanges" in refused(
        "ablate", "--table", "mafa-4", "--rows", "5", "--base", SMALL
    )
    assert "--on is flickr, but mafa-5 has: coco" in refused("ablate", "--table", "mafa-5", "--on", "flickr")
    assert "give --options model.discriminator.checkpoint" in refused("ablate", "--table", "mafa-4", "--base", SMALL, "--dry-run")
    assert "none of ours" in refused("ablate", "--table", "mafa-4", "--base", str(lavis_yaml()))
    for small in ("--emoji", "--scenes"):
        assert "neither with --dry-run" in refused("ablate", "--table", "mafa-4", small, "--dry-run")
    assert "choose one" in refused("ablate", "--table", "mafa-4", "--emoji", "--scenes")
    assert "--con-d truth needs data whose truth is known" in refused("ablate", "--table", "mafa-4", "--con-d", "truth")
    assert "it needs --scenes" in refused("ablate", "--table", "mafa-4", "--emoji", "--wrong", "0.3")
    assert "'2' is not a number between 0 and 1" in refused("ablate", "--table", "mafa-4", "--scenes", "--wrong", "2")
    base.write_text(base.read_text().replace("test_splits: [test]", "test_splits: []"))
    assert "run.test_splits is empty" in refused("ablate", "--table", "mafa-4", "--base", str(base))
    monkeypatch.setenv("WORLD_SIZE", "abc")
    assert "WORLD_SIZE is 'abc' in the environment" in refused("ablate", "--table", "mafa-4")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["ablate", "--table", "mafa-18", "--rows", "1", "--seeds", "1"]) == 2
    said = capsys.readouterr()
    assert "runs in one process, not in 2" in said.err and len(said.err.splitlines()) == 1 and "torchrun" in said.out


def lavis_yaml() -> Path:
    import importlib.util

    spec = importlib.util.find_spec("lavis")
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "projects/albef/train/ret_coco_ft.yaml"


def test_the_list_shows_every_row_and_with_a_table_its_options(capsys):
    assert main(["ablate", "--list"]) == 0
    said = capsys.readouterr().out
    assert all(row.name in said for row in ROWS) and "model." not in said
    assert main(["ablate", "--list", "--table", "mafa-6", "--base", SMALL]) == 0
    assert "model.itc.momentum_distillation.queue_size=448" in capsys.readouterr().out


@pytest.fixture
def started(monkeypatch, tmp_path) -> list[tuple[str, list[str]]]:
    """Without training: every run that is started, with its options. It leaves a checkpoint, and scores that grow with row and seed."""
    import torch

    calls: list[tuple[str, list[str]]] = []
    names = ("text_encoder.cls.predictions.bias", *(f"{head}.weight" for head in ("vision_proj", "text_proj", "itm_head")))
    torch.save({name: torch.zeros(1) for name in names}, tmp_path / "con_d.pth")  # what tells one of pre-training

    def leaves_behind(yaml: str, options: list[str]) -> None:
        calls.append((Path(yaml).stem, options))
        config = check_yaml(yaml, options)  # every checkpoint it names is there
        folder = Path(config.run.output_dir) / "20250101000000"
        folder.mkdir(parents=True)
        (folder / "config.yaml").touch()
        shutil.copy(tmp_path / "con_d.pth", folder / f"checkpoint_{config.run.max_epoch - 1}.pth")
        write_metrics(folder, 3600)
        score = 10.0 + config.run.seed + config.run.seed % 3 * (1 + config.model.itc.smoothing) + 5 * config.model.ecm.enabled
        of = dict.fromkeys(("tr_r1", "ir_r1", "tr_r_precision", "ir_r_precision", "tr_map_at_r", "ir_map_at_r", "agg_metrics"), score)
        lines = ({"split": split, "epoch": "last", **of} for split in config.run.test_splits)
        (folder / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablate, "run_job", leaves_behind)
    return calls


def write_metrics(folder: Path, seconds: float) -> None:
    """Of a run that trained so long, in two pieces, the second four times as fast."""
    rows = [{"epoch": 0, "step": 1, "samples_seen": 400 * n, "samples_per_second": 4**n * 125 / seconds} for n in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_on_emoji_con_d_is_trained_once(started, monkeypatch, tmp_path, capsys):
    (tmp_path / "output/ablate/emoji").mkdir(parents=True)
    (tmp_path / "output/ablate/emoji/truth.parquet").touch()
    monkeypatch.setattr("lavis_mafa.datasets.emoji.build_emoji", lambda folder: None)
    call = ["ablate", "--table", "mafa-4", "--emoji", "--seeds", "42", "--options", "datasets.grit_emoji.build_info.max_concepts=60"]
    assert main(call) == 0
    assert [name for name, _ in started] == ["con_d_1", "con_d_2", "mafa", "mafa", "mafa", "mafa"]
    assert all("datasets.grit_emoji.build_info.max_concepts=60" in options for _, options in started)
    assert main([*call, "run.max_epoch=2"]) == 0 and len(started) == 10  # other rows, the same Con-D
    assert "R-P" not in capsys.readouterr().out
    assert main([*call, "--con-d", "truth"]) == 0 and len(started) == 14
    assert all(TRUTH[0] in options for _, options in started[10:])


@pytest.fixture
def scenes(started, monkeypatch, tmp_path) -> list[tuple[str, float]]:
    """Name and share of wrong captions of all scenes that are built; nothing is drawn."""
    built: list[tuple[str, float]] = []

    def build(folder: Path, world: World) -> None:
        if not folder.exists():
            built.append((folder.name, world.wrong))
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("train", "curated", "val", "test", "unseen"):
            (folder / f"{name}.parquet").touch()
        (folder / "vocab.txt").write_text("\n".join(vocabulary()))
        (folder / "summary.json").write_text("{}")

    monkeypatch.setattr("lavis_mafa.datasets.scenes.build.build_scenes", build)
    return built


def test_a_table_of_blip2_has_scenes_of_its_own(started, scenes, refused, tmp_path):
    assert main(["ablate", "--table", "mafa-7", "--scenes", "--seeds", "1"]) == 0
    assert [name for name, _ in started] == ["blip2_mafa"] * 3
    given = {option for _, options in started for option in options if option.startswith(("model.pretrained", "model.discriminator"))}
    both = f"model.pretrained={shipped('scenes_blip2_start')}", f"model.discriminator.checkpoint={shipped('scenes_blip2_con_d')}"
    assert given == {*both}
    assert "--scenes has both" in refused("ablate", "--table", "mafa-7", "--emoji")
    with pytest.raises(UserError, match="'blip_mafa', but weights for scenes are there for albef_mafa and blip2_mafa alone"):
        scenes_start("mafa/blip/train/pretrain.yaml", tmp_path, [], lambda name, options: None)


def test_on_scenes_a_table_says_how_sure_it_is(started, scenes, capsys, tmp_path):
    call = ["ablate", "--table", "mafa-4", "--scenes", "--seeds", "1", "2", "3"]
    assert main(call) == 0
    assert [name for name, _ in started] == ["mafa"] * 12 and scenes == [("scenes", 0.0)]
    root = "output/ablate/scenes"
    assert all({f"datasets.grit_scenes.build_info.root={root}", f"model.tokenizer={root}/vocab.txt"} <= {*o} for _, o in started)
    given = {option for _, options in started for option in options if option.startswith(("model.pretrained", "model.discriminator"))}
    assert given == {f"model.pretrained={shipped('scenes_start')}", f"model.discriminator.checkpoint={shipped('scenes_con_d')}"}

    said = capsys.readouterr().out
    heads = [line for line in said.splitlines() if line.startswith("== ")]
    assert len(heads) == 13 and "about" not in heads[1] and heads[2].endswith("; about 11 h 0 min for 11 runs")
    assert "val split of mafa/quickstart/scenes/mafa.yaml: mean ± half of its 95 % interval (Student's t) over seeds" in said
    (head,) = {line for line in said.splitlines() if line.startswith("row") and "seeds" in line}
    assert [name in head for name in ("TR R@1", "IR R-P", "TR mAP@R", "mean recall")] == [True] * 4
    results = json.loads((tmp_path / "output/ablate/mafa-4/results.json").read_text())
    rows = {row["number"]: row for row in results["rows"]}
    assert [*rows] == [1, 2, 3, 4]
    of_seeds = {n: [rows[n]["seeds"][seed]["val"]["ir_r_precision"] for seed in "123"] for n in rows}
    assert rows[2]["half"]["val"]["ir_r_precision"] == pytest.approx(4.3027 * statistics.stdev(of_seeds[2]) / 3**0.5, rel=1e-4)
    differences = [a - b for a, b in zip(of_seeds[2], of_seeds[4], strict=True)]
    found = rows[2]["against"]["4"]["val"]["ir_r_precision"]
    assert found["difference"] == pytest.approx(statistics.fmean(differences))
    assert found["half"] == pytest.approx(4.3027 * statistics.stdev(differences) / 3**0.5, rel=1e-4) and 0 < found["p"] < 1
    assert [*rows[1]["against"]] == ["4"] and [*rows[2]["against"]] == ["1", "4"] and [*rows[4]["against"]] == ["1"]
    lines = said[said.index("val: differences over the same seeds") :].splitlines()
    assert lines[1].split("  ")[-1].strip() == "IR R-P - row 4" and lines[3].startswith("2    ECM")
    assert lines[3].endswith(f"{found['difference']:+.1f} ± {found['half']:.1f}, p = {found['p']:.2g}")
    assert "| 2 | ECM | +5.0 ± 0.0 |" in (tmp_path / "output/ablate/mafa-4/table.md").read_text()  # ECM adds 5, whatever the seed

    # one more seed, whose time the others tell; a row with fewer seeds makes it a table of standard deviations
    assert main([*call[:4], "--seeds", "1", "2", "3", "4", "--rows", "1"]) == 0 and len(started) == 13
    said = capsys.readouterr().out
    assert "about 1 h 0 min for 1 run\n" in said
    assert main([*call[:4], "--seeds", "1", "2"]) == 0 and "± standard deviation over seeds" in capsys.readouterr().out


def test_on_scenes_with_wrong_captions_the_clean_rows_have_none(started, scenes, capsys):
    call = ["ablate", "--table", "mafa-4", "--scenes", "--con-d", "truth", "--wrong", "0.3", "--seeds", "1"]
    assert main(call) == 0
    assert [name for name, _ in started] == ["start", *["mafa"] * 6] and sorted(scenes) == [("scenes", 0.0), ("scenes_wrong_0.3", 0.3)]
    roots = [[option.split("=")[1] for option in options if "grit_scenes" in option][-1] for _, options in started]
    assert [Path(root).name for root in roots] == ["scenes_wrong_0.3"] * 5 + ["scenes"] * 2
    assert all(TRUTH[0] in options for _, options in started[1:]) and not any("cc3m" in o for _, options in started for o in options)
    assert "GRIT-VLP, 4M-Clean" in capsys.readouterr().out


def test_a_row_that_is_not_known_takes_as_long_as_the_others(tmp_path):
    table = find_table("mafa-4")
    trials = plan_trials(table, [1, 2], SMALL, None, [], tmp_path)

    def finish(trial: Trial, seconds: float, seed: int) -> None:
        folder = trial.runs[0].folder.parent / f"seed_{seed}" / "20250101000000"
        folder.mkdir(parents=True)
        (folder / "config.yaml").touch()
        write_metrics(folder, seconds)
        scored = "".join(json.dumps({"split": split, "epoch": "last"}) + "\n" for split in ("val", "test"))
        (folder / "evaluation.jsonl").write_text(scored)
        end = (folder / "metrics.jsonl").stat().st_mtime
        os.utime(folder / "evaluation.jsonl", (end + 10, end + 10))

    assert expected_seconds(trials, trials) is None
    finish(trials[0], 100, seed=1)
    finish(trials[0], 140, seed=9)  # of an earlier call
    assert expected_seconds(trials, trials[1:]) == pytest.approx(7 * 130)
    finish(trials[2], 290, seed=1)
    assert expected_seconds(trials, [trials[1], trials[3], trials[4]]) == pytest.approx(130 + 300 + 215)


def test_a_table_without_any_run_has_no_metrics():
    table = find_table("mafa-15")
    text = format_terminal(collect(table, "coco", table.base, [], []))
    assert text.splitlines()[0] == table.title and "±" not in text
