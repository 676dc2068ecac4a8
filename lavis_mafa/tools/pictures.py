"""A page of a trained model: what it takes for hard negatives (GRIT-VLP Figure 1), what it would teach (ALBEF Figures 2, 11, 12), and
where words look (ALBEF Figures 6 and 9, SoftMask)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lavis_mafa.config.schema import SoftMask
from lavis_mafa.datasets.indexed import IndexedDataset, image_source_of, seeded
from lavis_mafa.errors import UserError
from lavis_mafa.grit.sampler import first_occurrences
from lavis_mafa.models.soft_masks import told_of, word_maps
from lavis_mafa.models.synthetic_texts import ReplaceableWords, tokens_of
from lavis_mafa.models.transformer import Reading
from lavis_mafa.objectives.mining import best_query
from lavis_mafa.objectives.soft_mask import soft_mask
from lavis_mafa.tools.candidates import (
    TRUTH,
    Block,
    Candidates,
    Encoder,
    Known,
    ReadableRows,
    batches_of,
    encoded_blocks,
    grouped_order,
    hardest_negatives,
    match_probabilities,
)
from lavis_mafa.tools.gallery import DIRECTIONS, Thumbnails, webp_url
from lavis_mafa.tools.render import Table, number
from lavis_mafa.tools.trained_model import Opened

KINDS = ("random", "hardest of a random batch", "hardest of its GRIT batch")
TOP = 5
WORDS = 6  # of a caption, whose maps are shown


# --- what is looked at --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """n pairs of a split, in random order.

    Attributes:
        block: their rows, captions and features by the model, without token states.
        taught: features of images and of texts by who gives pseudo-targets.
        truth: which image matches which text; None where that is not known.
    """

    block: Block
    taught: tuple[Tensor, Tensor]
    truth: Any = None

    def matches(self, image: Tensor, text: Tensor) -> list[bool | None]:
        """LongTensor[P] rows of the pool each -> whether they truly match; None where that is not known."""
        if self.truth is None:
            return [None] * len(image)
        pairs = self.block.truth["concept"][image], self.block.truth["text_key"][text]
        found = zip(self.truth.knows(*pairs).tolist(), self.truth.matches(*pairs).tolist(), strict=True)
        return [match if known else None for known, match in found]


@torch.no_grad()
def encode_pool(model: Any, teacher: Any, batches: Iterable[dict[str, Any]], truth: Any = None) -> Pool:
    """Features of what ``batches`` hold, each row once; ``teacher``: who gives pseudo-targets, the model itself or its momentum model.

    Raises:
        UserError: there are fewer than two pairs, so that there is no negative, or a feature is not finite.
    """
    captions: list[str] = []
    columns: dict[str, list[Tensor]] = {}
    for samples in batches:
        captions += samples["text_input"]
        for who, one in {"own": model, "taught": teacher}.items():
            if who == "own" or teacher is not model:
                for side, features in zip(("image", "text"), _features(one, samples), strict=True):
                    columns.setdefault(f"{who}_{side}", []).append(features.float().cpu())
        for name in ("index", "image_key", *(TRUTH if truth is not None else ())):
            columns.setdefault(name, []).append(samples[name].cpu())
    joined = {name: torch.cat(parts) for name, parts in columns.items()}
    once = first_occurrences(joined["index"])  # the stand-in of an unreadable sample repeats a row
    if int(once.sum()) < 2:
        raise UserError(f"there is {int(once.sum())} pair to look at, but a negative takes two; raise --max-samples.")
    for name in ("own_image", "own_text"):
        if not joined[name].isfinite().all():
            raise UserError("--checkpoint gives features that are not finite: its weights are broken, or too large for run.precision.")
    joined = {name: column[once] for name, column in joined.items()}
    block = Block(
        number=0,
        index=joined["index"],
        image_key=joined["image_key"],
        captions=[caption for caption, kept in zip(captions, once.tolist(), strict=True) if kept],
        images=torch.empty(0),
        texts=(),
        image_features=joined["own_image"],
        text_features=joined["own_text"],
        truth={} if truth is None else {name: joined[name] for name in TRUTH},
    )
    taught = joined.get("taught_image", joined["own_image"]), joined.get("taught_text", joined["own_text"])
    return Pool(block, taught, truth)


def _features(model: Any, samples: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return model.image_rows(samples["image"].to(model.device))[1], model.text_rows(samples["text_input"])[1]


def truth_of(dataset: Any) -> Any:
    """Which image matches which text, of a data set that knows it; None for several, whose truths number their concepts differently."""
    parts = getattr(dataset, "datasets", [dataset])
    return getattr(parts[0], "truth", None) if len(parts) == 1 else None


def choose_anchors(block: Block, count: int) -> Tensor:
    """LongTensor[at most ``count`` rows], the first ones of different images."""
    return first_occurrences(block.image_key).nonzero().flatten()[:count]


# --- hard negatives -----------------------------------------------------------------------------------------------------


def negatives(block: Block, batch_size: int, search_space: int, seed: int, known: Known) -> dict[str, Candidates]:
    """Of each of :data:`KINDS` one negative for every image and every text: GRIT-VLP Figure 1, (a) to (c).

    The block is in random order, so any ``batch_size`` rows on end are a random batch; GRIT groups the same rows, M at once.
    """
    order = grouped_order(block, search_space, seed)
    found = (
        random_negatives(block, known),
        hardest_negatives(block, batches_of(torch.arange(len(block)), batch_size), known),
        hardest_negatives(block, batches_of(order, batch_size, search_space), known),
    )
    return dict(zip(KINDS, found, strict=True))


def random_negatives(block: Block, known: Known) -> Candidates:
    """For each row the next one, in the block's random order, that is not known to match it."""
    rows, keys = torch.arange(len(block)), known.keys(block)
    other = rows.roll(-1)
    for _ in range(len(block)):
        match = other == rows
        for key in keys:
            match |= key == key[other]
        if not match.any():
            break
        other = torch.where(match, (other + 1) % len(block), other)
    image, text = torch.cat([rows, other]), torch.cat([other, rows])
    pairs = zip(block.image_features[image].split(256), block.text_features[text].split(256), strict=True)
    cosines = [best_query(i[:, None] if i.dim() == 2 else i, t).diagonal() for i, t in pairs]
    return Candidates(image, text, ~match.repeat(2), torch.cat(cosines))


