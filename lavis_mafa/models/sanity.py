"""The perfect Con-D of data whose truth is known: an upper bound (MAFA Table 16), never a training method for real data.

Can Con-D judge? Own pairs against shuffled ones and hardest negatives, on the first batches of a training.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from lavis_mafa.datasets.ground_truth import GroundTruth
from lavis_mafa.distributed import gather_own_first, rank
from lavis_mafa.models.trust import MARGIN, Medians, median
from lavis_mafa.objectives import Discriminator


class GroundTruthDiscriminator:
    """Probability 1 where the concepts match and 0 elsewhere; selected only by the name ``ground_truth``."""

    def __init__(self, truth: GroundTruth) -> None:
        self.truth = truth

    def match_probability(self, samples: dict[str, Any], image_index: Tensor, text_index: Tensor) -> Tensor:
        """[P], [P] -> [P]; ``samples`` must carry ``concept`` and ``text_key`` LongTensor[B]."""
        concept, text_key = samples["concept"].to(image_index.device), samples["text_key"].to(image_index.device)
        if samples.get("gathered", False):
            concept, text_key = gather_own_first(concept), gather_own_first(text_key)
        return self.truth.matches(concept[image_index].cpu(), text_key[text_index].cpu()).float().to(image_index.device)


logger = logging.getLogger(__name__)
BATCHES, PAIRS = 4, 256  # enough of either
STANDARD_ERRORS = 3.0


class SanityCheck:
    """Scores each own pair, and its image with another text of the batch; then says once how they and the hardest negatives compare.

    Con-D is sane if the mean of own minus shuffled exceeds both 0.02 and three of its standard errors (weights that know nothing
    differ by chance alone, and a trained Con-D by far more), and if the medians allow it (:meth:`Medians.why_not`). Every rank asks
    Con-D, so that one that gathers finds the others; rank 0 tells of its own pairs. Nothing is drawn and nothing enters a loss, so
    training is the same with and without.

    Args:
        name: of Con-D, for the message.
        threshold: ``model.ecm.threshold``; the lists' shares above it are told.
    """

    def __init__(self, name: str, threshold: float) -> None:
        self.name, self.threshold = name, threshold
        self.seen = 0
        self.scores: list[Tensor] = []  # [2, n] each: own, shuffled
        self.hardest: list[Tensor] = []  # [m] each
        self.done = False

    @torch.no_grad()
    def look(self, con_d: Discriminator, samples: dict[str, Any], known_positive: Tensor, hardest: Tensor | None = None) -> None:
        """To be called on each training batch; asks Con-D on the first ones alone.

        Args:
            con_d: what ECM asks.
            samples: as ECM hands them to it; with ``epoch`` and ``iters`` a resumed run is recognised, and not checked again.
            known_positive: BoolTensor[B, K], K >= B, own rows first: the same image, so no negative.
            hardest: Con-D's probabilities of the hardest negatives of this step, which ECM has asked for; NaN where there is none.
        """
        resumed = self.seen == 0 and (samples.get("epoch", 0) > 0 or samples.get("iters", 0) >= BATCHES)
        if self.done or resumed:
            self.done = True
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
            self._tell(torch.cat(self.scores, dim=1).float().cpu(), hardest.float().cpu())
        if self.done:
            self.scores.clear()
            self.hardest.clear()

    def _tell(self, scores: Tensor, hardest: Tensor) -> None:
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
            logger.log(
                logging.INFO if doubt is None else logging.WARNING, "Con-D (%s): %s.%s", self.name, found, f" {doubt}" * bool(doubt)
            )
            return
        logger.warning(
            "Con-D (%s) CANNOT JUDGE: %s. What it decides is noise. Found: %s. Is it a trained matching model of the architecture in "
            "model.discriminator.arch, and was it trained on such images and texts? Give another model.discriminator.checkpoint, or "
            "train without it: model.ecm.enabled: false.",
            self.name,
            reason,
            found,
        )


def is_sane(difference: Tensor) -> bool:
    """[n] own minus shuffled probability: is the mean clearly above 0?

    Example:
        >>> is_sane(torch.tensor([0.9, 0.7, 0.8])), is_sane(torch.tensor([0.9, -0.9, 0.3]))
        (True, False)
    """
    error = difference.std(correction=0) / len(difference) ** 0.5
    return bool(difference.mean() > max(MARGIN, STANDARD_ERRORS * float(error)))


def partners(captions: list[str], known_positive: Tensor) -> tuple[Tensor, Tensor]:
    """For each image the next text of the batch, cyclically, that is another text and of another image.

    Args:
        captions: B texts.
        known_positive: BoolTensor[B, K], K >= B.

    Returns:
        LongTensor[B]; BoolTensor[B], False where there is no such text.

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
