"""Which words of a text may be replaced, and by which: all but function words, without a tagger (ViLTA section 3.3)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lavis_mafa.errors import UserError
from lavis_mafa.objectives.synthetic_negatives import choose_place

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


class ReplaceableWords:
    """Of a BERT vocabulary, as masks that the choice of a word is made with.

    Content words are letters and digits, and no function word. A word of several pieces is left alone: one token for one token keeps
    lengths.

    Raises:
        UserError: it has no more than ``top_k`` content words.
    """

    def __init__(self, tokenizer: Any, top_k: int) -> None:
        words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        content = [word.isalnum() and word.lower() not in FUNCTION_WORDS for word in words]
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
