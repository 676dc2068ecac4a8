"""Con-D: who decides whether a hard negative is a false one. Any of our models can, in training and in an offline pass."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import lavis  # noqa: F401 - registers us before a module of ours is half imported
import torch
import torch.nn.functional as F
from lavis.common.registry import registry
from torch import Tensor, nn

from lavis_mafa.config.checkpoints import OF_MODEL, kind_of
from lavis_mafa.config.schema import MafaBlock, con_d_block
from lavis_mafa.distributed import gather_own_first
from lavis_mafa.errors import UserError
from lavis_mafa.models.momentum import TEACHERS
from lavis_mafa.models.vit import EvaVit, fit_position_embeddings
from lavis_mafa.objectives import Discriminator
from lavis_mafa.weights import load_exactly, read_weights

logger = logging.getLogger(__name__)
VIT = "visual_encoder."
POOLERS = ("text_encoder.pooler.", "text_encoder.bert.pooler.")
PROJECTIONS = ("vision_proj", "text_proj")
EVA_SIDE = 224  # pixels that the published EVA was trained on


@dataclass
class ConD:
    """A model's matching head as the probability that a pair matches.

    It holds a module but is none itself, so that a model that uses it neither trains, saves nor broadcasts it.
    """

    network: Any  # a MafaModel in eval mode, without gradients
    dtype: torch.dtype = torch.float32  # of what it computes in
    shared: bool = False  # its image encoder is the model's own, frozen one, and does not run twice
    gathered: bool = False  # do indices name rows of all ranks, own ones first?
    vit_states: Tensor | None = None  # [K, N, width] of that shared encoder

    def in_step(self, gathered: bool, vit_states: Tensor | None) -> ConD:
        """The same for one step of the model that asks it."""
        return replace(self, gathered=gathered, vit_states=vit_states)

    @torch.no_grad()
    def match_probability(self, samples: dict[str, Any], image_index: Tensor, text_index: Tensor) -> Tensor:
        """One pass over P pairs: LongTensor[P], LongTensor[P] -> [P] fp32 in [0, 1].

        ``samples``: ``image`` [B, 3, H, W] of any size (none is needed where the image encoder is shared) and ``text_input``;
        ``more_texts`` are this process's own that follow those of all.
        """
        network, device = self.network, image_index.device
        if network.device != device:
            network.to(device)
        with torch.autocast(device.type, enabled=False):
            if self.shared:
                assert self.vit_states is not None, "a Con-D that shares the model's image encoder is asked through in_step"
                states = self.vit_states.detach().to(self.dtype)
            else:
                image = network.at_own_size(samples["image"].to(device))
                image = image.to(torch.float32 if VIT in network.keeps_precision else self.dtype)
                states = self._gathered(network.image_states(image).to(self.dtype))
            images = network.image_tokens(states)
            texts = network.text_tokens(samples["text_input"], self.gathered)
            if more := samples.get("more_texts"):
                texts = joined(texts, network.text_tokens(more))
            if device.type == "cpu":  # a pair that was mined from both sides is asked about once; a GPU would have to be waited for
                pairs, place = torch.unique(torch.stack([image_index, text_index]), dim=1, return_inverse=True)
                logits = network.match_rows(images, texts, *pairs)[place]
            else:
                logits = network.match_rows(images, texts, image_index, text_index)
        return logits.float().softmax(dim=1)[:, 1]

    def _gathered(self, rows: Tensor) -> Tensor:
        return gather_own_first(rows) if self.gathered else rows


def joined(texts: tuple[Tensor, ...], more: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What matching needs of texts, and of more of them: [B, T, ...] and [C, U, ...] each -> [B + C, the longer, ...]."""
    width = max(texts[-1].shape[1], more[-1].shape[1])

    def padded(rows: Tensor) -> Tensor:
        return F.pad(rows, (*(0, 0) * (rows.dim() - 2), 0, width - rows.shape[1]))

    return tuple(torch.cat([padded(one), padded(other)]) for one, other in zip(texts, more, strict=True))


class Truth(Protocol):
    """What data know of themselves: see :class:`lavis_mafa.datasets.ground_truth.GroundTruth`."""

    def matches(self, concept: Tensor, text_key: Tensor) -> Tensor: ...

    def text_key(self, text: str) -> int: ...


