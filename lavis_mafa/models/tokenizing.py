"""Captions to ids, padded to the longest caption of the batch, or of all ranks' batches where texts will be put together."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lavis_mafa.common.distributed import largest


def tokenize(
    tokenizer: Any, captions: list[str], max_length: int, device: torch.device, gathered: bool = False
) -> tuple[Tensor, Tensor]:
    """LongTensor[B, T] ids and mask.

    Args:
        tokenizer: of BERT's kind.
        captions: B texts.
        max_length: T at most; longer captions are cut.
        device: of the result.
        gathered: pad to the longest caption over all ranks, so that the ranks' tensors can be concatenated.
    """
    text = tokenizer(list(captions), padding="longest", truncation=True, max_length=max_length, return_tensors="pt").to(device)
    ids, mask = text.input_ids, text.attention_mask
    if gathered:
        more = largest(ids.shape[1], ids.device) - ids.shape[1]
        ids, mask = F.pad(ids, (0, more), value=tokenizer.pad_token_id), F.pad(mask, (0, more))
    return ids, mask
