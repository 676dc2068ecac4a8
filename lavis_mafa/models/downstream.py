"""What ALBEF's downstream models share: its encoders without the heads of pre-training, a start from it, and a momentum teacher."""

from __future__ import annotations

import logging
from copy import deepcopy
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from lavis.models.albef_models.albef_outputs import AlbefOutputWithLogits
from lavis.models.base_model import BaseModel
from torch import Tensor, nn

from lavis_mafa.config.checkpoints import OF_MODEL, check_kind
from lavis_mafa.config.schema import AlbefDownstreamBlock, AlbefEncodersBlock, typed_block
from lavis_mafa.errors import UserError
from lavis_mafa.models.encoders import build_image_encoder, build_text_encoder, build_tokenizer, fold_token_type, tokenize
from lavis_mafa.models.momentum import TEACHERS
from lavis_mafa.models.step import check_samples
from lavis_mafa.models.transformer import Bert
from lavis_mafa.models.vit import fit_position_embeddings
from lavis_mafa.objectives import distilled_targets, ramp_up, update_teacher
from lavis_mafa.weights import load_exactly, read_weights

logger = logging.getLogger(__name__)
Block = TypeVar("Block", bound=AlbefEncodersBlock)
Tuned = TypeVar("Tuned", bound=AlbefDownstreamBlock)
NOW = (("epoch", 0), ("iters", 0), ("num_iters_per_epoch", 1))  # when a step is, by LAVIS's names
# beginnings of what a model leaves out that has no such part itself
OF_PRETRAINING = ("text_encoder.cls.", "vision_proj.", "text_proj.", "itm_head.", "ta_head.", "temp")


