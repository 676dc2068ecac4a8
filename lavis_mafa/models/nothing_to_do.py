"""Batches that leave an objective nothing to do: their losses are finite, and the user is told once."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from lavis_mafa.common.distributed import rank
from lavis_mafa.common.model_settings import MafaBlock
from lavis_mafa.objectives import StepOutput

logger = logging.getLogger(__name__)
ASKED = 16384  # candidates without a single new positive until that is worth a word

LACKING = {
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


class NothingToDo:
    """Looks at each training step, and warns on rank 0 at most once of each thing that is lacking.

    What only the device knows is summed there and read after steps 1, 2, 4, 8, ..., so that no step has to wait for it.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.said: set[str] = set()
        self.sums: Tensor | None = None

    def look(self, captions: list[str], step: StepOutput, settings: MafaBlock) -> None:
        """After each training step.

        Args:
            captions: the batch's own.
            step: what came of it.
            settings: of the model.
        """
        if rank() != 0:
            return
        ecm = settings.ecm
        if ecm.enabled and ecm.threshold >= 1.0:
            self._say("threshold", threshold=ecm.threshold)
        if not any(caption.strip() for caption in captions):
            self._say("word")
        elif len(captions) > 1 and len(set(captions)) == 1:
            self._say("caption", count=len(captions), caption=captions[0])
        self.steps += 1
        self.sums = _counts(step) + (0 if self.sums is None else self.sums)
        if self.steps & (self.steps - 1) == 0:
            no_candidate, no_negative, asked, found = self.sums.tolist()
            if no_candidate:
                self._say("candidate")
            if no_negative:
                self._say("negative", threshold=ecm.threshold)
            if asked >= ASKED and not found:
                self._say("positive", asked=asked, threshold=ecm.threshold)

    def _say(self, what: str, **values: object) -> None:
        if what not in self.said:
            self.said.add(what)
            logger.warning(LACKING[what].format(**values))


@torch.no_grad()
def _counts(step: StepOutput) -> Tensor:
    """LongTensor[4]: has the batch no candidate; has it some, but no negative is left; candidates judged; those found positive."""
    verdicts, none = step.mined.connections, torch.zeros((), dtype=torch.long, device=step.loss.device)
    some = step.mined.pairs.exists.any()
    accuracy = step.figures.get("itm_accuracy_negative")  # not there without ITM, which then lacks nothing
    no_negative = none.bool() if accuracy is None else accuracy.isnan()  # a share of nothing
    asked = none if verdicts is None else step.mined.pairs.exists.sum()
    found = none if verdicts is None else verdicts.positive.sum()
    return torch.stack([(no_negative & ~some).long(), (no_negative & some).long(), asked, found])
