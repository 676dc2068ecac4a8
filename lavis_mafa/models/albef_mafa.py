"""``albef_mafa``: ALBEF on LAVIS's encoders with MAFA's step. One class gives ALBEF, GRIT-VLP and MAFA by YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lavis.models.base_model import BaseModel
from omegaconf import DictConfig
from torch import Tensor, nn

from lavis_mafa.common.check import typed_block
from lavis_mafa.common.distributed import gather_own_first
from lavis_mafa.common.errors import UserError
from lavis_mafa.common.settings import ModelBlock
from lavis_mafa.common.weights import read_weights
from lavis_mafa.models.albef_encoders import (
    build_image_encoder,
    build_text_encoder,
    build_tokenizer,
    fold_token_type,
    load_exactly,
)
from lavis_mafa.models.albef_pairs import AlbefPairs
from lavis_mafa.models.albef_scoring import score_matrices
from lavis_mafa.models.albef_teacher import TAUGHT, MomentumTeacher, project
from lavis_mafa.models.outputs import PretrainOutput
from lavis_mafa.models.tokenizing import tokenize
from lavis_mafa.objectives import (
    Discriminator,
    EncodedBatch,
    StepSettings,
    mafa_step,
)
from lavis_mafa.objectives.pretraining import ItcSettings, StepOutput

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "models"


class AlbefMafa(MomentumTeacher, BaseModel):
    """ALBEF with MAFA (MAFA sections 4.1, 4.2).

    Parameter names are LAVIS's, so a checkpoint loads into ``albef_retrieval``, ``albef_vqa``, ``albef_nlvr`` and back.

    Example:
        >>> from lavis.models import load_model
        >>> model = load_model("albef_mafa", "tiny")
    """

    discriminator: Discriminator | None

    PRETRAINED_MODEL_CONFIG_DICT = {
        "base": str(CONFIGS / "albef_mafa_base.yaml"),
        "tiny": str(CONFIGS / "albef_mafa_tiny.yaml"),
    }

    def __init__(self, settings: ModelBlock) -> None:
        super().__init__()
        self.settings = settings
        self.tokenizer = build_tokenizer(settings.tokenizer)
        self.visual_encoder = build_image_encoder(settings.image_encoder)
        self.text_encoder = build_text_encoder(settings.text_encoder, settings.image_encoder.width)
        self.vision_proj = nn.Linear(settings.image_encoder.width, settings.embed_dim)
        self.text_proj = nn.Linear(settings.text_encoder.width, settings.embed_dim)
        self.itm_head = nn.Linear(settings.text_encoder.width, 2)
        self.temp = nn.Parameter(torch.tensor(settings.temperature))
        self.batch_scope = "local"  # set from run.grit.batch_scope: whose candidates an anchor sees
        # the discriminator is no part of the module tree: not trained, not saved, not broadcast
        self.__dict__["discriminator"] = None
        distillation = settings.itc.momentum_distillation
        if distillation is not None:
            self._add_teacher(distillation.queue_size)

    @classmethod
    def from_config(cls, cfg: DictConfig) -> AlbefMafa:
        """Build from the ``model:`` block; loads ``pretrained`` and the discriminator where they are named."""
        from lavis_mafa.discriminators import build_discriminator

        settings: ModelBlock = typed_block("model", cfg)
        model = cls(settings)
        if settings.pretrained is not None:
            model.load_from_pretrained(settings.pretrained)
        if settings.ecm.enabled and settings.discriminator is not None:
            model.set_discriminator(build_discriminator(settings))
        return model

    def set_discriminator(self, discriminator: Discriminator | None) -> None:
        """Use any object with ``match_probability`` as Con-D; it stays out of the module tree and of checkpoints."""
        self.__dict__["discriminator"] = discriminator

    def load_from_pretrained(self, url_or_filename: str) -> None:
        """Start from a checkpoint of ours, LAVIS's or the authors'; anything that does not fit is an error that lists the keys.

        Position embeddings are resized to this model's image size; BERT's token-type row is folded in; a momentum teacher
        starts as a copy of the student.
        """
        from lavis.models.vit import interpolate_pos_embed

        state = fold_token_type(read_weights(url_or_filename, "model.pretrained"))
        name = "visual_encoder.pos_embed"
        if name in state and state[name].shape[-1] == self.visual_encoder.pos_embed.shape[-1]:
            state[name] = interpolate_pos_embed(state[name], self.visual_encoder)
        teacher = tuple(f"{part}_m." for part in TAUGHT) + ("image_queue", "text_queue", "queue_ptr", "idx_queue")
        state = {n: v for n, v in state.items() if not n.startswith(teacher)}
        load_exactly(self, state, f"model.pretrained: {url_or_filename}", may_miss=teacher)
        if self.settings.itc.momentum_distillation is not None:
            self._copy_to_teacher()

    # --- one training step -----------------------------------------------------------------------------------------

    def forward(self, samples: dict[str, Any]) -> PretrainOutput:
        """One MAFA step on a batch.

        Args:
            samples: ``image`` [B, 3, H, W], ``text_input`` list of B captions; from the runner also ``index`` and ``image_key``
                LongTensor[B], ``grouped`` (does GRIT's order serve this epoch), ``epoch``, ``iters``, ``num_iters_per_epoch``.
        """
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
        samples = {**samples, "gathered": self.batch_scope == "global"}
        pairs, batch, features = self.encode(samples)
        try:
            output = mafa_step(pairs, batch, samples, self._step_settings(samples), self.discriminator)
        except ValueError as error:
            index = samples["index"].tolist() if "index" in samples else "unknown"
            raise UserError(f"{error}. Data set indices of the batch: {index}.") from error
        return PretrainOutput(
            loss=output.loss,
            loss_itc=output.loss_itc,
            loss_itm=output.loss_itm,
            loss_mlm=output.loss_lm,
            image_features=features[0],
            text_features=features[1],
            figures=output.figures,
            verdicts=self._verdicts(output, samples),
        )

    def encode(self, samples: dict[str, Any]) -> tuple[AlbefPairs, EncodedBatch, tuple[Tensor, Tensor]]:
        """Both encoders once: pair lists for ITM and MLM, similarities for ITC and mining, features [B, d] for GRIT."""
        gathered = self.batch_scope == "global"
        image_embeds, text_embeds, ids, mask = self._token_states(samples, gathered)
        image_feature, text_feature = self.image_feature(image_embeds), self.text_feature(text_embeds)
        own = image_feature.detach(), text_feature.detach()
        keys = self._image_keys(samples)
        teacher_images, keys_image, keys_text, distillation = None, *own, 0.0
        momentum = self.settings.itc.momentum_distillation
        if momentum is not None:
            teacher_images, keys_image, keys_text = self._teach(samples, ids, mask)
            distillation = self._distillation(samples)
        teacher_own = keys_image, keys_text
        all_keys = keys
        if gathered:
            image_embeds = gather_own_first(image_embeds, with_gradient=True)
            text_embeds = gather_own_first(text_embeds, with_gradient=True)
            ids, mask, all_keys = gather_own_first(ids), gather_own_first(mask), gather_own_first(keys)
            keys_image, keys_text = gather_own_first(keys_image), gather_own_first(keys_text)
            teacher_images = None if teacher_images is None else gather_own_first(teacher_images)
        candidates = len(all_keys)
        if momentum is not None:
            keys_image = torch.cat([keys_image, self.image_queue.T.clone()])
            keys_text = torch.cat([keys_text, self.text_queue.T.clone()])
            all_keys = torch.cat([all_keys, self.idx_queue[0].clone()])
        with torch.autocast(self.device.type, enabled=False):  # bf16 similarities would change a tenth of what is mined
            sim_i2t, sim_t2i = image_feature @ keys_text.T, text_feature @ keys_image.T
            teacher = (teacher_own[0] @ keys_text.T, teacher_own[1] @ keys_image.T) if momentum is not None else (None, None)
        batch = EncodedBatch(
            sim_i2t=sim_i2t,
            sim_t2i=sim_t2i,
            temperature=self.temp,
            known_positive=self._known_positive(keys, all_keys),
            candidates=candidates,
            teacher_i2t=teacher[0],
            teacher_t2i=teacher[1],
            distillation=distillation,
        )
        if momentum is not None:
            self._remember(*teacher_own, keys)
        return AlbefPairs(self, image_embeds, text_embeds, ids, mask, teacher_images, distillation), batch, own

    @torch.no_grad()
    def grit_features(self, samples: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Features [B, d] without a training step, for GRIT's separate pass (GRIT-VLP Table 4, "naive")."""
        image_embeds, text_embeds, _, _ = self._token_states(samples, gathered=False)
        return self.image_feature(image_embeds), self.text_feature(text_embeds)

    def compute_sim_matrix(self, data_loader: Any, task_cfg: Any) -> tuple[Any, Any]:
        """Scores for LAVIS's ``retrieval`` task: ITC top-k, then ITM on those (ALBEF section 5). numpy [I, T], [T, I]."""
        return score_matrices(self, data_loader, int(task_cfg.k_test))

    def tokenize(self, captions: list[str], gathered: bool = False) -> tuple[Tensor, Tensor]:
        """ids and mask [B, T]; see :func:`lavis_mafa.models.tokenizing.tokenize`."""
        return tokenize(self.tokenizer, captions, self.settings.max_text_length, self.device, gathered)

    def image_feature(self, image_embeds: Tensor) -> Tensor:
        """Normalised projection of [CLS]: [B, N, width] -> [B, d], always fp32 since it decides what is mined."""
        return project(self.vision_proj, image_embeds)

    def text_feature(self, text_embeds: Tensor) -> Tensor:
        """[B, T, width] -> [B, d] fp32."""
        return project(self.text_proj, text_embeds)

    # --- parts of a step -------------------------------------------------------------------------------------------

    def _token_states(self, samples: dict[str, Any], gathered: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ids, mask = self.tokenize(samples["text_input"], gathered)
        image_embeds = self.visual_encoder.forward_features(samples["image"].to(self.device))
        text_embeds = self.text_encoder.bert(ids, attention_mask=mask, return_dict=True, mode="text").last_hidden_state
        return image_embeds, text_embeds, ids, mask

    def _image_keys(self, samples: dict[str, Any]) -> Tensor:
        keys = samples.get("image_key")
        if keys is None or not self.settings.ecm.same_image:
            keys = samples.get("index")  # the stand-in of an unreadable sample repeats a row: that one is known to match
        if keys is None:
            return torch.full((len(samples["text_input"]),), -1, device=self.device)
        return keys.to(self.device)

    def _known_positive(self, keys: Tensor, all_keys: Tensor) -> Tensor:
        same = (keys[:, None] == all_keys[None, :]) & (keys[:, None] >= 0)
        return same | torch.eye(len(keys), len(all_keys), dtype=torch.bool, device=keys.device)

    def _step_settings(self, samples: dict[str, Any]) -> StepSettings:
        itc, when = self.settings.itc, self.settings.itc.smooth_when
        smooth = when == "always" or (when == "grouped" and bool(samples.get("grouped", False)))
        return StepSettings(
            itc=ItcSettings(smoothing=itc.smoothing if smooth else 0.0, consistency=itc.consistency),
            ecm=self.settings.ecm,
            negatives=self.settings.itm.negatives,
        )

    def _verdicts(self, output: StepOutput, samples: dict[str, Any]) -> dict[str, Tensor] | None:
        if "index" not in samples:
            return None
        index = samples["index"].to(self.device)
        index = gather_own_first(index) if self.batch_scope == "global" else index
        pairs, mined = output.mined.pairs, output.mined
        verdicts = {"image": index[pairs.image_index], "text": index[pairs.text_index], "exists": pairs.exists}
        verdicts |= {"image_position": pairs.image_index, "text_position": pairs.text_index}
        if mined.probability is not None and mined.connections is not None:
            verdicts["probability"] = mined.probability
            verdicts["positive"], verdicts["ambiguous"] = mined.connections.positive, mined.connections.ambiguous
        return verdicts
