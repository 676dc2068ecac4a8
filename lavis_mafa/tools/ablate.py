"""The papers' ablation tables: their rows as runs of a base, large or small, and the table that comes out beside the paper's.

A row is a list of options of a YAML, a trial is a row with a seed, and its runs are one training after the other: pre-training and,
where a paper scores a fine-tuned model, fine-tuning. What is finished is found on disk and never run again.
"""

from __future__ import annotations

import json
import re
import shlex
import statistics
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lavis_mafa.config.check import check_yaml
from lavis_mafa.config.read import find_yaml, plain
from lavis_mafa.config.schema import MODEL_BLOCKS, RUN_BLOCKS, typed_block
from lavis_mafa.errors import UserError, did_you_mean
from lavis_mafa.files import digest, last_checkpoint, write_bytes, write_text
from lavis_mafa.tools.run_files import last_epoch, read_evaluations, read_metrics

TABLES = Path(__file__).resolve().parents[1] / "configs" / "ablations.yaml"
RELATIVE = re.compile(r"([\w.]+)=([\d.]+)\*(model|run)\.([\w.]+)")  # run.max_epoch=0.5*run.max_epoch
BENCHMARKS = {"coco": "COCO's 5K test split", "flickr": "Flickr30K's 1K test split"}
SHOWN = {"tr_r1": "TR R@1", "ir_r1": "IR R@1", "agg_metrics": "mean recall"}
MEANS = {"tr_mean": "TR mean", "ir_mean": "IR mean"}  # of R@1, 5, 10, where a paper has nothing else
SHARES = {"false_negative_share": "false negatives (known)", "new_positive_share": "false negatives (Con-D's)"}
PAPER = (
    "The paper's numbers are for {}, fine-tuned after pre-training on 4M pairs or more: "
    "compare the order of the rows with them, not the numbers."
)
Metrics = dict[str, dict[str, float]]  # split -> metric -> per cent
RunJob = Callable[[str, list[str]], Any]  # trains a YAML with options


# --- tables and rows ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One row of a paper's table; an ``oracle`` row takes its Con-D from the user."""

    number: int
    name: str
    paper: Metrics  # by benchmark
    options: list[str]  # of the table's base
    finetune_options: list[str]  # of the YAML that it is fine-tuned with
    oracle: bool


@dataclass(frozen=True)
class Table:
    """A paper's table; ``configs/ablations.yaml`` says what is what. ``plotted``: over the search space, as MAFA's Figure 2."""

    key: str
    title: str
    base: str
    finetune: dict[str, str]
    rows: list[Row]
    con_d: list[str] = field(default_factory=list)
    plotted: bool = False


def load_tables() -> dict[str, Table]:
    """Every table of ``configs/ablations.yaml`` by its key."""
    tables = {}
    for key, block in plain(OmegaConf.load(TABLES)).items():
        if key.startswith("_"):
            continue
        columns, always = block.pop("columns"), block.pop("always", [])
        rows = []
        for number, row in enumerate(block.pop("rows"), start=1):
            paper = {name: dict(zip(columns[name], row[name], strict=True)) for name in columns if name in row}
            options = [*always, *row.get("options", [])]
            rows.append(Row(number, row["name"], paper, options, row.get("finetune_options", []), row.get("oracle", False)))
        finetune = {name: block["finetune"][name] for name in columns}
        tables[key] = Table(key, rows=rows, **block | {"finetune": finetune})
    return tables


def find_table(name: str) -> Table:
    """One table; raises UserError where there is none of this name."""
    tables = load_tables()
    if name not in tables:
        raise UserError(f"--table is {name!r}, which is none.{did_you_mean(name, tables)} Known: {', '.join(tables)}.")
    return tables[name]


def read_base(yaml: str, options: list[str], files: bool = False) -> DictConfig:
    """The checked YAML that rows are options of; raises UserError where it is none of ours, since no row fits another's."""
    config = check_yaml(yaml, options, files)
    if config.model.arch not in MODEL_BLOCKS or config.run.task not in RUN_BLOCKS:
        raise UserError(f"{yaml} is none of ours (model.arch: {config.model.arch}, run.task: {config.run.task}), so no row fits it.")
    return config


