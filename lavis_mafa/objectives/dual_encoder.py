"""MAFA's contrastive loss as one object, for a dual encoder in a loop of one's own (MAFA section 4, eq. 1 and 5)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lavis_mafa.objectives.itc import itc_loss, itc_targets
from lavis_mafa.objectives.mining import known_positives

Pair = tuple[Tensor, Tensor]


class Contrast(NamedTuple):
    """``loss`` Tensor[]; ``false_negative_share`` Tensor[], of all pairs that are not labelled as matching, without gradient."""

    loss: Tensor
    false_negative_share: Tensor


class MafaItcLoss(nn.Module):
    """Image-text contrast in which pairs that match without being labelled so are positives, not negatives.

    Who says that they match is yours: a ``guide`` (features of a model trained before, as in GISTEmbed) or ``scores`` of any judge,
    such as a matching head (Con-D). A pair is a false negative where its score is above ``threshold``, or above its anchor's own pair's
    score minus ``margin``. Found positives share an anchor's target equally with its own text (section 4.1); ``smoothing`` then
    spreads alpha of it over all (S-ITC, eq. 5). Without guide, scores, ids and smoothing this is CLIP's loss.

    Args:
        threshold: of scores; needs a guide or scores in each call.
        margin: instead of ``threshold``: relative to the own pair's score; 0: whatever scores higher than the own pair.
        smoothing: alpha, in [0, 1]. For grouped (GRIT) batches; 0 for random ones.
        false_negatives: ``convert`` makes them positives, ``eliminate`` takes them out of the loss (ECM-E, GISTEmbed).
        gather: contrast with the features of all ranks, whose gradients flow back to them; each rank brings as many pairs.

    Raises:
        ValueError: threshold and margin together, or a word or number that is none of these.

    Example:
        >>> image = text = torch.eye(3)
        >>> criterion = MafaItcLoss(margin=0.0, smoothing=0.5)
        >>> criterion(image, text, scale=20.0, guide=(image, text)).loss > 0
        tensor(True)
    """

    def __init__(
        self,
        threshold: float | None = None,
        margin: float | None = None,
        smoothing: float = 0.0,
        false_negatives: str = "convert",
        gather: bool = False,
    ) -> None:
        super().__init__()
        if threshold is not None and margin is not None:
            raise ValueError(f"threshold is {threshold} and margin is {margin}, but only one can say what a false negative is")
        if not 0.0 <= smoothing <= 1.0:
            raise ValueError(f"smoothing is {smoothing}, but must be in [0, 1]")
        if false_negatives not in ("convert", "eliminate"):
            raise ValueError(f"false_negatives is {false_negatives!r}, but must be one of convert, eliminate")
        self.threshold, self.margin, self.smoothing = threshold, margin, smoothing
        self.false_negatives, self.gather = false_negatives, gather

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        scale: Tensor | float,
        ids: Tensor | None = None,
        guide: Pair | None = None,
        scores: Tensor | None = None,
    ) -> Contrast:
        """Row b of ``image`` and of ``text`` are a labelled pair.

        Args:
            image, text: [B, D], normalised. R ranks that gather have C = R * B candidates.
            scale: 1 / temperature, such as open_clip's ``logit_scale``.
            ids: LongTensor[B] or [B, n], keys (the image's, the caption's): an equal one: known to match; below 0: unknown.
            guide: features [B, E] of the same images and texts by another model; their inner product scores a pair.
            scores: [B, B] of the own batch, image b and text k, for example Con-D's match probabilities; -inf where nobody was asked.
                Pairs with other ranks' samples have no score.

        Raises:
            ValueError: shapes that do not fit, both guide and scores, or none of them where threshold or margin asks for one.
        """
        count = len(image)
        if image.shape != text.shape or image.dim() != 2:
            raise ValueError(f"image and text must both be [B, D], not {list(image.shape)} and {list(text.shape)}")
        if (guide is None and scores is None) != (self.threshold is None and self.margin is None):
            raise ValueError("a guide or scores, and threshold or margin, need each other")
        if guide is not None and scores is not None:
            raise ValueError("guide and scores are both given, but only one can say which pairs match")
        if scores is not None and scores.shape != (count, count):
            raise ValueError(f"scores are {list(scores.shape)}, but must be {[count, count]}")
        keys = torch.full((count, 1), -1, device=image.device) if ids is None else ids.to(image.device).view(count, -1)
        all_images, all_texts, all_keys = self._gathered(image), self._gathered(text), self._gathered(keys)
        known = known_positives(keys, all_keys)
        if guide is not None:
            images, texts = (features.detach().to(image.device) for features in guide)
            if len(images) != count or len(texts) != count:
                raise ValueError(f"guide has {len(images)} images and {len(texts)} texts, but the batch has {count} pairs")
            found_i2t = self._found(images @ self._gathered(texts).T, known)
            found_t2i = self._found(texts @ self._gathered(images).T, known)
        elif scores is not None:
            scores = scores.detach().to(image.device)
            found_i2t, found_t2i = self._found(scores, known), self._found(scores.T, known)
        else:
            found_i2t = found_t2i = torch.zeros_like(known)
        logits_i2t, targets_i2t = self._direction(image @ all_texts.T * scale, known, found_i2t)
        logits_t2i, targets_t2i = self._direction(text @ all_images.T * scale, known, found_t2i)
        loss = itc_loss(logits_i2t, logits_t2i, targets_i2t, targets_t2i)
        found = found_i2t.sum() + found_t2i.sum()
        return Contrast(loss, found / (2 * (~known).sum()).clamp_min(1))

    def _direction(self, logits: Tensor, known: Tensor, found: Tensor) -> Pair:
        """Logits and targets [B, C] of one direction."""
        if self.false_negatives == "eliminate":
            return logits.masked_fill(found, float("-inf")), itc_targets(known, smoothing=self.smoothing, excluded=found)
        return logits, itc_targets(known | found, smoothing=self.smoothing)

    def _found(self, scores: Tensor, known: Tensor) -> Tensor:
        """BoolTensor[B, C]: what scores [B, B or C] say of pairs that are not known to match."""
        least: Any = self.threshold
        if self.margin is not None:
            own = scores.diagonal()[:, None]
            least = own.masked_fill(own.isneginf(), float("inf")) - self.margin  # nobody was asked: nothing to compare with
        found = torch.zeros_like(known)
        found[:, : scores.shape[1]] = scores > least
        return found & ~known

    def _gathered(self, rows: Tensor) -> Tensor:
        """[B, ...] -> [C, ...], this rank's own first."""
        if not self.gather or not dist.is_initialized() or dist.get_world_size() == 1:
            return rows
        if rows.requires_grad:
            from torch.distributed.nn.functional import all_gather  # differentiable

            parts = list(all_gather(rows))  # type: ignore[no-untyped-call]
        else:
            parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, rows.contiguous())
        own = parts.pop(dist.get_rank())
        return torch.cat([own, *parts])
