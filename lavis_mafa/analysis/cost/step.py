"""A training step cut into parts, on tensors that have shapes and no memory: what flops.py and memory.py look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

from lavis_mafa.config.schema import loss_weights
from lavis_mafa.models.albef import AlbefMafa, AlbefPairs
from lavis_mafa.models.blip import BlipPairs
from lavis_mafa.models.blip2 import Blip2Mafa, Blip2Pairs, query_pass
from lavis_mafa.models.blip2_opt import Blip2OptMafa
from lavis_mafa.models.momentum import project
from lavis_mafa.models.retrieval import best_query

IMAGE, TEXT, TEACHER, ITC, ITM, LM = "image encoder", "text encoder", "momentum teacher", "ITC", "ITM", "LM"
QUERIES, CON_D, CON_D_VIT = "Q-Former's queries", "Con-D, matching", "Con-D, image encoder"
Record = Callable[[str, Callable[[], Any]], Any]  # runs a part, keeps what it wants to know, returns its output without its graph


@dataclass(frozen=True)
class StepSize:
    """How large a step is, on one GPU."""

    batch: int  # B, pairs
    text_length: int  # T, tokens of every caption
    gathered: int = 1  # batches whose candidates an anchor sees: all ranks' with batch_scope: global
    new_positives: float = 0.0  # what Con-D adds to the LM's B pairs, as a share of B


def no_memory() -> FakeTensorMode:
    """Within it tensors of any size take no memory, and say that they are on any device."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def pretend(module: nn.Module, device: str) -> None:
    """Replace a meta module's weights by fake ones of ``device``; weights that are shared stay shared."""
    new: dict[int, Tensor] = {}
    for part in module.modules():
        stores: tuple[dict[str, Any], ...] = part._parameters, part._buffers
        for tensors in stores:
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in new:
                    empty = torch.empty_like(tensor, device=device)
                    new[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
                if tensor is not None:
                    tensors[name] = new[id(tensor)]


def modules_of(model: nn.Module | None, con_d: Any) -> list[nn.Module]:
    """The model's and Con-D's, which holds its modules without being one."""
    parts = [model, getattr(con_d, "network", None)]
    return [part for part in parts if isinstance(part, nn.Module)]


def leaf(output: Any) -> Any:
    """The same tensors as inputs of the next part: their graph ends here, their gradient is still asked for."""
    # a view, because of true leaves autocast would keep one half-precision copy for all layers, as it does of weights
    return tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.requires_grad).view_as(t), output)


def run_step(model: Any, con_d: Any, size: StepSize, device: str, record: Record) -> None:
    """Every part of one step, in the order of :func:`lavis_mafa.objectives.mafa_step`, on one batch of empty images.

    A loss that is off is no part. An encoder's backward pass counts all the same where no other loss asks for it.

    Args:
        model: one of ours, in training mode, on ``device``.
        con_d: its discriminator, or None.
        size: of the step.
        device: where the tensors are, or pretend to be.
        record: called with each part's name and the function that runs it.
    """
    encoder = model.settings.image_encoder
    with torch.device(device):
        image = torch.empty(size.batch, 3, encoder.image_size, encoder.image_size)
        if isinstance(model, Blip2OptMafa):
            return _stage_2(model, image, size, record)
        step = _stage_1 if isinstance(model, Blip2Mafa) else _dual
        step(model, con_d, image, size, record)


def _indices(size: StepSize) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of Con-D's 2B pairs, ITM's 3B, and the LM's B and more."""
    own = torch.arange(size.batch)
    return own.repeat(2), own.repeat(3), torch.cat([own, own[: round(size.new_positives * size.batch)]])


def _everyone(size: StepSize, *tensors: Tensor) -> Any:
    """What ``gather_own_first`` would bring: this rank's rows once for each rank."""
    return tensors if size.gathered == 1 else tuple(torch.cat([t] * size.gathered) for t in tensors)


def _contrast(model: Any, image: Tensor, text: Tensor, keys_image: Tensor, keys_text: Tensor) -> Tensor:
    similarities = best_query(image, keys_text), best_query(keys_image, text).T
    return sum(((s / model.temp).log_softmax(1).mean() for s in similarities), torch.zeros(()))


def _predicted(share: float) -> Any:
    """The LM's head runs on the words alone; tensors without values cannot say which, so here it is a share of all."""
    return patch("torch.nonzero", lambda words: torch.arange(round(words.numel() * share), device=words.device)[:, None])


def _captions(size: StepSize) -> list[str]:
    return ["a " * size.text_length] * size.batch