def concrete(options: list[str], config: DictConfig) -> list[str]:
    """Options with what is relative to the base (``KEY=F*KEY``: F times another setting) replaced by its value.

    A search space becomes the nearest one that the base allows: a divisor of its ``queue_size`` that holds a batch.

    Example:
        >>> concrete(["run.max_epoch=0.5*run.max_epoch"], config)  # a base of 20 epochs, as check_yaml gives it
        ['run.max_epoch=10']
    """
    blocks = {"model": typed_block("model", config.model), "run": typed_block("run", config.run)}
    result: list[str] = []
    for option in options:
        if found := RELATIVE.fullmatch(option):
            key, factor, block, path = found.groups()
            value = attrgetter(path)(blocks[block])
            value = max(1, round(float(factor) * value)) if isinstance(value, int) else float(factor) * value
            if key == "run.grit.search_space":
                value = _allowed_space(value, blocks["run"], result)
            option = f"{key}={value}"
        result.append(option)
    return result


def _allowed_space(wanted: int, run: Any, before: list[str]) -> int:
    """The divisor of the queue that is nearest to ``wanted`` and at least a batch, as the options before it have it."""
    given = [int(option.split("=")[1]) for option in before if option.startswith("run.batch_size_train=")]
    batch, queue = (given or [run.batch_size_train])[-1], run.grit.queue_size
    divisors = [d for d in range(1, queue + 1) if queue % d == 0 and d >= batch]
    return min(divisors or [queue], key=lambda d: abs(d - wanted))


# --- trials and their runs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One training of a row: everything that `lavis-mafa train` is given."""

    yaml: str
    options: list[str]
    folder: Path  # its run.output_dir
    test_splits: list[str]
    last_checkpoint: str  # its file name; empty where it is not known beforehand
    asks_con_d: bool  # ECM with a Con-D whose checkpoint is not given yet
    search_space: int | None  # M; None of random batches

    def with_seed(self, seed: int, runs: Path) -> Run:
        """The same with a seed, in a folder of its own below ``runs``."""
        return replace(self, options=[*self.options, f"run.seed={seed}"], folder=runs / self.folder.name / f"seed_{seed}")

    def finished(self) -> Path | None:
        """The folder of the newest run that came to its end: scored on all test splits or, without any, the last epoch saved."""
        for folder in sorted((config.parent for config in self.folder.glob("*/config.yaml")), reverse=True):
            scored = read_evaluations(folder)
            # a validation within the training has the epoch's number there
            ended = [scored.get(split, {}).get("epoch") in ("best", "last") for split in self.test_splits]
            if all(ended) if ended else (folder / self.last_checkpoint).is_file():
                return folder
        return None

    def train(self, run_job: RunJob, *options: str) -> Path:
        """Train, unless that was done before; the finished run's folder."""
        if self.finished() is None:
            run_job(self.yaml, [*self.options, *options, f"run.output_dir={self.folder}"])
        if (done := self.finished()) is None:
            raise UserError(f"{self.folder}: the run ended without metrics of {', '.join(self.test_splits)}.")
        return done


@dataclass(frozen=True)
class Trial:
    """A row with one seed: pre-training and, where its metrics come from a fine-tuned model, fine-tuning."""

    row: Row
    seed: int
    runs: list[Run]

    def train(self, run_job: RunJob) -> None:
        """Train what is not finished, in this process."""
        folder = self.runs[0].train(run_job)
        for run in self.runs[1:]:
            folder = run.train(run_job, f"model.pretrained={last_checkpoint(folder)}")

    def metrics(self) -> Metrics | None:
        """What the last run was scored with, and the means of its recalls; None while it is not finished."""
        if (folder := self.runs[-1].finished()) is None:
            return None
        found: Metrics = {}
        for split, values in read_evaluations(folder).items():
            if split in self.runs[-1].test_splits:
                found[split] = {name: value for name, value in values.items() if isinstance(value, float)}
                for side in ("tr", "ir"):  # ALBEF Tables 1 and 6
                    recalls = [values[f"{side}_r{k}"] for k in (1, 5, 10) if f"{side}_r{k}" in values]
                    found[split] |= {f"{side}_mean": sum(recalls) / 3} if len(recalls) == 3 else {}
        return found

    def shares(self) -> dict[str, float]:
        """Of the last epoch of pre-training: the share of new positives and, where the truth is known, of false negatives."""
        folder = self.runs[0].finished()
        metrics = last_epoch(read_metrics(folder)) if folder is not None else {}
        return {name: metrics[name] for name in SHARES if name in metrics}


