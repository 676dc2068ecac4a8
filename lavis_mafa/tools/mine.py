"""Missing image-text connections (MAFA section G.8): every anchor's hardest negative in its GRIT batch, judged by Con-D.

``mine_blocks`` writes one Parquet file a block, the unit of resuming and of sharing the work among ranks; of these candidates
``choose`` takes what becomes a pair, and ``pairs_table`` makes training data of them.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from lavis_mafa.datasets.annotations import absolute
from lavis_mafa.datasets.facts import FACTS, TEXTS, check_facts, one_each
from lavis_mafa.datasets.fingerprint import data_record
from lavis_mafa.datasets.formats import SAME_IMAGE
from lavis_mafa.datasets.ids import pc
from lavis_mafa.datasets.stored import PLACE, places_from
from lavis_mafa.distributed import broadcast_object, rank, world_size
from lavis_mafa.errors import UserError
from lavis_mafa.files import SETTINGS, check_unfinished, replacing, write_text
from lavis_mafa.objectives.trust import Medians
from lavis_mafa.tools.candidates import (
    Block,
    Blocks,
    Encoder,
    Progress,
    ReadableRows,
    batches_of,
    grouped_order,
    hardest_negatives,
    reason_of,
    shuffled_pairs,
)
from lavis_mafa.tools.count import below, ratio
from lavis_mafa.tools.judges import Given
from lavis_mafa.tools.marks import ACCEPT, MARKS, REJECT, SCHEMA, confirmed
from lavis_mafa.tools.training_data import annotated

DIRECTIONS = ("text for image", "image for text")
NOBODY = -1  # in place of a candidate that an anchor does not have

# --- begun, or gone on with ---------------------------------------------------------------------------------------------


def begin(folder: Path, settings: dict[str, Any], result: str) -> bool:
    """Make the folder and write down what is to be done there, or check that this is what was begun there: then it is True.

    Raises:
        UserError: on all ranks; it holds a result, or was begun with other settings (the message names the first).
    """
    answer = broadcast_object(_begin(folder, settings, result) if rank() == 0 else None)
    if isinstance(answer, str):
        raise UserError(answer)
    return bool(answer)


def _begin(folder: Path, settings: dict[str, Any], result: str) -> bool | str:
    """A message instead of an error, so that the other ranks hear of it."""
    try:
        check_unfinished(folder, result)
        if not (folder / SETTINGS).exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")
            return False
        begun = json.loads((folder / SETTINGS).read_text())
    except UserError as error:
        return str(error)
    except (OSError, ValueError) as error:
        return f"--output: {folder}: {error}."
    for name, value in settings.items():
        if begun.get(name) != value:
            then, now = ("none" if one is None else one for one in (begun.get(name), value))
            return f"--output: {folder} was begun with {name} {then}, not {now}; go on with that, or choose another folder."
    return True


def fingerprint(dataset: Any, keys: Tensor, settings: str) -> str:
    """Changes with any row's texts or image path, with which rows share an image, and with the settings of the data."""
    content = json.dumps(data_record(dataset), sort_keys=True)
    found = hashlib.sha256(f"{len(dataset)}\n{content}\n{settings}\n".encode())
    found.update(keys.numpy().tobytes())
    return f"of {len(dataset)} rows, fingerprint {found.hexdigest()[:16]}"


# --- the pass -----------------------------------------------------------------------------------------------------------


class SourceRows:
    """The annotations behind a training set, whichever builder made it: what mined pairs are written from.

    Raises:
        UserError: several data sets whose facts do not fit (see ``check_facts``).

    Attributes:
        table: ``image``, list of ``caption`` and, where known, ``concept`` or ``facts`` and ``caption_facts``, as they were written;
            N rows.
        root: the folder the image paths start from; None where they are absolute, since several data sets have several folders.
    """

    def __init__(self, dataset: Any) -> None:
        self.children = list(getattr(dataset, "datasets", [dataset]))
        self.ends = list(itertools.accumulate(len(child) for child in self.children))
        parts = [annotated(child) for child in self.children]
        roots = {part.root.absolute() for part in parts}
        self.root = roots.pop() if len(roots) == 1 else None
        tables = []
        for part in parts:
            table = part.table.select(
                [name for name in ("image", "caption", "concept", *FACTS, *PLACE) if name in part.table.column_names]
            )
            tables.append(places_from(self.root, table) if self.root is not None else absolute(table, part.root))
        check_facts([(f"data set {number}", table) for number, table in enumerate(tables, 1)])
        self.table = pa.concat_tables(tables, promote_options="default")

    def __len__(self) -> int:
        return self.table.num_rows

    def caption(self, index: int, as_read: str) -> str:
        """The caption of a row that the text processor turned into ``as_read``; the first one where none is recognised."""
        captions: list[str] = self.table["caption"][index].as_py()
        if len(captions) == 1:
            return captions[0]
        process = self.children[bisect.bisect_right(self.ends, index)].text_processor
        return next((c for c in captions if process(c) == as_read), captions[0])


