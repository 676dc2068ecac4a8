"""One MAFA step, put together from a host model's pair lists, a discriminator and the settings (MAFA Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from lavis_mafa.objectives.connections import Connections, check_probabilities, is_probability, sorted_connections
from lavis_mafa.objectives.intra_modal import IntraModal, intra_modal_losses
from lavis_mafa.objectives.itc import consistency_loss, itc_loss, itc_targets
from lavis_mafa.objectives.itm import CandidatePairs, ExtraPairs, ItmPairs, candidate_pairs, itm_accuracy, itm_loss, itm_pairs
from lavis_mafa.objectives.mining import mine_hard_negatives, sampling_scores
from lavis_mafa.objectives.momentum import distilled_targets
from lavis_mafa.objectives.setting import setting

OF_THE_SUM = "of the loss in the sum; 0: off, not computed and not logged"


class PairModel(Protocol):
    """What MAFA asks of a host model that has encoded a batch."""

    def itm_logits(self, image_index: Tensor, text_index: Tensor) -> Tensor:
        """LongTensor[P], LongTensor[P] on the host -> Tensor[P, 2]; column 1 is "matches"."""
        ...

    def lm_loss(self, image_index: Tensor, text_index: Tensor) -> Tensor:
        """LongTensor[P], LongTensor[P] on the host -> Tensor[]; masked or autoregressive, whichever the host trains."""
        ...


class Discriminator(Protocol):
    """Con-D: how probable is it that a pair matches."""

    def match_probability(self, samples: dict[str, Any], image_index: Tensor, text_index: Tensor) -> Tensor:
        """LongTensor[P], LongTensor[P] -> Tensor[P] in [0, 1], without gradients.

        A text beyond the K candidates is one of ``samples["more_texts"]``, a list of this process's own; it is there with extra pairs
        that are to be judged alone.
        """
        ...


@dataclass
class ItcSettings:
    """How much the contrastive loss counts (0: it is switched off), and how it is softened."""

    weight: float = setting(1.0, OF_THE_SUM, "ALBEF Table 1; GRIT-VLP Table 1", low=0)
    smoothing: float = setting(0.5, "alpha of S-ITC; 0 is off", "MAFA Tables 4, 6, 18, eq. 5", low=0, high=1)
    focal: float = setting(0.0, "power with which pairs that are told well count less; 0 is off", "SoftMask, arXiv 2304.00719", low=0)
    consistency: float = setting(0.0, "lambda of GRIT-VLP's consistency loss; 0 is off", "MAFA Table 6; GRIT-VLP Table 4, eq. 6", low=0)


@dataclass
class EcmSettings:
    """How false negatives are found and what is done with them."""

    enabled: bool = setting(True, "ask Con-D about every hard negative", "MAFA Tables 4, 5")
    threshold: float = setting(0.8, "above this match probability a hard negative is a false one", "MAFA Table 15", low=0, high=1)
    ambiguous_from: float = setting(
        0.5, "from here on it is no negative either; the threshold: no such class", "MAFA Table 15", low=0, high=1
    )
    use_in: list[str] = setting(
        ["itc", "itm", "lm"],
        "losses that get the new positives; `lm` is ALBEF's masked one",
        "MAFA Table 14",
        choices=("itc", "itm", "lm"),
    )
    false_negatives: str = setting(
        "convert", "`convert` to positives, or `eliminate` (ECM-E)", "MAFA Table 5", choices=("convert", "eliminate")
    )
    resample_ambiguous: bool = setting(
        True, "in place of an ambiguous pair ITM takes the second hardest; false: keeps it", "MAFA sec. 4.1"
    )


@dataclass
class ItmSettings:
    """How much the matching loss counts (0: it is switched off), and which pairs are its negatives."""

    weight: float = setting(1.0, OF_THE_SUM, "GRIT-VLP Table 5", low=0)
    negatives: str = setting(
        "hardest",
        "`hardest` (GRIT-VLP, MAFA), `sampled` by similarity (ALBEF), `random` (ITM_rand); `none`: as `weight: 0`",
        "GRIT-VLP Tables 4, 5",
        choices=("hardest", "sampled", "random", "none"),
    )


@dataclass
class StepSettings:
    """What :func:`mafa_step` needs to know. A loss of weight 0 is switched off."""

    itc: ItcSettings = field(default_factory=ItcSettings)
    ecm: EcmSettings = field(default_factory=EcmSettings)
    negatives: str = ItmSettings.negatives
    itm_weight: float = ItmSettings.weight
    lm_weight: float = 1.0


@dataclass
class EncodedBatch:
    """A batch as the host model encoded it: B anchors, K >= B candidates of this step, C >= K contrastive keys.

    Keys K..C-1 (ALBEF's queue) are contrasted with but never mined. Keys carry no gradient.
    """

    sim_i2t: Tensor  # [B, C] fp32 cosine of image b and text key c
    sim_t2i: Tensor  # [B, C]
    temperature: Tensor  # []
    known_positive: Tensor  # BoolTensor[B, C]
    candidates: int  # K
    teacher_i2t: Tensor | None = None  # [B, C] the momentum model's cosines
    teacher_t2i: Tensor | None = None
    distillation: float = 0.0  # alpha of ALBEF eq. 6
    extra: ExtraPairs | None = None
    soft_masked: ExtraPairs | None = None  # further ones, which Con-D is never asked about (SoftMask)
    intra: IntraModal | None = None  # TCL


@dataclass
class Mined:
    """What was asked of Con-D in one step and what came of it; kept for records, on the device."""

    pairs: CandidatePairs
    probability: Tensor | None = None  # [2B]
    connections: Connections | None = None


@dataclass
class StepOutput:
    """Losses (Tensor[], None where switched off), what was mined, metrics (detached Tensor[]) for the log, and the scores' ranges.

    ``loss`` is the sum of the losses times their weights (MAFA eq. 6); the others are logged as they are.
    """

    loss: Tensor
    loss_itc: Tensor | None
    loss_itm: Tensor | None
    loss_lm: Tensor | None
    mined: Mined
    metrics: dict[str, Tensor]
    ranges: dict[str, Tensor]  # [2] each, the least and the greatest


@torch.no_grad()
def value_range(*tensors: Tensor) -> Tensor:
    """Tensor[2] in fp32: the least and the greatest value of tensors of any shape, NaN if one is NaN; nothing is copied to the host.

    Example:
        >>> value_range(torch.tensor([[0.5, -1.0]]), torch.tensor(3.0))
        tensor([-1.,  3.])
    """
    ends = torch.stack([torch.stack(torch.aminmax(tensor.float())) for tensor in tensors])
    return torch.stack([ends[:, 0].amin(), ends[:, 1].amax()])


def mafa_step(
    model: PairModel,
    batch: EncodedBatch,
    samples: dict[str, Any],
    settings: StepSettings,
    discriminator: Discriminator | None = None,
) -> StepOutput:
    """Mine, judge, correct the labels, and compute the three losses (MAFA Algorithm 1, eq. 6).

    With ``ecm.enabled: false`` and ``itc.smoothing: 0`` this is ALBEF without momentum distillation. A loss of weight 0 costs nothing:
    its pass does not run. Without ITC the negatives are still those that the similarities, whoever trained them, name; where ITM has
    none (``negatives``), it is off, and Con-D is asked about the hardest pairs.

    Similarities that are not finite make losses that are not finite, and no exception: whether to skip such a step is the caller's.

    Args:
        model: the encoded batch as pair lists.
        batch: similarities and what is known to match.
        samples: handed to the discriminator as they are.
        settings: switches of every ablation row.
        discriminator: required while ``settings.ecm.enabled``.

    Raises:
        ValueError: ECM without a discriminator, probabilities that are none (see :func:`judge_connections`), or no loss at all.
    """
    ecm, count, own_count = settings.ecm, batch.candidates, len(batch.sim_i2t)
    itm_weight, how = (0.0, "hardest") if settings.negatives == "none" else (settings.itm_weight, settings.negatives)
    weights = settings.itc.weight, itm_weight, settings.lm_weight
    if not any(weights):
        raise ValueError("the weights of all losses are 0")
    known = batch.known_positive[:, :count]
    negatives = mine_hard_negatives(
        sampling_scores(batch.sim_i2t[:, :count], batch.temperature, how),
        sampling_scores(batch.sim_t2i[:, :count], batch.temperature, how),
        known,
    )
    mined, extra = Mined(candidate_pairs(negatives)), batch.extra if itm_weight else None
    if ecm.enabled:
        if discriminator is None:
            raise ValueError("ecm.enabled is true, but no discriminator (Con-D) was set")
        mined, extra = _ask(discriminator, samples, _with_similarity(mined.pairs, batch), extra, ecm)
    verdicts = mined.connections

    metrics: dict[str, Tensor] = {}
    ranges = {"similarity": value_range(batch.sim_i2t, batch.sim_t2i) / batch.temperature.detach()}
    loss_itc = loss_itm = loss_lm = None
    if settings.itc.weight:
        intra = {} if batch.intra is None else intra_modal_losses(batch.intra, batch.temperature, batch.known_positive)
        loss_itc = _contrast(batch, mined, settings, [*intra.values()])
        metrics |= {name: loss.detach() for name, loss in intra.items()}
    pairs = itm_pairs(negatives, verdicts if "itm" in ecm.use_in else None, ecm.false_negatives, ecm.resample_ambiguous)
    pairs = pairs.extended(extra).extended(batch.soft_masked if itm_weight else None)
    image_index, text_index, new_image, new_text = _on_host(pairs, mined, count)
    if itm_weight:
        logits = model.itm_logits(image_index, text_index)
        loss_itm = itm_loss(logits, pairs)
        metrics |= _accuracies(logits.detach(), pairs)
        ranges["itm_logits"] = value_range(logits)
    if settings.lm_weight:
        own = torch.arange(own_count)
        if "lm" not in ecm.use_in or ecm.false_negatives == "eliminate":
            new_image = new_text = own[:0]
        loss_lm = model.lm_loss(torch.cat([own, new_image]), torch.cat([own, new_text]))

    if verdicts is not None:
        asked = mined.pairs.exists.sum().clamp_min(1)
        metrics["new_positive_share"] = verdicts.positive.sum() / asked
        metrics["ambiguous_share"] = verdicts.ambiguous.sum() / asked
    if extra is not None and batch.extra is not None and extra is not batch.extra:
        metrics["extra_judged_true_share"] = 1 - extra.weight.sum() / batch.extra.weight.sum()
    metrics["temperature"] = batch.temperature.detach()
    ranges["temperature"] = value_range(batch.temperature)
    if mined.probability is not None:
        ranges["con_d_probability"] = value_range(mined.probability)
    terms = [weight * loss for weight, loss in zip(weights, (loss_itc, loss_itm, loss_lm), strict=True) if loss is not None]
    return StepOutput(sum(terms[1:], start=terms[0]), loss_itc, loss_itm, loss_lm, mined, metrics, ranges)


@torch.no_grad()
def _ask(
    discriminator: Discriminator, samples: dict[str, Any], pairs: CandidatePairs, extra: ExtraPairs | None, ecm: EcmSettings
) -> tuple[Mined, ExtraPairs | None]:
    """Verdicts on the candidates; and the extra pairs, where these are to be judged, without those negatives that may match."""
    image_index, text_index, count = pairs.image_index, pairs.text_index, len(pairs.exists)
    if extra is not None and extra.texts is not None:
        samples = {**samples, "more_texts": extra.texts}
        image_index, text_index = torch.cat([image_index, extra.image_index]), torch.cat([text_index, extra.text_index])
    answers = discriminator.match_probability(samples, image_index, text_index)
    probability, of_extra = answers[:count], answers[count:]
    if extra is not None and extra.texts is not None:
        kept = (extra.label == 1) | (of_extra <= ecm.ambiguous_from)
        extra = replace(extra, weight=extra.weight * kept)
    # an anchor without a candidate was asked about its own pair: no verdict on it counts
    counted = torch.where(pairs.exists, probability, 0.0)
    return Mined(pairs, probability, sorted_connections(counted, ecm.threshold, ecm.ambiguous_from)), extra


def _accuracies(logits: Tensor, pairs: ItmPairs) -> dict[str, Tensor]:
    """Of the matching head, on extra pairs apart."""
    accuracies = {}
    parts = {"": pairs.extra} if pairs.extra is None else {"": ~pairs.extra, "extra_": pairs.extra}
    for name, part in parts.items():
        of_part = pairs if part is None else replace(pairs, weight=pairs.weight * part)
        accuracies[f"itm_accuracy_{name}positive"], accuracies[f"itm_accuracy_{name}negative"] = itm_accuracy(logits, of_part)
    return accuracies


def _with_similarity(pairs: CandidatePairs, batch: EncodedBatch) -> CandidatePairs:
    """Leave out pairs whose similarity is NaN or infinite: a broken image breaks Con-D's answer too, and Con-D is not to blame."""
    texts, images = pairs.text_index.chunk(2)[0], pairs.image_index.chunk(2)[1]
    similarity = torch.cat([batch.sim_i2t.gather(1, texts[:, None]), batch.sim_t2i.gather(1, images[:, None])]).flatten()
    return replace(pairs, exists=pairs.exists & similarity.isfinite())


def _contrast(batch: EncodedBatch, mined: Mined, settings: StepSettings, intra: list[Tensor]) -> Tensor:
    """The mean of ITC and of the ``intra``-modal losses, each a mean of images and texts (TCL's loss), plus consistency."""
    logits_i2t, logits_t2i = batch.sim_i2t / batch.temperature, batch.sim_t2i / batch.temperature
    consistency = None
    if settings.itc.consistency > 0:
        consistency = consistency_loss(logits_i2t[:, : batch.candidates], logits_t2i[:, : batch.candidates])
    texts, images = mined.pairs.text_index.chunk(2)[0], mined.pairs.image_index.chunk(2)[1]
    if mined.connections is not None and "itc" in settings.ecm.use_in:
        found_i2t, found_t2i = mined.connections.positive.chunk(2)
    else:
        found_i2t = found_t2i = torch.zeros_like(texts, dtype=torch.bool)
    excluded_i2t = excluded_t2i = None
    if settings.ecm.false_negatives == "eliminate":
        excluded_i2t = _at(texts, found_i2t, batch.known_positive)
        excluded_t2i = _at(images, found_t2i, batch.known_positive)
        logits_i2t = logits_i2t.masked_fill(excluded_i2t, float("-inf"))
        logits_t2i = logits_t2i.masked_fill(excluded_t2i, float("-inf"))
        found_i2t = found_t2i = torch.zeros_like(found_i2t)
    smoothing = settings.itc.smoothing
    targets_i2t = itc_targets(batch.known_positive, texts, found_i2t, smoothing, excluded_i2t)
    targets_t2i = itc_targets(batch.known_positive, images, found_t2i, smoothing, excluded_t2i)
    if batch.teacher_i2t is not None and batch.teacher_t2i is not None:
        teacher_i2t, teacher_t2i = batch.teacher_i2t / batch.temperature, batch.teacher_t2i / batch.temperature
        if excluded_i2t is not None and excluded_t2i is not None:
            teacher_i2t = teacher_i2t.masked_fill(excluded_i2t, float("-inf"))
            teacher_t2i = teacher_t2i.masked_fill(excluded_t2i, float("-inf"))
        targets_i2t = distilled_targets(targets_i2t, teacher_i2t.detach(), batch.distillation)
        targets_t2i = distilled_targets(targets_t2i, teacher_t2i.detach(), batch.distillation)
    loss = itc_loss(logits_i2t, logits_t2i, targets_i2t, targets_t2i, settings.itc.focal)
    loss = torch.stack([loss, *intra]).mean() if intra else loss
    return loss if consistency is None else loss + settings.itc.consistency * consistency


def _at(column: Tensor, mask: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like).scatter(1, column[:, None], mask[:, None])


def _on_host(pairs: ItmPairs, mined: Mined, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The one place where a step waits for the device: ITM's pairs, and those that Con-D turned into positives, image and text.

    A pair that was found from both sides counts once (D_ECM is a set). ValueError for probabilities that are none.
    """
    found = torch.zeros_like(mined.pairs.image_index) if mined.connections is None else mined.connections.positive.long()
    wrong = torch.zeros_like(found) if mined.probability is None else (mined.pairs.exists & ~is_probability(mined.probability)).long()
    code = mined.pairs.image_index * count + mined.pairs.text_index
    columns = pairs.image_index, pairs.text_index, found, wrong, code
    image_index, text_index, found, wrong, code = torch.split(torch.cat(columns).cpu(), [len(column) for column in columns])
    check_probabilities(wrong)
    code = torch.unique(code[torch.nonzero(found).flatten()])
    return image_index, text_index, code // count, code % count
