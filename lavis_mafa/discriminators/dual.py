"""What a Con-D from ALBEF and one from BLIP share: an image encoder, a text encoder that fuses, and a matching head."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lavis_mafa.common.check import con_d_block
from lavis_mafa.common.distributed import gather_own_first
from lavis_mafa.common.model_settings import MafaBlock
from lavis_mafa.common.weights import load_exactly, read_weights
from lavis_mafa.models.albef_encoders import fit_position_embeddings
from lavis_mafa.models.tokenizing import tokenize

Own = TypeVar("Own", bound="DualDiscriminator")


class DualDiscriminator:
    """A matching head as the probability that a pair matches.

    It holds an ordinary module but is none itself, so that a model that uses it neither trains, saves nor broadcasts it.
    """

    def __init__(self, settings: Any, precision: str = "fp32") -> None:
        self.settings = settings
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.tokenizer: Any = self.build_tokenizer()
        self.network: Any = nn.ModuleDict(self.parts())

    # --- what a host defines ---------------------------------------------------------------------------------------

    def parts(self) -> dict[str, nn.Module]:
        """``visual_encoder``, ``text_encoder`` and ``itm_head`` at the sizes of ``settings``, with the tokenizer's words."""
        raise NotImplementedError

    def build_tokenizer(self) -> Any:
        raise NotImplementedError

    def wanted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's weights by this network's names; others may be among them."""
        return state

    def text_rows(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What matching needs of each text, [B, T, ...], and its mask."""
        return ids, mask

    def logits(self, text: Tensor, mask: Tensor, images: Tensor) -> Tensor:
        """P texts and P images -> [P, 2]."""
        raise NotImplementedError

    # --- shared ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_checkpoint(cls: type[Own], model: MafaBlock) -> Own:
        """Build with the model's own sizes (the paper's choice) unless the block names others, and load every weight.

        Raises:
            UserError: the file is missing, or a weight of the encoders or the matching head is missing or of another size.
        """
        block = model.discriminator
        assert block is not None and block.checkpoint is not None
        con_d = cls(con_d_block(model), block.precision)
        con_d.load(read_weights(block.checkpoint, "model.discriminator.checkpoint"), block.checkpoint)
        return con_d

    def load(self, state: dict[str, Tensor], source: str) -> None:
        """Take the scoring parts out of a checkpoint; its projections, LM, teacher and queues are not needed."""
        state = self.wanted(state)
        state = {name: value for name, value in state.items() if name.startswith(tuple(f"{part}." for part in self.network))}
        state = fit_position_embeddings(state, self.network["visual_encoder"])
        load_exactly(self.network, state, f"model.discriminator.checkpoint: {source}")
        self.network.eval().requires_grad_(False).to(self.dtype)

    @torch.no_grad()
    def match_probability(self, samples: dict[str, Any], image_index: Tensor, text_index: Tensor) -> Tensor:
        """One pass over P pairs: [P], [P] -> [P] fp32 in [0, 1].

        Args:
            samples: ``image`` [B, 3, H, W] and ``text_input``; ``gathered`` true when indices name other ranks' rows too.
            image_index: LongTensor[P].
            text_index: LongTensor[P].
        """
        device = image_index.device
        if next(self.network.parameters()).device != device:
            self.network.to(device)
        gathered = bool(samples.get("gathered", False))
        ids, mask = tokenize(self.tokenizer, samples["text_input"], self.settings.max_text_length, device, gathered)
        with torch.autocast(device.type, enabled=False):
            images = self.network["visual_encoder"].forward_features(samples["image"].to(device, self.dtype))
            text, mask = self.text_rows(ids, mask)
            if gathered:
                images, text, mask = gather_own_first(images), gather_own_first(text), gather_own_first(mask)
            logits = self.logits(text[text_index], mask[text_index], images[image_index])
        return logits.float().softmax(dim=1)[:, 1]
