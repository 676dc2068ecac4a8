"""How many hardest negatives are false ones (MAFA section 3, Tables 1 and 9, Figures 2 and 5): counted, as JSON and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from lavis_mafa.distributed import gather_objects, rank, world_size
from lavis_mafa.objectives.trust import UNHEARD_OF, Histogram, Medians
from lavis_mafa.tools.candidates import (
    SAME_IMAGE,
    Block,
    Encoder,
    Known,
    Progress,
    ReadableRows,
    batches_of,
    blocks_of,
    grouped_order,
    hardest_negatives,
    reason_of,
    shuffled_pairs,
)
from lavis_mafa.tools.judges import Given

SIDES = ("image", "text")  # whose negatives: with respect to images, with respect to texts
BINS = 10
ENOUGH = 20_000  # own and shuffled pairs of a rank: a median needs no more


@dataclass(frozen=True)
class Sampling:
    """How batches are made: random (``search_space`` None), or GRIT's from groups of M = ``search_space``."""

    batch_size: int
    search_space: int | None = None

    @property
    def name(self) -> str:
        return "random" if self.search_space is None else "GRIT"


def samplings(batch_sizes: Sequence[int], search_spaces: Sequence[int]) -> list[Sampling]:
    """Random and GRIT batches of every size, GRIT for every M."""
    sizes, spaces = sorted(set(batch_sizes)), sorted(set(search_spaces))
    return [*(Sampling(b) for b in sizes), *(Sampling(b, m) for m in spaces for b in sizes)]


# --- counted ------------------------------------------------------------------------------------------------------------


def _long(*shape: int) -> Any:
    return field(default_factory=lambda: torch.zeros(*shape, dtype=torch.long))


@dataclass
class Tally:
    """Sums of one way to sample. K thresholds, or margins below the own pair; [2] and [2, K] have a row for each of ``SIDES``."""

    thresholds: tuple[float, ...]
    negatives: Tensor = _long(2)  # anchors that have a hardest negative
    lonely: Tensor = _long(2)  # anchors that have none
    false: Tensor = field(init=False)  # [2, K], of which Con-D says p > threshold
    true: Tensor = _long(2)  # of which the truth says that they match
    both: Tensor = field(init=False)  # [2, K]
    asked: Tensor = _long(2)  # negatives of which the truth says whether they match
    said: Tensor = field(init=False)  # [2, K], of which Con-D says p > threshold
    judged: Tensor = _long(BINS)  # by probability, in bins of equal width
    judged_true: Tensor = _long(BINS)
    judged_sum: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))
    squared_error: float = 0.0
    scores: Histogram = field(default_factory=Histogram)  # of the hardest negatives

    def __post_init__(self) -> None:
        self.false, self.both, self.said = (torch.zeros(2, len(self.thresholds), dtype=torch.long) for _ in range(3))

    def add(
        self,
        probability: Tensor,
        exists: Tensor,
        true: Tensor | None = None,
        known: Tensor | None = None,
        own: Tensor | None = None,
    ) -> None:
        """Take in 2n candidates, n of image anchors, then n of text anchors: Con-D's probability, is there one, and where there is a
        truth, do they match by it and does it say anything of them (by default of all); [2n] each. With the probability of the
        anchors' ``own`` pairs [2n], the thresholds are margins below it."""
        exists = exists.view(2, -1)
        limits = torch.tensor(self.thresholds, dtype=probability.dtype)
        above = probability.view(2, -1, 1) > (limits if own is None else own.view(2, -1, 1) - limits)
        above = above & exists[..., None]
        self.negatives += exists.sum(dim=1)
        self.lonely += (~exists).sum(dim=1)
        self.false += above.sum(dim=1)
        self.scores.add(probability[exists.flatten()])
        if true is None:
            return
        known = exists if known is None else exists & known.view(2, -1)
        match = true.view(2, -1) & known
        self.asked += known.sum(dim=1)
        self.said += (above & known[..., None]).sum(dim=1)
        self.true += match.sum(dim=1)
        self.both += (above & match[..., None]).sum(dim=1)
        asked, right = probability[known.flatten()].double(), match[known].double()
        place = (asked * BINS).long().clamp(0, BINS - 1)  # a cosine may be below 0
        self.judged += torch.bincount(place, minlength=BINS)
        self.judged_true += torch.bincount(place, weights=right, minlength=BINS).long()
        self.judged_sum += torch.bincount(place, weights=asked, minlength=BINS)
        self.squared_error += float(((asked - right) ** 2).sum())

    def merge(self, other: Tally) -> None:
        """Add what another rank found."""
        self.scores.merge(other.scores)
        for name in (one.name for one in fields(self) if one.name not in ("thresholds", "scores")):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def counts(self, correction: float = 1.0) -> list[dict[str, Any]]:
        """Per threshold: count and share of false negatives for each side, times ``correction``."""
        rows = []
        for k, threshold in enumerate(self.thresholds):
            row: dict[str, Any] = {"threshold": threshold}
            for side, name in enumerate(SIDES):
                row[f"wrt_{name}"] = found = int(self.false[side, k]) * correction
                row[f"wrt_{name}_share"] = ratio(found, int(self.negatives[side]))
            rows.append(row)
        return rows

    def against_truth(self) -> dict[str, Any]:
        """How many hardest negatives truly match, and how well Con-D says so: precision, recall, calibration."""
        total, true = int(self.asked.sum()), int(self.true.sum())
        said, both = self.said.sum(dim=0).tolist(), self.both.sum(dim=0).tolist()
        gap = (self.judged_sum - self.judged_true.double()).abs()[self.judged > 0].sum().item()
        return {
            "true": dict(zip(SIDES, self.true.tolist(), strict=True)),
            "true_share": ratio(true, total),
            "thresholds": [
                {"threshold": t, "precision": ratio(b, s), "recall": ratio(b, true)}
                for t, s, b in zip(self.thresholds, said, both, strict=True)
            ],
            "calibration_error": ratio(gap, total),
            "brier": ratio(self.squared_error, total),
            "calibration": [
                {"from": k / BINS, "pairs": pairs, "mean_probability": ratio(of_all, pairs), "true_share": ratio(of_true, pairs)}
                for k, (pairs, of_all, of_true) in enumerate(
                    zip(self.judged.tolist(), self.judged_sum.tolist(), self.judged_true.tolist(), strict=True)
                )
            ],
        }