@dataclass
class GroundTruthDiscriminator:
    """The perfect Con-D of data whose truth is known: an upper bound (MAFA Table 16), never a training method for real data.

    Probability 1 where the concepts match and 0 elsewhere; selected only by the name ``ground_truth``.
    """

    truth: Truth
    gathered: bool = False

    def in_step(self, gathered: bool, _: Tensor | None) -> GroundTruthDiscriminator:
        return replace(self, gathered=gathered)

    def match_probability(self, samples: dict[str, Any], image_index: Tensor, text_index: Tensor) -> Tensor:
        """[P], [P] -> [P]; ``samples`` must carry ``concept`` and ``text_key`` LongTensor[B]. Of ``more_texts``
        it knows those that are captions of the data; of any other it says 0.
        """
        concept, text_key = samples["concept"].to(image_index.device), samples["text_key"].to(image_index.device)
        if self.gathered:
            concept, text_key = gather_own_first(concept), gather_own_first(text_key)
        if more := samples.get("more_texts"):
            text_key = torch.cat([text_key, text_key.new_tensor([self.truth.text_key(text) for text in more])])
        return self.truth.matches(concept[image_index].cpu(), text_key[text_index].cpu()).float().to(image_index.device)


# --- from a checkpoint -------------------------------------------------------------------------------------------------


def build_discriminator(model: MafaBlock, host: nn.Module | None = None) -> Discriminator | None:
    """The Con-D that ``model.discriminator`` names, or None for ``ground_truth`` (the task sets it, knowing the data).

    Its sizes are the model's own (the paper's choice) unless the block names others; any family can work for any other. Of a checkpoint
    the parts that score are taken, whatever else it holds; raises UserError if there is none, or it does not fit.

    Args:
        model: the settings of the model it works for.
        host: that model. Its frozen ViT is shared where the checkpoint's has equal weights, or where the checkpoint (as LAVIS writes
            those of BLIP-2) has none, no file is named for it, and the sizes agree.
    """
    block = model.discriminator
    if block is None or block.arch == "ground_truth":
        return None
    if not block.checkpoint:
        raise UserError("model.discriminator.checkpoint is null; an untrained Con-D is never used.")
    network, shared = _load(con_d_block(model), block.checkpoint, "model.discriminator.checkpoint", host=host)
    return as_con_d(network, block.precision, shared)


def load_con_d(block: Any, path: str, device: torch.device, flag: str = "--con-d", mines: bool = True) -> Any:
    """The model of a ``model:`` block with the weights of ``path``, for an offline pass: in eval mode, without gradients.

    What does not score (language heads and decoders, a momentum model, queues, the temperature) may be missing from the checkpoint or
    left over in it; all else must fit exactly.

    Args:
        block: of one of our pre-training models. Its encoders' ``init`` is not read, but for a ViT that the checkpoint leaves out.
        path: a checkpoint of ours or LAVIS's (pre-training, retrieval, image-text matching); ``flag`` is what named it.
        mines: are its features used; if not, its projections need not fit either.

    Raises:
        UserError: the file is missing, is of another kind, has no matching head, or does not fit (the message lists the keys).
    """
    network, _ = _load(block, path, flag, features=mines, exact=True)
    return network.eval().requires_grad_(False).to(device)


