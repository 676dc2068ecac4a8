"""What counting and mining have in common: who mines and who judges, checked, and then opened with the data."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from torch import Tensor

from lavis_mafa.config.schema import RunBlock
from lavis_mafa.errors import UserError
from lavis_mafa.files import check_unfinished
from lavis_mafa.named_weights import fetched
from lavis_mafa.objectives.trust import Medians
from lavis_mafa.tools.candidates import Encoder, ReadableRows, shuffled
from lavis_mafa.tools.features import Features, check_own_pairs, read_features
from lavis_mafa.tools.judges import Given, Guide, PicturelessPairs, ScoreTable, check_caption_a_row, write_pairs
from lavis_mafa.tools.own_data import BATCH, SPACE, pass_settings
from lavis_mafa.tools.training_data import Opened, check_pass, opened_pass

# --- who mines and who judges -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """What is read, who mines and who judges; every field is the flag of its name, which messages name.

    A Con-D judges pairs of a YAML, or of ``annotations`` with their ``images``. Or nobody needs a model: ``features`` of the
    annotations mine, and ``scores`` or ``guide_features`` judge.
    """

    cfg_path: str | None = None
    options: Sequence[str] = ()
    annotations: Sequence[Path] | None = None
    images: Path | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    con_d: str | None = None
    miner: str | None = None
    features: Sequence[Path] | None = None
    scores: Sequence[Path] | None = None
    write_pairs: Path | None = None
    guide_features: Sequence[Path] | None = None
    guide_margin: float | None = None
    samples: int | None = None
    seed: int | None = None
    force: bool = False

    @property
    def judge(self) -> str:
        """The flag that names who judges."""
        return "--con-d" if self.con_d else "--scores" if self.scores else "--guide-features"

    def sources(self) -> dict[str, Any]:
        """What a result says of where it is from; paths as they were written."""
        files = {name: getattr(self, name) or [] for name in ("annotations", "features", "scores", "guide_features")}
        given = {name: list(map(str, paths)) for name, paths in files.items()}
        return {"cfg_path": self.cfg_path, "options": list(self.options), "con_d": self.con_d, "given": given}

    def check(self, folder: Path | None, result: str, threshold: Any = None) -> None:
        """Raises UserError where the fields name nobody who judges, two who do, or what does not go together; or where ``folder``, in
        which ``result`` is to be written, holds something."""
        judges = {"--con-d": self.con_d, "--scores": self.scores, "--guide-features": self.guide_features}
        given = [flag for flag, value in judges.items() if value is not None]
        if len(given) > 1:
            raise UserError(f"{given[0]} and {given[1]} exclude each other: only one can judge.")
        if not given and self.write_pairs is None:
            raise UserError(
                "nobody judges: give --con-d with --cfg-path; or, for --features, --scores or --guide-features, or --write-pairs to "
                "have the pairs written that a judge of yours should see."
            )
        check_numbers(samples=self.samples, guide_margin=self.guide_margin, threshold=threshold)
        if self.guide_margin is not None and self.guide_features is None:
            raise UserError("--guide-margin belongs to --guide-features; --scores and --con-d have --threshold.")
        if threshold is not None and self.guide_features is not None:
            raise UserError("--threshold and --guide-features exclude each other: a guide has --guide-margin.")
        if self.con_d is None:
            needed, other = ["annotations", "features"], ["cfg_path", "options", "miner"]
            other += ["write_pairs"] if self.guide_features is not None else []
        elif self.annotations is None or self.cfg_path is not None:
            needed, other = ["cfg_path"], ["annotations", "images", "columns", "write_pairs"]
        else:
            needed, other = ["annotations", "images"], ["write_pairs"]
        way = given[0] if given else "--write-pairs"
        for name in needed:
            if getattr(self, name) is None:
                instead = " (or --annotations with --images)" if name == "cfg_path" else ""
                raise UserError(f"{way} needs {_flag(name)}{instead}.")
        for name in other:
            if getattr(self, name):
                raise UserError(f"{way} and {_flag(name)} exclude each other; it takes {' and '.join(map(_flag, needed))}.")
        if self.write_pairs is not None:
            if self.write_pairs.suffix.lower() not in (".parquet", ".csv"):
                raise UserError(f"--write-pairs is {self.write_pairs}; allowed: a .parquet or .csv file.")
            if self.write_pairs.exists():
                raise UserError(f"--write-pairs: {self.write_pairs} is there, and may hold what was judged; choose another name.")
        if self.features is not None and self.miner is not None:
            raise UserError("--features and --miner exclude each other: only one can mine.")
        if folder is not None and self.write_pairs is None:
            check_unfinished(folder, result)

    def features_of(self, dataset: Any, name: str = "features") -> Features | None:
        """``features`` or ``guide_features`` of a training set, looked at; None where there are none."""
        flag, paths = _flag(name), getattr(self, name)
        if paths is None:
            return None
        check_caption_a_row(dataset, flag)
        features = read_features(paths, len(dataset), flag)
        if not self.force:
            check_own_pairs(features, flag)
        return features

    def refuse_meaningless(self, found: Iterable[Medians]) -> None:
        """Raises UserError where the judge cannot judge (:meth:`Medians.why_not`) under any of the ways to sample, unless forced."""
        medians = next((medians for medians in found if medians.why_not()), None)
        if medians is not None and not self.force:
            who = "a Con-D that" if self.con_d else "one that"
            raise UserError(
                f"{self.judge} cannot judge these data: {medians.why_not()}; medians: {medians}. What it decides means nothing, so no "
                f"result is given. Give {who} was trained on such images and texts; or, where most captions do fit many of the images, "
                "--force, and it is marked."
            )


def check_numbers(**given: Any) -> None:
    """Raises UserError unless all are what their flags take, one number or several: shares from 0 to 1, or whole numbers from 1."""
    for name, value in given.items():
        share = name in ("threshold", "margin", "guide_margin", "correction")
        for one in [] if value is None else value if isinstance(value, Sequence) else [value]:
            if not (0 <= one <= 1 if share else one >= 1 and one == int(one)):
                raise UserError(f"{_flag(name)} is {one!r}; allowed: {'0 to 1' if share else 'a whole number from 1'}.")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class Judging:
    """A pass whose data and judge are open."""

    of: Pass  # its checkpoints are files
    encoder: Encoder | Given
    rows: ReadableRows
    order: Tensor
    seed: int
    batch_sizes: list[int]
    search_spaces: list[int]
    opened: Opened | None  # None without a model

    def unjudged(self) -> Unjudged | None:
        """After the pass: the pairs that no score is known of are written, where they are asked for; else there must be none."""
        if not isinstance(self.encoder, Given) or not isinstance(self.encoder.judge, ScoreTable):
            return None
        if self.of.write_pairs is None:
            self.encoder.judge.check()
            return None
        pairs = self.encoder.judge.missing_pairs()
        write_pairs(pairs, self.encoder.dataset, self.of.write_pairs)
        return Unjudged(len(pairs[0]), self.of.write_pairs)


@contextlib.contextmanager
def judging(of: Pass, batch_size: Sequence[int] | None, search_space: Sequence[int] | None) -> Iterator[Judging]:
    """Check, then open data and judge. Sizes that are not asked for are those that the YAML trains with."""

    def opened_for(encoder: Encoder | Given, rows: ReadableRows, seed: int, opened: Opened | None = None) -> Judging:
        seed = seed if of.seed is None else of.seed
        return Judging(of, encoder, rows, shuffled(len(rows), seed, of.samples), seed, *sizes, opened)

    if of.con_d is None:
        sizes = _sizes(batch_size, search_space, OmegaConf.create())
        given = _open_given(of)
        yield opened_for(given, ReadableRows(given.dataset), RunBlock().seed)
        return
    of = replace(of, con_d=fetched(of.con_d, "--con-d"), miner=None if of.miner is None else fetched(of.miner, "--miner"))
    assert of.con_d is not None
    from lavis_mafa.runners.train import as_before  # here: of LAVIS, which a pass without a model does not need

    with as_before(), _yaml(of) as name:
        options = list(of.options)
        config = check_pass(name, options, of.con_d, of.miner)
        sizes = _sizes(batch_size, search_space, config)
        with opened_pass(config, name, options, of.con_d, of.miner, of.features) as opened:
            run = opened.run
            rows = ReadableRows(opened.dataset, run.seed, run.batch_size_eval, run.num_workers)
            features = of.features_of(opened.dataset)
            miner = opened.miner if features is None else features
            yield opened_for(Encoder(opened.con_d, opened.device, run.precision, miner), rows, run.seed, opened)


@contextlib.contextmanager
def _yaml(of: Pass) -> Iterator[str]:
    """The YAML of a pass with a Con-D; of annotations alone one is made for the time of the pass."""
    if of.cfg_path is not None:
        yield of.cfg_path
        return
    assert of.annotations is not None and of.images is not None and of.con_d is not None, "checked"
    settings = pass_settings(of.annotations, of.images, of.columns, of.con_d, of.miner, of.samples)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pairs.yaml"
        file.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
        yield str(file)


def _sizes(batch_size: Sequence[int] | None, search_space: Sequence[int] | None, config: Any) -> tuple[list[int], list[int]]:
    """All B and M; raises UserError unless 2 <= B <= M. An empty sequence is none of them."""

    def asked(given: Sequence[int] | None, key: str, default: int) -> list[int]:
        return [int(OmegaConf.select(config, key) or default)] if given is None else list(map(int, given))

    batch_sizes = asked(batch_size, "run.batch_size_train", BATCH)
    search_spaces = asked(search_space, "run.grit.search_space", SPACE)
    for size in batch_sizes:
        if size < 2:
            raise UserError(f"--batch-size is {size}, but a batch with negatives has at least 2 samples.")
        for space in search_spaces:
            if size > space:
                raise UserError(f"--batch-size is {size}, but must not exceed --search-space ({space}).")
    return batch_sizes, search_spaces


def _open_given(of: Pass) -> Given:
    """Pairs, features and judge of a pass without a model."""
    dataset = PicturelessPairs(of.annotations or (), of.images, of.columns)
    features, guide = of.features_of(dataset), of.features_of(dataset, "guide_features")
    assert features is not None, "checked"
    judge = ScoreTable(of.scores or (), len(dataset)) if guide is None else Guide(guide, of.guide_margin or 0.0)
    return Given(features, dataset, judge)


@dataclass(frozen=True)
class Unjudged:
    """The pairs that a judge of one's own should see: how many, and the file with them."""

    pairs: int
    file: Path

    def __str__(self) -> str:
        return (
            f"{self.pairs:,} pairs to be judged: {self.file}\n"
            "Add a column probability (0 to 1) and give the file as --scores, beside what was given before; all else as now."
        )
