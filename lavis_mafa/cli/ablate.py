"""``lavis-mafa ablate --table mafa-4 --emoji``: the rows of a paper's ablation table, several seeds, and the table they give."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavis_mafa.common.errors import UserError

if TYPE_CHECKING:
    from lavis_mafa.analysis.ablation.runs import Trial
    from lavis_mafa.analysis.ablation.tables import Table

EMOJI = "mafa/quickstart/train"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--table", metavar="NAME", help="mafa-4, mafa-5, ...: `lavis-mafa ablate --list` shows all")
    parser.add_argument("--list", action="store_true", help="show the tables, or with --table the options of its rows, and stop")
    parser.add_argument("--base", metavar="YAML", help="what the rows are options of (default: the paper's; --emoji: the quickstart's)")
    parser.add_argument(
        "--finetune",
        metavar="YAML",
        help="fine-tune each row with this before it is scored (default: the paper's, for the paper's base)",
    )
    parser.add_argument("--emoji", action="store_true", help="all of it on emoji, on a CPU: build the data, train Con-D, then the rows")
    parser.add_argument("--rows", nargs="+", type=int, metavar="N", help="these alone (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44], metavar="N", help="default: 42 43 44")
    parser.add_argument("--output", type=Path, default=Path("output/ablate"), help="for runs and tables (default: output/ablate)")
    parser.add_argument("--dry-run", action="store_true", help="print the command lines of what is not finished, for a cluster")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="override settings of the base in all rows")


def run_job(name: str, options: list[str]) -> Any:
    """As :func:`lavis_mafa.common.job.run_job`, for whose imports `--help` does not wait."""
    from lavis_mafa.common import job

    return job.run_job(name, options)


def run(arguments: argparse.Namespace) -> int:
    from lavis_mafa.analysis.ablation.runs import plan_trials
    from lavis_mafa.analysis.ablation.tables import find_table, load_tables

    if arguments.list:
        _show([find_table(arguments.table)] if arguments.table else [*load_tables().values()], arguments.base, bool(arguments.table))
        return 0
    if arguments.table is None:
        raise UserError(f"--table is missing. Known: {', '.join(load_tables())}.")
    table, processes = find_table(arguments.table), int(os.environ.get("WORLD_SIZE", 1))
    wanted = arguments.rows or [row.number for row in table.rows]
    for number in wanted:
        if not 1 <= number <= len(table.rows):
            raise UserError(f"--rows has {number}, but {table.key} has the rows 1 to {len(table.rows)}.")
    if processes > 1 and int(os.environ.get("RANK", 0)) > 0:
        return 2  # one process speaks
    commands_only = arguments.dry_run or processes > 1
    if arguments.emoji and commands_only:
        raise UserError("--emoji trains in this process; it goes neither with --dry-run nor under torchrun.")

    options = [*_emoji_start(arguments.output, arguments.options), *arguments.options] if arguments.emoji else arguments.options
    base = arguments.base or (f"{EMOJI}/mafa.yaml" if arguments.emoji else table.base)
    finetune = arguments.finetune or (table.finetune if base == table.base else None)
    seeds, runs = list(dict.fromkeys(arguments.seeds)), arguments.output / "runs"
    # all rows are planned, so that the table has those of earlier calls too; only what is to run must have its files
    trials = plan_trials(table.rows, seeds, base, finetune, options, runs, with_files=[] if commands_only else wanted)
    chosen = [trial for trial in trials if trial.row.number in wanted]
    if commands_only:
        _print_commands(chosen)
        if processes > 1:
            raise UserError(f"runs in one process, not in {processes}; launch the commands above, then call it again without torchrun.")
        return 0
    _train(table, base, options, trials, chosen, arguments.output / table.key)
    return 0


def _train(table: Table, base: str, options: list[str], trials: list[Trial], chosen: list[Trial], folder: Path) -> None:
    from lavis_mafa.analysis.ablation.results import collect, format_terminal, write_results

    started, trained = time.perf_counter(), 0
    for number, trial in enumerate(chosen, start=1):
        ready = trial.figures() is not None
        text = f"{number}/{len(chosen)}  row {trial.row.number} ({trial.row.name}), seed {trial.seed}"
        print(f"\n== {text}{': finished before' if ready else ''}", flush=True)
        if not ready:
            trial.train(run_job)
            trained += 1
            write_results(folder, collect(table, base, options, trials))  # after each, so that an interrupted table is there too
    results = collect(table, base, options, trials)
    write_results(folder, results)
    minutes = (time.perf_counter() - started) / 60
    print(f"\n{format_terminal(results)}\n\n{trained} of {len(chosen)} trained in {minutes:.1f} minutes.", end=" ")
    print(f"The table: {folder}/table.md. All figures: {folder}/results.json")


def _emoji_start(output: Path, options: list[str]) -> list[str]:
    """Data and Con-D, made once; the options by which a run starts from them."""
    from lavis_mafa.analysis.ablation.runs import plan_run
    from lavis_mafa.datasets.emoji import build_emoji
    from lavis_mafa.reports.run_files import last_checkpoint

    data = [f"datasets.grit_emoji.build_info.root={output}/emoji"]
    print("== the data and Con-D, made once", flush=True)
    build_emoji(output / "emoji")
    shared = [*data, *(option for option in options if option.startswith("datasets."))]
    first = plan_run(f"{EMOJI}/con_d_1.yaml", shared, output / "runs", name="con_d_1_").train(run_job)
    half = f"model.pretrained={last_checkpoint(first)}"
    second = plan_run(f"{EMOJI}/con_d_2.yaml", [*shared, half], output / "runs", name="con_d_2_").train(run_job)
    return [*data, half, f"model.discriminator.checkpoint={last_checkpoint(second)}"]


def _show(tables: list[Table], base: str | None, with_options: bool) -> None:
    from lavis_mafa.analysis.ablation.runs import check_ours
    from lavis_mafa.analysis.ablation.tables import concrete
    from lavis_mafa.common.job import check_yaml

    for table in tables:
        print(f"{table.key:12s}{table.title}")
        if with_options:
            config = check_yaml(base or table.base, [], files=False)
            check_ours(base or table.base, config)
        for row in table.rows:
            paper = f"{row.paper['tr_r1']} {row.paper['ir_r1']}"
            print(f"  {row.number}  {row.name:30s} {paper}" + (f"  {' '.join(concrete(row.options, config))}" if with_options else ""))
    print("The figures: the paper's R@1 on COCO's 5K test split, TR and IR.")


def _print_commands(trials: list[Trial]) -> None:
    for trial in trials:
        if trial.figures() is None:
            print(f"# row {trial.row.number} ({trial.row.name}), seed {trial.seed}")
            print("\n".join(trial.commands()))
