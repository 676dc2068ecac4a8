"""What our pre-training models return: LAVIS-style attribute and key access, plus what GRIT and the records need.

What a model is handed: one caption may be a text, and images and captions must go together.

Batches that leave an objective nothing to do: their losses are finite, and the user is told once.

What our pre-training models share: one MAFA step on an encoded batch, whoever encoded it.

What ALBEF and BLIP share: an image and a text encoder with one feature each, contrasted with or without a momentum teacher.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

from lavis_mafa.config.checkpoints import LANGUAGE, OF_MODEL, check_kind
from lavis_mafa.config.schema import CHOICES, MafaBlock, loss_weights, typed_block
from lavis_mafa.distributed import gather_own_first, rank
from lavis_mafa.errors import UserError
from lavis_mafa.models.bert import fold_token_type
from lavis_mafa.models.encoders import fit_position_embeddings, tokenize
from lavis_mafa.models.momentum import TEACHERS, MomentumTeacher, project
from lavis_mafa.models.retrieval import RetrievalScores, retrieval_scores
from lavis_mafa.models.sanity import SanityCheck
from lavis_mafa.objectives import (
    Discriminator,
    EncodedBatch,
    StepOutput,
    StepSettings,
    known_positives,
    mafa_step,
    text_key,
    value_range,
)
from lavis_mafa.objectives.mining import UNKNOWN
from lavis_mafa.objectives.pretraining import ItcSettings, PairModel
from lavis_mafa.weights import load_exactly, read_weights


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


FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def checked(samples: dict[str, Any], image_size: int, *keys: str) -> dict[str, Any]:
    """The samples with ``text_input`` as a list; a single text is a list of one.

    Args:
        samples: of LAVIS's form: ``image`` [B, 3, H, W], ``text_input`` list of B texts.
        image_size: H and W of the model.
        keys: what is needed of the two.

    Raises:
        UserError: one is missing or of another form, or there are not as many texts (or keys, or indices) as images.
    """
    for key in keys:
        if samples.get(key) is None:
            raise UserError(f"samples has no {key!r}; needed: {' and '.join(keys)}.")
    if "image" in keys:
        image = samples["image"]
        if not isinstance(image, Tensor) or image.dim() != 4 or tuple(image.shape[1:]) != (3, image_size, image_size):
            found = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
            hint = "; give one image as image.unsqueeze(0)" if isinstance(image, Tensor) and image.dim() == 3 else ""
            raise UserError(f"samples['image'] is {found}; needed: a tensor [B, 3, {image_size}, {image_size}]{hint}.")
        if not len(image):
            raise UserError("samples['image'] has no image; needed: at least one.")
        if image.dtype not in FLOATS:
            raise UserError(f"samples['image'] is {image.dtype}; needed: torch.float32, normalised as an image processor gives it.")
    if "text_input" not in keys:
        return samples
    texts = samples["text_input"]
    texts = [texts] if isinstance(texts, str) else list(texts)
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong or not texts:
        raise UserError(f"samples['text_input'] holds {wrong[0] if wrong else 'nothing'!r}; needed: a list of texts, one an image.")
    if "image" in keys and len(texts) != len(samples["image"]):
        raise UserError(f"samples has {len(samples['image'])} images and {len(texts)} texts (text_input); needed: one text an image.")
    for key in ("index", "image_key"):
        if samples.get(key) is not None and (not isinstance(samples[key], Tensor) or samples[key].shape != (len(texts),)):
            raise UserError(f"samples[{key!r}] is {samples[key]!r}; needed: a LongTensor [{len(texts)}], a number a text.")
    return {**samples, "text_input": texts}


def check_lengths(shortest: int, longest: int, beams: int, lines: int = 1, sampled: bool = False) -> None:
    """What is generated can be: 1 to ``longest`` tokens, and at least one line, which a search takes from its beams.

    Raises:
        UserError: it cannot.
    """
    if longest < 1 or shortest > longest:
        raise UserError(
            f"min_length is {shortest} and max_length {longest}; allowed: a max_length of 1 or more, and at least min_length."
        )
    if beams < 1 and not sampled:
        raise UserError(f"num_beams is {beams}; allowed: 1 or more.")
    if lines < 1:
        raise UserError(f"num_captions is {lines}; allowed: 1 or more.")
    if lines > beams and not sampled:
        raise UserError(f"num_captions is {lines}, but num_beams is {beams}; allowed: at most as many.")


logger = logging.getLogger(__name__)
ASKED = 16384  # candidates without a single new positive until that is worth a word

LACKING = {
    "candidate": (
        "A batch has no negative: it is one sample, or all its samples show one image or have one text. ITM learns from positives "
        "alone there; use a larger run.batch_size_train, or samples of more images."
    ),
    "negative": (
        "ECM leaves a batch no negative: every hard negative of it was called positive, or ambiguous without a second one. ITM "
        "learns from positives alone there; raise model.ecm.threshold (now {threshold}), or look at Con-D."
    ),
    "caption": (
        "All {count} captions of a batch are the same text ({caption!r}): nothing tells images that match it from others. Look at the "
        "annotations."
    ),
    "word": "All captions of a batch are empty: there is no word to match or to predict. Look at the annotations.",
    "threshold": "model.ecm.threshold is {threshold}, and no probability exceeds it: ECM never finds a false negative.",
    "positive": (
        "Con-D called none of {asked} hard negatives positive: ECM has not changed a label so far. Lower model.ecm.threshold (now "
        "{threshold}), or look at Con-D; data without false negatives need no ECM."
    ),
}


class NothingToDo:
    """Looks at each training step, and warns on rank 0 at most once of each thing that is lacking.

    What only the device knows is summed there and read after steps 1, 2, 4, 8, ..., so that no step has to wait for it.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.said: set[str] = set()
        self.sums: Tensor | None = None

    def look(self, captions: list[str], step: StepOutput, settings: MafaBlock) -> None:
        """After each training step.

        Args:
            captions: the batch's own.
            step: what came of it.
            settings: of the model.
        """
        if rank() != 0:
            return
        ecm = settings.ecm
        if ecm.enabled and ecm.threshold >= 1.0:
            self._say("threshold", threshold=ecm.threshold)
        if not any(caption.strip() for caption in captions):
            self._say("word")
        elif len(captions) > 1 and len(set(captions)) == 1:
            self._say("caption", count=len(captions), caption=captions[0])
        self.steps += 1
        self.sums = _counts(step) + (0 if self.sums is None else self.sums)
        if self.steps & (self.steps - 1) == 0:
            no_candidate, no_negative, asked, found = self.sums.tolist()
            if no_candidate:
                self._say("candidate")
            if no_negative:
                self._say("negative", threshold=ecm.threshold)
            if asked >= ASKED and not found:
                self._say("positive", asked=asked, threshold=ecm.threshold)

    def _say(self, what: str, **values: object) -> None:
        if what not in self.said:
            self.said.add(what)
            logger.warning(LACKING[what].format(**values))


