"""Con-D: who decides whether a hard negative is a false one. One adapter per host model."""

from __future__ import annotations

from torch import nn

from lavis_mafa.common.check import FAMILIES
from lavis_mafa.common.errors import UserError
from lavis_mafa.common.model_settings import MafaBlock
from lavis_mafa.objectives import Discriminator


def build_discriminator(model: MafaBlock, host: nn.Module | None = None) -> Discriminator | None:
    """The discriminator that ``model.discriminator`` names, or None for ``ground_truth`` (the task sets it, knowing the data).

    Args:
        model: the settings of the model it works for; any family can work for any other.
        host: that model, whose frozen image encoder a BLIP-2 Con-D may share.

    Raises:
        UserError: no checkpoint, or one that does not fit.
    """
    settings = model.discriminator
    if settings is None or settings.arch == "ground_truth":
        return None
    if not settings.checkpoint:
        raise UserError("model.discriminator.checkpoint is null; an untrained Con-D is never used.")
    family = FAMILIES[settings.arch]
    if family == "blip2_mafa":
        from lavis_mafa.discriminators.blip2 import Blip2Discriminator

        return Blip2Discriminator.from_checkpoint(model, host)
    if family == "blip_mafa":
        from lavis_mafa.discriminators.blip import BlipDiscriminator

        return BlipDiscriminator.from_checkpoint(model)
    from lavis_mafa.discriminators.albef import AlbefDiscriminator

    return AlbefDiscriminator.from_checkpoint(model)