def mine_blocks(
    encoder: Encoder,
    rows: ReadableRows,
    source: SourceRows,
    blocks: Blocks,
    folder: Path,
    batch_size: int,
    seed: int = 0,
    progress: Progress = lambda _: None,
) -> None:
    """Write ``block_N.parquet`` into ``folder`` for this rank's share of the blocks that have none yet.

    Hardest negatives come from GRIT's batches of B = ``batch_size``, whose random starts depend on ``seed``.
    """
    waiting = [item for item in blocks if not part_path(folder, item[0]).exists()]
    for block in encoder.blocks(rows, waiting[rank() :: world_size()], progress):
        write_parquet(judged(encoder, block, source, batch_size, seed), part_path(folder, block.number))


def judged(encoder: Encoder | Given, block: Block, source: SourceRows, batch_size: int, seed: int) -> pa.Table:
    """A row an anchor: its candidate, Con-D's probability for it and for the anchor's own pair.

    Columns: ``block``, ``direction``, ``image`` and ``text`` (data set rows, -1 for none), ``caption`` of the text as it was written,
    ``similarity`` (cosine), ``probability``, ``own_probability``, ``shuffled_probability`` (of an anchor image with the text of the
    block's next sample; null for anchor texts, and where that is the same image or text). What could not be read is listed in the
    metadata.
    """
    count, own = len(block), torch.arange(len(block))
    found = hardest_negatives(block, batches_of(grouped_order(block, max(count, 1), seed), batch_size))
    other_image, other_text = shuffled_pairs(block)
    images, texts = torch.cat([found.image, own, other_image]), torch.cat([found.text, own, other_text])
    probability, own_probability, other = encoder.probabilities(block, images, texts).split([2 * count, count, len(other_image)])
    shuffled = torch.full((2 * count,), float("nan")).index_copy(0, other_image, other)
    anchor_of_text, here = torch.arange(2 * count) >= count, found.exists
    image = torch.where(here | ~anchor_of_text, block.index[found.image], NOBODY)
    text = torch.where(here | anchor_of_text, block.index[found.text], NOBODY)
    captions = [source.caption(index, read) for index, read in zip(block.index.tolist(), block.captions, strict=True)]
    nothing = torch.full_like(probability, float("nan"))
    table = pa.table(
        {
            "block": pa.array([block.number] * 2 * count, pa.int32()),
            "direction": pa.array([DIRECTIONS[0]] * count + [DIRECTIONS[1]] * count, pa.string()),
            "image": pa.array(image.numpy(), pa.int64()),
            "text": pa.array(text.numpy(), pa.int64()),
            "caption": pa.array([captions[t] if row >= 0 else None for t, row in zip(found.text.tolist(), text.tolist(), strict=True)]),
            "similarity": pa.array(torch.where(here, found.similarity, nothing).numpy(), pa.float32()),
            "probability": pa.array(torch.where(here, probability, nothing).numpy(), pa.float32()),
            "own_probability": pa.array(own_probability.repeat(2).numpy(), pa.float32()),
            "shuffled_probability": pa.array(shuffled.numpy(), pa.float32(), from_pandas=True),
        }
    )
    return table.replace_schema_metadata({"bad_samples": json.dumps(block.bad_samples)})


def part_path(folder: Path, number: int) -> Path:
    """Where a block's candidates are."""
    return folder / f"block_{number:06}.parquet"


def read_parts(folder: Path, blocks: int) -> tuple[pa.Table, list[dict[str, Any]]]:
    """All blocks' candidates in the order of the blocks, and all samples that could not be read."""
    tables = [pq.read_table(part_path(folder, number)) for number in range(blocks)]
    bad = [sample for table in tables for sample in json.loads(table.schema.metadata[b"bad_samples"])]
    return pa.concat_tables([table.replace_schema_metadata(None) for table in tables]), bad