@torch.no_grad()
def _counts(step: StepOutput) -> Tensor:
    """LongTensor[4]: has the batch no candidate; has it some, but no negative is left; candidates judged; those found positive."""
    verdicts, none = step.mined.connections, torch.zeros((), dtype=torch.long, device=step.loss.device)
    some = step.mined.pairs.exists.any()
    accuracy = step.figures.get("itm_accuracy_negative")  # not there without ITM, which then lacks nothing
    no_negative = none.bool() if accuracy is None else accuracy.isnan()  # a share of nothing
    asked = none if verdicts is None else step.mined.pairs.exists.sum()
    found = none if verdicts is None else verdicts.positive.sum()
    return torch.stack([(no_negative & ~some).long(), (no_negative & some).long(), asked, found])


CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "models"
PROJECTIONS = r"(vision_proj|text_proj)\.|temp$"
Block = TypeVar("Block", bound=MafaBlock)


def may_lack(state: dict[str, Tensor], arch: str, source: str) -> tuple[str, ...]:
    """What a checkpoint for matching alone may do without: the whole language head, and then the temperature. A warning names it."""
    part, what, _ = LANGUAGE[arch]
    if any(name.startswith(part) for name in state):
        return ()
    lacking = [part] if "temp" in state else [part, "temp"]
    logger.warning("%s has no %s (%s): it keeps its first values. Retrieval and features need none.", source, what, ", ".join(lacking))
    return tuple(lacking)