def ratio(part: float, whole: float) -> float | None:
    """``part / whole``; None of nothing, which JSON can say."""
    return part / whole if whole else None


@dataclass
class Count:
    """What was found: a tally for each way to sample, samples that were read, and why others were not."""

    tallies: dict[Sampling, Tally]
    truth_known: bool
    samples: int = 0
    unreadable: Counter[str] = field(default_factory=Counter)
    own: Histogram = field(default_factory=Histogram)  # Con-D's probabilities of own pairs, and of images with some other text
    shuffled: Histogram = field(default_factory=Histogram)

    def medians(self, way: Sampling) -> Medians:
        """What Con-D says of own pairs, shuffled ones, and the hardest negatives of one way to sample."""
        tally = self.tallies[way]
        truth = tally.against_truth() if self.truth_known else None
        lift = None if truth is None else ratio(truth["thresholds"][0]["precision"] or 0.0, truth["true_share"] or 0.0)
        return Medians(self.own.median(), self.shuffled.median(), tally.scores.median(), lift)

    def of_all_ranks(self) -> Count:
        """All ranks' counts as one."""
        total = Count({way: Tally(tally.thresholds) for way, tally in self.tallies.items()}, truth_known=True)
        for part in gather_objects(self):
            total.truth_known = total.truth_known and part.truth_known
            total.samples += part.samples
            total.unreadable += part.unreadable
            total.own.merge(part.own)
            total.shuffled.merge(part.shuffled)
            for way, tally in part.tallies.items():
                total.tallies[way].merge(tally)
        return total