def write_parquet(table: pa.Table, path: Path) -> None:
    """Whole or not at all."""
    with replacing(path) as part:
        pq.write_table(table, part)


# --- what becomes a pair ------------------------------------------------------------------------------------------------

MINED = "mined"
NO_CANDIDATE = "no candidate in the batch"
BELOW = "not above the threshold"
MARGIN = "below the margin of the own pair"
KNOWN = "the image has this caption already"
TWICE = "found twice"
OVER = "over the limit per image"
OVER_ALL = "over the limit in all"
REJECTED = "rejected by a person"
OUTCOMES = (MINED, NO_CANDIDATE, BELOW, MARGIN, KNOWN, TWICE, OVER, OVER_ALL, REJECTED)


@dataclass(frozen=True)
class Rules:
    """When a candidate becomes a pair. Of more than a limit the most probable ones are kept."""

    threshold: float = 0.8  # Con-D's probability must be above it
    margin: float = 0.0  # and at least this share of the probability of the anchor's own pair
    per_image: int | None = None  # limit of captions an image
    at_most: int | None = None  # limit of pairs in all (2M in MAFA section G.8)
    guide_margin: float | None = None  # of a guide, in place of the threshold: above the own pair's cosine less this

    def above(self, probability: np.ndarray, own_probability: np.ndarray) -> np.ndarray:
        """Bool [R]; False where there is none."""
        limit = self.threshold if self.guide_margin is None else own_probability - self.guide_margin
        return np.asarray(probability > limit)


def choose(
    candidates: pa.Table, image_keys: np.ndarray, captions: pa.ChunkedArray, rules: Rules, marks: pa.Table | None = None
) -> np.ndarray:
    """The outcome of each candidate, a number that names one of ``OUTCOMES``.

    The same caption (but for case, punctuation and spaces) is written once an image, with its highest probability, and never where
    the image has it already. All rows of an image (``image_keys``) count as one. Ties go to the lowest rows. What a person rejected is
    dropped; what one accepted needs no threshold and no margin, and goes first where there is a limit.

    Args:
        candidates: as :func:`judged` writes it, R rows.
        image_keys: [N] of the data. captions: [N] list<string> of the data.
        marks: of these data (:func:`lavis_mafa.tools.marks.fitted`); they hold for all rows of the same image and caption.

    Returns:
        int8 [R].
    """
    image, text = candidates["image"].to_numpy(), candidates["text"].to_numpy()
    probability = candidates["probability"].to_numpy().astype(np.float64)
    own_probability = candidates["own_probability"].to_numpy().astype(np.float64)
    key = np.where(image >= 0, image_keys[np.maximum(image, 0)], -1)
    outcome = np.full(len(image), OUTCOMES.index(MINED), dtype=np.int8)

    def drop(rows: np.ndarray, why: str) -> None:
        outcome[rows & (outcome == 0)] = OUTCOMES.index(why)

    drop((image < 0) | (text < 0), NO_CANDIDATE)
    marks = SCHEMA.empty_table() if marks is None else marks
    pair, marked, known = _pair_codes(candidates, marks, image_keys, captions)
    accepted, rejected = (np.isin(pair, marked[pc.equal(marks["mark"], mark).to_numpy()]) for mark in MARKS)
    drop(rejected, REJECTED)
    drop(~rules.above(probability, own_probability) & ~accepted, BELOW)
    if rules.margin:
        drop((probability < rules.margin * own_probability) & ~accepted, MARGIN)
    drop(np.isin(pair, known), KNOWN)
    best_first = np.lexsort((text, image, -probability, ~accepted))
    drop(~_is_among_first(pair, best_first[outcome[best_first] == 0], 1), TWICE)
    if rules.per_image is not None:
        drop(~_is_among_first(key, best_first[outcome[best_first] == 0], rules.per_image), OVER)
    if rules.at_most is not None:
        kept = best_first[outcome[best_first] == 0]
        outcome[kept[rules.at_most :]] = OUTCOMES.index(OVER_ALL)
    return outcome


