"""An ablation's rows as runs: what each takes, where it writes, and whether that is finished."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lavis_mafa.analysis.ablation.tables import Row, concrete, fits
from lavis_mafa.config.read import find_yaml
from lavis_mafa.config.schema import MODEL_BLOCKS, RUN_BLOCKS, typed_block
from lavis_mafa.errors import UserError
from lavis_mafa.runners.job import check_yaml

Figures = dict[str, dict[str, float]]  # split -> metric -> per cent


@dataclass(frozen=True)
class Run:
    """One training of a row: everything that `lavis-mafa train` is given."""

    yaml: str
    options: list[str]
    folder: Path  # its run.output_dir
    test_splits: list[str]
    last_checkpoint: str  # its file name; empty where it is not known beforehand
    asks_con_d: bool = False  # ECM with a Con-D whose checkpoint is not given yet
    search_space: int | None = None  # M; None of random batches

    def with_seed(self, seed: int, runs: Path) -> Run:
        """The same with a seed, in a folder of its own below ``runs``."""
        return replace(self, options=[*self.options, f"run.seed={seed}"], folder=runs / self.folder.name / f"seed_{seed}")

    def finished(self) -> Path | None:
        """The folder of the newest run that came to its end: scored on all test splits or, without any, the last epoch saved."""
        from lavis_mafa.reports.run_files import read_evaluations  # imports pyarrow

        for folder in sorted((c.parent for c in self.folder.glob("*/config.yaml")), reverse=True):
            if not self.test_splits:
                done = bool(self.last_checkpoint) and (folder / self.last_checkpoint).is_file()
            else:
                scored = read_evaluations(folder) if (folder / "evaluation.jsonl").is_file() else {}
                # a validation within the training has the epoch's number there
                done = all(scored.get(split, {}).get("epoch") in ("best", "last") for split in self.test_splits)
            if done:
                return folder
        return None

    def train(self, run_job: Callable[[str, list[str]], Any], *options: str) -> Path:
        """Train, unless that was done before; the finished run's folder."""
        if (done := self.finished()) is None:
            run_job(self.yaml, [*self.options, *options, f"run.output_dir={self.folder}"])
            done = self.finished()
        if done is None:
            raise UserError(f"{self.folder}: the run ended without figures of {', '.join(self.test_splits)}.")
        return done


@dataclass(frozen=True)
class Trial:
    """A row with one seed: pre-training and, where its figures come from a fine-tuned model, fine-tuning."""

    row: Row
    seed: int
    runs: list[Run]

    def shares(self) -> dict[str, float]:
        """Of the last epoch of pre-training: the share of new positives and, where the truth is known, of false negatives."""
        from lavis_mafa.reports.run_files import last_epoch, read_metrics

        folder = self.runs[0].finished()
        metrics = read_metrics(folder) if folder is not None and (folder / "metrics.jsonl").is_file() else []
        figures = last_epoch(metrics) if metrics else {}
        return {name: figures[name] for name in ("false_negative_share", "new_positive_share") if name in figures}

    def figures(self) -> Figures | None:
        """What the last run was scored with, and the means of its recalls; None while it is not finished."""
        from lavis_mafa.reports.run_files import read_evaluations

        if (folder := self.runs[-1].finished()) is None:
            return None
        scored = {split: values for split, values in read_evaluations(folder).items() if split in self.runs[-1].test_splits}
        found = {split: {k: v for k, v in values.items() if isinstance(v, float)} for split, values in scored.items()}
        return {split: values | _means(values) for split, values in found.items()}

    def train(self, run_job: Callable[[str, list[str]], Any]) -> None:
        """Train what is not finished, in this process."""
        from lavis_mafa.reports.run_files import last_checkpoint

        folder = self.runs[0].train(run_job)
        for run in self.runs[1:]:
            folder = run.train(run_job, f"model.pretrained={last_checkpoint(folder)}")

    def commands(self, con_d: str | None = None) -> list[str]:
        """The same as command lines, for a cluster; `lavis-mafa ablate` finds what they wrote.

        Args:
            con_d: the folder that Con-D is trained in, for rows that ask it.
        """
        return chain(self.runs, con_d if self.runs[0].asks_con_d else None)


def chain(runs: list[Run], con_d: str | None = None) -> list[str]:
    """Command lines of what is not finished; each run goes on from the one before, the first asks the Con-D below ``con_d``."""
    lines: list[str] = []
    for run, before in zip(runs, [None, *runs], strict=False):
        if run.finished() is not None:
            continue
        found = re.search(r"nproc_per_node=(\d+)", find_yaml(run.yaml).read_text(encoding="utf-8"))
        launch = f'torchrun --nproc_per_node="${{NPROC:-{found[1]}}}" -m lavis_mafa' if found else "lavis-mafa"
        options = shlex.join([*run.options, f"run.output_dir={run.folder}"])
        if before is not None:
            options += f' model.pretrained="{_newest(before.folder, "checkpoint_*.pth")}"'
        elif con_d is not None:
            options += f' model.discriminator.checkpoint="{_newest(con_d, "checkpoint_best.pth")}"'
        lines.append(f"{launch} train --cfg-path {shlex.quote(run.yaml)} --options {options}")
    return lines