def _judge(con_d: Any, samples: dict[str, Any], pairs: Tensor, record: Record, vit_states: Tensor | None = None) -> None:
    if con_d is not None:
        con_d.network.settings.max_text_length = con_d.network.max_txt_len = len(samples["text_input"][0].split())
        record(CON_D, lambda: con_d.in_step(False, vit_states).match_probability(samples, pairs, pairs))


def _dual(model: Any, con_d: Any, image: Tensor, size: StepSize, record: Record) -> None:
    twice, thrice, written = _indices(size)
    captions = _captions(size)
    model.settings.max_text_length = size.text_length
    ids, mask = model.tokenize(captions)
    albef, distils = isinstance(model, AlbefMafa), model.settings.itc.momentum_distillation is not None

    def both(states: Tensor, feature: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        return states, feature(states)

    images, image_feature = record(IMAGE, lambda: both(model.image_states(image), model.image_features))
    texts, text_feature = record(TEXT, lambda: both(model.text_states(ids, mask), lambda states: project(model.text_proj, states)))
    taught = None
    keys = image_feature.detach(), text_feature.detach()
    if distils:
        taught, *keys = record(TEACHER, lambda: model._momentum_features(image, ids, mask))
    keys = _everyone(size, *keys)
    itc, itm, lm = loss_weights(model.settings).values()
    if distils:
        keys = torch.cat([keys[0], model.image_queue.T]), torch.cat([keys[1], model.text_queue.T])
    if itc:
        record(ITC, lambda: _contrast(model, image_feature, text_feature, *keys))
    _judge(con_d, {"image": image, "text_input": captions}, twice, record)
    images, texts = record(ITM, lambda: _everyone(size, images, texts))
    ids, mask = _everyone(size, ids, mask)
    pairs: Any = BlipPairs(model, images, ids, mask)
    if albef:
        distils = distils and model.settings.itc.momentum_distillation.mlm
        pairs = AlbefPairs(model, images, texts, ids, mask, taught if distils else None, 0.4 if distils else 0.0)
    if itm:
        record(ITM, lambda: pairs.itm_logits(thrice, thrice))
    share = model.settings.mlm.mask_probability * (size.text_length - 2) / size.text_length if albef else 1.0
    if lm:
        with _predicted(share):
            record(LM, lambda: pairs.lm_loss(written, written))


def _stage_1(model: Any, con_d: Any, image: Tensor, size: StepSize, record: Record) -> None:
    twice, thrice, written = _indices(size)
    captions = _captions(size)
    ids = torch.ones(size.batch, size.text_length, dtype=torch.long)
    mask = torch.ones_like(ids)
    states = record(IMAGE, lambda: model.visual_encoder(image))
    embeds = record(QUERIES, lambda: model.ln_vision(states))

    def queries() -> tuple[Tensor, Any]:
        output, cache = query_pass(model, embeds)
        return model._image_feature(output), cache

    image_feature, cache = record(QUERIES, queries)
    text_feature = record(TEXT, lambda: model.text_features((ids, mask)))
    (states_of_all,) = _everyone(size, states)
    if size.gathered > 1:
        frozen = model.visual_encoder.frozen
        embeds = record(QUERIES, lambda: model.ln_vision(states_of_all) if frozen else _everyone(size, embeds)[0])
    keys = _everyone(size, image_feature.detach(), text_feature.detach())
    itc, itm, lm = loss_weights(model.settings).values()
    if itc:
        record(ITC, lambda: _contrast(model, image_feature, text_feature, *keys))
    _judge(con_d, {"image": image, "text_input": captions}, twice, record, states_of_all)
    ids, mask = _everyone(size, ids, mask)
    pairs = Blip2Pairs(model, embeds, ids, mask, cache)
    if itm:
        record(ITM, lambda: pairs.itm_logits(thrice, thrice))
    if lm:
        with _predicted(1.0):
            record(LM, lambda: pairs.lm_loss(written, written))


def _stage_2(model: Any, image: Tensor, size: StepSize, record: Record) -> None:
    opt, length = model.opt_model, model.query_tokens.shape[1] + size.text_length
    states = record(IMAGE, lambda: model.visual_encoder(image))
    queries = record(QUERIES, lambda: model.opt_proj(query_pass(model, model.ln_vision(states))[0]))
    words = torch.ones(size.batch, size.text_length, dtype=torch.long)
    seen, labels = torch.ones(size.batch, length, dtype=torch.long), torch.ones(size.batch, length, dtype=torch.long)

    def written() -> Tensor:
        # its mask's smallest number is read out of a tensor, which has a value on the CPU alone
        with model.maybe_autocast(), torch.device("cpu"):
            embeds = torch.cat([queries, opt.model.decoder.embed_tokens(words)], dim=1)
            loss: Tensor = opt(inputs_embeds=embeds, attention_mask=seen, return_dict=True, labels=labels).loss
        return loss

    record(LM, written)