def _is_among_first(group: np.ndarray, order: np.ndarray, count: int) -> np.ndarray:
    """Bool [R]: is a row of ``order`` among the first ``count`` of its group there."""
    by_group = order[np.argsort(group[order], kind="stable")]
    _, start, size = np.unique(group[by_group], return_index=True, return_counts=True)
    place = np.arange(len(by_group)) - np.repeat(start, size)
    among = np.zeros(len(group), dtype=bool)
    among[by_group[place < count]] = True
    return among


def _pair_codes(
    candidates: pa.Table, marks: pa.Table, image_keys: np.ndarray, captions: pa.ChunkedArray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(image, caption) as one number, of the candidates, of the marks and of the data."""
    own = plain(pc.list_flatten(captions))
    distinct = pc.unique(own)

    def number(of: pa.ChunkedArray) -> np.ndarray:
        return pc.fill_null(pc.index_in(of, value_set=distinct), 0).to_numpy().astype(np.int64)

    key_of_caption = np.repeat(image_keys, pc.list_value_length(captions).to_numpy())
    of_data = key_of_caption * len(distinct) + number(own)
    of_both = []
    for table in (candidates, marks):
        image, texts = table["image"].to_numpy(), table["caption"].cast(pa.string())
        of_both.append(np.where(image >= 0, image_keys[np.maximum(image, 0)], -1) * len(distinct) + number(plain(texts)))
    return of_both[0], of_both[1], of_data


def plain(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Lower case, words alone with single spaces; a text of nothing but signs stays as it is.

    Example:
        >>> plain(pa.chunked_array([["A dog, running!", "A  dog running", ":)"]])).to_pylist()
        ['a dog running', 'a dog running', ':)']
    """
    lower = pc.utf8_lower(texts)
    words = pc.utf8_trim_whitespace(pc.replace_substring_regex(lower, pattern=r"[^\p{L}\p{M}\p{N}]+", replacement=" "))
    return pc.if_else(pc.equal(words, ""), lower, words)


# --- what is written ----------------------------------------------------------------------------------------------------


def pairs_table(source: SourceRows, image_keys: np.ndarray, candidates: pa.Table, mined: np.ndarray) -> pa.Table:
    """The annotation file of the pass, readable by ``grit_pairs``: N original rows, then the ``mined`` candidates, best first.

    Columns: ``image``; ``caption`` (text, or a list of texts where a row of the data has several); ``image_id``, equal for all rows of
    one image; ``source`` (original, mined); ``score``, Con-D's probability (of the caption that was drawn, where there are several;
    null where an image could not be read); ``image_sample`` and ``text_sample``, data set rows; where the data count several paths
    as one, ``same_image``, which tells ``grit_pairs``; where the data have them, ``concept``, null for a mined pair, or the image's
    ``facts`` and the text's ``caption_facts``; where images lie inside larger files, ``PLACE``.
    """
    old, count = source.table, len(source)
    new = candidates.take(mined[np.argsort(-candidates["probability"].to_numpy()[mined], kind="stable")])
    paths = pc.index_in(old["image"], value_set=pc.unique(old["image"])).to_numpy().astype(np.int64)
    several_paths = len(np.unique(np.stack([image_keys, paths]), axis=1).T) > len(np.unique(image_keys))
    types = {"image": pa.string(), "caption": TEXTS, "image_id": pa.int64()}
    types |= {"source": pa.string(), "score": pa.float32(), "image_sample": pa.int64(), "text_sample": pa.int64()}
    types |= {SAME_IMAGE: pa.int64()} if several_paths else {}
    truth = {"concept": pa.string(), **FACTS}
    types |= {name: kind for name, kind in {**truth, **PLACE}.items() if name in old.column_names}

    def part(kind: str, image_rows: np.ndarray, text_rows: np.ndarray, **columns: Any) -> pa.Table:
        ids = image_keys[image_rows]
        columns |= {"image_id": ids, SAME_IMAGE: ids, "source": pa.repeat(kind, len(ids))}
        columns |= {"image_sample": image_rows, "text_sample": text_rows}
        return pa.table({name: columns[name] for name in types}).cast(pa.schema(types))

    rows = np.arange(count)
    as_written = {name: old[name] for name in ("caption", *truth, *PLACE) if name in old.column_names}
    originals = part("original", rows, rows, image=old["image"], score=own_scores(candidates, count), **as_written)
    right: dict[str, Any] = {"concept": pa.nulls(new.num_rows, pa.string())}
    if "facts" in types:
        right = {"facts": old["facts"].take(new["image"]), "caption_facts": one_each(_claims_of(new["caption"], old))}
    right |= {name: old[name].take(new["image"]) for name in ("image", *PLACE) if name in old.column_names}
    captions = one_each(new["caption"])
    image_rows, text_rows = new["image"].to_numpy(), new["text"].to_numpy()
    additions = part("mined", image_rows, text_rows, caption=captions, score=new["probability"], **right)
    table = pa.concat_tables([originals, additions])
    if not pc.any(pc.greater(pc.list_value_length(table["caption"]), 1)).as_py():
        for name in {"caption", "caption_facts"}.intersection(types):
            table = table.set_column(table.schema.get_field_index(name), name, pc.list_element(table[name], 0))
    return table


def _claims_of(texts: pa.ChunkedArray, table: pa.Table) -> pa.ChunkedArray:
    """[R] what each of these captions of a table claims; null where no row says it."""
    told = table.filter(table["caption_facts"].is_valid())
    captions, claims = pc.list_flatten(told["caption"]), pc.list_flatten(told["caption_facts"])
    known = claims.is_valid()
    return claims.filter(known).take(pc.index_in(texts, value_set=captions.filter(known)))


def own_scores(candidates: pa.Table, count: int) -> pa.Array:
    """[N] probability of each sample's own pair, null where it was not judged."""
    scores = np.full(count, np.nan, dtype=np.float32)
    of_image = pc.equal(candidates["direction"], DIRECTIONS[0]).to_numpy()
    anchor = np.where(of_image, candidates["image"].to_numpy(), candidates["text"].to_numpy())
    scores[anchor] = candidates["own_probability"].to_numpy()
    return pa.array(scores, mask=np.isnan(scores))


# --- what is reported ---------------------------------------------------------------------------------------------------

QUARTILES = ("minimum", "25 %", "median", "75 %", "maximum")


def medians_of(candidates: pa.Table, count: int, rules: Rules, truth: Any = None, concepts: Tensor | None = None) -> Medians:
    """What Con-D says of own pairs, shuffled ones and candidates, of whatever was judged so far of N = ``count`` samples."""
    lift = None
    if truth is not None and concepts is not None:
        there = candidates.filter(pc.and_(pc.greater_equal(candidates["image"], 0), pc.greater_equal(candidates["text"], 0)))
        pairs = concepts[there["image"].to_numpy().copy()], truth.texts.find_all(there["caption"])
        known = truth.knows(*pairs).numpy()  # of the others nobody says whether they match
        true = truth.matches(*pairs).numpy()[known]
        above = rules.above(there["probability"].to_numpy(), there["own_probability"].to_numpy())[known]
        lift = ratio(ratio(int(true[above].sum()), int(above.sum())) or 0.0, ratio(int(true.sum()), len(true)) or 0.0)
    own = own_scores(candidates, count).drop_null().to_numpy()
    columns = own, candidates["shuffled_probability"].to_numpy(), candidates["probability"].to_numpy()
    first, second, third = (None if np.isnan(column).all() else float(np.nanmedian(column)) for column in columns)
    return Medians(first, second, third, lift)


def mine_results(
    candidates: pa.Table,
    outcome: np.ndarray,
    image_keys: np.ndarray,
    bad: list[dict[str, Any]],
    truth: Any,
    concepts: Tensor | None,
    rules: Rules,
    reviewed: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that the tables show, ready for JSON: of R candidates, their outcome [R], and what could not be read.

    ``truth`` is that of the data, with the concept of each of their N rows by it, where known.
    """
    mined = np.flatnonzero(outcome == 0)
    new, probability = candidates.take(mined), candidates["probability"].to_numpy()
    own = own_scores(candidates, len(image_keys)).drop_null().to_numpy()
    shuffled = candidates["shuffled_probability"].to_numpy()
    scores = {"own pairs": own, "shuffled pairs": shuffled, "candidates": probability, "mined": probability[mined]}
    medians = medians_of(candidates, len(image_keys), rules, truth, concepts)
    results: dict[str, Any] = {
        "mined": len(mined),
        "images_with_new_captions": len(np.unique(image_keys[new["image"].to_numpy()])),
        "samples": candidates.num_rows // 2,
        "unreadable": dict(Counter(map(reason_of, bad))),
        "reviewed": reviewed,
        "outcomes": {name: int((outcome == number).sum()) for number, name in enumerate(OUTCOMES)},
        "scores": {name: _quartiles(of) for name, of in scores.items()},
        "medians": medians.as_json(),
        "meaningless": medians.why_not(),
        "doubt": medians.doubt(),
    }
    if truth is not None and concepts is not None:
        pairs = concepts[new["image"].to_numpy().copy()], truth.texts.find_all(new["caption"])
        results["mined_truly_match"] = ratio(int(truth.matches(*pairs).sum()), int(truth.knows(*pairs).sum()))
    return results


def review(candidates: pa.Table, image_keys: np.ndarray, captions: pa.ChunkedArray, marks: pa.Table, path: Path) -> dict[str, Any]:
    """What marks came to, ready for JSON; of those that are ``not_found`` among the candidates nothing becomes."""
    said = {mark: pc.sum(pc.equal(marks["mark"], mark)).as_py() or 0 for mark in MARKS}
    pair, marked, _ = _pair_codes(candidates, marks, image_keys, captions)
    not_found = int((~np.isin(marked, pair)).sum())
    return {"marks": str(path), **said, "not_found": not_found, "factor": str(confirmed(marks))}


def review_lines(reviewed: dict[str, Any]) -> list[str]:
    lines = [f"People accepted {reviewed[ACCEPT]:,} pairs and rejected {reviewed[REJECT]:,} ({reviewed['marks']})."]
    if reviewed["not_found"]:
        lines.append(f"{reviewed['not_found']:,} of these pairs are no candidates of this pass, so that nothing becomes of them.")
    return [*lines, reviewed["factor"]]


def _quartiles(scores: np.ndarray) -> dict[str, float | int | None]:
    """Of what is no NaN."""
    scores = scores[~np.isnan(scores)]
    values = np.quantile(scores, [0, 0.25, 0.5, 0.75, 1]).tolist() if len(scores) else [None] * 5
    return {"pairs": len(scores), **dict(zip(QUARTILES, values, strict=True))}


def rules_words(results: dict[str, Any]) -> str:
    """When a candidate became a pair."""
    settings, guide_margin = results["settings"], results["settings"]["guide_margin"]
    rules = f"p > {settings['threshold']:g}" if guide_margin is None else f"above the own pair's cosine{below(guide_margin)}"
    rules += f", at least {settings['margin']:g} of the own pair's" if settings["margin"] else ""
    rules += f", at most {settings['per_image']} an image" if settings["per_image"] is not None else ""
    rules += f", at most {settings['at_most']:,}" if settings.get("at_most") is not None else ""
    return rules


def format_mined(results: dict[str, Any]) -> str:
    """The tables for a terminal of 100 columns: quartiles of scores, and what was skipped and why."""
    judge = results["judge"]
    images = f"{results['images_with_new_captions']:,} images"
    lines = [f"{results['mined']:,} new pairs for {images}, from {results['samples']:,} pairs ({rules_words(results)})"]
    if results["meaningless"]:
        lines = [f"MEANINGLESS, since {results['meaningless']}: {judge} cannot judge these data.", *lines]
    if results["doubt"]:
        lines.append(results["doubt"])
    if results.get("reviewed") is not None:
        lines += review_lines(results["reviewed"])
    if not results["mined"]:
        lines.append("Nothing was mined: pairs.parquet holds the original pairs alone.")
    if results.get("mined_truly_match") is not None:
        lines.append(f"By the known truth {results['mined_truly_match']:.1%} of them match.")
    lines += ["", f"  {judge:34s} {'pairs':>10s} " + " ".join(f"{name:>8s}" for name in QUARTILES)]
    for name, row in results["scores"].items():
        values = " ".join("       -" if row[q] is None else f"{row[q]:8.3f}" for q in QUARTILES)
        lines.append(f"  {name:34s} {row['pairs']:10,d} {values}")
    lines += ["", f"  {'what became of the candidates':34s} {'pairs':>10s} {'share':>8s}"]
    total = sum(results["outcomes"].values())
    for name, number in results["outcomes"].items():
        if number or name == MINED:
            lines.append(f"  {name:34s} {number:10,d} {number / max(total, 1):8.1%}")
    lines += [f"  {'unreadable sample: ' + reason:34s} {number:10,d}" for reason, number in results["unreadable"].items()]
    return "\n".join(lines)
