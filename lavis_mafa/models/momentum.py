"""The momentum model of ALBEF and BLIP with its queue of features (ALBEF section 3.3)."""

from __future__ import annotations

from copy import copy, deepcopy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_mafa.config.schema import MafaBlock
from lavis_mafa.distributed import gather_in_rank_order
from lavis_mafa.errors import UserError
from lavis_mafa.models.step import StepInputs
from lavis_mafa.models.transformer import on_device
from lavis_mafa.objectives import enqueue, pooled_patches, ramp_up, update_teacher

MOMENTUM_PARTS = ("visual_encoder", "text_encoder", "vision_proj", "text_proj")
# beginnings of what a momentum model has in checkpoints of ours and LAVIS's
TEACHERS = (
    *(f"{part}_m." for part in (*MOMENTUM_PARTS, "text_decoder")),
    *("image_queue", "text_queue", "queue_ptr", "ptr_queue", "idx_queue"),
)


class Parts(NamedTuple):
    """Features of what images and texts are made of, without gradient (TCL): regions of patches, and words."""

    regions: Tensor  # [K, M, d]
    words: Tensor  # [K, N, d]
    real: Tensor  # BoolTensor[K, N], False where a text has ended


class MomentumModel(nn.Module):
    """Methods of a model that may have a momentum copy of its ``MOMENTUM_PARTS``, named with ``_m`` appended, as in LAVIS.

    It sees whole images where ``image_encoder.drop_patches`` leaves the model a part of each, so that its targets miss nothing.
    """

    ramp_up_epochs = 1  # until its targets have their full weight
    settings: MafaBlock
    device: Any
    training: bool
    visual_encoder_m: Any
    text_encoder_m: Any
    vision_proj_m: Any
    text_proj_m: Any
    image_queue: Tensor  # [d, Q]
    text_queue: Tensor  # [d, Q]
    idx_queue: Tensor  # [1, Q]
    text_queue_keys: Tensor  # ours alone: what the texts of text_queue are
    queue_ptr: Tensor

    def _add_momentum_model(self, queue_size: int) -> None:
        """``queue_size`` 0: no queue, whose tensors are there and empty; an anchor then sees the batch alone (MAFA's MD_NQ)."""
        for part in MOMENTUM_PARTS:
            setattr(self, f"{part}_m", deepcopy(getattr(self, part)).requires_grad_(False))
        self.visual_encoder_m.drop_patches = 0.0
        embed_dim = self.settings.embed_dim
        self.register_buffer("image_queue", F.normalize(torch.randn(embed_dim, queue_size), dim=0))
        self.register_buffer("text_queue", F.normalize(torch.randn(embed_dim, queue_size), dim=0))
        self.register_buffer("idx_queue", torch.full((1, queue_size), -100))
        self.register_buffer("text_queue_keys", torch.full((1, queue_size), -100))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def _copy_to_momentum_model(self) -> None:
        for part in MOMENTUM_PARTS:
            getattr(self, f"{part}_m").load_state_dict(getattr(self, part).state_dict())

    @torch.no_grad()
    def _momentum_update(self) -> None:
        momentum = self.settings.itc.momentum_distillation
        assert momentum is not None
        for part in MOMENTUM_PARTS:
            update_teacher(getattr(self, part).parameters(), getattr(self, f"{part}_m").parameters(), momentum.momentum)

    @torch.no_grad()
    def _momentum_features(
        self, image: Tensor, ids: Tensor, mask: Tensor, local: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Parts | None]:
        """The momentum model's image states [B, N, width], features [B, d] of images and texts and, if ``local``, of their parts."""
        states, texts = self.visual_encoder_m.forward_features(image), self.momentum_text_states(ids, mask)
        parts = None
        if local:
            regions = pooled_patches(project(self.vision_proj_m, states[:, 1:]))
            parts = Parts(regions, project(self.text_proj_m, texts[:, 1:]), on_device(mask[:, 1:], regions.device))
        return states, project(self.vision_proj_m, states[:, 0]), project(self.text_proj_m, texts[:, 0]), parts

    def momentum_text_states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Its text encoder's states, which a host defines: [B, T] on the host -> [B, T, width], or of the first token alone."""
        raise NotImplementedError

    def _distillation_weight(self, inputs: StepInputs) -> float:
        momentum = self.settings.itc.momentum_distillation
        assert momentum is not None
        step = inputs.epoch * inputs.steps_per_epoch + inputs.step
        return ramp_up(momentum.alpha, 0, step, self.ramp_up_epochs * inputs.steps_per_epoch)

    @torch.no_grad()
    def _enqueue(self, image_feature: Tensor, text_feature: Tensor, keys: Tensor) -> None:
        """Every rank's momentum features and their keys [B, 2] into the queue, in training alone."""
        size = self.image_queue.shape[1]
        if not self.training or size == 0:
            return
        image_feature, text_feature = gather_in_rank_order(image_feature), gather_in_rank_order(text_feature)
        keys = gather_in_rank_order(keys)
        if len(keys) > size:
            raise UserError(f"model.itc.momentum_distillation.queue_size is {size}, smaller than a global batch ({len(keys)}).")
        # one NaN column would spoil the loss of every step until it is overwritten; pair and key stay together
        finite = image_feature.isfinite().all(dim=1) & text_feature.isfinite().all(dim=1)
        enqueue(self.image_queue, self.queue_ptr, image_feature, finite)
        enqueue(self.text_queue, self.queue_ptr, text_feature, finite)
        enqueue(self.idx_queue, self.queue_ptr, keys[:, 0], finite)
        enqueue(self.text_queue_keys, self.queue_ptr, keys[:, 1], finite)
        self.queue_ptr.copy_((self.queue_ptr + len(keys)) % size)


def by_momentum(model: Any) -> Any:
    """A model whose parts are the momentum copies of this one's; whatever else it has is the same, and no weight is copied."""
    teacher = copy(model)
    teacher.__dict__["_modules"] = {**model._modules, **{part: getattr(model, f"{part}_m") for part in MOMENTUM_PARTS}}
    return teacher


def project(layer: nn.Linear, first: Tensor) -> Tensor:
    """Normalised projection of tokens: [..., width] -> [..., d], always fp32 since it decides what is mined."""
    with torch.autocast(first.device.type, enabled=False):
        return F.normalize(layer(first.float()), dim=-1)
