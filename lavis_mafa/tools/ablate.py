"""The papers' ablation tables: their rows as runs of a base, large or small.

A row is a list of options of a YAML, a trial is a row with a seed, and its runs are one training after the other: pre-training and,
where a paper scores a fine-tuned model, fine-tuning. What is finished is found on disk and never run again.
"""

from __future__ import annotations

import re
import shlex
import statistics
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lavis_mafa.config.check import check_yaml
from lavis_mafa.config.read import find_yaml, plain
from lavis_mafa.config.schema import MODEL_BLOCKS, RUN_BLOCKS, typed_block
from lavis_mafa.errors import UserError, did_you_mean
from lavis_mafa.files import LATEST, digest, last_checkpoint, runs_with
from lavis_mafa.tools.run_files import last_epoch, read_evaluations, read_metrics, wall_seconds
from lavis_mafa.weights import shipped

TABLES = Path(__file__).resolve().parents[1] / "configs" / "ablations.yaml"
RELATIVE = re.compile(r"([\w.]+)=([\d.]+)\*(model|run)\.([\w.]+)")  # run.max_epoch=0.5*run.max_epoch
SHARES = {"false_negative_share": "false negatives (known)", "new_positive_share": "false negatives (Con-D's)"}
TRUTH = ["model.discriminator.arch=ground_truth"]
SCENES_PREFIXES = {"albef_mafa": "", "blip2_mafa": "blip2_"}  # model.arch -> of its YAMLs, shipped weights and folders
SCENES = "datasets.grit_scenes.build_info.root"
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


@cache
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
        for folder in reversed(runs_with(self.folder, "config.yaml")):
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

    def seconds(self) -> float | None:
        """How long it took with any seed that is finished, on average; None where none is."""
        seeds = [replace(self, folder=folder).finished() for folder in self.folder.parent.glob("seed_*")]
        times = [wall_seconds(folder) for folder in seeds if folder is not None]
        return statistics.mean(times) if times else None


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

    def seconds(self) -> float | None:
        """How long this row takes with one seed, where that is known."""
        times = [run.seconds() for run in self.runs]
        return sum(time for time in times if time is not None) if None not in times else None

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
    clean: list[str] | None = None,
) -> list[Trial]:
    """What each row takes with each seed. A row's options come after the user's, so that it stays that row.

    A row that exchanges data sets which the base has not (4M-Clean for 4M-Noisy), or whose oracle is not given, is left out.

    Args:
        base: the YAML whose options the rows are. finetune: the YAML that follows each, or None.
        options: of the base, in all rows. runs: where the folders are. oracle: options that make the oracle the Con-D.
        asked: rows that the user named.
        clean: options that stand for a row's own data sets (4M-Clean) on a base that has not the paper's.

    Raises:
        UserError: a row is impossible on this base, or one that was asked for is left out, or nothing would be scored.
    """
    config, trials = read_base(base, options), []
    for row in table.rows:
        exchanged = {option.split(".")[1] for option in row.options if option.startswith("datasets.")}
        own = row.options
        if exchanged and clean is not None:
            own = [*(option for option in own if not option.startswith("datasets.")), *clean]
        left_out = "needs --oracle CHECKPOINT" if row.oracle and oracle is None else None
        if not exchanged <= set(config.datasets) and clean is None:
            left_out = f"exchanges annotations of data sets that {base} does not have"
        if left_out and row.number in asked:
            raise UserError(f"--rows has {row.number} ({row.name}), which {left_out}.")
        if left_out:
            continue
        given = [*options, *concrete(own, config), *(oracle or [] if row.oracle else [])]
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


def emoji_start(output: Path, options: list[str], run_job: RunJob, truth: bool = False) -> list[str]:
    """Data, start and Con-D on emoji, made once below ``output``; the options by which a run starts from them."""
    from lavis_mafa.datasets.emoji import build_emoji

    build_emoji(output / "emoji")
    data = [f"datasets.grit_emoji.build_info.root={output}/emoji"]
    recipes = ("mafa/quickstart/train/con_d_1.yaml", "mafa/quickstart/train/con_d_2.yaml")
    return [*data, *_start_and_con_d(recipes, data, output, options, run_job, truth)]