def negatives_table(pool: Pool, found: dict[str, Candidates]) -> Table:
    """How alike the negatives of all anchors are, and how many of them truly match."""
    count, rows = len(pool.block), []
    for kind, pairs in found.items():
        cells = []
        for side in (slice(0, count), slice(count, None)):
            exists = pairs.exists[side]
            matches = pool.matches(pairs.image[side][exists], pairs.text[side][exists])
            told = [match for match in matches if match is not None]
            cells.append(number(float(pairs.similarity[side][exists].mean())))
            cells.append(number(sum(told) / len(told), share=True) if told else "–")
        rows.append([kind, *cells])
    head = ["negative", "texts: cosine", "truly match", "images: cosine", "truly match"]
    return Table(head, rows, f"Mean over {count:,} images and {count:,} texts")


# --- pseudo-targets -----------------------------------------------------------------------------------------------------


def likeliest_texts(pool: Pool, anchors: Tensor, top: int = TOP) -> list[list[tuple[int, float]]]:
    """For each image the rows of the ``top`` texts most similar by who teaches, with their cosines; equal captions count once."""
    number_of = {caption: row for row, caption in reversed([*enumerate(pool.block.captions)])}
    rows = torch.tensor([*number_of.values()])
    cosines, places = best_query(pool.taught[0][anchors], pool.taught[1][rows]).topk(min(top, len(rows)), dim=1)
    return [[*zip(rows[p].tolist(), c.tolist(), strict=True)] for c, p in zip(cosines, places, strict=True)]


@dataclass(frozen=True)
class MaskedWord:
    """A caption with one word masked, and what is expected there, the likeliest first."""

    before: str
    word: str
    after: str
    expected: list[tuple[str, float]]


