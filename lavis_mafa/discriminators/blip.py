"""Con-D from a BLIP: LAVIS's ``blip_image_text_matching`` and ``blip_retrieval`` checkpoints, the authors', our ``blip_mafa``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lavis_mafa.common.check import con_d_block
from lavis_mafa.common.distributed import gather_own_first
from lavis_mafa.common.model_settings import BlipBlock, MafaBlock
from lavis_mafa.common.weights import load_exactly, read_weights
from lavis_mafa.models.albef_encoders import build_image_encoder, fit_position_embeddings
from lavis_mafa.models.blip_encoders import build_blip_text_encoder, build_blip_tokenizer
from lavis_mafa.models.blip_pairs import match
from lavis_mafa.models.tokenizing import tokenize


class BlipDiscriminator:
    """BLIP's matching head as the probability that a pair matches.

    It holds an ordinary module but is none itself, so that a model that uses it neither trains, saves nor broadcasts it.
    """

    def __init__(self, settings: BlipBlock, precision: str = "fp32") -> None:
        self.settings = settings
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.network: Any = nn.ModuleDict(
            {
                "visual_encoder": build_image_encoder(replace(settings.image_encoder, init=None)),
                "text_encoder": build_blip_text_encoder(settings.text_encoder, settings.image_encoder.width),
                "itm_head": nn.Linear(settings.text_encoder.width, 2),
            }
        )
        self.tokenizer: Any = build_blip_tokenizer(settings.tokenizer)

    @classmethod
    def from_checkpoint(cls, model: MafaBlock) -> BlipDiscriminator:
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
        """Take the scoring parts out of a checkpoint; its projections, decoder, teacher and queues are not needed."""
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
            if gathered:
                images, ids, mask = gather_own_first(images), gather_own_first(ids), gather_own_first(mask)
            text_encoder, enc_token_id = self.network["text_encoder"], self.tokenizer.enc_token_id
            states = match(text_encoder, ids[text_index], mask[text_index], images[image_index], enc_token_id)
            logits = self.network["itm_head"](states)
        return logits.float().softmax(dim=1)[:, 1]
