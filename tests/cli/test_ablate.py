"""`lavis-mafa ablate`: rows, seeds and the table, on twenty small pictures; every row as a switch of its base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lavis_mafa.analysis.ablation.results import collect, format_terminal
from lavis_mafa.analysis.ablation.runs import plan_trials
from lavis_mafa.analysis.ablation.tables import concrete, find_table, load_tables
from lavis_mafa.cli import ablate
from lavis_mafa.cli.main import main
from lavis_mafa.common.job import check_yaml, run_job

SMALL = "mafa/quickstart/train/mafa.yaml"
ROWS = [row for table in load_tables().values() for row in table.rows]


def options_on(base: str, table: str, number: int) -> list[str]:
    return concrete(find_table(table).rows[number - 1].options, check_yaml(base, [], files=False))


# --- the rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", load_tables())
def test_a_row_is_a_switch_of_a_small_base_too(key):
    table = find_table(key)  # on the paper's base: test_project_yamls.py
    trials = plan_trials(table.rows, [42], SMALL, None, [], Path("runs"), with_files=[])
    assert len({trial.runs[0].folder for trial in trials}) == len(table.rows)  # no two rows are the same


def test_equal_rows_of_two_tables_share_a_run():
    def folder(key: str, number: int) -> Path:
        table = find_table(key)
        (trial,) = plan_trials([table.rows[number - 1]], [42], table.base, table.finetune, [], Path("runs"), with_files=[])
        return trial.runs[0].folder

    assert folder("mafa-4", 1) == folder("mafa-5", 3) == folder("mafa-14", 1) != folder("mafa-4", 3)


def test_sizes_of_the_paper_become_those_of_the_base():
    large, small = find_table("mafa-6").base, SMALL
    queue = "model.itc.momentum_distillation.queue_size"
    assert options_on(large, "mafa-6", 5)[-1] == f"{queue}=48000" and options_on(small, "mafa-6", 5)[-1] == f"{queue}=448"
    assert "run.max_epoch=10" in options_on(large, "mafa-18", 1) and "run.max_epoch=8" in options_on(small, "mafa-18", 1)
    assert options_on(large, "mafa-15", 1) == ["model.ecm.threshold=0.5"]
    assert options_on(small, "mafa-15", 1) == ["model.ecm.threshold=0.3"]


def test_a_row_wins_over_the_users_options():
    table = find_table("mafa-18")
    (trial,) = plan_trials(table.rows[:1], [7], table.base, table.finetune, ["run.max_epoch=4"], Path("runs"), with_files=[])
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
    assert "COCO's 5K test split" in said

    folder = tmp_path / "output/ablate/mafa-4"
    results = json.loads((folder / "results.json").read_text())
    row = results["rows"][0]
    of_seeds = [row["seeds"][seed]["test"]["tr_r1"] for seed in "12"]
    assert row["mean"]["test"]["tr_r1"] == pytest.approx(sum(of_seeds) / 2)
    assert row["spread"]["test"]["tr_r1"] == pytest.approx(abs(of_seeds[0] - of_seeds[1]) / 2**0.5)
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


def test_a_dry_run_prints_what_a_cluster_is_to_run(capsys):
    assert main(["ablate", "--table", "mafa-4", "--rows", "4", "--seeds", "42", "43", "--dry-run"]) == 0
    first, pretrain, finetune, *others = capsys.readouterr().out.splitlines()
    assert first == "# row 4 (MAFA), seed 42" and len(others) == 3
    assert pretrain.startswith('torchrun --nproc_per_node="${NPROC:-4}" -m lavis_mafa train --cfg-path mafa/albef/train/pretrain.yaml')
    assert "2_discriminator_finetune_coco.yaml" in finetune and 'model.pretrained="$(ls -t output/ablate/runs/' in finetune


def test_wrong_calls_are_one_message(refused, base, monkeypatch, capsys):
    assert "'mafa-44', which is none. Did you mean 'mafa-4'?" in refused("ablate", "--table", "mafa-44")
    assert "--table is missing. Known: mafa-4, mafa-5" in refused("ablate")
    assert "--rows has 5, but mafa-4 has the rows 1 to 4" in refused("ablate", "--table", "mafa-4", "--rows", "5")
    assert "row 2 (ECM): model.discriminator.checkpoint is null" in refused("ablate", "--table", "mafa-4", "--rows", "2")
    assert "none of ours" in refused("ablate", "--table", "mafa-4", "--base", str(lavis_yaml()))
    assert "neither with --dry-run" in refused("ablate", "--table", "mafa-4", "--emoji", "--dry-run")
    base.write_text(base.read_text().replace("test_splits: [test]", "test_splits: []"))
    assert "run.test_splits is empty" in refused("ablate", "--table", "mafa-4", "--base", str(base))
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
    assert all(row.name in said for row in ROWS) and "=" not in said
    assert main(["ablate", "--list", "--table", "mafa-6", "--base", SMALL]) == 0
    assert "model.itc.momentum_distillation.queue_size=448" in capsys.readouterr().out


def test_on_emoji_con_d_is_trained_once(monkeypatch, tmp_path, capsys):
    """Without training: what would be started, and with which checkpoints."""
    calls: list[tuple[str, list[str]]] = []

    def leaves_behind(yaml: str, options: list[str]) -> None:
        calls.append((yaml, options))
        config = check_yaml(yaml, options)  # every checkpoint it names is there
        folder = Path(config.run.output_dir) / "20250101000000"
        folder.mkdir(parents=True)
        (folder / "config.yaml").touch()
        shutil.copy(con_d, folder / "checkpoint_9.pth")
        lines = ({"split": split, "epoch": "last", "tr_r1": 1.0, "ir_r1": 2.0, "agg_metrics": 3.0} for split in config.run.test_splits)
        (folder / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    import torch

    con_d = tmp_path / "con_d.pth"
    torch.save({"text_encoder.bert.embeddings.word_embeddings.weight": torch.zeros(1)}, con_d)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablate, "run_job", leaves_behind)
    (tmp_path / "output/ablate/emoji").mkdir(parents=True)
    (tmp_path / "output/ablate/emoji/truth.parquet").touch()
    monkeypatch.setattr("lavis_mafa.datasets.emoji.build_emoji", lambda folder: None)
    call = ["ablate", "--table", "mafa-4", "--emoji", "--seeds", "42", "--options", "datasets.grit_emoji.build_info.max_concepts=60"]
    assert main(call) == 0
    names = [Path(yaml).stem for yaml, _ in calls]
    assert names == ["con_d_1", "con_d_2", "mafa", "mafa", "mafa", "mafa"]
    assert all("datasets.grit_emoji.build_info.max_concepts=60" in options for _, options in calls)
    assert main([*call, "run.max_epoch=2"]) == 0 and len(calls) == 10  # other rows, the same Con-D
    assert capsys.readouterr().out.count("3.0") == 16  # four rows, two splits, two calls


def test_a_table_without_any_run_has_no_figures():
    table = find_table("mafa-15")
    text = format_terminal(collect(table, table.base, [], []))
    assert text.splitlines()[0] == table.title and "±" not in text
