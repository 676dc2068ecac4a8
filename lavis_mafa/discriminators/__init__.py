"""Con-D: who decides whether a hard negative is a false one. One adapter per host model."""

from __future__ import annotations

from lavis_mafa.common.errors import UserError
from lavis_mafa.common.settings import ModelBlock
from lavis_mafa.objectives import Discriminator


def build_discriminator(model: ModelBlock) -> Discriminator | None:
    """The discriminator that ``model.discriminator`` names, or None for ``ground_truth`` (the task sets it, knowing the data).

    Raises:
        UserError: no checkpoint, or one that does not fit.
    """
    settings = model.discriminator
    if settings is None or settings.arch == "ground_truth":
        return None
    if not settings.checkpoint:
        raise UserError("model.discriminator.checkpoint is null; an untrained Con-D is never used.")
    from lavis_mafa.discriminators.albef import AlbefDiscriminator

    return AlbefDiscriminator.from_checkpoint(model)
