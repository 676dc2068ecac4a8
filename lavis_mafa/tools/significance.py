"""How sure a score is, and a difference of two: bootstrap intervals and permutation tests over queries, Student's t over seeds.

Two things vary when one compares models. *Which queries were asked*: :func:`interval` and :func:`paired` speak of that. Their p says
whether these two checkpoints would differ on further images of this kind, and nothing about training them again. *Which seed they were
trained with*: :func:`over_seeds` and :func:`paired_over_seeds`. A claim about a method needs the second, by ``lavis-mafa ablate``.

Queries of one image are no independent witnesses: five captions of an image are found or missed together. So whole images are drawn
and flipped, with all their queries; texts taken one by one would give intervals that are too narrow and a p that is too small. What
stays: all queries are ranked in one gallery, so a gallery of few images tells less than its p says. And p is of one metric: of twenty
metrics one falls below 0.05 by chance.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from lavis_mafa.errors import UserError, did_you_mean
from lavis_mafa.tools.run_files import query_splits, read_queries

Values = NDArray[np.float64]
METRICS = {"r1": "R@1", "r5": "R@5", "r10": "R@10", "r_precision": "R-Precision", "map_at_r": "mAP@R"}
ITC = "itc_"  # before the metrics of ITC's cosine alone
DIRECTIONS = ("tr", "ir")
NO_METRICS = ("direction", "query", "image")  # the other columns of a file of queries
LEVEL = 0.95
RESAMPLES = 9_999  # of a bootstrap
FLIPS = 20_000  # of a permutation test: the fewest by which p can fall below 0.0001
AT_ONCE = 4_000_000  # numbers, bounds memory
SEED = 0  # of both: the same files give the same figures


# --- over queries -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Two runs on the same queries, in per cent: their means, and of the ``difference`` the 95 % interval and p."""

    metric: str
    direction: str
    mean_a: float
    mean_b: float
    difference: float  # a - b
    low: float
    high: float
    p: float

    def sentence(self, name_a: str, name_b: str) -> str:
        """In words; ± is half of the interval.

        Example:
            >>> Comparison("r_precision", "tr", 30.1, 25.9, 4.2, 3.1, 5.3, 0.00005).sentence("MAFA", "GRIT")
            'MAFA above GRIT by 4.2 ± 1.1 points of R-Precision, TR; p < 0.0001'
            >>> Comparison("r1", "ir", 25.9, 26.1, -0.2, -1.4, 1.0, 0.75).sentence("MAFA", "GRIT")
            'MAFA and GRIT cannot be told apart: -0.2 ± 1.2 points of R@1, IR; p = 0.75'
        """
        half, where = (self.high - self.low) / 2, f"points of {metric_name(self.metric)}, {self.direction.upper()}; {p_text(self.p)}"
        if self.p >= 1 - LEVEL:
            return f"{name_a} and {name_b} cannot be told apart: {self.difference:+.1f} ± {half:.1f} {where}"
        place = "above" if self.difference > 0 else "below"
        return f"{name_a} {place} {name_b} by {abs(self.difference):.1f} ± {half:.1f} {where}"


def paired(run_a: Path, run_b: Path, split: str, metric: str, direction: str) -> Comparison:
    """Compare two run folders, query by query, on the gallery that both were scored on.

    Args:
        metric: a column of the files: ``r1``, ``r_precision``, ``map_at_r``, ..., or with ``itc_`` before it.
        direction: ``tr`` or ``ir``.

    Raises:
        UserError: a run has no metrics of single queries of the split, or not this one, or the galleries differ.
    """
    tables = [read_queries(run, split) for run in (run_a, run_b)]
    galleries = [(table.schema.metadata or {}).get(b"gallery") for table in tables]
    if galleries[0] != galleries[1]:
        sizes = [f"{table.num_rows:,} queries" for table in tables]
        raise UserError(
            f"{run_a} and {run_b} were scored on other galleries in the split {split!r} ({sizes[0]} and {sizes[1]}, other texts or "
            "matches), so that no query of one is a query of the other; evaluate both on the same data."
        )
    (a, image), (b, _) = (of_direction(t, run, metric, direction) for t, run in zip(tables, (run_a, run_b), strict=True))
    low, high = interval(a - b, image)
    p = sign_flip(a - b, image)
    return Comparison(metric, direction, float(a.mean()), float(b.mean()), float((a - b).mean()), float(low), float(high), float(p))


def of_direction(table: pa.Table, run: Path, metric: str, direction: str) -> tuple[Values, NDArray[np.int64]]:
    """A metric of one direction's queries, [Q], and the image of each, [Q]; raises UserError where the file has no such metric."""
    known = [name for name in table.column_names if name not in NO_METRICS]
    if metric not in known:
        raise UserError(f"the metric {metric!r} is not among those of {run}.{did_you_mean(metric, known)} Known: {', '.join(known)}.")
    rows = table.filter(np.asarray(table["direction"].to_pylist()) == direction)
    return rows[metric].to_numpy().astype(np.float64), rows["image"].to_numpy().astype(np.int64)


