"""BLIP-2's stage 1 as a PairModel: the encoded batch, its matching logits and its LM loss by pair lists."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lavis_mafa.objectives import language_modelling_loss

if TYPE_CHECKING:
    from lavis_mafa.models.blip2_mafa import Blip2Mafa

KeysValues = tuple[tuple[Tensor, Tensor], ...]  # of each layer [B, heads, queries, d]


class Blip2Pairs:
    """K images as ViT states and K texts as ids; an index may name any of them, also those gathered from other ranks."""

    def __init__(
        self,
        model: Blip2Mafa,
        image_embeds: Tensor,  # [K, N, vision width]
        text_ids: Tensor,  # [K, T]
        text_mask: Tensor,  # [K, T]
        query_cache: KeysValues,  # of the batch's own B images
    ) -> None:
        self.model = model
        self.image_embeds, self.text_ids, self.text_mask = image_embeds, text_ids, text_mask
        self.query_cache = query_cache

    def itm_logits(self, image_index: Tensor, text_index: Tensor) -> Tensor:
        """[P], [P] -> [P, 2]: one pass of queries and text over the images, averaged over the queries."""
        model = self.model
        ids, mask = self.text_ids.index_select(0, text_index), self.text_mask.index_select(0, text_index)
        images = self.image_embeds.index_select(0, image_index)
        return match_queries(model.Qformer.bert, model.query_tokens, model.itm_head, images, ids, mask)

    def lm_loss(self, image_index: Tensor, text_index: Tensor) -> Tensor:
        """[P], [P] -> []: each text predicted from its image's query keys and values, which the contrastive pass left behind.

        The first B pairs must name own images; further ones may name any, and cost a pass of their queries.
        """
        model, own = self.model, len(self.query_cache[0][0])
        cache = tuple((k.index_select(0, image_index[:own]), v.index_select(0, image_index[:own])) for k, v in self.query_cache)
        if len(image_index) > own:
            _, more = query_pass(model, self.image_embeds.index_select(0, image_index[own:]))
            cache = tuple((torch.cat([k, mk]), torch.cat([v, mv])) for (k, v), (mk, mv) in zip(cache, more, strict=True))
        ids = self.text_ids.index_select(0, text_index).clone()
        ids[:, 0] = model.tokenizer.bos_token_id
        mask = self.text_mask.index_select(0, text_index)
        queries = torch.ones(len(ids), model.query_tokens.shape[1], dtype=mask.dtype, device=mask.device)
        states = model.Qformer.bert(
            ids,
            attention_mask=torch.cat([queries, mask], dim=1),
            past_key_values=cache,
            return_dict=True,
            is_decoder=True,
        ).last_hidden_state
        return language_modelling_loss(states, ids, model.Qformer.cls, model.tokenizer.pad_token_id)


def query_pass(model: Any, image_embeds: Tensor) -> tuple[Tensor, KeysValues]:
    """The queries alone over B images: states [B, queries, width], and the keys and values that the LM reads."""
    output = model.Qformer.bert(
        query_embeds=model.query_tokens.expand(len(image_embeds), -1, -1),
        encoder_hidden_states=image_embeds,
        encoder_attention_mask=torch.ones(image_embeds.shape[:2], dtype=torch.long, device=image_embeds.device),
        use_cache=True,
        return_dict=True,
    )
    return output.last_hidden_state, output.past_key_values


def match_queries(bert: Any, query_tokens: Tensor, head: Any, image_embeds: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The matching head on P pairs: [P, N, vision width], [P, T], [P, T] -> [P, 2], the mean over the queries."""
    queries = query_tokens.expand(len(ids), -1, -1)
    states = bert(
        ids,
        query_embeds=queries,
        attention_mask=torch.cat([torch.ones(queries.shape[:2], dtype=mask.dtype, device=mask.device), mask], dim=1),
        encoder_hidden_states=image_embeds,
        encoder_attention_mask=torch.ones(image_embeds.shape[:2], dtype=torch.long, device=image_embeds.device),
        return_dict=True,
    ).last_hidden_state
    return head(states[:, : queries.shape[1]]).mean(dim=1)
