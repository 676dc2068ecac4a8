"""What goes into a training step and what comes out of it, typed; and what users hand us, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_outputs import ModelOutput

from lavis_mafa.errors import UserError
from lavis_mafa.models.soft_masks import SoftMasks
from lavis_mafa.models.transformer import KeysValues, Reading, named_images
from lavis_mafa.objectives import EncodedBatch, PairModel

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class StepInputs:
    """What one step reads of LAVIS's ``samples``. Who trains without our runner need not give what has a default."""

    samples: dict[str, Any]  # the whole, with ``text_input`` as a list: Con-D gets it
    image: Tensor  # [B, 3, H, W] on the model's device
    captions: list[str]  # B
    index: Tensor | None = None  # LongTensor[B], rows of the data set
    image_key: Tensor | None = None  # LongTensor[B], equal for one image
    grouped: bool = False  # does GRIT's order serve this epoch
    epoch: int = 0
    step: int = 0  # of the epoch
    steps_per_epoch: int = 1
    window: int = 1  # steps whose gradients are accumulated
    second_view: Tensor | None = None  # [B, 3, H, W], the same images augmented once more (TCL)

    @classmethod
    def of(cls, samples: dict[str, Any], device: Any) -> StepInputs:
        """From samples that :func:`check_samples` gives."""
        second = samples.get("image_second_view")
        return cls(
            samples,
            samples["image"].to(device),
            samples["text_input"],
            samples.get("index"),
            samples.get("image_key"),
            bool(samples.get("grouped", False)),
            samples.get("epoch", 0),
            samples.get("iters", 0),
            samples.get("num_iters_per_epoch", 1),
            samples.get("window", 1),
            None if second is None else second.to(device),
        )

    @property
    def first_of_window(self) -> bool:
        return self.step % self.window == 0

    @property
    def update(self) -> int:
        """How many optimizer steps of the run came before this step's own; an epoch's last window may be short.

        Example:
            >>> inputs = StepInputs({}, torch.zeros(1), [], epoch=2, step=4, steps_per_epoch=7, window=3)
            >>> inputs.update, inputs.first_of_window
            (7, False)
        """
        return self.epoch * math.ceil(self.steps_per_epoch / self.window) + self.step // self.window


@dataclass
class DualPairs:
    """What ALBEF's and BLIP's pairs share: K images that any of K texts may be read with.

    For matching alone there are more: B synthetic texts, and the B own images once more, softly masked, from K on.
    """

    model: Any
    candidates: int  # K
    image_embeds: Tensor  # [K, N, width]
    text_mask: Tensor  # BoolTensor[K or K + B, T] on the host
    metrics: dict[str, Tensor] = field(default_factory=dict, kw_only=True)
    soft_masks: SoftMasks | None = field(default=None, kw_only=True)

    @cached_property
    def keys_values(self) -> KeysValues:
        """Of every image once, for all that looks at them."""
        images: KeysValues = self.model.keys_values(self.image_embeds)
        return images

    def reading(self, image_index: Tensor, text_index: Tensor, masked: bool = False) -> tuple[KeysValues, Reading]:
        """Pairs, LongTensor[P] each; ``masked``: if softly masked images are among them, all are, in order, and last."""
        masks = self.soft_masks if masked and len(image_index) and bool(image_index[-1] >= self.candidates) else None
        if masks is not None:
            own = len(masks.kept)
            image_index = torch.cat([image_index[:-own], torch.arange(own)])
        named, index = named_images(self.image_embeds, image_index)
        images = self.keys_values if named is self.image_embeds else self.model.keys_values(named)
        if masks is not None:
            # all own images are named, and so they are the first of those that are
            more = masks.keys_values(self.model, [(key[:own], value[:own]) for key, value in images])
            images = [(torch.cat([key, k]), torch.cat([value, v])) for (key, value), (k, v) in zip(images, more, strict=True)]
            index = torch.cat([index[:-own], torch.arange(own) + len(named)])
        return images, Reading.of(self.text_mask, self.model.device, text_index, index, len(images[0][0]))


class Encoded(NamedTuple):
    """A batch as its host encoded it."""

    pairs: PairModel  # for ITM, LM; with ``vit_states`` [K, N, width] where a Con-D may share the host's frozen ViT
    batch: EncodedBatch  # for ITC and mining
    features: tuple[Tensor, Tensor]  # [B, d] of images and texts, without gradient: for GRIT


