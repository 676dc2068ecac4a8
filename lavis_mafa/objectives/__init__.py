"""MAFA's objectives as pure tensor functions: usable with any model, importing torch alone."""

from lavis_mafa.objectives.answers import answer_loss, rank_answers
from lavis_mafa.objectives.connections import Connections, judge_connections
from lavis_mafa.objectives.dual_encoder import Contrast, MafaItcLoss
from lavis_mafa.objectives.intra_modal import IntraModal, intra_modal_losses, local_loss, pooled_patches
from lavis_mafa.objectives.itc import consistency_loss, itc_loss, itc_targets
from lavis_mafa.objectives.itm import ExtraPairs, ItmPairs, candidate_pairs, itm_loss, itm_pairs
from lavis_mafa.objectives.lm import language_modelling_loss, mask_tokens, masked_lm_loss
from lavis_mafa.objectives.mining import HardNegatives, known_positives, mine_hard_negatives, sampling_scores, text_key
from lavis_mafa.objectives.momentum import distilled_targets, enqueue, ramp_up, update_teacher
from lavis_mafa.objectives.pretraining import (
    Discriminator,
    EcmSettings,
    EncodedBatch,
    ItcSettings,
    PairModel,
    StepOutput,
    StepSettings,
    mafa_step,
    value_range,
)
from lavis_mafa.objectives.text_assignment import Assignment, assign_texts

__all__ = [
    "Assignment",
    "Connections",
    "Contrast",
    "Discriminator",
    "EcmSettings",
    "EncodedBatch",
    "ExtraPairs",
    "HardNegatives",
    "IntraModal",
    "ItcSettings",
    "ItmPairs",
    "MafaItcLoss",
    "PairModel",
    "StepOutput",
    "StepSettings",
    "assign_texts",
    "answer_loss",
    "candidate_pairs",
    "consistency_loss",
    "distilled_targets",
    "enqueue",
    "intra_modal_losses",
    "itc_loss",
    "itc_targets",
    "itm_loss",
    "itm_pairs",
    "judge_connections",
    "known_positives",
    "language_modelling_loss",
    "local_loss",
    "mafa_step",
    "mask_tokens",
    "masked_lm_loss",
    "mine_hard_negatives",
    "pooled_patches",
    "ramp_up",
    "rank_answers",
    "sampling_scores",
    "text_key",
    "update_teacher",
    "value_range",
]
