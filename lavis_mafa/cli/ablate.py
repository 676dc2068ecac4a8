"""``lavis-mafa ablate --table mafa-4 --emoji``: the rows of a paper's ablation table, several seeds, and the table they give."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavis_mafa.distributed import rank_and_size
from lavis_mafa.errors import UserError

if TYPE_CHECKING:
    from lavis_mafa.analysis.ablation.runs import Trial
    from lavis_mafa.analysis.ablation.tables import Row, Table

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
    parser.add_argument("--on", metavar="coco|flickr", help="whose figures, after fine-tuning there (default: the table's first)")
    parser.add_argument(
        "--oracle", metavar="CHECKPOINT", help="Con-D of an oracle's row: BLIP's, fine-tuned for retrieval on COCO (--emoji: the truth)"
    )
    parser.add_argument("--emoji", action="store_true", help="all of it on emoji, on a CPU: build the data, train Con-D, then the rows")
    parser.add_argument("--rows", nargs="+", type=int, metavar="N", help="these alone (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44], metavar="N", help="default: 42 43 44")
    parser.add_argument("--output", type=Path, default=Path("output/ablate"), help="for runs and tables (default: output/ablate)")
    parser.add_argument("--dry-run", action="store_true", help="print the command lines of what is not finished, for a cluster")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="override settings of the base in all rows")


def run_job(name: str, options: list[str]) -> Any:
    """As :func:`lavis_mafa.runners.job.run_job`, for whose imports `--help` does not wait."""
    from lavis_mafa.runners import job

    return job.run_job(name, options)


def run(arguments: argparse.Namespace) -> int:
    from lavis_mafa.analysis.ablation.runs import plan_trials
    from lavis_mafa.analysis.ablation.tables import find_table, load_tables

    if arguments.list:
        _show([find_table(arguments.table)] if arguments.table else [*load_tables().values()], arguments.base, bool(arguments.table))
        return 0
    if arguments.table is None:
        raise UserError(f"--table is missing. Known: {', '.join(load_tables())}.")
    table, (rank, processes) = find_table(arguments.table), rank_and_size()
    wanted = arguments.rows or [row.number for row in table.rows]
    for number in wanted:
        if not 1 <= number <= len(table.rows):
            raise UserError(f"--rows has {number}, but {table.key} has the rows 1 to {len(table.rows)}.")
    if processes > 1 and rank > 0:
        return 2  # one process speaks
    commands_only = arguments.dry_run or processes > 1
    if arguments.emoji and commands_only:
        raise UserError("--emoji trains in this process; it goes neither with --dry-run nor under torchrun.")

    benchmark = arguments.on or next(iter(table.finetune))
    if benchmark not in table.finetune:
        raise UserError(f"--on is {benchmark}, but {table.key} has: {', '.join(table.finetune)}.")
    oracle = ["model.discriminator.arch=ground_truth"] if arguments.emoji else _oracle(arguments.oracle)
    base = arguments.base or (f"{EMOJI}/mafa.yaml" if arguments.emoji else table.base)
    if arguments.rows:
        _check_rows([row for row in table.rows if row.number in wanted], base, arguments.options, oracle)
    options = [*_emoji_start(arguments.output, arguments.options), *arguments.options] if arguments.emoji else arguments.options
    finetune = arguments.finetune or (table.finetune[benchmark] if base == table.base else None)
    seeds, runs = list(dict.fromkeys(arguments.seeds)), arguments.output / "runs"
    # all rows are planned, so that the table has those of earlier calls too; only what is to run must have its files
    planned = [] if commands_only else wanted
    trials = plan_trials(table.rows, seeds, base, finetune, options, runs, with_files=planned, oracle=oracle)
    chosen = [trial for trial in trials if trial.row.number in wanted]
    if commands_only:
        _print_commands(chosen, table, base, runs)
        if processes > 1:
            raise UserError(f"runs in one process, not in {processes}; launch the commands above, then call it again without torchrun.")
        return 0
    name = table.key if benchmark == next(iter(table.finetune)) else f"{table.key}-{benchmark}"
    _train(table, benchmark, base, options, trials, chosen, arguments.output / name)
    return 0


def _oracle(checkpoint: str | None) -> list[str] | None:
    if checkpoint is None:
        return None
    if not Path(checkpoint).is_file():
        raise UserError(f"--oracle is {checkpoint!r}, but there is no such file.")
    return ["model.discriminator.arch=blip_retrieval", f"model.discriminator.checkpoint={checkpoint}"]


def _check_rows(rows: list[Row], base: str, options: list[str], oracle: list[str] | None) -> None:
    """Rows that were asked for by number and cannot be; raises UserError."""
    from lavis_mafa.analysis.ablation.tables import fits
    from lavis_mafa.runners.job import check_yaml

    config = check_yaml(base, options, files=False)
    for row in rows:
        if not fits(row, config):
            raise UserError(
                f"--rows has {row.number} ({row.name}), which exchanges annotations of data sets that {base} does not have."
            )
        if row.oracle and oracle is None:
            raise UserError(f"--rows has {row.number} ({row.name}), which needs --oracle CHECKPOINT.")


def _train(table: Table, benchmark: str, base: str, options: list[str], trials: list[Trial], chosen: list[Trial], folder: Path) -> None:
    from lavis_mafa.analysis.ablation.results import collect, format_terminal, write_results

    started, trained = time.perf_counter(), 0
    for number, trial in enumerate(chosen, start=1):
        ready = trial.figures() is not None
        text = f"{number}/{len(chosen)}  row {trial.row.number} ({trial.row.name}), seed {trial.seed}"
        print(f"\n== {text}{': finished before' if ready else ''}", flush=True)
        if not ready:
            trial.train(run_job)
            trained += 1
            # after each, so that an interrupted table is there too
            write_results(folder, collect(table, benchmark, base, options, trials), table.plotted)
    results = collect(table, benchmark, base, options, trials)
    write_results(folder, results, table.plotted)
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
    from lavis_mafa.runners.job import check_yaml

    for table in tables:
        print(f"{table.key:12s}{table.title}")
        if with_options:
            config = check_yaml(base or table.base, [], files=False)
            check_ours(base or table.base, config)
        for row in table.rows:
            paper = "; ".join(f"{name} {' '.join(map(str, _first_figures(figures)))}" for name, figures in row.paper.items())
            shown = [*concrete(row.options, config), *(f"(fine-tuning: {o})" for o in row.finetune_options)] if with_options else []
            print(f"  {row.number}  {row.name:30s} {paper}" + (f"  {' '.join(shown)}" if shown else ""))
    print("The figures: the paper's R@1 (ALBEF: the mean of R@1, 5 and 10), TR and IR, on COCO's 5K and Flickr30K's 1K test split.")


def _first_figures(figures: dict[str, float]) -> list[float]:
    return [value for metric, value in figures.items() if metric.endswith(("_r1", "_mean"))]


def _print_commands(trials: list[Trial], table: Table, base: str, runs: Path) -> None:
    """Command lines of what is not finished, Con-D's two steps before the rows that ask it."""
    from lavis_mafa.analysis.ablation.runs import chain, plan_run

    left = [trial for trial in trials if trial.figures() is None]
    con_d = None
    if any(trial.runs[0].asks_con_d for trial in left):
        if base != table.base or not table.con_d:
            raise UserError(
                "rows with ECM need a Con-D: give --options model.discriminator.checkpoint=CON_D.pth. Its two steps are known for the "
                f"paper's base alone ({table.base})."
            )
        first, second = (plan_run(yaml, [], runs, files=False, name=f"con_d_{n}_") for n, yaml in enumerate(table.con_d, start=1))
        con_d = str(second.folder)
        if second.finished() is None:
            print("# Con-D: its two steps, before the rows that ask it")
            print("\n".join(chain([first, second])))
    printed: set[str] = set()
    for trial in left:
        print(f"# row {trial.row.number} ({trial.row.name}), seed {trial.seed}")
        for command in trial.commands(con_d):
            print(f"# as above: {command}" if command in printed else command)  # rows share runs
            printed.add(command)