def as_con_d(network: Any, precision: str = "fp32", shared: bool = False) -> ConD:
    """A network of :func:`untrained`, with its weights, as it judges in training."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    network.eval().requires_grad_(False)
    for name, weight in network.named_parameters():
        if not name.startswith(network.keeps_precision):
            weight.data = weight.data.to(dtype)
    return ConD(network, dtype, shared)


def untrained(block: Any, vit: str = "own", features: bool = False) -> Any:
    """The parts that score of the model of a typed block, with first weights; nothing is read but the tokenizer.

    Args:
        block: of any of our pre-training models.
        vit: ``own``, ``init`` (from the file that ``image_encoder.init`` names), or ``shared`` (none is built).
        features: keep the projections, for mining.
    """
    parts: Any = {name: replace(getattr(block, name), init=None) for name in ("text_encoder", "qformer") if hasattr(block, name)}
    if vit == "own":
        parts["image_encoder"] = replace(block.image_encoder, init=None)
    elif vit == "shared":
        parts["image_encoder"] = replace(block.image_encoder, init=None, depth=0)
    itc, ecm = replace(block.itc, momentum_distillation=None), replace(block.ecm, enabled=False)
    itm = replace(block.itm, synthetic=None)
    settings = replace(block, pretrained=None, discriminator=None, language_teacher=None, itc=itc, ecm=ecm, itm=itm, **parts)
    model_class = registry.get_model_class(block.arch)
    if model_class is None:
        raise UserError(f"{block.arch} is not registered with LAVIS; call lavis_mafa.plugin.register() where LAVIS_MAFA_AUTOLOAD is 0.")
    with torch.random.fork_rng(devices=[]):  # training draws the same with and without a Con-D
        network = model_class(settings)
    for part in _not_scoring(network, features):
        owner, _, name = part.rpartition(".")
        setattr(network.get_submodule(owner), name, None)
    if vit == "shared":
        network.visual_encoder = None
    return network


def _not_scoring(network: Any, features: bool) -> list[str]:
    return [part for part in network.not_scoring if not (features and part in PROJECTIONS)]


def _load(
    block: Any, path: str, key: str, features: bool = False, exact: bool = False, host: nn.Module | None = None
) -> tuple[Any, bool]:
    """A network that scores, with the weights of a checkpoint; does it share the host's image encoder?"""
    source, state = f"{key}: {path}", read_weights(path, key)
    kind, wanted = kind_of(state), OF_MODEL.get(block.arch)
    if kind is not None and wanted is not None and kind != wanted:
        raise UserError(f"{source} is {kind}, but {'model.arch' if exact else 'a Con-D of'} {block.arch} needs {wanted}.")
    if not any(name.startswith("itm_head.") for name in state):
        raise UserError(
            f"{source} has no matching head (itm_head), so it cannot judge pairs; give a checkpoint of pre-training, retrieval or "
            "image-text matching."
        )
    has_vit, side = any(name.startswith(VIT) for name in state), block.image_encoder.image_size
    encoder: Any = getattr(host, "visual_encoder", None)
    shared = _can_share(encoder, block.image_encoder, state)
    if shared and encoder.patch_embed.image_size != side:
        raise UserError(
            f"model.discriminator.image_size is {side}, but Con-D has the model's frozen image encoder, which has another size "
            f"({encoder.patch_embed.image_size}) and runs anyway; allowed here: null."
        )
    trained = _trained_side(state, block.image_encoder)
    if trained not in (None, side):
        logger.warning(
            "%s was trained on images of %d x %d pixels, but sees %d x %d: its position embeddings are resized, which nothing has "
            "trained, and it may miss many pairs that it would find otherwise.%s",
            *(source, trained, trained, side, side),
            "" if exact else f" model.discriminator.image_size: {trained} shows it what it knows.",
        )
    if shared:
        logger.info("Con-D %s the model's frozen image encoder: it runs once", "has the weights of" if has_vit else "takes")
    elif not has_vit and hasattr(block.image_encoder, "freeze") and block.image_encoder.init is None:
        if exact:
            raise UserError(f"{source} holds no image encoder; name its file in model.image_encoder.init.")
        raise UserError(
            f"{source} holds no image encoder, and the model has none of its size that is frozen as model.image_encoder.init gives it; "
            "name the file of Con-D's in model.discriminator.image_encoder.init."
        )
    from_file = not has_vit and block.image_encoder.init is not None and hasattr(block.image_encoder, "freeze")
    network = untrained(block, "shared" if shared else "init" if from_file else "own", features)
    if not shared:
        state = network.own_weights(state)
    left_out = (*TEACHERS, *POOLERS, *_not_scoring(network, features), *((VIT,) if shared else ()))
    parts = {name.split(".")[0] for name in network.state_dict()}
    state = {n: v for n, v in state.items() if not n.startswith(left_out) and (exact or n.split(".")[0] in parts)}
    load_exactly(network, state, source, may_miss=(VIT,) if from_file else ())
    return network, shared


def _trained_side(state: dict[str, Tensor], vit: Any) -> int | None:
    """Pixels of the images that a ViT was trained on, by the position embeddings of a checkpoint or of the file that ``init`` names."""
    if not any(name.startswith(VIT) for name in state) and vit.init is not None:
        if vit.init == "eva_clip_g":
            return EVA_SIDE
        state = read_weights(vit.init, "image_encoder.init", names_only=True)
    positions = next((value for name, value in state.items() if name.removeprefix(VIT) == "pos_embed"), None)
    if positions is None or positions.dim() != 3:
        return None  # none at all, or for the loading to name
    return math.isqrt(max(0, positions.shape[1] - 1)) * int(vit.patch_size)


def _can_share(encoder: Any, wanted: Any, state: dict[str, Tensor]) -> bool:
    """Is a model's frozen ViT the one that a checkpoint holds, in the ViT's precision, or that it left out?

    What it left out is a ViT as published, of the same size, if no other file is named.
    """
    if not isinstance(encoder, EvaVit) or not encoder.frozen or not hasattr(wanted, "freeze"):
        return False
    own = encoder.state_dict()
    theirs = fit_position_embeddings(state, encoder)
    theirs = {name.removeprefix(VIT): value for name, value in theirs.items() if name.startswith(VIT)}
    if not theirs:
        sizes = encoder.num_features, len(encoder.blocks), encoder.patch_embed.patch_size
        return encoder.as_published and wanted.init is None and sizes == (wanted.width, wanted.depth, wanted.patch_size)
    return own.keys() == theirs.keys() and all(
        theirs[name].shape == value.shape and torch.equal(theirs[name].to(value), value) for name, value in own.items()
    )