def _newest(folder: str | Path, name: str) -> str:
    """A shell's word for the newest checkpoint below a folder."""
    return f"$(ls -t {shlex.quote(str(folder))}/*/{name} | grep -v '\\.rank' | head -n 1)"


def _means(values: dict[str, float]) -> dict[str, float]:
    """``tr_mean`` and ``ir_mean``, of R@1, 5 and 10 (ALBEF Tables 1 and 6)."""
    sides = {side: [values[f"{side}_r{k}"] for k in (1, 5, 10) if f"{side}_r{k}" in values] for side in ("tr", "ir")}
    return {f"{side}_mean": sum(recalls) / 3 for side, recalls in sides.items() if len(recalls) == 3}


def plan_run(yaml: str, options: list[str], runs: Path, files: bool = True, name: str = "") -> Run:
    """A run whose folder says what it is: other settings never share one, and the same row of two tables does.

    Args:
        runs: where the folders are.
        files: are the checkpoints it names to be there.
        name: put before the folder's name.

    Raises:
        UserError: from :func:`check_yaml`, or the YAML is no run of ours.
    """
    config = check_yaml(yaml, options, files)
    check_ours(yaml, config)
    run = typed_block("run", config.run)
    settings: Any = OmegaConf.to_container(config)
    settings["run"] = {k: v for k, v in settings["run"].items() if k not in ("output_dir", "seed")}
    code = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
    last = f"checkpoint_{run.max_epoch - 1}.pth" if run.max_steps is None else ""
    ecm, con_d = (OmegaConf.select(config.model, key) for key in ("ecm.enabled", "discriminator"))
    asks = bool(ecm) and con_d is not None and con_d.get("arch") != "ground_truth" and con_d.get("checkpoint") is None
    space = run.grit.search_space if run.grit.enabled else None
    return Run(yaml, options, runs / f"{name}{code}", list(run.test_splits), last, asks, space)


def plan_trials(
    rows: list[Row],
    seeds: list[int],
    base: str,
    finetune: str | None,
    options: list[str],
    runs: Path,
    with_files: list[int],
    oracle: list[str] | None = None,
) -> list[Trial]:
    """What each row takes with each seed. A row's options come after the user's, so that it stays that row.

    A row that exchanges data sets which the base has not, or that asks an oracle where none is given, is left out.

    Args:
        rows: of a table.
        base: the YAML whose options they are. finetune: the YAML that follows each, or None.
        options: of the base, in all rows.
        runs: where the folders are.
        with_files: numbers of the rows whose checkpoints must be there already, unless they are finished.
        oracle: options that make the oracle the Con-D.

    Raises:
        UserError: a row is impossible on this base, or nothing would be scored.
    """
    config = check_yaml(base, options, files=False)
    check_ours(base, config)
    trials = []
    for row in rows:
        if not fits(row, config) or (row.oracle and oracle is None):
            continue
        own = [*concrete(row.options, config), *(oracle or [] if row.oracle else [])]
        given = [*options, *own] if finetune is not None else [*options, *own, *row.finetune_options]
        tuning = None
        try:
            first = plan_run(base, given, runs, files=False)
            if finetune is not None:
                tuning = plan_run(finetune, row.finetune_options, Path(), files=False, name="finetune_")
        except UserError as error:
            raise UserError(f"row {row.number} ({row.name}): {error}") from error
        last = tuning or first
        if not last.test_splits:
            hint = "add --options run.test_splits=[test], or --finetune YAML" if tuning is None else "set it in that file"
            raise UserError(f"run.test_splits is empty, so a row would have no figures; {hint}. ({last.yaml})")
        of_row = []
        for seed in seeds:
            planned = [first.with_seed(seed, runs)]
            of_row.append(Trial(row, seed, planned if tuning is None else [*planned, tuning.with_seed(seed, planned[0].folder)]))
        if row.number in with_files and any(trial.figures() is None for trial in of_row):
            _check_files(base, given, row, first)
        trials += of_row
    return trials


def _check_files(base: str, options: list[str], row: Row, first: Run) -> None:
    try:
        check_yaml(base, options)
    except UserError as error:
        steps = " --dry-run prints the two steps that make the paper's Con-D." if first.asks_con_d else ""
        raise UserError(f"row {row.number} ({row.name}): {error}{steps}") from error


def check_ours(yaml: str, config: DictConfig) -> None:
    """Rows are switches of our models and tasks; raises UserError for another's."""
    if config.model.arch not in MODEL_BLOCKS or config.run.task not in RUN_BLOCKS:
        raise UserError(f"{yaml} is none of ours (model.arch: {config.model.arch}, run.task: {config.run.task}), so no row fits it.")
