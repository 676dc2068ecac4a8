"""What our pre-training models share: one MAFA step on an encoded batch, whoever encoded it.

A host is a class with :meth:`MafaModel.encode` and the row functions below it; training, retrieval, GRIT and Con-D follow from these.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from lavis.models.base_model import BaseModel
from omegaconf import DictConfig
from torch import Tensor, nn

from lavis_mafa.config.checkpoints import LANGUAGE, OF_MODEL, check_kind
from lavis_mafa.config.schema import CHOICES, MafaBlock, loss_weights, typed_block
from lavis_mafa.distributed import gather_own_first, gather_words
from lavis_mafa.errors import UserError
from lavis_mafa.models.con_d import build_discriminator
from lavis_mafa.models.encoders import build_image_encoder, fold_token_type, tokenize
from lavis_mafa.models.language_teacher import LanguageTeacher, build_language_teacher
from lavis_mafa.models.momentum import TEACHERS, MomentumModel, Parts, project
from lavis_mafa.models.retrieval import RetrievalScores, retrieval_scores, without_autocast
from lavis_mafa.models.sanity import BatchCheck, SanityCheck
from lavis_mafa.models.soft_masks import SoftMasks, soft_masks, told_of
from lavis_mafa.models.step import DualPairs, Encoded, PretrainOutput, StepInputs, check_samples
from lavis_mafa.models.synthetic_texts import Guess, ReplaceableWords, SyntheticTexts, by_teacher
from lavis_mafa.models.transformer import POSITIONS, KeysValues, Reading, Tokens, named_images, on_device
from lavis_mafa.models.vit import fit_position_embeddings, resize_images
from lavis_mafa.objectives import (
    Discriminator,
    EncodedBatch,
    ExtraPairs,
    IntraModal,
    ItcSettings,
    StepOutput,
    StepSettings,
    known_positives,
    mafa_step,
    text_key,
    value_range,
)
from lavis_mafa.objectives.mining import UNKNOWN, best_query, most_similar_query
from lavis_mafa.weights import load_exactly, read_weights

logger = logging.getLogger(__name__)
CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "models"
PROJECTIONS = r"(vision_proj|text_proj)\.|temp$"
Block = TypeVar("Block", bound=MafaBlock)
Texts = tuple[Tensor, ...]  # what matching needs of B texts: [B, T, ...] each, padded with 0; the last one is the mask, on the host


class MafaModel(nn.Module, Generic[Block]):
    """Methods of a LAVIS model that trains with MAFA (MAFA Algorithm 1)."""

    lm_loss_name = "loss_lm"
    rank_by = "itm+itc"  # what its papers' code ranks retrieval by; run.rank_by overrides it
    # names of weights (regular expressions) that some losses alone train; all others are trained by each of the three
    trained_by: dict[str, set[str]] = {}
    # of a Con-D: parts that do not score, and beginnings of weights that keep their precision
    not_scoring: tuple[str, ...] = ("vision_proj", "text_proj", "temp")
    keeps_precision: tuple[str, ...] = ()
    settings: Block
    temp: nn.Parameter
    training: bool
    discriminator: Discriminator | None
    language_teacher: LanguageTeacher | None
    replaceable: ReplaceableWords | None
    tokenizer: Any
    con_d_check: SanityCheck | None

    def _prepare_mafa(self) -> None:
        """To be called at the end of a host's ``__init__``."""
        self._freeze_what_no_loss_trains()
        self.batch_scope = "local"
        # the discriminator is no part of the module tree: not trained, not saved, not broadcast
        self.__dict__["discriminator"] = None
        self.__dict__["language_teacher"] = None
        self.con_d_check = None
        self.batch_check = BatchCheck()
        synthetic, asked = self.settings.itm.synthetic, loss_weights(self.settings)["itm"] > 0
        self.replaceable = ReplaceableWords(self.tokenizer, synthetic.top_k) if synthetic is not None and asked else None

    @classmethod
    def from_config(cls, cfg: DictConfig, batch_scope: str = "local") -> Any:
        """Build from the ``model:`` block; loads ``pretrained`` and the discriminator where they are named, nothing else.

        ``batch_scope`` (``run.grit.batch_scope``): does an anchor see this process's candidates (local), or all (global)?
        """
        settings: Any = typed_block("model", cfg)
        model: Any = cls(settings)
        model.batch_scope = batch_scope
        if settings.pretrained is not None:
            model.load_from_pretrained(settings.pretrained)
        if settings.ecm.enabled and settings.discriminator is not None:
            model.set_discriminator(build_discriminator(settings, model))
        if settings.language_teacher is not None:
            model.set_language_teacher(build_language_teacher(settings.language_teacher.init, model.tokenizer))
        return model

    def set_language_teacher(self, teacher: LanguageTeacher | None) -> None:
        """ViLTA's; like Con-D it stays out of the module tree and of checkpoints."""
        self.__dict__["language_teacher"] = teacher

    def set_discriminator(self, discriminator: Discriminator | None) -> None:
        """Use any object with ``match_probability`` as Con-D; it stays out of the module tree and of checkpoints.

        One with a method ``in_step(gathered, vit_states)`` is asked for what judges a step: see :class:`lavis_mafa.models.con_d.ConD`.
        """
        self.__dict__["discriminator"] = discriminator
        block = self.settings.discriminator
        name = type(discriminator).__name__ if block is None else block.checkpoint or block.arch
        self.con_d_check = None if discriminator is None else SanityCheck(name, self.settings.ecm.threshold)

    def _freeze_what_no_loss_trains(self) -> None:
        """DDP waits for a gradient of every weight that wants one; and what no loss moves should not decay either."""
        weights = zip(("itc", "itm", "lm"), loss_weights(self.settings).values(), strict=True)
        on = {loss for loss, weight in weights if weight}
        idle = [names for names, losses in self.trained_by.items() if not losses & on]
        for name, parameter in self.named_parameters():
            if any(re.match(names, name) for names in idle):
                parameter.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """LAVIS's own lists every parameter whenever it is asked."""
        return next(self.parameters()).device

    @property
    def gathers(self) -> bool:
        return self.batch_scope == "global"

    @property
    def intra_modal(self) -> Collection[str]:
        """Which of TCL's contrasts within a modality are on; a step then needs a second view of each image."""
        return getattr(self.settings.itc, "intra_modal", ())

    # --- what a host defines ---------------------------------------------------------------------------------------

    def encode(self, inputs: StepInputs) -> Encoded:
        """Encode a batch once. Where the model :attr:`gathers`, pairs hold all ranks' rows, own ones first."""
        raise NotImplementedError

    def image_states(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] -> the image encoder's token states [B, N, width]."""
        raise NotImplementedError

    def image_tokens(self, states: Tensor) -> Tensor:
        """The same as matching reads them."""
        return states

    def image_features(self, tokens: Tensor) -> Tensor:
        """[B, N, width] -> fp32 [B, d], or [B, queries, d], of which the most similar to a text counts."""
        raise NotImplementedError

    def text_tokens(self, captions: list[str], gathered: bool = False) -> Texts:
        """What matching needs of each text; ``gathered``: of all ranks' texts, own ones first."""
        raise NotImplementedError

    def text_features(self, texts: Texts) -> Tensor:
        """-> fp32 [B, d]"""
        raise NotImplementedError

    def match_rows(self, image_tokens: Tensor, texts: Texts, image_index: Tensor, text_index: Tensor) -> Tensor:
        """Pairs of K images and B texts, LongTensor[P] each -> logits [P, 2]; column 1 is "matches".

        With indices on the host nothing is computed twice, or for padding; with those of a device nothing waits for it.
        """
        raise NotImplementedError

    def own_weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint of this kind by this model's names and sizes."""
        return state

    # --- one training step -----------------------------------------------------------------------------------------

    def forward(self, samples: dict[str, Any]) -> PretrainOutput:
        """One MAFA step on LAVIS's samples (see :class:`StepInputs`); in eval mode without a Con-D with the plain labels.

        Raises:
            UserError: samples that do not go together, training with ECM but without a Con-D, or one that answers no probability.
        """
        inputs = self.inputs(samples)
        if self.training and self.settings.ecm.enabled and self.discriminator is None:
            raise UserError(
                "model.ecm.enabled is true, but the model has no Con-D to ask; hand it one by model.set_discriminator(con_d), name "
                "one in model.discriminator, or train without it: model.ecm.enabled: false."
            )
        if self.training and self.settings.language_teacher is not None and self.language_teacher is None:
            raise UserError(
                "model.language_teacher is set, but the model has none; hand it one by model.set_language_teacher(teacher)."
            )
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
        pairs, batch, features = self.encode(inputs)
        con_d: Any = self.discriminator
        if hasattr(con_d, "in_step"):
            con_d = con_d.in_step(self.gathers, getattr(pairs, "vit_states", None))
        try:
            output = mafa_step(pairs, batch, inputs.samples, self._step_settings(inputs), con_d)
        except ValueError as error:
            index = "unknown" if inputs.index is None else inputs.index.tolist()
            raise UserError(f"{self._explained(str(error))}. Data set indices of the batch: {index}.") from error
        if self.training:
            self._check_step(con_d, inputs, batch, output)
        norms = {"image_feature_norm": features[0].norm(dim=-1), "text_feature_norm": features[1].norm(dim=-1)}
        return PretrainOutput(
            loss=output.loss,
            loss_itc=output.loss_itc,
            loss_itm=output.loss_itm,
            image_features=features[0],
            text_features=features[1],
            metrics=output.metrics | getattr(pairs, "metrics", {}),
            verdicts=self._verdicts(output, inputs),
            ranges=output.ranges | {name: value_range(norm) for name, norm in norms.items()},
            **{self.lm_loss_name: output.loss_lm},
        )

    def inputs(self, samples: dict[str, Any]) -> StepInputs:
        """LAVIS's samples, checked; raises UserError."""
        inputs = StepInputs.of(self.check_samples(samples, "image", "text_input"), self.device)
        if self.intra_modal and inputs.second_view is None:
            raise UserError(
                "samples has no 'image_second_view', with which model.itc.intra_modal contrasts images; needed: each image augmented "
                "once more, as runner_mafa gives it, or intra_modal: []."
            )
        return inputs

    def at_own_size(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] -> images of the size that this model's image encoder reads; as they are where they have it."""
        settings: Any = self.settings
        return resize_images(image, settings.image_encoder.image_size)

    def check_samples(self, samples: dict[str, Any], *keys: str) -> dict[str, Any]:
        settings: Any = self.settings
        return check_samples(samples, settings.image_encoder.image_size, *keys)

    def contrast(
        self,
        inputs: StepInputs,
        image_feature: Tensor,
        text_feature: Tensor,
        momentum: tuple[Tensor, Tensor] | None = None,
        queue: tuple[Tensor, Tensor, Tensor] | None = None,
        distillation: float = 0.0,
        parts: Parts | None = None,
    ) -> EncodedBatch:
        """Similarities of a batch with the keys of this step, which carry no gradient.

        Args:
            inputs: of the step; features of its images [B, d] or [B, queries, d], and of its texts [B, d].
            momentum: features that are the keys, if not the batch's own; their similarities are soft targets (``distillation``).
            queue: features [Q, d] of images and of texts that are contrasted with and never mined, and their keys [Q, 2].
            parts: the momentum model's, of this batch, if images and texts are contrasted with them.
        """
        keys = all_keys = self._keys(inputs)
        own = momentum or (image_feature.detach(), text_feature.detach())
        keys_image, keys_text = own
        if self.gathers:
            all_keys = gather_own_first(keys)
            keys_image, keys_text = gather_own_first(keys_image), gather_own_first(keys_text)
            if parts is not None:
                real = gather_own_first(parts.real.long()).bool()
                parts = Parts(gather_own_first(parts.regions), gather_own_first(parts.words), real)
        candidates = len(all_keys)
        if queue is not None:
            keys_image, keys_text = torch.cat([keys_image, queue[0]]), torch.cat([keys_text, queue[1]])
            all_keys = torch.cat([all_keys, queue[2]])
        sim_i2t, sim_t2i = _similarities(image_feature, text_feature, keys_image, keys_text)
        teacher_i2t, teacher_t2i = (None, None) if momentum is None else _similarities(*own, keys_image, keys_text)
        known = known_positives(keys, all_keys)
        intra = None
        if self.intra_modal:
            whole = (keys_image, keys_text) if "global" in self.intra_modal else None
            intra = _within(image_feature, text_feature, whole, parts)
        return EncodedBatch(sim_i2t, sim_t2i, self.temp, known, candidates, teacher_i2t, teacher_t2i, distillation, intra=intra)

    def synthetic_texts(
        self, inputs: StepInputs, ids: Tensor, mask: Tensor, count: int, guess: Guess | None = None
    ) -> SyntheticTexts | None:
        """Each of B own texts, [B, T] on the host, with one word replaced, and its pair with its image (ViLTA section 3.3).

        Args:
            count: K, the texts that a host holds, which these are to follow.
            guess: who says which words fit; None: the language teacher. Where there is neither, and in evaluation, no text is made.
        """
        how = self.settings.itm.synthetic
        if guess is None and self.language_teacher is not None:
            guess = by_teacher(self.language_teacher, mask, self.device)
        if how is None or self.replaceable is None or guess is None or not self.training:
            return None
        words, exists = self.replaceable.replace(ids, guess, self.device)
        own, texts = torch.arange(len(ids), device=self.device), None
        if how.judge and self._asks(inputs):
            texts = self.tokenizer.batch_decode(words, skip_special_tokens=True)
        pairs = ExtraPairs(own, own + count, torch.zeros_like(own), exists, texts, in_place=how.mode == "replace")
        return SyntheticTexts(words, mask, pairs)

    def _check_step(self, con_d: Discriminator | None, inputs: StepInputs, batch: EncodedBatch, output: StepOutput) -> None:
        self.batch_check.update(inputs.captions, output, self.settings)
        check, hardest = self.con_d_check, output.mined.probability
        if hardest is not None and con_d is not None and check is not None and not check.done:
            hardest = hardest.masked_fill(~output.mined.pairs.exists, float("nan"))
            check.update(con_d, inputs.samples, batch.known_positive, hardest)

    def _explained(self, error: str) -> str:
        """What went wrong in a step; of Con-D's answers also whose they are and what to do."""
        if "match probabilities" not in error:
            return error
        name = type(self.discriminator).__name__ if self.con_d_check is None else self.con_d_check.name
        return (
            f"Con-D ({name}): {error}. Its weights are broken, or too large for their precision: try "
            "model.discriminator.precision: fp32, give another model.discriminator.checkpoint, or set model.ecm.enabled: false"
        )

    def _keys(self, inputs: StepInputs) -> Tensor:
        """LongTensor[B, 2]: who each sample's image is, and what its text is (see :func:`known_positives`)."""
        ecm, texts = self.settings.ecm, inputs.captions
        image = inputs.image_key
        if image is None or not ecm.same_image:
            image = inputs.index  # the stand-in of an unreadable sample repeats a row: that one is known to match
        if image is None:
            image = torch.full((len(texts),), UNKNOWN)
        text = torch.tensor([text_key(text) if ecm.same_text else UNKNOWN for text in texts])
        return torch.stack([image.to(self.device, non_blocking=True), text.to(self.device, non_blocking=True)], dim=1)

    @property
    def _judges(self) -> bool:
        """Is there a Con-D that is asked, if not in every step?"""
        return self.settings.ecm.enabled and self.discriminator is not None

    def _asks(self, inputs: StepInputs) -> bool:
        """Is it asked in this step?"""
        return self._judges and inputs.update % self.settings.ecm.every == 0

    def _step_settings(self, inputs: StepInputs) -> StepSettings:
        itc, when = self.settings.itc, self.settings.itc.smooth_when
        smooth = when == "always" or (when == "grouped" and inputs.grouped)
        itc_weight, itm_weight, lm_weight = loss_weights(self.settings).values()
        return StepSettings(
            itc=ItcSettings(
                weight=itc_weight, smoothing=itc.smoothing if smooth else 0.0, consistency=itc.consistency, focal=itc.focal
            ),
            ecm=replace(self.settings.ecm, enabled=self._asks(inputs)),
            negatives=self.settings.itm.negatives,
            itm_weight=itm_weight,
            lm_weight=lm_weight,
        )

    def _verdicts(self, output: StepOutput, inputs: StepInputs) -> dict[str, Tensor] | None:
        if inputs.index is None or (self._judges and output.mined.probability is None):
            return None
        index = inputs.index.to(self.device)
        index = gather_own_first(index) if self.gathers else index
        pairs, mined = output.mined.pairs, output.mined
        verdicts = {"image": index[pairs.image_index], "text": index[pairs.text_index], "exists": pairs.exists}
        verdicts |= {"image_position": pairs.image_index, "text_position": pairs.text_index}
        if mined.probability is not None and mined.connections is not None:
            verdicts["probability"] = mined.probability
            verdicts["positive"], verdicts["ambiguous"] = mined.connections.positive, mined.connections.ambiguous
        return verdicts

    # --- weights ---------------------------------------------------------------------------------------------------

    def load_checkpoint(self, url_or_filename: str) -> Any:
        """LAVIS's name for loading one's own weights (``load_model(..., checkpoint=FILE)``): as exact as ``load_from_pretrained``."""
        return self.load_from_pretrained(url_or_filename)

    def load_from_pretrained(self, url_or_filename: str) -> Any:
        """Start from a checkpoint of ours, LAVIS's or the authors'; anything that does not fit is an error that lists the keys.

        Position embeddings are resized to this model's image size; a momentum model starts as a copy. A file fine-tuned for retrieval
        may lack the whole language head, as the log says; one of BLIP-2 its frozen image encoder, where ``image_encoder.init`` is set.
        Returns, as LAVIS's, the names that were missing; raises UserError if the file is of another kind, or does not fit.
        """
        source, arch = f"model.pretrained: {url_or_filename}", self.settings.arch
        state = read_weights(url_or_filename, "model.pretrained")
        if arch in OF_MODEL:
            check_kind(state, OF_MODEL[arch], source, arch)
        state = self.own_weights(state)
        return self._load(state, source, _may_lack_language(state, arch, source))

    def _load(self, state: dict[str, Tensor], source: str, may_miss: tuple[str, ...]) -> Any:
        return load_exactly(self, state, source, may_miss=may_miss)

    # --- retrieval, and GRIT's separate pass -----------------------------------------------------------------------

    def image_rows(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] -> what matching needs of each image, and features."""
        tokens = self.image_tokens(self.image_states(image))
        return tokens, self.image_features(tokens)

    def text_rows(self, captions: list[str]) -> tuple[Texts, Tensor]:
        """What matching needs of each text, and features."""
        texts = self.text_tokens(captions)
        return texts, self.text_features(texts)

    def retrieval_scores(self, data_loader: Any, run: Any) -> RetrievalScores:
        """Scores of an evaluation set by ``run.rank_by`` (null or absent: this model's own, or ``itc`` where ``run.k_test`` is 0), and
        cosines."""
        top_k, allowed = getattr(run, "k_test", None), CHOICES["run.rank_by"]
        rank_by = getattr(run, "rank_by", None) or ("itc" if top_k == 0 else self.rank_by)
        if rank_by not in allowed:  # LAVIS's tasks check nothing
            raise UserError(f"run.rank_by is {rank_by!r}, but must be one of {', '.join(allowed)}, or null.")
        if rank_by != "itc" and (not isinstance(top_k, int) or top_k < 1):
            raise UserError(f"run.k_test is {top_k!r}, but must be a whole number, 1 or more.")
        return retrieval_scores(self, data_loader, top_k or 0, rank_by)

    def compute_sim_matrix(self, data_loader: Any, task_cfg: Any) -> tuple[Any, Any]:
        """The same for LAVIS's ``retrieval`` task: numpy [I, T], [T, I]."""
        scores = self.retrieval_scores(data_loader, task_cfg)
        return scores.i2t.numpy(), scores.t2i.numpy()

    @torch.no_grad()
    def grit_features(self, samples: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Features [B, d] without a training step, for GRIT's separate pass (GRIT-VLP Table 4, "naive")."""
        _, image = self.image_rows(samples["image"].to(self.device))
        _, text = self.text_rows(samples["text_input"])
        return most_similar_query(image, text) if image.dim() == 3 else image, text


def _similarities(image: Tensor, text: Tensor, keys_image: Tensor, keys_text: Tensor) -> tuple[Tensor, Tensor]:
    """[B, K] of images with text keys, and of texts with image keys; in fp32, since bf16 would change a tenth of what is mined."""
    with torch.autocast(image.device.type, enabled=False):
        t2i = text @ keys_image.T if keys_image.dim() == 2 else best_query(keys_image, text).T
        return best_query(image, keys_text), t2i


def _within(image: Tensor, text: Tensor, whole: tuple[Tensor, Tensor] | None, parts: Parts | None) -> IntraModal:
    """Cosines of images and texts [B, d] with the keys of their own modality [C, d], and with parts [K, M, d]; in fp32."""
    with torch.autocast(image.device.type, enabled=False):
        return IntraModal(
            None if whole is None else (image @ whole[0].T, text @ whole[1].T),
            None
            if parts is None
            else (torch.einsum("bd,kmd->bkm", image, parts.regions), torch.einsum("bd,kmd->bkm", text, parts.words), parts.real),
        )


def _may_lack_language(state: dict[str, Tensor], arch: str, source: str) -> tuple[str, ...]:
    """What a checkpoint for matching alone may do without: the whole language head, and then the temperature. A YAML that would train
    that head has been refused before (:func:`lavis_mafa.config.checkpoints.check_kinds`)."""
    part, what, _ = LANGUAGE.get(arch, ("", "", ""))
    if any(name.startswith(part) for name in state):
        return ()
    lacking = (part,) if "temp" in state else (part, "temp")
    names = ", ".join(name.rstrip(".") for name in lacking)
    logger.info("%s has no %s (%s): it keeps its first values. Retrieval and features need none.", source, what, names)
    return lacking


class DualEncoder(MafaModel[Block], MomentumModel, BaseModel):
    """What ALBEF and BLIP share: an image and a text encoder with one feature each, contrasted with or without a momentum model."""

    settings: Block
    feature_output: Any  # LAVIS's class of extracted features
    of_multimodal: tuple[str, ...]  # which of them its extractor gives in this mode
    visual_encoder: Any
    text_encoder: Any

    def __init__(self, settings: Block) -> None:
        super().__init__()
        self.settings = settings
        sizes: Any = settings
        self.tokenizer = self.build_tokenizer(settings.tokenizer)
        self.visual_encoder = build_image_encoder(sizes.image_encoder)
        self.add_text(sizes.text_encoder, sizes.image_encoder.width, len(self.tokenizer))
        self.vision_proj = nn.Linear(sizes.image_encoder.width, settings.embed_dim)
        self.text_proj = nn.Linear(sizes.text_encoder.width, settings.embed_dim)
        self.itm_head = nn.Linear(sizes.text_encoder.width, 2)
        self.temp = nn.Parameter(torch.tensor(settings.temperature))
        self._prepare_mafa()
        self.told = told_of(self.tokenizer) if sizes.itm.soft_mask is not None and loss_weights(settings)["itm"] else None
        if settings.itc.momentum_distillation is not None:
            self._add_momentum_model(settings.itc.momentum_distillation.queue_size)

    # --- what they define ------------------------------------------------------------------------------------------

    def build_tokenizer(self, name: str) -> Any:
        raise NotImplementedError

    def add_text(self, settings: Any, encoder_width: int, words: int) -> None:
        """Set ``text_encoder``, and a decoder where there is one."""
        raise NotImplementedError

    def keys_values(self, image_tokens: Tensor) -> KeysValues:
        """[K, N, width] -> what any text reads of each image."""
        raise NotImplementedError

    def fuse(
        self, images: KeysValues, texts: Tensor, reading: Reading, chosen: Tokens | None = None, layers: int | None = None
    ) -> Tensor:
        """P of B texts, each read with its image -> [S, width], or of the ``chosen`` tokens; ``texts``: the tuple's first.

        ``layers``: by the first so many of those that look at images; None: by all.
        """
        raise NotImplementedError

    def text_states(self, ids: Tensor, mask: Tensor, padded: bool = False) -> Tensor:
        """Texts read alone: [B, T] -> [B, T, width]; ``padded``: what LAVIS has after a text's last word too."""
        raise NotImplementedError

    def first_states(self, texts: Texts) -> Tensor:
        """The first token of each text, read alone: -> [B, width]."""
        raise NotImplementedError

    def fused(self, ids: Tensor, states: Tensor) -> Tensor:
        """What :meth:`fuse` reads of texts: their words, or, in ALBEF, what its text layers made of them."""
        return ids

    # --- rows ------------------------------------------------------------------------------------------------------

    def image_states(self, image: Tensor) -> Tensor:
        return self.visual_encoder.forward_features(image)

    def image_features(self, tokens: Tensor) -> Tensor:
        return project(self.vision_proj, tokens[:, 0])

    def words(self, captions: list[str], gathered: bool = False) -> tuple[Tensor, Tensor]:
        """ids and mask [B, T] on the host; ``gathered``: of all ranks, own ones first."""
        ids, mask = tokenize(self.tokenizer, captions, self.settings.max_text_length)
        return gather_words(ids, mask, self.tokenizer.pad_token_id, self.device) if gathered else (ids, mask)

    def text_tokens(self, captions: list[str], gathered: bool = False) -> Texts:
        return self.words(captions, gathered)

    def text_features(self, texts: Texts) -> Tensor:
        return project(self.text_proj, self.first_states(texts))

    def match_rows(self, image_tokens: Tensor, texts: Texts, image_index: Tensor, text_index: Tensor) -> Tensor:
        image_tokens, image_index = named_images(image_tokens, image_index)
        reading = Reading.of(texts[-1], image_tokens.device, text_index, image_index, len(image_tokens))
        images = self.keys_values(image_tokens)
        return without_autocast(self.itm_head, self.fuse(images, texts[0], reading, reading.first))

    def reading(self, mask: Tensor, padded: bool = False) -> Reading:
        """All texts [B, T] alone; ``padded`` as LAVIS reads them."""
        if not padded:
            return Reading.of(mask, self.device)
        return Reading.padded(on_device(mask, self.device), torch.arange(len(mask), device=self.device))

    # --- one training step -----------------------------------------------------------------------------------------

    def contrast_with_queue(
        self, inputs: StepInputs, image_feature: Tensor, text_feature: Tensor, ids: Tensor, mask: Tensor
    ) -> tuple[EncodedBatch, Tensor | None]:
        """Similarities with the keys of this step and of the queue, and the momentum model's image states [B, N, width]."""
        if self.settings.itc.momentum_distillation is None:
            return self.contrast(inputs, image_feature, text_feature), None
        if self.training and inputs.first_of_window:  # once in an accumulation window, as the student moves
            self._momentum_update()
        view = inputs.second_view if self.intra_modal else inputs.image
        assert view is not None
        states, *own, parts = self._momentum_features(view, ids, mask, local="local" in self.intra_modal)
        queue = self.image_queue.T, self.text_queue.T, torch.cat([self.idx_queue, self.text_queue_keys]).T
        weight = self._distillation_weight(inputs)
        batch = self.contrast(inputs, image_feature, text_feature, (own[0], own[1]), queue, weight, parts)
        self._enqueue(own[0], own[1], self._keys(inputs))
        return batch, states

    def soft_masks(self, images: KeysValues, texts: Tensor, ids: Tensor, mask: Tensor) -> SoftMasks:
        """See :func:`lavis_mafa.models.soft_masks.soft_masks`."""
        return soft_masks(self, images, texts, ids, mask)

    def add_masked_images(self, batch: EncodedBatch, pairs: DualPairs, texts: Tensor, ids: Tensor, mask: Tensor) -> None:
        """In training, and with ``itm.soft_mask``: each of B own images once more, for matching with its own text (SoftMask).

        ``texts``: [B, T, ...] as matching reads them; ids, mask: [B, T] on the host.
        """
        if not self.training or self.told is None:
            return
        if pairs.candidates == len(ids):
            images = pairs.keys_values
        else:  # those of all ranks, of which the own ones come first
            with torch.no_grad():
                images = self.keys_values(pairs.image_embeds[: len(ids)])
        pairs.soft_masks = self.soft_masks(images, texts, ids, mask)
        batch.soft_masked = pairs.soft_masks.pairs(pairs.candidates)

    def own_weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return fit_position_embeddings(fold_token_type(state), self.visual_encoder)

    def _load(self, state: dict[str, Tensor], source: str, may_miss: tuple[str, ...]) -> Any:
        state = {n: v for n, v in state.items() if not n.startswith(TEACHERS) and ".pooler." not in n}
        missing = super()._load(state, source, (*TEACHERS, *may_miss))
        if self.settings.itc.momentum_distillation is not None:
            self._copy_to_momentum_model()
        return missing

    # --- LAVIS's interface -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def extract_features(self, samples: dict[str, Any], mode: str | list[str] = "multimodal") -> Any:
        """Features as LAVIS's ``albef_feature_extractor`` and ``blip_feature_extractor`` give them, by their names.

        Args:
            samples: ``image`` [B, 3, H, W] and ``text_input``, a list of B texts or a single text; each only where its mode needs it.
            mode: ``image`` (``image_embeds`` [B, N, width], ``image_embeds_proj`` [B, N, d]), ``text`` (``text_embeds`` [B, T, width],
                ``text_embeds_proj`` [B, T, d]) or ``multimodal`` (``multimodal_embeds`` [B, T, width], and what LAVIS gives with
                it); several in a list. UserError for another, or for samples that lack what it needs.
        """
        modes, found = [mode] if isinstance(mode, str) else list(mode or []), dict[str, Tensor]()
        wrong = [m for m in modes if m not in ("image", "text", "multimodal")]
        if wrong or not modes:
            raise UserError(f"mode is {mode!r}; allowed: image, text, multimodal.")
        keys = [key for key, m in (("image", "image"), ("text_input", "text")) if m in modes or "multimodal" in modes]
        samples = self.check_samples(samples, *keys)
        if "image" in keys:
            found["image_embeds"] = self.image_states(samples["image"].to(self.device))
            found["image_embeds_proj"] = F.normalize(self.vision_proj(found["image_embeds"]), dim=-1)
        if "text_input" in keys:
            ids, mask = tokenize(self.tokenizer, samples["text_input"], POSITIONS)  # LAVIS cuts no text here
            found["text_embeds"] = self.text_states(ids, mask, padded=True)
            found["text_embeds_proj"] = F.normalize(self.text_proj(found["text_embeds"]), dim=-1)
        if "multimodal" in modes:
            every = torch.arange(len(mask), device=self.device)
            reading = Reading.padded(on_device(mask, self.device), every, every)
            images = self.keys_values(found["image_embeds"])
            found["multimodal_embeds"] = self.fuse(images, self.fused(ids, found["text_embeds"]), reading).view(*mask.shape, -1)
        asked: dict[str, tuple[str, ...]] = {name: (f"{name}_embeds", f"{name}_embeds_proj") for name in ("image", "text")}
        asked["multimodal"] = self.of_multimodal
        return self.feature_output(**{name: found[name] for m in modes for name in asked[m]})
