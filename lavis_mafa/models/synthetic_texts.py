"""Texts with one word replaced, for any host: which words may be, without a tagger, and what a language model says of their places
(ViLTA section 3.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lavis_mafa.errors import UserError
from lavis_mafa.models.language_teacher import LanguageTeacher
from lavis_mafa.models.transformer import Reading, on_device
from lavis_mafa.objectives import ExtraPairs
from lavis_mafa.objectives.synthetic_negatives import choose_place, draw, replacements

# texts with one word masked, the whole texts, that word's place: LongTensor[B, T], LongTensor[B, T], LongTensor[B] on the host -> what
# a language model expects there: logits [B, words] for the masked texts (p_m), and for the whole ones (q)
Guess = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

# English words that are no noun, verb, adjective or number: a closed class, unlike those
FUNCTION_WORDS = frozenset(
    """
    a an the this that these those each every either neither both all any some no none such another other same own
    i me my mine myself you your yours yourself yourselves he him his himself she her hers herself it its itself
    we us our ours ourselves they them their theirs themselves one ones who whom whose which what whoever whatever whichever
    someone somebody something anyone anybody anything everyone everybody everything nobody nothing
    and or but nor so yet for if unless until while whereas because since although though as than whether once
    about above across after against along alongside amid among amongst around at atop before behind below beneath beside besides
    between beyond by despite down during except from in inside into like near next of off on onto opposite out outside over past per
    round through throughout till to toward towards under underneath up upon versus via with within without
    am is are was were be been being do does did doing done have has had having can could may might must shall should will would
    ought s t d ll m re ve don doesn didn isn aren wasn weren hasn haven hadn won wouldn couldn shouldn cannot
    not only also too very just even still already again ever never always often sometimes here there where when why how then now
    thus hence however therefore rather quite almost else instead away back together apart perhaps maybe more most much many less
    least few several etc
    """.split()
)


def has_content(word: str) -> bool:
    """Is it letters and digits, and no function word?"""
    return word.isalnum() and word.lower() not in FUNCTION_WORDS


class ReplaceableWords:
    """Of a BERT vocabulary, as masks that the choice of a word is made with.

    Content words are letters and digits, and no function word; what a model has added to BERT's words ([DEC], [ENC]) is none. A word of
    several pieces is left alone: one token for one token keeps lengths.

    Raises:
        UserError: it has no more than ``top_k`` content words.
    """

    def __init__(self, tokenizer: Any, top_k: int) -> None:
        words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        content = [has_content(word) for word in words[: tokenizer.vocab_size]]
        content += [False] * (len(words) - len(content))
        self.top_k, self.mask_token = top_k, tokenizer.mask_token_id
        self.content = torch.tensor(content, device="cpu")
        self.continues = torch.tensor([word.startswith("##") for word in words], device="cpu")
        if (count := sum(content)) <= top_k:
            raise UserError(
                f"model.itm.synthetic.top_k is {top_k}, but model.tokenizer has {count} words that may replace another; allowed: less "
                "than that."
            )

    def choose(self, ids: Tensor) -> Tensor:
        """LongTensor[B, T] on the host -> LongTensor[B] where a word is to be replaced, -1 where a text has none."""
        goes_on = F.pad(self.continues[ids][:, 1:], (0, 1))
        return choose_place(self.content[ids] & ~goes_on)

    def replace(self, ids: Tensor, guess: Guess, device: torch.device) -> tuple[Tensor, Tensor]:
        """One word of each text by another that would fit.

        Args:
            ids: LongTensor[B, T] on the host.
            guess: who says which words fit.

        Returns:
            LongTensor[B, T] on the device; [B] 1, or 0 where a text has no word that may be replaced, whose row is of no use.
        """
        place = self.choose(ids)
        exists, at = on_device((place >= 0).float(), device), place.clamp_min(0)[:, None]
        fits, known = guess(ids.scatter(1, at, self.mask_token), ids, at[:, 0])
        original, at = on_device(ids.gather(1, at), device), on_device(at, device)
        content = on_device(self.content[: fits.shape[1]], device)  # a teacher has BERT's words alone
        word = draw(*replacements(fits, known, original[:, 0], content, self.top_k))
        return on_device(ids, device).scatter(1, at, word[:, None]), exists


def by_teacher(teacher: LanguageTeacher, mask: Tensor, device: torch.device, states: Tensor | None = None) -> Guess:
    """What it says of texts with BoolTensor[B, T] on the host; ``states`` [B, T, width] where it has read the whole texts already."""

    def guess(masked: Tensor, whole: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        reading = Reading.of(mask, device)
        chosen = reading.tokens_at(tokens_of(mask, place))
        fits = teacher.predict(teacher.read(masked, reading, chosen))
        if states is None:
            return fits, teacher.predict(teacher.read(whole, reading, chosen))
        return fits, teacher.predict(states[torch.arange(len(mask), device=device), on_device(place, device)])

    return guess


def tokens_of(mask: Tensor, place: Tensor) -> Tensor:
    """BoolTensor[B, T], LongTensor[B], a place in each text -> LongTensor[B], that token among all S."""
    return mask.sum(dim=1).cumsum(dim=0) - mask.sum(dim=1) + place


@dataclass(frozen=True)
class SyntheticTexts:
    """B texts that differ in one word from a batch's own, to follow the K that a host holds."""

    ids: Tensor  # LongTensor[B, T] on the device
    mask: Tensor  # BoolTensor[B, T] on the host
    pairs: ExtraPairs  # of image b with text K + b

    def masked_as(self, ids: Tensor, shown: Tensor) -> Tensor:
        """Words masked where the batch's own texts ``ids`` are ``shown`` with masked ones, or else matching could tell these apart by
        that; the word that differs is never masked. LongTensor[B, T] on the host each -> LongTensor[B, T] on the device."""
        own, shown = on_device(ids, self.ids.device), on_device(shown, self.ids.device)
        return torch.where(self.ids == own, shown, self.ids)

    def following(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Of K texts LongTensor[K, T] and BoolTensor[K, T] -> LongTensor[K + B, T] on the device, BoolTensor[K + B, T] on the host."""
        return torch.cat([on_device(ids, self.ids.device), self.ids]), torch.cat([mask, self.mask])

    @property
    def metrics(self) -> dict[str, Tensor]:
        return {"synthetic_share": self.pairs.weight.mean()}