def count_false_negatives(
    encoder: Encoder | Given,
    rows: ReadableRows,
    order: Tensor,
    ways: Sequence[Sampling],
    thresholds: Sequence[float],
    seed: int = 0,
    known: Known = SAME_IMAGE,
    progress: Progress = lambda _: None,
    look: Callable[[Count], object] = lambda _: None,
) -> Count:
    """Go through the data once and count for every way to sample: each anchor's hardest negative in its batch, if p > threshold.

    Blocks have the size of the largest M. Their samples are shuffled, so random batches are cut from a block as it is. All ways'
    candidates of a block are scored together, each distinct pair once. Ranks share the blocks. Beside them Con-D is asked about the own
    pairs and shuffled pairs of the first 20,000 samples of each rank.

    Args:
        encoder: of Con-D, or what stands for it where features and scores are given.
        order: LongTensor, shuffled rows to visit.
        thresholds: of the probability; margins, where ``encoder.margin`` is one.
        seed: of GRIT's random starts.
        progress: told how many samples were taken.
        look: given what was found in the first block of each rank, so that a hopeless pass can end there; on all ranks.
    """
    size = max(way.search_space or way.batch_size for way in ways)
    truth = getattr(rows.dataset, "truth", None)
    found = Count({way: Tally(tuple(thresholds)) for way in ways}, truth is not None)
    own = blocks_of(order, size)[rank() :: world_size()]
    for number, block in enumerate(encoder.blocks(rows, own, progress)):
        found.samples += len(block)
        found.unreadable.update(reason_of(bad) for bad in block.bad_samples)
        found.truth_known = found.truth_known and (bool(block.truth) or not len(block))
        _count_block(encoder, block, found, truth if block.truth else None, seed, known)
        if number == 0:
            look(found.of_all_ranks())
    if not own:
        look(found.of_all_ranks())
    return found.of_all_ranks()


def _count_block(encoder: Encoder | Given, block: Block, count: Count, truth: Any, seed: int, known: Known) -> None:
    orders: dict[int | None, Tensor] = {None: torch.arange(len(block))}
    found = []
    for way in count.tallies:
        if way.search_space not in orders:
            orders[way.search_space] = grouped_order(block, way.search_space or len(block), seed)
        found.append(hardest_negatives(block, batches_of(orders[way.search_space], way.batch_size, way.search_space), known))
    own = torch.arange(len(block) if int(count.own.counts.sum()) < ENOUGH else 0)
    other_image, other_text = shuffled_pairs(block) if len(own) else (own, own)
    image = torch.cat([*(c.image for c in found), own, other_image])
    text = torch.cat([*(c.text for c in found), own, other_text])
    *parts, of_own, of_other = encoder.probabilities(block, image, text).split([*map(len, found), len(own), len(other_image)])
    everyone = torch.arange(len(block))
    own_scores = None if encoder.margin is None else encoder.probabilities(block, everyone, everyone).repeat(2)
    count.own.add(of_own)
    count.shuffled.add(of_other)
    for tally, one, scores in zip(count.tallies.values(), found, parts, strict=True):
        pairs = (block.truth["concept"][one.image], block.truth["text_key"][one.text]) if truth is not None else None
        true, knows = (truth.matches(*pairs), truth.knows(*pairs)) if pairs else (None, None)
        tally.add(scores, one.exists, true, knows, own_scores)


# --- as JSON and tables -------------------------------------------------------------------------------------------------


def count_results(count: Count, correction: float, about: dict[str, Any]) -> dict[str, Any]:
    """Everything that was counted, ready for JSON, with ``about`` before it; the first threshold is the one of table and plot.

    ``correction`` is the share of Con-D's false negatives that are some by human judgement (0.83 in the paper); 1 for none.
    """
    rows = []
    for way, tally in count.tallies.items():
        medians = count.medians(way)
        row: dict[str, Any] = {"sampling": way.name, "batch_size": way.batch_size, "search_space": way.search_space}
        row["negatives"] = dict(zip(("wrt_image", "wrt_text"), tally.negatives.tolist(), strict=True))
        row["without_negative"] = dict(zip(("wrt_image", "wrt_text"), tally.lonely.tolist(), strict=True))
        row["false_negatives"] = tally.counts(correction)
        row |= {"medians": medians.as_json(), "meaningless": medians.why_not(), "doubt": medians.doubt()}
        if correction != 1.0:
            row["uncorrected"] = tally.counts()
        if count.truth_known:
            row["truth"] = tally.against_truth()
        rows.append(row)
    meaningless = next((row["meaningless"] for row in rows if row["meaningless"]), None)
    medians_of_all = {"own": count.own.median(), "shuffled": count.shuffled.median()}
    about = {**about, "correction": correction, "samples": count.samples, "unreadable": dict(count.unreadable)}
    return {**about, "medians": medians_of_all, "meaningless": meaningless, "ways": rows}