@torch.no_grad()
def likeliest_words(teacher: Any, samples: dict[str, Any], seed: int, top: int = TOP) -> list[MaskedWord | None]:
    """One content word of each caption masked, and predicted from the rest and the image; None for a caption without one.

    ``teacher``: an ``albef_mafa``; ``samples``: images with captions and ``index``, on which the choice depends, and on ``seed``.
    """
    tokenizer, words = teacher.tokenizer, ReplaceableWords(teacher.tokenizer, 0)
    ids, mask = teacher.words(samples["text_input"])
    places = []
    for row, index in zip(ids, samples["index"].tolist(), strict=True):
        with seeded(seed, 0, index):
            places.append(int(words.choose(row[None])))
    every = torch.arange(len(ids))
    at = torch.tensor(places).clamp_min(0)
    reading = Reading.of(mask, teacher.device, every, every, len(ids))
    lengths = mask.sum(dim=1)
    chosen = reading.tokens_at(tokens_of(mask, at))
    masked = ids.scatter(1, at[:, None], tokenizer.mask_token_id)
    images = teacher.keys_values(teacher.image_states(samples["image"].to(teacher.device)))
    logits = teacher.predict(teacher.text_encoder, reading.take(masked), reading, images, chosen)
    chances, found = logits.float().softmax(dim=1).topk(min(top, logits.shape[1]), dim=1)
    result: list[MaskedWord | None] = []
    for row, place, length, best, chance in zip(ids, places, lengths.tolist(), found, chances, strict=True):
        expected = [*zip(tokenizer.convert_ids_to_tokens(best.tolist()), chance.tolist(), strict=True)]
        parts = (row[1:place], row[place : place + 1], row[place + 1 : length - 1])
        before, word, after = (tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in parts)
        result.append(MaskedWord(before, word, after, expected) if place >= 0 else None)
    return result


# --- where words look ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WordMap:
    """Where a word of a caption looks in its image: Grad-CAM of the matching score, and the soft mask made of it; [N] patches each."""

    word: str
    cam: Tensor
    mask: Tensor


@torch.no_grad()
def word_maps_of(model: Any, samples: dict[str, Any], how: SoftMask, at_most: int = WORDS) -> list[list[WordMap]]:
    """Of each caption its first words that may be seen in a picture.

    Args:
        model: of ALBEF's or BLIP's kind. samples: images with their captions.
        how: ``model.itm.soft_mask``.

    Raises:
        UserError: there is no such layer.
    """
    told, (ids, mask) = told_of(model.tokenizer), model.words(samples["text_input"])
    every = torch.arange(len(ids))
    reading = Reading.of(mask, model.device, every, every, len(ids))
    images = model.keys_values(model.image_tokens(model.image_states(samples["image"].to(model.device))))
    cams = word_maps(model, images, model.text_tokens(samples["text_input"]), reading, how.layer, how.by).cpu()
    found, first = [], 0
    for row, length in zip(ids, mask.sum(dim=1).tolist(), strict=True):
        places = told[row[:length]].nonzero().flatten()[:at_most]
        names = model.tokenizer.convert_ids_to_tokens(row[places].tolist())
        own = cams[first + places]
        found.append([*map(WordMap, names, own, soft_mask(own, how.share))])
        first += length
    return found


def drawn(image: Tensor, word: WordMap) -> dict[str, str]:
    """Data URLs of an image as the model took it, [3, H, W]: red where the word looks, and grey where it is masked."""
    low, high = image.amin(), image.amax()
    base = 255 * (image - low) / (high - low).clamp_min(1e-6)
    grey = base.mean(dim=0, keepdim=True).expand_as(base)
    heat = word.cam / word.cam.amax().clamp_min(1e-12)
    layers = {"cam": (0.7 * grey + 0.3 * base, 0.8 * heat, (230.0, 30.0, 0.0)), "mask": (base, word.mask, (127.0, 127.0, 127.0))}
    urls = {}
    for name, (below, weight, colour) in layers.items():
        side = math.isqrt(len(weight))
        spread = F.interpolate(weight.view(1, 1, side, side), image.shape[1:], mode="bilinear", align_corners=False)[0]
        blended = below * (1 - spread) + torch.tensor(colour)[:, None, None] * spread
        urls[name] = webp_url(Image.fromarray(blended.round().byte().permute(1, 2, 0).numpy()))
    return urls


