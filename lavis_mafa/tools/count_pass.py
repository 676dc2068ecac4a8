"""How many false negatives, as one call: data and judge are opened, gone through, and the result is written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd

from lavis_mafa.datasets.ground_truth import NO_TRUTH
from lavis_mafa.distributed import rank
from lavis_mafa.errors import UserError
from lavis_mafa.files import write_bytes, write_text
from lavis_mafa.tools.candidates import Known, progress_bar
from lavis_mafa.tools.count import Count, count_false_negatives, count_results, format_count, samplings
from lavis_mafa.tools.count_plots import count_plot
from lavis_mafa.tools.marks import factor_of
from lavis_mafa.tools.passes import Pass, Unjudged, check_numbers, judging
from lavis_mafa.tools.run_files import COUNTED

Same = Literal["count", "exclude"]


@dataclass(frozen=True, repr=False)
class CountResult:
    """False negatives among the hardest negatives; printed, the table of MAFA's Table 1; in a notebook, the plot of its Figure 2.

    Attributes:
        results: everything that was counted, as in ``count.json``. folder: where that and ``count.png`` are; None: nowhere.
    """

    results: dict[str, Any]
    folder: Path | None = None

    def frame(self) -> pd.DataFrame:
        """A row a way to sample and threshold: ``sampling``, ``batch_size``, ``search_space``, ``threshold``, and of ``image`` and
        ``text`` as anchors the false negatives ``wrt_image``, ``wrt_text`` and their shares."""
        kept = ("sampling", "batch_size", "search_space")
        rows = [{**{name: way[name] for name in kept}, **one} for way in self.results["ways"] for one in way["false_negatives"]]
        return pd.DataFrame(rows).astype({"search_space": "Int64"})

    def __str__(self) -> str:
        text = format_count(self.results)
        if self.results["corrected_by"] is not None:
            text = f"{self.results['corrected_by']}\n\n{text}"
        if self.folder is None:
            return text
        return f"{text}\n\nThe metrics: {self.folder / COUNTED}, the plot: {self.folder / 'count.png'}"

    __repr__ = __str__

    def _repr_png_(self) -> bytes:
        return count_plot(self.results)


def run_count(
    of: Pass,
    folder: Path | None = None,
    *,
    batch_size: Sequence[int] | None = None,
    search_space: Sequence[int] | None = None,
    threshold: Sequence[float] | None = None,
    correction: float | Path = 1.0,
    random_only: bool = False,
    same_image: Same | None = None,
    same_text: Same | None = None,
    truth: bool = False,
) -> CountResult | Unjudged | None:
    """Count false negatives among the hardest negatives of random and of GRIT batches (MAFA section 3). See :mod:`lavis_mafa.api`.

    Args:
        folder: of ``count.json`` and ``count.png``; None: nothing is written.
        correction: a factor, or a file of marks that tells it (:func:`lavis_mafa.tools.marks.factor_of`).
        truth: insist on a comparison with the known truth, made where there is one.

    Returns:
        on the first rank; None on others.

    Raises:
        UserError: settings that do not go together, files, checkpoints or features that are wrong, or a judge that cannot judge.
    """
    confirmed = None
    check_numbers(batch_size=batch_size, search_space=search_space, correction=None if isinstance(correction, Path) else correction)
    for flag, same in (("--same-image", same_image), ("--same-text", same_text)):
        if same not in (None, *get_args(Same)):
            raise UserError(f"{flag} is {same!r}; allowed: {', '.join(get_args(Same))}.")
    if isinstance(correction, Path):
        # a guide's cosines have no threshold
        confirmed = factor_of(correction, None if of.guide_features is not None else (threshold or [0.5])[0])
        correction = confirmed.factor or 0.0
    if not correction:
        told = "" if confirmed is None else f" by {confirmed.rejected:,} marks, all of them reject"
        raise UserError(f"--correction is 0{told}, which leaves no false negatives; allowed: above 0, up to 1.")
    if random_only and search_space:
        raise UserError("--random-only and --search-space exclude each other: random batches have no search space.")
    of.check(folder, COUNTED, threshold)
    with judging(of, batch_size, () if random_only else search_space) as found:
        encoder, of = found.encoder, found.of
        if truth and getattr(found.rows.dataset, "truth", None) is None:
            raise UserError(f"--truth is given, but {NO_TRUTH}.")
        trained = Known(same_image=True, same_text=True)
        if found.opened is not None:
            trained = Known(found.opened.model.ecm.same_image, found.opened.model.ecm.same_text)
        asked = (same_image, trained.same_image), (same_text, trained.same_text)
        known = Known(*(of_yaml if flag is None else flag == "exclude" for flag, of_yaml in asked))
        about = {"judge": encoder.judge_name, "margin": encoder.margin, **of.sources(), "miner": of.miner}
        about |= {"data": len(found.rows), "seed": found.seed, "same_image": known.same_image, "same_text": known.same_text}
        about |= {"corrected_by": None if confirmed is None else str(confirmed)}
        thresholds = threshold or [0.5] if encoder.margin is None else [encoder.margin]

        def look(counted: Count) -> None:
            of.refuse_meaningless(counted.medians(way) for way in counted.tallies)

        ways = samplings(found.batch_sizes, found.search_spaces)
        if folder is not None and of.write_pairs is None:
            folder.mkdir(parents=True, exist_ok=True)  # now: a folder that cannot be written is found before hours of work
        # a pass without a model is short, and all that a judge was not asked is told at once
        first_look = (lambda _: None) if found.opened is None else look
        with progress_bar(len(found.order)) as bar:
            counted = count_false_negatives(encoder, found.rows, found.order, ways, thresholds, found.seed, known, bar, first_look)
        if (unjudged := found.unjudged()) is not None:
            return unjudged
        if counted.samples == 0:
            raise UserError(f"none of {len(found.order)} samples could be read: {', '.join(counted.unreadable)}.")
        look(counted)
        if rank() != 0:
            return None
        result = CountResult(count_results(counted, correction, about), folder)
        if folder is not None:
            write_bytes(folder / "count.png", result._repr_png_())
            write_text(folder / COUNTED, json.dumps(result.results, indent=2) + "\n")
        return result
