"""What ALBEF and BLIP share: an image and a text encoder with one feature each, contrasted with or without a momentum teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lavis_mafa.common.distributed import gather_own_first
from lavis_mafa.common.weights import load_exactly, read_weights
from lavis_mafa.models.albef_encoders import fit_position_embeddings
from lavis_mafa.models.bert import fold_token_type
from lavis_mafa.models.mafa_model import Block, MafaModel
from lavis_mafa.models.momentum_teacher import TAUGHT, MomentumTeacher, project
from lavis_mafa.models.tokenizing import tokenize
from lavis_mafa.objectives import EncodedBatch, known_positives


class DualEncoder(MafaModel[Block], MomentumTeacher):
    """Methods of a host whose parts have LAVIS's names: ``visual_encoder``, ``text_encoder``, ``vision_proj``, ``text_proj``."""

    settings: Block
    tokenizer: Any
    visual_encoder: Any
    text_encoder: Any
    vision_proj: Any
    text_proj: Any

    def load_from_pretrained(self, url_or_filename: str) -> None:
        """Start from a checkpoint of ours, LAVIS's or the authors'; anything that does not fit is an error that lists the keys.

        Position embeddings are resized to this model's image size; BERT's token-type row is folded in; a momentum teacher
        starts as a copy of the student.
        """
        state = fold_token_type(read_weights(url_or_filename, "model.pretrained"))
        state = fit_position_embeddings(state, self.visual_encoder)
        teacher = tuple(f"{part}_m." for part in TAUGHT) + ("image_queue", "text_queue", "queue_ptr", "idx_queue")
        state = {n: v for n, v in state.items() if not n.startswith(teacher)}
        load_exactly(self, state, f"model.pretrained: {url_or_filename}", may_miss=teacher)
        if self.settings.itc.momentum_distillation is not None:
            self._copy_to_teacher()

    @torch.no_grad()
    def grit_features(self, samples: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Features [B, d] without a training step, for GRIT's separate pass (GRIT-VLP Table 4, "naive")."""
        image_embeds, text_embeds, _, _ = self._token_states(samples, gathered=False)
        return self.image_feature(image_embeds), self.text_feature(text_embeds)

    def image_rows(self, image: Tensor) -> tuple[Tensor, Tensor]:
        states = self.visual_encoder.forward_features(image)
        return states, self.image_feature(states)

    # --- parts of a step -------------------------------------------------------------------------------------------

    def tokenize(self, captions: list[str], gathered: bool = False) -> tuple[Tensor, Tensor]:
        """ids and mask [B, T]; see :func:`lavis_mafa.models.tokenizing.tokenize`."""
        return tokenize(self.tokenizer, captions, self.settings.max_text_length, self.device, gathered)

    def image_feature(self, image_embeds: Tensor) -> Tensor:
        """[B, N, width] -> [B, d] fp32."""
        return project(self.vision_proj, image_embeds)

    def text_feature(self, text_embeds: Tensor) -> Tensor:
        """[B, T, width] -> [B, d] fp32."""
        return project(self.text_proj, text_embeds)

    def text_states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The text alone, without the image: [B, T] -> [B, T, width]."""
        return self.text_encoder.base_model(ids, attention_mask=mask, return_dict=True, mode="text").last_hidden_state

    def _token_states(self, samples: dict[str, Any], gathered: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ids, mask = self.tokenize(samples["text_input"], gathered)
        image_embeds = self.visual_encoder.forward_features(samples["image"].to(self.device))
        return image_embeds, self.text_states(ids, mask), ids, mask

    def _contrast(
        self, samples: dict[str, Any], image_feature: Tensor, text_feature: Tensor, ids: Tensor, mask: Tensor
    ) -> tuple[EncodedBatch, Tensor | None]:
        """Similarities with the keys of this step (and of the queue), and the teacher's image states [B, N, width]."""
        keys = self._keys(samples)
        teacher_images, keys_image, keys_text, distillation = None, image_feature.detach(), text_feature.detach(), 0.0
        momentum = self.settings.itc.momentum_distillation
        if momentum is not None:
            teacher_images, keys_image, keys_text = self._teach(samples, ids, mask)
            distillation = self._distillation(samples)
        teacher_own = keys_image, keys_text
        all_keys = keys
        if self.batch_scope == "global":
            all_keys = gather_own_first(keys)
            keys_image, keys_text = gather_own_first(keys_image), gather_own_first(keys_text)
        candidates = len(all_keys)
        if momentum is not None:
            keys_image = torch.cat([keys_image, self.image_queue.T.clone()])
            keys_text = torch.cat([keys_text, self.text_queue.T.clone()])
            all_keys = torch.cat([all_keys, torch.cat([self.idx_queue, self.text_queue_keys]).T])
        with torch.autocast(self.device.type, enabled=False):  # bf16 similarities would change a tenth of what is mined
            sim_i2t, sim_t2i = image_feature @ keys_text.T, text_feature @ keys_image.T
            teacher = (teacher_own[0] @ keys_text.T, teacher_own[1] @ keys_image.T) if momentum is not None else (None, None)
        batch = EncodedBatch(
            sim_i2t=sim_i2t,
            sim_t2i=sim_t2i,
            temperature=self.temp,
            known_positive=known_positives(keys, all_keys),
            candidates=candidates,
            teacher_i2t=teacher[0],
            teacher_t2i=teacher[1],
            distillation=distillation,
        )
        if momentum is not None:
            self._remember(*teacher_own, keys)
        return batch, teacher_images
