"""``lavis-mafa ablate --table mafa-4 --scenes``: the rows of a paper's ablation table, several seeds, and the table they give."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavis_mafa.cli.options import share
from lavis_mafa.errors import UserError

if TYPE_CHECKING:
    from lavis_mafa.tools.ablate import Table

SMALL = {"scenes": "mafa/quickstart/scenes/mafa.yaml", "emoji": "mafa/quickstart/train/mafa.yaml"}
SMALL_BLIP2 = "mafa/quickstart/scenes/blip2_mafa.yaml"  # of a table of BLIP-2's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--table", metavar="NAME", help="mafa-4, mafa-5, ...: `lavis-mafa ablate --list` shows all")
    parser.add_argument("--list", action="store_true", help="show the tables, or with --table the options of its rows, and stop")
    parser.add_argument(
        "--base", metavar="YAML", help="what the rows are options of (default: the paper's; --scenes, --emoji: the quickstart's)"
    )
    parser.add_argument(
        "--finetune",
        metavar="YAML",
        help="fine-tune each row with this before it is scored (default: the paper's, for the paper's base)",
    )
    parser.add_argument("--on", metavar="coco|flickr", help="whose metrics, after fine-tuning there (default: the table's first)")
    parser.add_argument(
        "--oracle",
        metavar="CHECKPOINT",
        help="Con-D of an oracle's row: BLIP's, fine-tuned for retrieval on COCO (--scenes: the truth)",
    )
    parser.add_argument(
        "--scenes",
        action="store_true",
        help="all of it on scenes, on a CPU: build the data, then the rows; start and Con-D come with the package",
    )
    parser.add_argument("--emoji", action="store_true", help="the same on emoji, where Con-D is trained first")
    parser.add_argument("--con-d", choices=["truth"], help="with --scenes or --emoji: the truth is Con-D in all rows with ECM")
    parser.add_argument(
        "--wrong",
        type=share,
        default=0.0,
        metavar="SHARE",
        help="with --scenes: of training captions so many match nothing, but in the rows on 4M-Clean (default: 0, without these rows)",
    )
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
    from lavis_mafa.distributed import rank_and_size
    from lavis_mafa.tools import ablate
    from lavis_mafa.tools.ablation_table import collect, format_terminal, write_results

    if arguments.list:
        _show([ablate.find_table(arguments.table)] if arguments.table else [*ablate.load_tables().values()], arguments)
        return 0
    if arguments.table is None:
        raise UserError(f"--table is missing. Known: {', '.join(ablate.load_tables())}.")
    table, (rank, processes) = ablate.find_table(arguments.table), rank_and_size()
    wanted = arguments.rows or [row.number for row in table.rows]
    for number in wanted:
        if not 1 <= number <= len(table.rows):
            raise UserError(f"--rows has {number}, but {table.key} has the rows 1 to {len(table.rows)}.")
    if processes > 1 and rank > 0:
        return 2  # one process speaks
    commands_only = arguments.dry_run or processes > 1
    small = _small(arguments, commands_only)
    benchmark = arguments.on or next(iter(table.finetune))
    if benchmark not in table.finetune:
        raise UserError(f"--on is {benchmark}, but {table.key} has: {', '.join(table.finetune)}.")
    oracle = ablate.TRUTH if small else _oracle(arguments.oracle)
    base = arguments.base or _base(table, small)
    finetune = arguments.finetune or (table.finetune[benchmark] if base == table.base else None)
    options, output, seeds = arguments.options, arguments.output, list(dict.fromkeys(arguments.seeds))
    runs, truth = output / "runs", arguments.con_d == "truth"
    clean = [f"{ablate.SCENES}={output}/scenes"] if arguments.wrong else None
    # all rows are planned, so that the table has those of earlier calls too; only what is to run must have its files
    trials = ablate.plan_trials(table, seeds, base, finetune, options, runs, oracle, arguments.rows or (), clean)
    if small:
        print("== the data, what the rows start from, and Con-D, made once", flush=True)
        if arguments.wrong:
            ablate.scenes_data(output)
        if small == "scenes":
            options = [*ablate.scenes_start(base, output, options, run_job, truth, arguments.wrong), *options]
        else:
            options = [*ablate.emoji_start(output, options, run_job, truth), *options]
        trials = ablate.plan_trials(table, seeds, base, finetune, options, runs, oracle, clean=clean)
    chosen = [trial for trial in trials if trial.row.number in wanted]
    if commands_only:
        print("\n".join(ablate.command_lines(chosen, table, base, runs)))
        if processes > 1:
            raise UserError(f"runs in one process, not in {processes}; launch the commands above, then call it again without torchrun.")
        return 0
    for trial in chosen:
        if trial.metrics() is None:
            ablate.check_files(trial)

    name = table.key if benchmark == next(iter(table.finetune)) else f"{table.key}-{benchmark}"
    folder, started, trained = output / name, time.perf_counter(), 0

    def write() -> dict[str, Any]:
        results = collect(table, benchmark, base, options, trials, many_matches=small == "scenes")
        write_results(folder, results, table.plotted)
        return results

    for number, trial in enumerate(chosen, start=1):
        print(f"\n== {number}/{len(chosen)}  row {trial.row.number} ({trial.row.name}), seed {trial.seed}", end="", flush=True)
        if trial.metrics() is not None:
            print(": finished before", flush=True)
            continue
        left = [one for one in chosen if one.metrics() is None]
        if (seconds := ablate.expected_seconds(trials, left)) is not None:
            print(f"; about {ablate.duration(seconds)} for {len(left)} run{'s' * (len(left) > 1)}", end="")
        print(flush=True)
        trial.train(run_job)
        trained += 1
        write()  # after each, so that an interrupted table is there too
    minutes = (time.perf_counter() - started) / 60
    print(f"\n{format_terminal(write())}\n\n{trained} of {len(chosen)} trained in {minutes:.1f} minutes.", end=" ")
    print(f"The table: {folder}/table.md. All metrics: {folder}/results.json")
    return 0


def _base(table: Table, small: str | None) -> str:
    """The YAML whose options the rows are, where the user names none; raises UserError where there is no small one of the model."""
    if small is None or not table.base.startswith("mafa/blip2"):
        return SMALL[small] if small else table.base
    if small == "emoji":
        raise UserError(f"--emoji has an ALBEF alone, but {table.key} is about BLIP-2; --scenes has both.")
    return SMALL_BLIP2


def _small(arguments: argparse.Namespace, commands_only: bool) -> str | None:
    """``scenes``, ``emoji`` or None; raises UserError where flags contradict."""
    asked = [name for name in SMALL if getattr(arguments, name)]
    if len(asked) > 1:
        raise UserError("--scenes and --emoji are given; choose one.")
    if asked and commands_only:
        raise UserError(f"--{asked[0]} trains in this process; it goes neither with --dry-run nor under torchrun.")
    if arguments.con_d and not asked:
        raise UserError("--con-d truth needs data whose truth is known: --scenes or --emoji.")
    if arguments.wrong and asked != ["scenes"]:
        raise UserError("--wrong is a share of the captions of scenes; it needs --scenes.")
    return asked[0] if asked else None


def _oracle(checkpoint: str | None) -> list[str] | None:
    if checkpoint is None:
        return None
    from lavis_mafa.named_weights import fetched

    checkpoint = fetched(checkpoint, "--oracle")
    if not Path(checkpoint).is_file():
        raise UserError(f"--oracle is {checkpoint!r}, but there is no such file.")
    return ["model.discriminator.arch=blip_retrieval", f"model.discriminator.checkpoint={checkpoint}"]


def _show(tables: list[Table], arguments: argparse.Namespace) -> None:
    from lavis_mafa.tools.ablate import concrete, read_base

    for table in tables:
        print(f"{table.key:12s}{table.title}")
        config = read_base(arguments.base or table.base, []) if arguments.table else None
        for row in table.rows:
            first = {name: [v for m, v in of.items() if m.endswith(("_r1", "_mean"))] for name, of in row.paper.items()}
            text = f"  {row.number}  {row.name:30s} " + "; ".join(f"{name} {' '.join(map(str, of))}" for name, of in first.items())
            if config is not None and (row.options or row.finetune_options):
                text += "  " + " ".join([*concrete(row.options, config), *(f"(fine-tuning: {o})" for o in row.finetune_options)])
            print(text)
    print("The numbers: the paper's R@1 (ALBEF: the mean of R@1, 5 and 10), TR and IR, on COCO's 5K and Flickr30K's 1K test split.")