@dataclass
class PretrainOutput(ModelOutput):
    """Losses, GRIT's features, metrics for the log, and what Con-D judged; by attribute and by key, as in LAVIS.

    ``stats`` is a dict of plain floats: reading it copies from the device, so read it when logging and not every step.
    """

    loss: Tensor | None = None
    loss_itc: Tensor | None = None
    loss_itm: Tensor | None = None
    loss_mlm: Tensor | None = None
    loss_lm: Tensor | None = None
    image_features: Tensor | None = None  # [B, d] fp32, no gradient
    text_features: Tensor | None = None  # [B, d]
    metrics: dict[str, Tensor] | None = None  # Tensor[] each, on the device
    # [2B] each: image, text (data set indices), probability, positive, ambiguous; None where there is a Con-D, and it was not asked
    verdicts: dict[str, Tensor] | None = None
    ranges: dict[str, Tensor] | None = None  # [2] each, least and greatest: where to look when a loss is not finite

    @property
    def stats(self) -> dict[str, float]:
        metrics = dict(self.metrics or {})
        for name in ("loss", "loss_itc", "loss_itm", "loss_mlm", "loss_lm"):
            value = getattr(self, name)
            if value is not None:
                metrics[name] = value.detach()
        values = torch.stack([v.float() for v in metrics.values()]).tolist()
        return dict(zip(metrics, values, strict=True))


def check_samples(samples: dict[str, Any], image_size: int, *keys: str) -> dict[str, Any]:
    """LAVIS's samples with ``text_input`` as a list; a single text is a list of one.

    Raises:
        UserError: of ``keys`` (image or image0 and image1, text_input) one is missing or of another form, or there are not as many
            texts (or image keys, or indices) as images.
    """
    for key in keys:
        if samples.get(key) is None:
            raise UserError(f"samples has no {key!r}; needed: {' and '.join(keys)}.")
    images = [key for key in keys if key.startswith("image")]
    for key in images:
        image = samples[key]
        if not isinstance(image, Tensor) or image.dim() != 4 or tuple(image.shape[1:]) != (3, image_size, image_size):
            found = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
            hint = "; give one image as image.unsqueeze(0)" if isinstance(image, Tensor) and image.dim() == 3 else ""
            raise UserError(f"samples[{key!r}] is {found}; needed: a tensor [B, 3, {image_size}, {image_size}]{hint}.")
        if not len(image):
            raise UserError(f"samples[{key!r}] has no image; needed: at least one.")
        if image.dtype not in FLOATS:
            raise UserError(f"samples[{key!r}] is {image.dtype}; needed: torch.float32, normalised as an image processor gives it.")
        second = samples.get("image_second_view")
        if second is not None and (not isinstance(second, Tensor) or second.shape != image.shape or second.dtype not in FLOATS):
            found = f"{second.dtype} {list(second.shape)}" if isinstance(second, Tensor) else type(second).__name__
            raise UserError(f"samples['image_second_view'] is {found}; needed: another view of each image, as samples['image'] is.")
    if "text_input" not in keys:
        return samples
    texts = samples["text_input"]
    texts = [texts] if isinstance(texts, str) else list(texts)
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong or not texts:
        raise UserError(f"samples['text_input'] holds {wrong[0] if wrong else 'nothing'!r}; needed: a list of texts, one an image.")
    for key in images:
        if len(texts) != len(samples[key]):
            raise UserError(f"samples has {len(samples[key])} images and {len(texts)} texts (text_input); needed: one text an image.")
    for key in ("index", "image_key"):
        if samples.get(key) is not None and (not isinstance(samples[key], Tensor) or samples[key].shape != (len(texts),)):
            raise UserError(f"samples[{key!r}] is {samples[key]!r}; needed: a LongTensor [{len(texts)}], a number a text.")
    return {**samples, "text_input": texts}


def checked_answers(samples: dict[str, Any]) -> tuple[list[str], Tensor, Tensor]:
    """Of samples as LAVIS's VQA sets have them the A answers, their weights [A], and LongTensor[A] on the host, whose they are.

    Raises:
        UserError: ``answer``, ``weight`` (default: 1 each) and ``n_answers`` (default: one a question) do not go together.
    """
    questions, answers = samples["text_input"], list(samples.get("answer") or ())
    counts = torch.as_tensor(samples.get("n_answers", [1] * len(questions))).cpu()
    weights = torch.as_tensor(samples.get("weight", [1.0] * len(answers)))
    if not answers or len(counts) != len(questions) or int(counts.sum()) != len(answers) or len(weights) != len(answers):
        raise UserError(
            f"samples has {len(questions)} questions, n_answers {counts.tolist()}, {len(answers)} answers and {len(weights)} "
            "weights (answer, weight); needed: n_answers for each question, and as many answers and weights as these add up to."
        )
    return answers, weights, torch.arange(len(questions)).repeat_interleave(counts)


def check_lengths(shortest: int, longest: int, beams: int, lines: int = 1, sampled: bool = False) -> None:
    """Can texts of these lengths be generated, ``lines`` each? A search takes its lines from its beams. Raises UserError."""
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
