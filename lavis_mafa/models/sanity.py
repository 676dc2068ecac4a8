"""What a user should be told of a training: can this Con-D judge at all, and is there anything to learn in the batches?

Nothing here is drawn and nothing enters a loss, so training is the same with and without.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from lavis_mafa.config.schema import MafaBlock
from lavis_mafa.distributed import rank
from lavis_mafa.objectives import Discriminator, StepOutput
from lavis_mafa.objectives.trust import UNHEARD_OF, Medians, is_sane, median

logger = logging.getLogger(__name__)
BATCHES, PAIRS = 4, 256  # of the sanity check; enough of either
ASKED = 16384  # candidates without a single new positive until that is worth a word

# --- Con-D ---------------------------------------------------------------------------------------------------------------


class SanityCheck:
    """Asks Con-D about own pairs and images with another text of the batch; logs once how these and the hardest negatives compare.

    Con-D is sane if the mean of own minus shuffled exceeds both 0.02 and three of its standard errors (weights that know nothing
    differ by chance alone, and a trained Con-D by far more), and if the medians allow it (:meth:`Medians.why_not`). Every rank asks
    Con-D, so that one that gathers finds the others; rank 0 reports its own pairs.

    Args:
        name: of Con-D, for the message.
        threshold: ``model.ecm.threshold``; the message has the shares above it.
    """

    def __init__(self, name: str, threshold: float) -> None:
        self.name, self.threshold = name, threshold
        self.seen = 0
        self.scores: list[Tensor] = []  # [2, n] each: own, shuffled
        self.hardest: list[Tensor] = []  # [m] each
        self.done = False

    @torch.no_grad()
    def update(self, con_d: Discriminator, samples: dict[str, Any], known_positive: Tensor, hardest: Tensor | None = None) -> None:
        """To be called on each training batch that Con-D judges; asks Con-D on the first ones alone.

        Args:
            con_d: what ECM asks.
            samples: as ECM hands them to it; with ``epoch`` and ``iters`` a resumed run is recognised, and not checked again.
            known_positive: BoolTensor[B, K], K >= B, own rows first: no negatives.
            hardest: Con-D's probabilities of this step's hardest negatives; NaN where there is none.
        """
        self.done |= self.seen == 0 and (samples.get("epoch", 0) > 0 or samples.get("iters", 0) >= BATCHES)
        if self.done:
            return
        partner, exists = partners(samples["text_input"], known_positive)
        own = torch.arange(len(partner), device=partner.device)
        probability = con_d.match_probability(samples, own.repeat(2), torch.cat([own, partner])).view(2, -1)
        self.scores.append(probability[:, exists & probability.isfinite().all(dim=0)])
        if hardest is not None:
            self.hardest.append(hardest.detach().flatten())
        self.seen += 1
        self.done = self.seen >= min(BATCHES, samples.get("num_iters_per_epoch", BATCHES)) or self.seen * len(own) >= PAIRS
        if self.done and rank() == 0:
            hardest = torch.cat(self.hardest) if self.hardest else probability[0, :0]
            self._report(torch.cat(self.scores, dim=1).float().cpu(), hardest.float().cpu())
        if self.done:
            self.scores.clear()
            self.hardest.clear()

    def _report(self, scores: Tensor, hardest: Tensor) -> None:
        count = scores.shape[1]
        if count == 0:
            logger.info("Con-D (%s) is not checked: the first batches hold no two images with different texts.", self.name)
            return
        hardest = hardest[hardest.isfinite()]
        medians = Medians(median(scores[0]), median(scores[1]), median(hardest))
        above = [f"{float((part > self.threshold).float().mean()):.0%}" if len(part) else "-" for part in (*scores, hardest)]
        found = f"median match probability of {count} {medians}; {', '.join(above)} are above model.ecm.threshold ({self.threshold})"
        reason = medians.why_not()
        if reason is None and not is_sane(scores[0] - scores[1]):
            reason = "own pairs score hardly better than shuffled ones"
        if reason is None:
            doubt = medians.doubt()
            level = logging.INFO if doubt is None else logging.WARNING
            logger.log(level, "Con-D (%s): %s.%s", self.name, found, "" if doubt is None else f" {doubt}")
            return
        logger.warning(
            "Con-D (%s) CANNOT JUDGE: %s. What it decides is noise. Found: %s. Is it a trained matching model of the architecture in "
            "model.discriminator.arch, and was it trained on such images and texts? Give another model.discriminator.checkpoint, or "
            "train without it: model.ecm.enabled: false.",
            self.name,
            reason,
            found,
        )


def partners(captions: list[str], known_positive: Tensor) -> tuple[Tensor, Tensor]:
    """For each image the next text of the batch, cyclically, that is another text and of another image.

    ``known_positive`` is a BoolTensor[B, K], K >= B. Returns LongTensor[B], and BoolTensor[B], False where there is no such text.

    Example:
        >>> partners(["a cat", "a cat", "a dog"], torch.eye(3, dtype=torch.bool))
        (tensor([2, 2, 0]), tensor([True, True, True]))
    """
    count, device = len(captions), known_positive.device
    number = {caption: i for i, caption in enumerate(captions)}
    text = torch.tensor([number[caption] for caption in captions], device=device)
    own = torch.arange(count, device=device)
    following = (own[:, None] + own) % count
    allowed = (text[following] != text[:, None]) & ~known_positive[:, :count].gather(1, following)
    return following.gather(1, allowed.int().argmax(dim=1, keepdim=True)).squeeze(1), allowed.any(dim=1)


class ShareWatch:
    """Warns once an epoch whose share of new positives is one that no paper reaches: a Con-D that says yes to everything.

    Args:
        steps_per_epoch: an epoch's mean counts from its 50th step on, or at its end.
    """

    STEPS = 50
    RIGHT = 0.9  # where the truth is known and Con-D agrees with it, the data are so, and there is nothing to warn of

    def __init__(self, steps_per_epoch: int) -> None:
        self.enough = min(self.STEPS, steps_per_epoch)
        self.epoch, self.step, self.warned = -1, 0, False
        self.share = 0.0  # times steps

    def look(self, record: dict[str, Any]) -> None:
        """A record of ``metrics.jsonl``: averages over the steps since the one before it, and over ranks."""
        if "new_positive_share" not in record:
            return
        if record["epoch"] != self.epoch:
            self.epoch, self.step, self.warned, self.share = record["epoch"], 0, False, 0.0
        self.share += record["new_positive_share"] * (record["step"] - self.step)
        self.step = record["step"]
        mean, precision = self.share / max(self.step, 1), record.get("con_d_precision")
        if self.warned or self.step < self.enough or mean <= UNHEARD_OF or (precision is not None and precision >= self.RIGHT):
            return
        self.warned = True
        logger.warning(
            "epoch %d: Con-D turns %.0f %% of the hardest negatives into positives (new_positive_share). No paper counts more than "
            "31.7 %% false negatives among them (MAFA Table 9), and those at a lower threshold. Does Con-D say yes to everything, or "
            "do captions fit nearly every image?%s Look before you believe it: lavis-mafa report RUN shows what it joined.",
            self.epoch,
            100 * mean,
            "" if precision is None else f" By the known truth {precision:.0%} of them do match.",
        )


# --- batches ---------------------------------------------------------------------------------------------------------

WARNINGS = {
    "candidate": (
        "A batch has no negative: it is one sample, or all its samples show one image or have one text. ITM learns from positives "
        "alone there; use a larger run.batch_size_train, or samples of more images."
    ),
    "negative": (
        "ECM leaves a batch no negative: every hard negative of it was called positive, or ambiguous without a second one. ITM "
        "learns from positives alone there; raise model.ecm.threshold (now {threshold}), or look at Con-D."
    ),
    "caption": (
        "All {count} captions of a batch are the same text ({caption!r}): nothing tells images that match it from others. Look at the "
        "annotations."
    ),
    "word": "All captions of a batch are empty: there is no word to match or to predict. Look at the annotations.",
    "threshold": "model.ecm.threshold is {threshold}, and no probability exceeds it: ECM never finds a false negative.",
    "positive": (
        "Con-D called none of {asked} hard negatives positive: ECM has not changed a label so far. Lower model.ecm.threshold (now "
        "{threshold}), or look at Con-D; data without false negatives need no ECM."
    ),
}


class BatchCheck:
    """Warns on rank 0, once of each, of batches that leave an objective nothing to do; their losses are finite.

    What only the device knows is summed there and read after steps 1, 2, 4, 8, ..., so that no step has to wait for it.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.warned: set[str] = set()
        self.sums: Tensor | None = None

    def update(self, captions: list[str], step: StepOutput, settings: MafaBlock) -> None:
        """After each training step, with the batch's own captions."""
        if rank() != 0:
            return
        ecm, asked = settings.ecm, 0
        empty = not any(caption.strip() for caption in captions)
        found = {
            "threshold": ecm.enabled and ecm.threshold >= 1.0,
            "word": empty,
            "caption": len(captions) > 1 and len(set(captions)) == 1 and not empty,
        }
        self.steps += 1
        self.sums = _counts(step) + (0 if self.sums is None else self.sums)
        if self.steps & (self.steps - 1) == 0:
            no_candidate, no_negative, asked, positive = self.sums.tolist()
            found |= {"candidate": no_candidate, "negative": no_negative, "positive": asked >= ASKED and not positive}
        for what in [what for what, is_so in found.items() if is_so and what not in self.warned]:
            self.warned.add(what)
            values = {"threshold": ecm.threshold, "count": len(captions), "caption": captions[0], "asked": asked}
            logger.warning(WARNINGS[what].format(**values))


@torch.no_grad()
def _counts(step: StepOutput) -> Tensor:
    """LongTensor[4]: has the batch no candidate; has it some, but no negative is left; candidates judged; those found positive."""
    verdicts, none = step.mined.connections, torch.zeros((), dtype=torch.long, device=step.loss.device)
    some = step.mined.pairs.exists.any()
    accuracy = step.metrics.get("itm_accuracy_negative")  # not there without ITM, which then lacks nothing
    no_negative = none.bool() if accuracy is None else accuracy.isnan()  # a share of nothing
    asked = none if verdicts is None else step.mined.pairs.exists.sum()
    found = none if verdicts is None else verdicts.positive.sum()
    return torch.stack([(no_negative & ~some).long(), (no_negative & some).long(), asked, found])