def plan_run(yaml: str, options: list[str], runs: Path, files: bool = True, name: str = "") -> Run:
    """A run whose folder below ``runs`` says what it is: other settings never share one, and the same row of two tables does.

    ``files``: are the checkpoints it names to be there. ``name`` comes before the folder's. Raises UserError as :func:`read_base`.
    """
    config = read_base(yaml, options, files)
    run = typed_block("run", config.run)
    settings = plain(config)
    settings["run"] = {k: v for k, v in settings["run"].items() if k not in ("output_dir", "seed")}
    code = digest(settings)[:10]
    ecm, con_d = (OmegaConf.select(config.model, key) for key in ("ecm.enabled", "discriminator"))
    return Run(
        yaml,
        options,
        runs / f"{name}{code}",
        test_splits=list(run.test_splits),
        last_checkpoint=f"checkpoint_{run.max_epoch - 1}.pth" if run.max_steps is None else "",
        asks_con_d=bool(ecm) and con_d is not None and con_d.get("arch") != "ground_truth" and con_d.get("checkpoint") is None,
        search_space=run.grit.search_space if run.grit.enabled else None,
    )


def plan_trials(
    table: Table,
    seeds: list[int],
    base: str,
    finetune: str | None,
    options: list[str],
    runs: Path,
    oracle: list[str] | None = None,
    asked: Collection[int] = (),
) -> list[Trial]:
    """What each row takes with each seed. A row's options come after the user's, so that it stays that row.

    A row that exchanges data sets which the base has not (4M-Clean for 4M-Noisy), or whose oracle is not given, is left out.

    Args:
        base: the YAML whose options the rows are. finetune: the YAML that follows each, or None.
        options: of the base, in all rows. runs: where the folders are. oracle: options that make the oracle the Con-D.
        asked: rows that the user named.

    Raises:
        UserError: a row is impossible on this base, or one that was asked for is left out, or nothing would be scored.
    """
    config, trials = read_base(base, options), []
    for row in table.rows:
        exchanged = {option.split(".")[1] for option in row.options if option.startswith("datasets.")}
        left_out = "needs --oracle CHECKPOINT" if row.oracle and oracle is None else None
        if not exchanged <= set(config.datasets):
            left_out = f"exchanges annotations of data sets that {base} does not have"
        if left_out and row.number in asked:
            raise UserError(f"--rows has {row.number} ({row.name}), which {left_out}.")
        if left_out:
            continue
        given = [*options, *concrete(row.options, config), *(oracle or [] if row.oracle else [])]
        try:
            if finetune is None:
                planned = [plan_run(base, [*given, *row.finetune_options], runs, files=False)]
            else:
                planned = [plan_run(base, given, runs, files=False)]
                planned.append(plan_run(finetune, row.finetune_options, runs, files=False, name="finetune_"))
        except UserError as error:
            raise UserError(f"row {row.number} ({row.name}): {error}") from error
        if not planned[-1].test_splits:
            hint = "add --options run.test_splits=[test], or --finetune YAML" if finetune is None else "set it in that file"
            raise UserError(f"run.test_splits is empty, so a row would have no metrics; {hint}. ({planned[-1].yaml})")
        for seed in seeds:
            first = planned[0].with_seed(seed, runs)
            trials.append(Trial(row, seed, [first, *(run.with_seed(seed, first.folder) for run in planned[1:])]))
    return trials


def check_files(trial: Trial) -> None:
    """What an unfinished trial starts from must be there; raises UserError."""
    first = trial.runs[0]
    try:
        check_yaml(first.yaml, first.options)
    except UserError as error:
        hint = " --dry-run prints the two steps that make the paper's Con-D." if first.asks_con_d else ""
        raise UserError(f"row {trial.row.number} ({trial.row.name}): {error}{hint}") from error