def interval(values: ArrayLike, image: ArrayLike, resamples: int = RESAMPLES) -> tuple[Values, Values]:
    """The 95 % bootstrap interval of the mean over queries, of which those of one image are drawn together.

    By percentiles. BCa corrects bias and skewness, of which the mean of hundreds of queries has little, and it has no answer where all
    queries score the same (R@1 of 0 or 100), which percentiles answer with an interval of no width.

    Args:
        values: [..., Q]. image: [Q], which image a query belongs to.

    Returns:
        lower and upper end, [...]; NaN where there are queries of one image alone.
    """
    sums, counts = _by_image(values, image)
    if len(counts) < 2:
        nothing = np.full(sums.shape[:-1], np.nan)
        return nothing, nothing
    found = stats.bootstrap(
        (sums, np.broadcast_to(counts, sums.shape)),
        lambda s, c, axis: s.sum(axis=axis) / c.sum(axis=axis),
        paired=True,
        axis=-1,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, AT_ONCE // sums.size),
        confidence_level=LEVEL,
        method="percentile",
        rng=SEED,
    ).confidence_interval
    return found.low, found.high


@dataclass(frozen=True)
class Accuracy:
    """A share of queries, and the ends of its 95 % interval; None where there are queries of one image alone."""

    accuracy: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, right: ArrayLike, image: ArrayLike) -> Accuracy:
        """[Q] shares, 1 where it is right, and [Q] the image of each.

        Example:
            >>> Accuracy.of([True, False, True], [0, 0, 0])
            Accuracy(accuracy=0.6666666666666666, low=None, high=None)
        """
        values = np.asarray(right, dtype=np.float64)
        low, high = (float(end) for end in interval(values, image))
        return cls(float(values.mean()), *((None, None) if np.isnan(low) else (low, high)))


def sign_flip(difference: ArrayLike, image: ArrayLike, resamples: int = FLIPS) -> Values:
    """The two-sided p of a mean difference, were the two models equal: then each image's difference could as well have the other sign.

    All signs of up to 14 images are tried, of more images ``resamples`` draws.

    Args:
        difference: [..., Q]. image: [Q], which image a query belongs to; all its queries are flipped together.

    Returns:
        [...]; 1 where there are queries of one image alone.
    """
    sums, counts = _by_image(difference, image)
    if len(counts) < 2:
        return np.ones(sums.shape[:-1])
    test = stats.permutation_test(
        (sums,),
        lambda x, axis: x.sum(axis=axis),
        permutation_type="samples",
        axis=-1,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, AT_ONCE // sums.size),
        rng=SEED,
    )
    return np.asarray(test.pvalue)


def half_widths(run: Path, split: str, resamples: int = 1_999) -> dict[str, float]:
    """Half of the 95 % interval of each metric of a split, named as in ``evaluation.jsonl``; none where the run has no such file."""
    if split not in query_splits(run):
        return {}
    table, found = read_queries(run, split), {}
    names = [name for name in table.column_names if name not in NO_METRICS]
    for direction in DIRECTIONS:
        columns = [of_direction(table, run, name, direction) for name in names]
        low, high = interval(np.stack([values for values, _ in columns]), columns[0][1], resamples)
        for name, half in zip(names, (high - low) / 2, strict=True):
            found[f"{ITC}{direction}_{name.removeprefix(ITC)}" if name.startswith(ITC) else f"{direction}_{name}"] = float(half)
    return found


def metric_name(metric: str) -> str:
    """``R-Precision``, and of ITC's cosine alone ``R-Precision by ITC alone``."""
    name = metric.removeprefix(ITC)
    return METRICS.get(name, name) + (" by ITC alone" if metric.startswith(ITC) else "")


def p_text(p: float) -> str:
    """``p < 0.0001``, ``p = 0.023``."""
    return "p < 0.0001" if p < 0.0001 else f"p = {p:.2g}"


def _by_image(values: ArrayLike, image: ArrayLike) -> tuple[Values, Values]:
    """Sums over the queries of each image, [..., I], and how many these are, [I]."""
    values = np.asarray(values, dtype=np.float64)
    image = np.asarray(image)
    order = image.argsort(kind="stable")
    _, first, counts = np.unique(image[order], return_index=True, return_counts=True)
    return np.add.reduceat(values[..., order], first, axis=-1), counts.astype(np.float64)


# --- over seeds ---------------------------------------------------------------------------------------------------------


def over_seeds(values: list[float]) -> float | None:
    """Half of the 95 % interval of the mean over seeds (Student's t); None of one seed."""
    return None if len(values) < 2 else float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * stats.sem(values))


def paired_over_seeds(a: list[float], b: list[float]) -> dict[str, float | None]:
    """Two rows with the same two seeds or more: mean ``difference`` a - b, ``half`` of its 95 % interval, ``p`` of a paired t-test.

    The p of differences that are all the same is None: they have no spread to compare them with.
    """
    differences = np.asarray(a) - np.asarray(b)
    found = {"difference": float(differences.mean()), "half": over_seeds(differences.tolist())}
    return {**found, "p": float(stats.ttest_rel(a, b).pvalue) if np.ptp(differences) > 1e-9 else None}