# --- the page -----------------------------------------------------------------------------------------------------------


def of_anchors(found: dict[str, Candidates], anchors: Tensor) -> Tensor:
    """The negatives of some anchors as pool rows (image, text): LongTensor[kinds, directions, anchors, 2], -1 where there is none."""
    kinds = []
    for pairs in found.values():
        places = torch.stack([anchors, anchors + len(pairs) // 2])
        rows = torch.stack([pairs.image[places], pairs.text[places]], dim=2)
        kinds.append(rows.masked_fill(~pairs.exists[places][..., None], -1))
    return torch.stack(kinds)


def matching(opened: Opened, dataset: IndexedDataset, pairs: Tensor, batch_size: int) -> dict[tuple[int, int], float]:
    """What the matching head says of pairs of data set rows (image, text), LongTensor[P, 2]."""
    rows = ReadableRows(dataset.dataset, opened.run.seed, batch_size, opened.run.num_workers)
    encoder = Encoder(opened.model, opened.device, opened.run.precision)
    (block,) = encoded_blocks(encoder, rows, [(0, pairs.unique())])
    place = {row: number for number, row in enumerate(block.index.tolist())}
    kept = [(image, text) for image, text in pairs.tolist() if image in place and text in place]
    images, texts = (torch.tensor([place[pair[side]] for pair in kept], dtype=torch.long) for side in (0, 1))
    return dict(zip(kept, match_probabilities(encoder, block, images, texts).tolist(), strict=True))


def page_data(
    pool: Pool,
    dataset: Any,
    anchors: Tensor,
    shown: Tensor,
    probability: dict[tuple[int, int], float],
    words: list[MaskedWord | None],
) -> dict[str, Any]:
    """What the page shows of each anchor; ``images``: what the numbers of images stand for.

    Args:
        dataset: whose rows the pool's are. shown: see :func:`of_anchors`.
        probability: of pairs of its rows, by the matching head; empty without one.
        words: of each anchor; empty for a model that predicts none.
    """
    block, images = pool.block, Thumbnails()
    texts = likeliest_texts(pool, anchors)

    def row(number: int) -> dict[str, Any]:
        index = int(block.index[number])
        return {
            "row": index,
            "image": images.add(image_source_of(dataset, index), f"row {index} of the data"),
            "caption": block.captions[number],
        }

    def negative(kind: int, direction: int, anchor: int) -> dict[str, Any] | None:
        image, text = shown[kind, direction, anchor].tolist()
        if image < 0:
            return None
        cosine = float(best_query(block.image_features[image][None], block.text_features[text][None]))
        return {
            **row(text if direction == 0 else image),
            "kind": KINDS[kind],
            "cosine": cosine,
            "matching": probability.get((int(block.index[image]), int(block.index[text]))),
            "true": pool.matches(torch.tensor([image]), torch.tensor([text]))[0],
        }

    found = []
    for place, anchor in enumerate(anchors.tolist()):
        near = [number for number, _ in texts[place]]
        true = pool.matches(torch.full((len(near),), anchor), torch.tensor(near, dtype=torch.long))
        found.append(
            {
                **row(anchor),
                "negatives": {name: [negative(k, d, place) for k in range(len(KINDS))] for d, name in enumerate(DIRECTIONS)},
                "texts": [
                    {
                        "caption": block.captions[number],
                        "cosine": cosine,
                        "own": block.captions[number] == block.captions[anchor],
                        "true": t,
                    }
                    for (number, cosine), t in zip(texts[place], true, strict=True)
                ],
                "word": asdict(word) if words and (word := words[place]) else None,
            }
        )
    return {"anchors": found, "images": images.entries}
