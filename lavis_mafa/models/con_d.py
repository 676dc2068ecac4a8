"""What a Con-D from ALBEF and one from BLIP share: an image encoder, a text encoder that fuses, and a matching head.

Con-D from an ALBEF: LAVIS's ``albef_retrieval`` checkpoints, the authors', and our own ``albef_mafa``.

Con-D from a BLIP: LAVIS's ``blip_image_text_matching`` and ``blip_retrieval`` checkpoints, the authors', our ``blip_mafa``.

Con-D from a BLIP-2 stage 1: LAVIS's ``blip2`` and ``blip2_image_text_matching`` checkpoints, and our own ``blip2_mafa``.

Con-D: who decides whether a hard negative is a false one. One adapter per host model.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, TypeVar

import torch
from lavis.models.blip2_models.blip2 import LayerNorm
from torch import Tensor, nn

from lavis_mafa.config.schema import FAMILIES, Blip2Block, EvaEncoder, MafaBlock, con_d_block
from lavis_mafa.distributed import gather_own_first
from lavis_mafa.errors import UserError
from lavis_mafa.models.albef import fuse
from lavis_mafa.models.bert import build_tokenizer, fold_token_type
from lavis_mafa.models.blip import match
from lavis_mafa.models.blip2 import match_queries
from lavis_mafa.models.blip2_encoders import EvaVit, build_blip2_tokenizer, build_eva, build_qformer, resize_positions
from lavis_mafa.models.encoders import (
    build_blip_text_encoder,
    build_blip_tokenizer,
    build_image_encoder,
    build_text_encoder,
    fit_position_embeddings,
    tokenize,
)
from lavis_mafa.objectives import Discriminator
from lavis_mafa.weights import load_exactly, read_weights

Own = TypeVar("Own", bound="DualDiscriminator")


class DualDiscriminator:
    """A matching head as the probability that a pair matches.

    It holds an ordinary module but is none itself, so that a model that uses it neither trains, saves nor broadcasts it.
    """

    def __init__(self, settings: Any, precision: str = "fp32") -> None:
        self.settings = settings
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.tokenizer: Any = self.build_tokenizer()
        self.network: Any = nn.ModuleDict(self.parts())

    # --- what a host defines ---------------------------------------------------------------------------------------

    def parts(self) -> dict[str, nn.Module]:
        """``visual_encoder``, ``text_encoder`` and ``itm_head`` at the sizes of ``settings``, with the tokenizer's words."""
        raise NotImplementedError

    def build_tokenizer(self) -> Any:
        raise NotImplementedError

    def wanted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's weights by this network's names; others may be among them."""
        return state

    def text_rows(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What matching needs of each text, [B, T, ...], and its mask."""
        return ids, mask

    def logits(self, text: Tensor, mask: Tensor, images: Tensor) -> Tensor:
        """P texts and P images -> [P, 2]."""
        raise NotImplementedError

    # --- shared ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_checkpoint(cls: type[Own], model: MafaBlock) -> Own:
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
        """Take the scoring parts out of a checkpoint; its projections, LM, teacher and queues are not needed."""
        state = self.wanted(state)
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
            text, mask = self.text_rows(ids, mask)
            if gathered:
                images, text, mask = gather_own_first(images), gather_own_first(text), gather_own_first(mask)
            logits = self.logits(text[text_index], mask[text_index], images[image_index])
        return logits.float().softmax(dim=1)[:, 1]