def emoji_start(output: Path, options: list[str], run_job: RunJob) -> list[str]:
    """Data and Con-D on emoji, made once below ``output``; the options by which a run starts from them."""
    from lavis_mafa.datasets.emoji import build_emoji

    data = f"datasets.grit_emoji.build_info.root={output}/emoji"
    build_emoji(output / "emoji")
    shared = [data, *(option for option in options if option.startswith("datasets."))]
    first = plan_run("mafa/quickstart/train/con_d_1.yaml", shared, output / "runs", name="con_d_1_").train(run_job)
    half = f"model.pretrained={last_checkpoint(first)}"
    second = plan_run("mafa/quickstart/train/con_d_2.yaml", [*shared, half], output / "runs", name="con_d_2_").train(run_job)
    return [data, half, f"model.discriminator.checkpoint={last_checkpoint(second)}"]


def command_lines(trials: list[Trial], table: Table, base: str, runs: Path) -> list[str]:
    """What is not finished as commands for a cluster, Con-D's two steps before the rows that ask it; ablate finds what they write.

    Raises:
        UserError: rows ask a Con-D, and how to make it is known for the paper's base alone.
    """
    left, lines, con_d = [trial for trial in trials if trial.metrics() is None], [], None
    if any(trial.runs[0].asks_con_d for trial in left):
        if base != table.base or not table.con_d:
            raise UserError(
                "rows with ECM need a Con-D: give --options model.discriminator.checkpoint=CON_D.pth. Its two steps are known for the "
                f"paper's base alone ({table.base})."
            )
        steps = [plan_run(yaml, [], runs, files=False, name=f"con_d_{n}_") for n, yaml in enumerate(table.con_d, start=1)]
        con_d = steps[-1].folder
        if steps[-1].finished() is None:
            lines += ["# Con-D: its two steps, before the rows that ask it", *_chain(steps)]
    for trial in left:
        lines.append(f"# row {trial.row.number} ({trial.row.name}), seed {trial.seed}")
        # rows share runs
        lines += [f"# as above: {c}" if c in lines else c for c in _chain(trial.runs, con_d if trial.runs[0].asks_con_d else None)]
    return lines


def _chain(runs: list[Run], con_d: Path | None = None) -> list[str]:
    """Command lines of what is not finished; each run goes on from the one before, the first asks the Con-D below ``con_d``."""
    lines: list[str] = []
    for run, before in zip(runs, [None, *runs], strict=False):
        if run.finished() is not None:
            continue
        processes = re.search(r"nproc_per_node=(\d+)", find_yaml(run.yaml).read_text(encoding="utf-8"))
        launch = f'torchrun --nproc_per_node="${{NPROC:-{processes[1]}}}" -m lavis_mafa' if processes else "lavis-mafa"
        options = shlex.join([*run.options, f"run.output_dir={run.folder}"])
        if before is not None:
            options += f' model.pretrained="$(python -m lavis_mafa.files {shlex.quote(str(before.folder))})"'
        elif con_d is not None:
            options += f' model.discriminator.checkpoint="$(ls {shlex.quote(str(con_d))}/*/checkpoint_best.pth | tail -n 1)"'
        lines.append(f"{launch} train --cfg-path {shlex.quote(run.yaml)} --options {options}")
    return lines


# --- results ------------------------------------------------------------------------------------------------------------


def collect(table: Table, benchmark: str, base: str, options: list[str], trials: list[Trial]) -> dict[str, Any]:
    """Everything that is known of a table's rows so far, as it goes into ``results.json``.

    Of each row: the options, the metrics of the paper's ``benchmark``, those of each seed and split, and their ``mean`` and ``spread``
    (the standard deviation of a sample, None for one seed). ``trials``: every row with every seed, finished or not.
    """
    rows = []
    for row in table.rows:
        own = [trial for trial in trials if trial.row == row]
        if trials and not own:
            continue  # a row that this base cannot have
        seeds = {trial.seed: (str(trial.runs[-1].finished()), found) for trial in own if (found := trial.metrics()) is not None}
        paper = row.paper.get(benchmark, {})
        if len(paper) == 6:  # R@1, 5 and 10 both ways
            paper = {**paper, "agg_metrics": round(statistics.mean(paper.values()), 1)}
        rows.append(
            {
                "number": row.number,
                "name": row.name,
                "options": own[0].runs[0].options[len(options) : -1] if own else row.options,  # without the base's and the seed
                "paper": paper,
                "seeds": {str(seed): {"folder": folder, **found} for seed, (folder, found) in seeds.items()},
                "shares": {str(trial.seed): shares for trial in own if (shares := trial.shares())},
                "search_space": own[0].runs[0].search_space if own else None,
                "mean": _over_seeds([found for _, found in seeds.values()], statistics.mean),
                "spread": _over_seeds(
                    [found for _, found in seeds.values()], lambda values: statistics.stdev(values) if len(values) > 1 else None
                ),
            }
        )
    about = {"table": table.key, "title": table.title, "benchmark": benchmark, "base": base, "options": options}
    return {**about, "note": PAPER.format(BENCHMARKS[benchmark]), "rows": rows}