def format_count(results: dict[str, Any]) -> str:
    """The tables for a terminal of 100 columns, laid out like MAFA's Table 1."""
    ways = results["ways"]
    threshold = ways[0]["false_negatives"][0]["threshold"]
    corrected = f", times {results['correction']:g} (human correction)" if results["correction"] != 1.0 else ""
    judge, margin, kind = results["judge"], results["margin"], _kind(results)
    who = capital(judge)
    rule = f"{judge} says p > {threshold:g}" if margin is None else f"{judge}'s cosine is above the own pair's{below(margin)}"
    lines = [f"False negatives among the hardest negatives of {results['samples']:,} pairs: {rule}{corrected}"]
    if results["meaningless"]:
        lines = [f"MEANINGLESS, since {results['meaningless']}: {judge} cannot judge these data.", *lines]
    lines.append(f"  {'sampling':9s} {'B':>6s} {'M':>7s} {'FN w.r.t. image':>22s} {'FN w.r.t. text':>22s} {f'median {kind}':>9s}")
    for row in ways:
        first = row["false_negatives"][0]
        cells = [f"{first[f'wrt_{side}']:,.0f} ({_share(first[f'wrt_{side}_share'])})" for side in SIDES]
        line = f"{_name(row)} {cells[0]:>22s} {cells[1]:>22s} {_p(row['medians']['hardest']):>9s}"
        lines.append(f"{line}{'  meaningless' if row['meaningless'] else ''}")
    own, shuffled = (_p(results["medians"][name]) for name in ("own", "shuffled"))
    lines.append(f"  {who}'s median {kind}: own pairs {own}, shuffled pairs {shuffled}; of the hardest negatives in the last column.")
    doubtful = [row for row in ways if row["doubt"]]
    lines += [f"  {max(doubtful, key=lambda row: row['medians']['hardest'])['doubt']}"] if doubtful else []
    shares = [row["false_negatives"][0][f"wrt_{side}_share"] or 0.0 for row in ways for side in SIDES]
    if max(shares) > UNHEARD_OF and not results["meaningless"]:
        lines.append("  Above a third, which no paper counts (MAFA Table 9: at most 31.7 %): look before you believe it (`mine`).")
    lonely = max(max(row["without_negative"].values()) for row in ways)
    if lonely:
        lines.append(f"  (up to {lonely:,} anchors have no negative: their batch shows nothing but their own image, or them alone)")
    lines += [f"  left out: {number:,} unreadable ({reason})" for reason, number in results["unreadable"].items()]
    if "truth" not in ways[0]:
        return "\n".join(lines)
    lines += ["", f"{who} against the known truth, on the same negatives"]
    limit = "p >" if margin is None else "margin"
    names = f"{'truly false':>12s} {limit:>6s} {'precision':>10s} {'recall':>8s} {'calibration error':>18s}"
    lines.append(f"  {'sampling':9s} {'B':>6s} {'M':>7s} {names}")
    for row in ways:
        truth = row["truth"]
        head = f"{_name(row)} {_share(truth['true_share']):>12s}"
        error = "" if truth["calibration_error"] is None else f"{truth['calibration_error']:.3f}"
        for at in truth["thresholds"]:
            lines.append(f"{head} {at['threshold']:6g} {_share(at['precision']):>10s} {_share(at['recall']):>8s} {error:>18s}".rstrip())
            head, error = " " * len(head), ""
    return "\n".join(lines)


def median_words(results: dict[str, Any]) -> str:
    """The medians that tell whether the judge can be trusted, in a line."""
    hardest = [row["medians"]["hardest"] for row in results["ways"] if row["medians"]["hardest"] is not None]
    own, shuffled = (_p(results["medians"][name]) for name in ("own", "shuffled"))
    said = f"{capital(results['judge'])}'s median {_kind(results)}: own pairs {own}, shuffled {shuffled}"
    if not hardest:
        return said
    low, high = _p(min(hardest)), _p(max(hardest))
    return f"{said}, hardest negatives {low}{'' if low == high else f' to {high}'}"


def _kind(results: dict[str, Any]) -> str:
    """What the judge's scores are."""
    return "p" if results["margin"] is None else "cosine"


def below(margin: float) -> str:
    """`` less 0.1``, or nothing of 0."""
    return f" less {margin:g}" if margin else ""


def capital(words: str) -> str:
    """The first letter in upper case, the others as they are."""
    return words[:1].upper() + words[1:]


def _name(row: dict[str, Any]) -> str:
    space = "-" if row["search_space"] is None else f"{row['search_space']:,}"
    return f"  {row['sampling']:9s} {row['batch_size']:6,d} {space:>7s}"


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