class AlbefDiscriminator(DualDiscriminator):
    """ALBEF's matching head: each text is read once, then fused with its images."""

    def parts(self) -> dict[str, nn.Module]:
        settings = self.settings
        text = build_text_encoder(replace(settings.text_encoder, init=None), settings.image_encoder.width, len(self.tokenizer))
        return {
            "visual_encoder": build_image_encoder(replace(settings.image_encoder, init=None)),
            "text_encoder": text.bert,
            "itm_head": nn.Linear(settings.text_encoder.width, 2),
        }

    def build_tokenizer(self) -> Any:
        return build_tokenizer(self.settings.tokenizer)

    def wanted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        state = {name.replace("text_encoder.bert.", "text_encoder."): value for name, value in fold_token_type(state).items()}
        return {name: value for name, value in state.items() if not name.startswith(("text_encoder.cls.", "text_encoder.pooler."))}

    def text_rows(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        bert = self.network["text_encoder"]
        return bert(ids, attention_mask=mask, return_dict=True, mode="text").last_hidden_state, mask

    def logits(self, text: Tensor, mask: Tensor, images: Tensor) -> Tensor:
        return self.network["itm_head"](fuse(self.network["text_encoder"], text, mask, images)[:, 0])


class BlipDiscriminator(DualDiscriminator):
    """BLIP's matching head: the text is read together with its image, after [ENC]."""

    def parts(self) -> dict[str, nn.Module]:
        settings = self.settings
        return {
            "visual_encoder": build_image_encoder(replace(settings.image_encoder, init=None)),
            "text_encoder": build_blip_text_encoder(settings.text_encoder, settings.image_encoder.width, len(self.tokenizer)),
            "itm_head": nn.Linear(settings.text_encoder.width, 2),
        }

    def build_tokenizer(self) -> Any:
        return build_blip_tokenizer(self.settings.tokenizer)

    def logits(self, text: Tensor, mask: Tensor, images: Tensor) -> Tensor:
        states = match(self.network["text_encoder"], text, mask, images, self.tokenizer.enc_token_id)
        return self.network["itm_head"](states)


logger = logging.getLogger(__name__)
VIT = "visual_encoder."
PARTS = ("ln_vision.", "query_tokens", "Qformer.bert.", "itm_head.")


class Blip2Discriminator:
    """BLIP-2's matching head as the probability that a pair matches.

    Where its frozen ViT has the very weights of the model's, the model's ViT states are used and the second ViT is not even built.
    It holds ordinary modules but is none itself, so that a model that uses it neither trains, saves nor broadcasts it.
    """

    def __init__(self, settings: Blip2Block, precision: str = "fp32", shared: bool = False) -> None:
        self.settings, self.shared = settings, shared
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.tokenizer = build_blip2_tokenizer(settings.tokenizer)
        width = settings.qformer.width
        qformer, query_tokens = build_qformer(replace(settings.qformer, init=None), settings.image_encoder.width, len(self.tokenizer))
        qformer.cls = nn.Identity()  # it judges and never writes
        self.network: Any = nn.Module()
        self.network.ln_vision = LayerNorm(settings.image_encoder.width)
        self.network.Qformer, self.network.query_tokens = qformer, query_tokens
        self.network.itm_head = nn.Linear(width, 2)
        self.visual_encoder: EvaVit | None = None

    @classmethod
    def from_checkpoint(cls, model: MafaBlock, host: nn.Module | None = None) -> Blip2Discriminator:
        """Build with the model's own sizes (the paper's choice) unless the block names others, and load every weight.

        Args:
            model: whose ``discriminator`` block says what to load.
            host: the model it will work for; its frozen ViT is shared when the checkpoint's has equal weights, or when the
                checkpoint (as LAVIS writes them) has none, no file is named for it, and the sizes agree.

        Raises:
            UserError: the file is missing, or a weight of the Q-Former or the matching head is missing or of another size.
        """
        block = model.discriminator
        assert block is not None and block.checkpoint is not None
        source = f"model.discriminator.checkpoint: {block.checkpoint}"
        settings = con_d_block(model)
        state = read_weights(block.checkpoint, "model.discriminator.checkpoint")
        theirs = getattr(host, "visual_encoder", None)
        theirs = theirs if isinstance(theirs, EvaVit) and theirs.frozen else None
        if theirs is not None:
            state = resize_positions(state, theirs)
        vit = {name: value for name, value in state.items() if name.startswith(VIT)}
        shared = theirs is not None and (same_weights(theirs, vit) if vit else _stands_in(theirs, settings.image_encoder))
        if shared:
            logger.info("Con-D %s the model's frozen image encoder: it runs once", "has the weights of" if vit else "takes")
        con_d = cls(settings, block.precision, shared)
        if not shared:
            con_d.visual_encoder = _own_vit(settings, vit, source)
        load_exactly(con_d.network, {n: v for n, v in state.items() if n.startswith(PARTS)}, source)
        con_d.network.eval().requires_grad_(False).to(con_d.dtype)
        con_d.network.ln_vision.float()  # it normalises in fp32, whatever comes in
        return con_d

    @torch.no_grad()
    def match_probability(self, samples: dict[str, Any], image_index: Tensor, text_index: Tensor) -> Tensor:
        """One pass over P pairs: [P], [P] -> [P] fp32 in [0, 1].

        Args:
            samples: ``image`` [B, 3, H, W] and ``text_input``; ``gathered`` true when indices name other ranks' rows too; when
                the ViT is shared, ``vit_states`` [K, N, width] of all rows that may be named.
            image_index: LongTensor[P].
            text_index: LongTensor[P].
        """
        device = image_index.device
        if next(self.network.parameters()).device != device:
            self.network.to(device)
        gathered = bool(samples.get("gathered", False))
        ids, mask = tokenize(self.tokenizer, samples["text_input"], self.settings.max_text_length, device, gathered)
        with torch.autocast(device.type, enabled=False):
            images = samples["vit_states"] if self.shared else self._vit_states(samples["image"].to(device), gathered)
            images = self.network.ln_vision(images.detach().to(self.dtype))
            if gathered:
                ids, mask = gather_own_first(ids), gather_own_first(mask)
            network = self.network
            logits = match_queries(
                network.Qformer.bert, network.query_tokens, network.itm_head, images[image_index], ids[text_index], mask[text_index]
            )
        return logits.float().softmax(dim=1)[:, 1]

    def _vit_states(self, image: Tensor, gathered: bool) -> Tensor:
        assert self.visual_encoder is not None
        if self.visual_encoder.pos_embed.device != image.device:
            self.visual_encoder.to(image.device)
        states = self.visual_encoder(image).to(self.dtype)
        return gather_own_first(states) if gathered else states


def same_weights(encoder: EvaVit, state: dict[str, Tensor]) -> bool:
    """Has a checkpoint's image encoder the weights of ``encoder``, in ``encoder``'s precision?"""
    own = encoder.state_dict()
    state = {name.removeprefix(VIT): value for name, value in state.items()}
    return own.keys() == state.keys() and all(
        state[name].shape == value.shape and torch.equal(state[name].to(value), value) for name, value in own.items()
    )


def _stands_in(encoder: EvaVit, wanted: EvaEncoder) -> bool:
    """Can ``encoder`` be what a checkpoint leaves out: frozen as published, of the same size, and no other file is named."""
    sizes = encoder.num_features, len(encoder.blocks), encoder.patch_embed.patch_size[0]
    return encoder.as_published and wanted.init is None and sizes == (wanted.width, wanted.depth, wanted.patch_size)


def _own_vit(settings: Blip2Block, state: dict[str, Tensor], source: str) -> EvaVit:
    """Con-D's own image encoder, from its checkpoint or else from ``model.discriminator.image_encoder.init``."""
    if not state and settings.image_encoder.init is None:
        raise UserError(
            f"{source} holds no image encoder, and the model has none of its size that is frozen as model.image_encoder.init gives "
            "it; name the file of Con-D's in model.discriminator.image_encoder.init."
        )
    encoder = build_eva(replace(settings.image_encoder, init=None if state else settings.image_encoder.init, freeze=True))
    if state:
        state = resize_positions(state, encoder)
        load_exactly(encoder, {name.removeprefix(VIT): value for name, value in state.items()}, source)
    return encoder.eval().requires_grad_(False)


def build_discriminator(model: MafaBlock, host: nn.Module | None = None) -> Discriminator | None:
    """The discriminator that ``model.discriminator`` names, or None for ``ground_truth`` (the task sets it, knowing the data).

    Args:
        model: the settings of the model it works for; any family can work for any other.
        host: that model, whose frozen image encoder a BLIP-2 Con-D may share.

    Raises:
        UserError: no checkpoint, or one that does not fit.
    """
    settings = model.discriminator
    if settings is None or settings.arch == "ground_truth":
        return None
    if not settings.checkpoint:
        raise UserError("model.discriminator.checkpoint is null; an untrained Con-D is never used.")
    family = FAMILIES[settings.arch]
    if family == "blip2_mafa":
        return Blip2Discriminator.from_checkpoint(model, host)
    if family == "blip_mafa":
        return BlipDiscriminator.from_checkpoint(model)

    return AlbefDiscriminator.from_checkpoint(model)
