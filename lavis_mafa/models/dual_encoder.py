"""What ALBEF and BLIP share: an image and a text encoder with one feature each, contrasted with or without a momentum teacher."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lavis_mafa.common.checkpoint_kinds import OF_MODEL, check_kind
from lavis_mafa.common.distributed import gather_own_first
from lavis_mafa.common.errors import UserError
from lavis_mafa.common.weights import load_exactly, read_weights
from lavis_mafa.models.albef_encoders import fit_position_embeddings
from lavis_mafa.models.bert import fold_token_type
from lavis_mafa.models.mafa_model import Block, MafaModel, may_lack
from lavis_mafa.models.momentum_teacher import TEACHERS, MomentumTeacher, project
from lavis_mafa.models.tokenizing import tokenize
from lavis_mafa.objectives import EncodedBatch, known_positives


class DualEncoder(MafaModel[Block], MomentumTeacher):
    """Methods of a host whose parts have LAVIS's names: ``visual_encoder``, ``text_encoder``, ``vision_proj``, ``text_proj``."""

    settings: Block
    feature_output: Any  # LAVIS's class of extracted features
    of_multimodal: tuple[str, ...]  # which of them its extractor gives in this mode
    tokenizer: Any
    visual_encoder: Any
    text_encoder: Any
    vision_proj: Any
    text_proj: Any

    def load_from_pretrained(self, url_or_filename: str) -> Any:
        """Start from a checkpoint of ours, LAVIS's or the authors'; anything that does not fit is an error that lists the keys.

        Position embeddings are resized to this model's image size; BERT's token-type row is folded in; a momentum teacher
        starts as a copy of the student. A file fine-tuned for retrieval may lack the whole language head: a warning says so.

        Returns:
            as LAVIS's: the names that were missing.

        Raises:
            UserError: the file is of another kind, or does not fit.
        """
        source = f"model.pretrained: {url_or_filename}"
        state = fold_token_type(read_weights(url_or_filename, "model.pretrained"))
        check_kind(state, OF_MODEL[self.settings.arch], source, self.settings.arch)
        state = fit_position_embeddings(self.by_own_names(state), self.visual_encoder)
        state = {n: v for n, v in state.items() if not n.startswith(TEACHERS) and ".pooler." not in n}
        told = load_exactly(self, state, source, may_miss=(*TEACHERS, *may_lack(state, self.settings.arch, source)))
        if self.settings.itc.momentum_distillation is not None:
            self._copy_to_teacher()
        return told

    def by_own_names(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint of this kind by this model's names."""
        return state

    @torch.no_grad()
    def grit_features(self, samples: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Features [B, d] without a training step, for GRIT's separate pass (GRIT-VLP Table 4, "naive")."""
        image_embeds, text_embeds, _, _ = self._token_states(samples, gathered=False)
        return self.image_feature(image_embeds), self.text_feature(text_embeds)

    @torch.no_grad()
    def extract_features(self, samples: dict[str, Any], mode: str | list[str] = "multimodal") -> Any:
        """Features as LAVIS's ``albef_feature_extractor`` and ``blip_feature_extractor`` give them, by their names.

        Args:
            samples: ``image`` [B, 3, H, W] and ``text_input``, a list of B texts or a single text; each only where its mode needs it.
            mode: ``image`` (``image_embeds`` [B, N, width], ``image_embeds_proj`` [B, N, d]), ``text`` (``text_embeds`` [B, T, width],
                ``text_embeds_proj`` [B, T, d]) or ``multimodal`` (``multimodal_embeds`` [B, T, width], and what LAVIS gives with
                it); several in a list.

        Raises:
            UserError: another mode, or samples that lack what it needs.
        """
        modes, found = [mode] if isinstance(mode, str) else list(mode or []), dict[str, Tensor]()
        wrong = [m for m in modes if m not in ("image", "text", "multimodal")]
        if wrong or not modes:
            raise UserError(f"mode is {mode!r}; allowed: image, text, multimodal.")
        keys = [key for key, m in (("image", "image"), ("text_input", "text")) if m in modes or "multimodal" in modes]
        samples = self.checked(samples, *keys)
        if "image" in keys:
            found["image_embeds"] = self.visual_encoder.forward_features(samples["image"].to(self.device))
            found["image_embeds_proj"] = F.normalize(self.vision_proj(found["image_embeds"]), dim=-1)
        if "text_input" in keys:
            positions = self.text_encoder.config.max_position_embeddings  # LAVIS cuts no text here
            ids, mask = tokenize(self.tokenizer, samples["text_input"], positions, self.device)
            found["text_embeds"] = self.text_states(ids, mask)
            found["text_embeds_proj"] = F.normalize(self.text_proj(found["text_embeds"]), dim=-1)
        if "multimodal" in modes:
            found["multimodal_embeds"] = self.fused(found["image_embeds"], found["text_embeds"], ids, mask)
        asked: dict[str, tuple[str, ...]] = {name: (f"{name}_embeds", f"{name}_embeds_proj") for name in ("image", "text")}
        asked["multimodal"] = self.of_multimodal
        return self.feature_output(**{name: found[name] for m in modes for name in asked[m]})

    def fused(self, image_embeds: Tensor, text_embeds: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """B texts, each with its image: [B, N, width], [B, T, width], [B, T], [B, T] -> [B, T, width]."""
        raise NotImplementedError

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