class MafaModel(nn.Module, Generic[Block]):
    """Methods of a LAVIS model that trains with MAFA (MAFA Algorithm 1). A host adds :meth:`encode` and retrieval's parts."""

    lm_loss_name = "loss_lm"
    rank_by = "itm+itc"  # what its papers' code ranks retrieval by; run.rank_by overrides it
    # names of weights (regular expressions) that some losses alone train; all others are trained by each of the three
    trained_by: dict[str, set[str]] = {}
    settings: Block
    temp: nn.Parameter
    device: Any
    training: bool
    discriminator: Discriminator | None
    con_d_check: SanityCheck | None

    def _prepare_mafa(self) -> None:
        """To be called at the end of a host's ``__init__``."""
        self._freeze_what_no_loss_trains()
        self.batch_scope = "local"  # set from run.grit.batch_scope: whose candidates an anchor sees
        # the discriminator is no part of the module tree: not trained, not saved, not broadcast
        self.__dict__["discriminator"] = None
        self.con_d_check = None
        self.nothing_to_do = NothingToDo()

    @classmethod
    def from_config(cls, cfg: DictConfig) -> Any:
        """Build from the ``model:`` block; loads ``pretrained`` and the discriminator where they are named, nothing else."""
        from lavis_mafa.models.con_d import build_discriminator

        settings: Any = typed_block("model", cfg)
        model: Any = cls(settings)
        if settings.pretrained is not None:
            model.load_from_pretrained(settings.pretrained)
        if settings.ecm.enabled and settings.discriminator is not None:
            model.set_discriminator(build_discriminator(settings, model))
        return model

    def load_checkpoint(self, url_or_filename: str) -> Any:
        """LAVIS's name for loading one's own weights (``load_model(..., checkpoint=FILE)``): as exact as ``load_from_pretrained``."""
        return self.load_from_pretrained(url_or_filename)

    def load_from_pretrained(self, url_or_filename: str) -> Any:
        """Start from a checkpoint; a host defines it."""
        raise NotImplementedError

    def set_discriminator(self, discriminator: Discriminator | None) -> None:
        """Use any object with ``match_probability`` as Con-D; it stays out of the module tree and of checkpoints."""
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

    # --- what a host defines ---------------------------------------------------------------------------------------

    def encode(self, samples: dict[str, Any]) -> tuple[PairModel, EncodedBatch, tuple[Tensor, Tensor]]:
        """Encode a batch once: pair lists for ITM and LM, similarities for ITC and mining, features [B, d] for GRIT."""
        raise NotImplementedError

    def text_rows(self, captions: list[str]) -> tuple[tuple[Tensor, ...], Tensor]:
        """See :class:`lavis_mafa.models.retrieval.RetrievalModel`."""
        raise NotImplementedError

    def image_rows(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`lavis_mafa.models.retrieval.RetrievalModel`."""
        raise NotImplementedError

    def match_rows(self, image_states: Tensor, text: tuple[Tensor, ...]) -> Tensor:
        """See :class:`lavis_mafa.models.retrieval.RetrievalModel`."""
        raise NotImplementedError

    # --- one training step -----------------------------------------------------------------------------------------

    def forward(self, samples: dict[str, Any]) -> PretrainOutput:
        """One MAFA step on a batch.

        Args:
            samples: ``image`` [B, 3, H, W], ``text_input`` list of B captions; from the runner also ``index`` and ``image_key``
                LongTensor[B], ``grouped`` (does GRIT's order serve this epoch), ``epoch``, ``iters``, ``num_iters_per_epoch``.

        In eval mode without a Con-D the losses are those of the plain labels.

        Raises:
            UserError: samples that do not go together, training with ECM but without a Con-D, or one that answers no probability.
        """
        samples = self.checked(samples, "image", "text_input")
        if self.training and self.settings.ecm.enabled and self.discriminator is None:
            raise UserError(
                "model.ecm.enabled is true, but the model has no Con-D to ask; hand it one by model.set_discriminator(con_d), name "
                "one in model.discriminator, or train without it: model.ecm.enabled: false."
            )
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
        samples = {**samples, "gathered": self.batch_scope == "global"}
        pairs, batch, features = self.encode(samples)
        try:
            output = mafa_step(pairs, batch, samples, self._step_settings(samples), self.discriminator)
        except ValueError as error:
            index = samples["index"].tolist() if "index" in samples else "unknown"
            raise UserError(f"{self._blamed(str(error))}. Data set indices of the batch: {index}.") from error
        if self.training:
            self._look_at(samples, batch, output)
        norms = {"image_feature_norm": features[0].norm(dim=-1), "text_feature_norm": features[1].norm(dim=-1)}
        return PretrainOutput(
            loss=output.loss,
            loss_itc=output.loss_itc,
            loss_itm=output.loss_itm,
            image_features=features[0],
            text_features=features[1],
            figures=output.figures,
            verdicts=self._verdicts(output, samples),
            ranges=output.ranges | {name: value_range(norm) for name, norm in norms.items()},
            **{self.lm_loss_name: output.loss_lm},
        )

    def retrieval_scores(self, data_loader: Any, run: Any) -> RetrievalScores:
        """Scores of an evaluation set by ``run.rank_by`` (null or absent: this model's own) with ``run.k_test``, and cosines."""
        rank_by, allowed = getattr(run, "rank_by", None) or self.rank_by, CHOICES["run.rank_by"]
        if rank_by not in allowed:  # LAVIS's tasks check nothing
            raise UserError(f"run.rank_by is {rank_by!r}, but must be one of {', '.join(allowed)}, or null.")
        top_k = getattr(run, "k_test", None)
        if rank_by != "itc" and (not isinstance(top_k, int) or top_k < 1):
            raise UserError(f"run.k_test is {top_k!r}, but must be a whole number, 1 or more.")
        return retrieval_scores(self, data_loader, top_k or 0, rank_by)

    def compute_sim_matrix(self, data_loader: Any, task_cfg: Any) -> tuple[Any, Any]:
        """The same for LAVIS's ``retrieval`` task: numpy [I, T], [T, I]."""
        scores = self.retrieval_scores(data_loader, task_cfg)
        return scores.i2t.numpy(), scores.t2i.numpy()

    def checked(self, samples: dict[str, Any], *keys: str) -> dict[str, Any]:
        """See :func:`lavis_mafa.models.base.checked`."""
        settings: Any = self.settings
        return checked(samples, settings.image_encoder.image_size, *keys)

    # --- parts of a step -------------------------------------------------------------------------------------------

    def _look_at(self, samples: dict[str, Any], batch: EncodedBatch, output: StepOutput) -> None:
        """What a user should be told about a training step; it changes nothing."""
        self.nothing_to_do.look(samples["text_input"], output, self.settings)
        check = self.con_d_check
        if self.settings.ecm.enabled and self.discriminator is not None and check is not None and not check.done:
            hardest = output.mined.probability
            if hardest is not None:
                hardest = hardest.masked_fill(~output.mined.pairs.exists, float("nan"))
            check.look(self.discriminator, samples, batch.known_positive, hardest)

    def _blamed(self, error: str) -> str:
        """What went wrong in a step; of Con-D's answers also whose they are and what to do."""
        if "match probabilities" not in error:
            return error
        name = type(self.discriminator).__name__ if self.con_d_check is None else self.con_d_check.name
        return (
            f"Con-D ({name}): {error}. Its weights are broken, or too large for their precision: try "
            "model.discriminator.precision: fp32, give another model.discriminator.checkpoint, or set model.ecm.enabled: false"
        )

    def _keys(self, samples: dict[str, Any]) -> Tensor:
        """LongTensor[B, 2]: who each sample's image is, and what its text is (see :func:`known_positives`)."""
        ecm, texts = self.settings.ecm, samples["text_input"]
        image = samples.get("image_key")
        if image is None or not ecm.same_image:
            image = samples.get("index")  # the stand-in of an unreadable sample repeats a row: that one is known to match
        if image is None:
            image = torch.full((len(texts),), UNKNOWN)
        text = torch.tensor([text_key(text) if ecm.same_text else UNKNOWN for text in texts])
        return torch.stack([image.to(self.device), text.to(self.device)], dim=1)

    def _step_settings(self, samples: dict[str, Any]) -> StepSettings:
        itc, when = self.settings.itc, self.settings.itc.smooth_when
        smooth = when == "always" or (when == "grouped" and bool(samples.get("grouped", False)))
        itc_weight, itm_weight, lm_weight = loss_weights(self.settings).values()
        return StepSettings(
            itc=ItcSettings(weight=itc_weight, smoothing=itc.smoothing if smooth else 0.0, consistency=itc.consistency),
            ecm=self.settings.ecm if self.discriminator is not None else replace(self.settings.ecm, enabled=False),
            negatives=self.settings.itm.negatives,
            itm_weight=itm_weight,
            lm_weight=lm_weight,
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
        """ids and mask [B, T]; see :func:`lavis_mafa.models.encoders.tokenize`."""
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
