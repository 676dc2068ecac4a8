"""What our pre-training models return: LAVIS-style attribute and key access, plus what GRIT and the records need."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.modeling_outputs import ModelOutput


@dataclass
class PretrainOutput(ModelOutput):
    """Losses, GRIT's features, figures for the log, and what Con-D judged.

    ``stats`` is a dict of plain floats: reading it copies from the device, so read it when logging and not every step.
    """

    loss: Tensor | None = None
    loss_itc: Tensor | None = None
    loss_itm: Tensor | None = None
    loss_mlm: Tensor | None = None
    loss_lm: Tensor | None = None
    image_features: Tensor | None = None  # [B, d] fp32, no gradient
    text_features: Tensor | None = None  # [B, d]
    figures: dict[str, Tensor] | None = None  # Tensor[] each, on the device
    verdicts: dict[str, Tensor] | None = None  # [2B] each: image, text (data set indices), probability, positive, ambiguous
    ranges: dict[str, Tensor] | None = None  # [2] each, least and greatest: where to look when a loss is not finite

    @property
    def stats(self) -> dict[str, float]:
        figures = dict(self.figures or {})
        for name in ("loss", "loss_itc", "loss_itm", "loss_mlm", "loss_lm"):
            value = getattr(self, name)
            if value is not None:
                figures[name] = value.detach()
        values = torch.stack([v.float() for v in figures.values()]).tolist()
        return dict(zip(figures, values, strict=True))