class AlbefDownstream(BaseModel, Generic[Block]):
    """``visual_encoder`` and ``text_encoder`` as ALBEF's downstream models have them, and a momentum copy of every part where
    ``momentum_distillation`` asks for one, named with ``_m`` appended. Names of parameters are those of LAVIS's classes.

    A subclass names its new parts in ``heads``, makes them in ``__init__``, and ends that with :meth:`_add_teacher`.
    """

    heads: tuple[str, ...] = ("cls_head",)
    settings: Block

    def __init__(self, settings: Block) -> None:
        super().__init__()
        self.settings = settings
        self.tokenizer = build_tokenizer(settings.tokenizer)
        self.visual_encoder = build_image_encoder(settings.image_encoder)
        self.text_encoder = self._text_encoder()

    def _text_encoder(self) -> Bert:
        bert: Bert = build_text_encoder(self.settings.text_encoder, self.settings.image_encoder.width, len(self.tokenizer)).bert
        return bert

    @classmethod
    def from_config(cls, cfg: Any) -> Any:
        """Build from the ``model:`` block; loads ``pretrained`` where it is named, nothing else."""
        settings: Any = typed_block("model", cfg)
        model = cls(settings)
        if settings.pretrained is not None:
            model.load_from_pretrained(settings.pretrained)
        return model

    def words(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """ids and mask [B, T] on the host."""
        return tokenize(self.tokenizer, texts, self.settings.max_text_length)

    # --- the teacher -----------------------------------------------------------------------------------------------

    @property
    def distillation(self) -> Any:
        """``momentum_distillation``; None where it is off, or the model has no such setting."""
        return getattr(self.settings, "momentum_distillation", None)

    @property
    def taught(self) -> tuple[str, ...]:
        """The parts that a teacher has a copy of."""
        return ("visual_encoder", "text_encoder", *self.heads)

    def _add_teacher(self) -> None:
        """To be called at the end of a subclass's ``__init__``."""
        if self.distillation is None:
            return
        for part in self.taught:
            setattr(self, f"{part}_m", deepcopy(getattr(self, part)).requires_grad_(False))
        teacher: Any = self
        teacher.visual_encoder_m.drop_patches = 0.0  # its targets are of whole images

    def _copy_to_teacher(self) -> None:
        for part in self.taught if self.distillation is not None else ():
            getattr(self, f"{part}_m").load_state_dict(getattr(self, part).state_dict())

    def _move_teacher(self, samples: dict[str, Any]) -> None:
        """Towards the student: once in an accumulation window, as the student moves, and in training alone."""
        distillation = self.distillation
        if distillation is None or not self.training or samples.get("iters", 0) % samples.get("window", 1):
            return
        for part in self.taught:
            update_teacher(getattr(self, part).parameters(), getattr(self, f"{part}_m").parameters(), distillation.momentum)

    # --- weights ---------------------------------------------------------------------------------------------------

    def load_checkpoint(self, url_or_filename: str) -> Any:
        """LAVIS's name for loading one's own weights (``load_model(..., checkpoint=FILE)``): as exact as ``load_from_pretrained``."""
        return self.load_from_pretrained(url_or_filename)

    def load_from_pretrained(self, url_or_filename: str) -> Any:
        """Start from a checkpoint of pre-training, or go on from one of this model; both ours, LAVIS's or the authors'.

        Heads of pre-training, its teacher and queues stay out, position embeddings are resized, and the teacher starts as a copy.
        Only a file that has nothing of :attr:`heads` may lack them; they keep their first values, as one line of the log says.

        Returns:
            as LAVIS's, the names that were missing.

        Raises:
            UserError: another kind of checkpoint; or what is missing, left over or of another size, with the keys.
        """
        source, arch = f"model.pretrained: {url_or_filename}", self.settings.arch
        state = read_weights(url_or_filename, "model.pretrained")
        check_kind(state, OF_MODEL[arch], source, arch)
        state, new = self.own_weights(state), tuple(f"{head}." for head in self.heads)
        starts = () if any(name.startswith(new) for name in state) else new
        teacher = tuple(f"{part}_m." for part in self.taught)
        found = load_exactly(self, state, source, may_miss=(*teacher, *starts))
        if starts:
            logger.info("%s has no %s, which starts at random: it is of pre-training.", source, ", ".join(self.heads))
        self._copy_to_teacher()
        return found

    def own_weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint of ALBEF by this model's names and sizes, without what it has no use for."""
        of_pretraining = (part for part in OF_PRETRAINING if part.rstrip(".") not in self._modules)
        unused = (*of_pretraining, *TEACHERS, *(f"{head}_m." for head in self.heads))
        state = {name: value for name, value in state.items() if not name.startswith(unused) and ".pooler." not in name}
        state = {name.replace("text_encoder.bert.", "text_encoder.", 1): value for name, value in state.items()}
        return fit_position_embeddings(fold_token_type(state), self.visual_encoder)


class AlbefClassifier(AlbefDownstream[Tuned]):
    """Tells which label a sentence about one image or two has, by an MLP on [CLS] of the last fusion layer.

    The loss is cross-entropy. With ``momentum_distillation`` its targets are ``(1 - alpha) * label + alpha * teacher`` (ALBEF
    section 3.4), where alpha is there from the first step on, or ``ramped`` up within the first epoch, as its authors set it.

    A subclass names its samples' ``images`` and how many ``classes`` there are, and gives :meth:`logits`.
    """

    images: tuple[str, ...] = ("image",)
    classes: int
    ramped = False

    def __init__(self, settings: Tuned) -> None:
        super().__init__(settings)
        width = settings.text_encoder.width
        self.cls_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, self.classes))
        self._add_teacher()

    def logits(self, samples: dict[str, Any], whose: str = "") -> Tensor:
        """[B, classes]; ``whose``: ``_m`` for the teacher's."""
        raise NotImplementedError

    def forward(self, samples: dict[str, Any]) -> AlbefOutputWithLogits:
        """Loss and logits [B, classes] of samples with ``images`` [B, 3, H, W], ``text_input`` (B texts) and ``label`` LongTensor[B].

        Raises:
            UserError: samples that do not go together.
        """
        samples = self._checked(samples)
        logits = self.logits(samples)
        targets: Tensor = samples["label"]
        teacher = None
        if self.distillation is not None:
            with torch.no_grad():
                self._move_teacher(samples)
                teacher = self.logits(samples, "_m")
            alpha = self.distillation.alpha
            if self.ramped:
                alpha = ramp_up(alpha, *(samples.get(name, default) for name, default in NOW))
            targets = distilled_targets(F.one_hot(targets, self.classes).float(), teacher, alpha)
        return AlbefOutputWithLogits(loss=F.cross_entropy(logits.float(), targets), logits=logits, logits_m=teacher)

    @torch.no_grad()
    def predict(self, samples: dict[str, Any]) -> dict[str, Tensor]:
        """``predictions``, logits [B, classes], and ``targets``, the labels: as LAVIS's."""
        samples = self._checked(samples)
        return {"predictions": self.logits(samples), "targets": samples["label"]}

    def _checked(self, samples: dict[str, Any]) -> dict[str, Any]:
        samples = check_samples(samples, self.settings.image_encoder.image_size, *self.images, "text_input")
        label, count = samples.get("label"), len(samples["text_input"])
        if not isinstance(label, Tensor) or label.shape != (count,) or label.dtype != torch.long:
            raise UserError(f"samples['label'] is {label!r}; needed: a LongTensor [{count}].")
        images = {name: samples[name].to(self.device) for name in self.images}
        return {**samples, **images, "label": label.to(self.device)}
