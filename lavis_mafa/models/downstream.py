"""What ALBEF's downstream models share: its encoders without the heads of pre-training, a start from it, and a momentum teacher."""

from __future__ import annotations

import logging
from copy import deepcopy
from typing import Any, Generic, TypeVar

from lavis.models.base_model import BaseModel
from torch import Tensor

from lavis_mafa.config.checkpoints import OF_MODEL, check_kind
from lavis_mafa.config.schema import AlbefDownstreamBlock, typed_block
from lavis_mafa.models.encoders import build_image_encoder, build_text_encoder, build_tokenizer, fold_token_type, tokenize
from lavis_mafa.models.momentum import TEACHERS
from lavis_mafa.models.vit import fit_position_embeddings
from lavis_mafa.objectives import update_teacher
from lavis_mafa.weights import load_exactly, read_weights

logger = logging.getLogger(__name__)
Block = TypeVar("Block", bound=AlbefDownstreamBlock)
OF_PRETRAINING = ("text_encoder.cls.", "vision_proj.", "text_proj.", "itm_head.", "temp")  # beginnings of what nothing here asks


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
        self.text_encoder = build_text_encoder(settings.text_encoder, settings.image_encoder.width, len(self.tokenizer)).bert

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
    def taught(self) -> tuple[str, ...]:
        """The parts that a teacher has a copy of."""
        return ("visual_encoder", "text_encoder", *self.heads)

    def _add_teacher(self) -> None:
        """To be called at the end of a subclass's ``__init__``."""
        if self.settings.momentum_distillation is None:
            return
        for part in self.taught:
            setattr(self, f"{part}_m", deepcopy(getattr(self, part)).requires_grad_(False))
        teacher: Any = self
        teacher.visual_encoder_m.drop_patches = 0.0  # its targets are of whole images

    def _copy_to_teacher(self) -> None:
        for part in self.taught if self.settings.momentum_distillation is not None else ():
            getattr(self, f"{part}_m").load_state_dict(getattr(self, part).state_dict())

    def _move_teacher(self, samples: dict[str, Any]) -> None:
        """Towards the student: once in an accumulation window, as the student moves, and in training alone."""
        distillation = self.settings.momentum_distillation
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
        unused = (*OF_PRETRAINING, *TEACHERS, *(f"{head}_m." for head in self.heads))
        state = {name: value for name, value in state.items() if not name.startswith(unused) and ".pooler." not in name}
        state = {name.replace("text_encoder.bert.", "text_encoder.", 1): value for name, value in state.items()}
        return fit_position_embeddings(fold_token_type(state), self.visual_encoder)