def scenes_start(base: str, output: Path, options: list[str], run_job: RunJob, truth: bool = False, wrong: float = 0.0) -> list[str]:
    """The same on scenes, where start and Con-D come with the package; trained anew for a share of ``wrong`` training captions.

    ``base``: whose model is started, ALBEF or BLIP-2; raises UserError where it is another.
    """
    arch = read_base(base, []).model.arch
    if arch not in SCENES_PREFIXES:
        raise UserError(f"{base}: model.arch is {arch!r}, but weights for scenes are there for {' and '.join(SCENES_PREFIXES)} alone.")
    folder, prefix = scenes_data(output, wrong), SCENES_PREFIXES[arch]
    data = [f"{SCENES}={folder}", f"model.tokenizer={folder}/vocab.txt"]
    if not wrong:
        con_d = TRUTH if truth else [f"model.discriminator.checkpoint={shipped(f'scenes_{prefix}con_d')}"]
        return [*data, f"model.pretrained={shipped(f'scenes_{prefix}start')}", *con_d]
    recipes = (f"mafa/quickstart/scenes/{prefix}start.yaml", f"mafa/quickstart/scenes/{prefix}con_d.yaml")
    return [*data, *_start_and_con_d(recipes, data, output, options, run_job, truth)]


def scenes_data(output: Path, wrong: float = 0.0) -> Path:
    """The folder of scenes below ``output``, built once."""
    from lavis_mafa.datasets.scenes.build import build_scenes
    from lavis_mafa.datasets.scenes.world import World

    folder = output / (f"scenes_wrong_{wrong:g}" if wrong else "scenes")
    build_scenes(folder, World(wrong=wrong))
    return folder


def _start_and_con_d(
    recipes: tuple[str, str], data: list[str], output: Path, options: list[str], run_job: RunJob, truth: bool
) -> list[str]:
    """The options that name what every row starts from, and Con-D, which goes on from it; ``truth``: the truth is its Con-D."""
    shared = [*data, *(option for option in options if option.startswith("datasets."))]

    def trained(yaml: str, *more: str) -> Path:
        run = plan_run(yaml, [*shared, *more], output / "runs", name=f"{Path(yaml).stem}_")
        return last_checkpoint(run.train(run_job))

    start = f"model.pretrained={trained(recipes[0])}"
    return [start, *(TRUTH if truth else [f"model.discriminator.checkpoint={trained(recipes[1], start)}"])]


def expected_seconds(trials: list[Trial], left: list[Trial]) -> float | None:
    """How long ``left`` will take by what ``trials`` have taken: a row as its finished seeds, one without as the mean of the others.

    None while nothing is finished.
    """
    found = {trial.row.number: trial.seconds() for trial in trials}
    known = {row: seconds for row, seconds in found.items() if seconds is not None}
    if not known:
        return None
    others = statistics.mean(known.values())
    distinct = {trial.runs[-1].folder: trial.row.number for trial in left}  # rows may share runs
    return sum(known.get(row, others) for row in distinct.values())


def duration(seconds: float) -> str:
    """In words, by the minute.

    Example:
        >>> duration(6010), duration(170), duration(3)
        ('1 h 40 min', '3 min', '1 min')
    """
    hours, minutes = divmod(max(1, round(seconds / 60)), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


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
            options += f" model.pretrained={shlex.quote(str(before.folder / LATEST / before.last_checkpoint))}"
        elif con_d is not None:
            options += f" model.discriminator.checkpoint={shlex.quote(str(con_d / LATEST / 'checkpoint_best.pth'))}"
        lines.append(f"{launch} train --cfg-path {shlex.quote(run.yaml)} --options {options}")
    return lines