def _over_seeds(seeds: list[Metrics], statistic: Callable[[list[float]], Any]) -> dict[str, dict[str, Any]]:
    """A statistic of each metric that all seeds have of a split."""
    result = {}
    for split in dict.fromkeys(split for metrics in seeds for split in metrics):
        values = [metrics[split] for metrics in seeds if split in metrics]
        result[split] = {name: statistic([v[name] for v in values]) for name in values[0] if all(name in v for v in values)}
    return result


def format_terminal(results: dict[str, Any]) -> str:
    """The table with aligned columns, one for each split that was scored."""
    lines = [results["title"]]
    for split, cells in _cells(results):
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines += ["", f"{split} split of {results['base']}: mean ± standard deviation over seeds, per cent"]
        for line in cells:
            aligned = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
            lines.append("  ".join(aligned).rstrip())
    return "\n".join([*lines, "", results["note"]])


def format_markdown(results: dict[str, Any]) -> str:
    """The same as Markdown."""
    lines = [f"# {results['title']}"]
    for split, (header, *rows) in _cells(results):
        lines += ["", f"`{split}` split of `{results['base']}`: mean ± standard deviation over seeds, per cent.", ""]
        lines += [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *(f"| {' | '.join(cells)} |" for cells in rows)]
    changed = [f"Options of all rows: `{' '.join(results['options'])}`."] if results["options"] else []
    lines += ["", results["note"], *changed, "", "| row | options |", "|---|---|"]
    lines += [f"| {row['number']} | `{' '.join(row['options']) or 'none'}` |" for row in results["rows"]]
    return "\n".join(lines) + "\n"


def _cells(results: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """(split, lines of cells, the first one the header), for each split that any row was scored on."""
    names = SHOWN | MEANS
    given = [m for m in names if any(m in row["paper"] for row in results["rows"])]
    shown = [*SHOWN, *(m for m in MEANS if m in given)]
    tables = []
    for split in dict.fromkeys(split for row in results["rows"] for split in row["mean"]):
        lines = [["row", "", *(names[m] for m in shown), "seeds", *(f"paper {names[m]}" for m in given)]]
        for row in results["rows"]:
            count = str(sum(split in metrics for metrics in row["seeds"].values()))
            mean, spread = row["mean"].get(split, {}), row["spread"].get(split, {})
            measured = [_cell(mean.get(m), spread.get(m)) for m in shown]
            lines.append([str(row["number"]), row["name"], *measured, count, *(_cell(row["paper"].get(m)) for m in given)])
            if any(f"itc_{m}" in mean for m in shown):
                alone = [_cell(mean.get(f"itc_{m}"), spread.get(f"itc_{m}")) for m in shown]
                lines.append(["", "  ranked by ITC alone", *alone, count, *("" for _ in given)])
        tables.append((split, lines))
    return tables


def _cell(mean: float | None, spread: float | None = None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.1f}" if spread is None else f"{mean:.1f} ± {spread:.1f}"


def write_results(folder: Path, results: dict[str, Any], plotted: bool) -> None:
    """``results.json``, ``table.md`` and, of a table over the search space, ``figure.png`` in ``folder``, each replaced at once."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")
    write_text(folder / "table.md", format_markdown(results))
    if plotted:
        from lavis_mafa.tools.curves import search_space_plot

        write_bytes(folder / "figure.png", search_space_plot(results["rows"], SHARES))
