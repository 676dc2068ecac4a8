"""Retrieval metrics for galleries where many pairs match (ECCV Caption, Chun et al. 2022): R@k, R-Precision, mAP@R, in per cent.

ECCV Caption's own and CxC's, on COCO's 5K test split, are those of the package ``eccv_caption``, which knows images and captions by
COCO's ids. LAVIS's COCO files have the image id in the file name but no caption ids, and their captions are in another order, so the
ids are read from COCO's own captions file.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lavis_mafa.errors import UserError
from lavis_mafa.models.retrieval import check_scores
from lavis_mafa.progress import Bar

logger = logging.getLogger(__name__)
AT_ONCE = 500  # queries, bounds memory


@dataclass(frozen=True)
class QueryMetrics:
    """One direction's metrics, query by query. A query without a match is not among the Q."""

    query: Tensor  # LongTensor[Q], its place among the images or texts
    values: dict[str, Tensor]  # metric -> [Q], shares


def retrieval_metrics(scores_i2t: Tensor, scores_t2i: Tensor, relevant: Tensor) -> dict[str, float]:
    """Text retrieval (``tr_``, query = image) and image retrieval (``ir_``): :func:`averages` of :func:`query_metrics`."""
    return averages(query_metrics(scores_i2t, scores_t2i, relevant))


def averages(queries: dict[str, QueryMetrics]) -> dict[str, float]:
    """Means over the queries in per cent: r1, r5, r10, r_precision, map_at_r per direction, and ``agg_metrics``, the mean of the six
    recalls."""
    results = {f"{side}_{name}": 100 * float(each.mean()) for side, of in queries.items() for name, each in of.values.items()}
    recalls = [v for k, v in results.items() if k.split("_")[1] in ("r1", "r5", "r10")]
    return results | {"agg_metrics": sum(recalls) / len(recalls)}


def query_metrics(scores_i2t: Tensor, scores_t2i: Tensor, relevant: Tensor) -> dict[str, QueryMetrics]:
    """What each query finds: ``tr``, every image among the texts, and ``ir``, every text among the images.

    Of equal scores the wrong ones come first, so that a model that tells nothing apart finds nothing, in whatever order the
    gallery is.

    Args:
        scores_i2t: [I, T], higher is better; scores_t2i: [T, I].
        relevant: BoolTensor[I, T], which pairs match. A query without a match is left out.

    Returns:
        r1, r5, r10, r_precision, map_at_r (of one query its average precision at R) per direction.

    Raises:
        UserError: a score is NaN or infinite, or nothing matches.
    """
    if not bool(relevant.any()):
        raise UserError("no image of the evaluation set has a text that matches it: there is nothing to find.")
    results: dict[str, QueryMetrics] = {}
    for side, query, scores, right in (("tr", "image", scores_i2t, relevant), ("ir", "text", scores_t2i, relevant.T)):
        check_scores(scores, query)
        equal = int((scores == scores[:, :1]).all(dim=1).sum())
        if equal and scores.shape[1] > 1:
            logger.warning(
                "%d of %d %ss score the same with the whole gallery; of equal scores wrong ones count first.", equal, len(scores), query
            )
        results[side] = _one_direction(scores, right)
    return results


def best_first(scores: Tensor, relevant: Tensor) -> Tensor:
    """The gallery in each query's order, highest scores first, of equal ones those that do not match: [Q, G] -> LongTensor[Q, G]."""
    wrong_first = relevant.byte().argsort(dim=1, stable=True)
    return wrong_first.gather(1, scores.gather(1, wrong_first).argsort(dim=1, descending=True, stable=True))


def _one_direction(scores: Tensor, relevant: Tensor) -> QueryMetrics:
    asked = relevant.any(dim=1)
    parts = []
    with Bar(total=int(asked.sum()), desc="metrics", unit="query", delay=1) as bar:
        for some, right in zip(scores[asked].split(AT_ONCE), relevant[asked].split(AT_ONCE), strict=True):
            parts.append(_of_queries(some, right))
            bar.update(len(some))
    return QueryMetrics(asked.nonzero().flatten(), {name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def _of_queries(scores: Tensor, relevant: Tensor) -> dict[str, Tensor]:
    """Each query's own metrics, [Q]."""
    hits = relevant.gather(1, best_first(scores, relevant)).float()
    count = relevant.sum(dim=1)
    place = torch.arange(1, hits.shape[1] + 1)
    within = (place[None, :] <= count[:, None]).float()  # the first R places, R = number of matches
    precision = hits.cumsum(dim=1) / place
    return {
        **{f"r{k}": hits[:, :k].amax(dim=1) for k in (1, 5, 10)},
        "r_precision": (hits * within).sum(dim=1) / count,
        "map_at_r": (hits * precision * within).sum(dim=1) / count,
    }


KEY = "run.coco_captions"
SHORT = {"i2t": "tr", "t2i": "ir"}


@dataclass(frozen=True)
class CocoGallery:
    """An evaluation set by COCO's ids: I images, and C captions with their columns in the score matrix."""

    image_id: list[int]  # [I]
    caption_id: list[int]  # [C]
    text: Tensor  # LongTensor[C]


def eccv_truth() -> Any:
    """The package's ``Metrics``, which brings its annotations along.

    Raises:
        UserError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it recommends ujson
            from eccv_caption import Metrics
    except ImportError as error:
        raise UserError(f"{KEY} needs the package eccv_caption; run `pip install lavis-mafa[coco]`.") from error
    return Metrics()


def coco_gallery(dataset: Any, captions: str | Path, truth: Any = None) -> CocoGallery:
    """COCO's ids of the images and captions of LAVIS's ``coco_retrieval`` test split, or of ours on the same images.

    Args:
        captions: COCO's ``captions_val2014.json``.
        truth: what ``eccv_truth()`` gives.

    Raises:
        UserError: the file is not COCO's, or images or captions that ECCV Caption asks for are not in the evaluation set.
    """
    known = (truth or eccv_truth()).coco_gts["t2i"]
    image_id = [_image_id(path) for path in dataset.image]
    place = {number: i for i, number in enumerate(image_id)}
    texts = [_captions(dataset, i) for i in range(len(image_id))]
    caption_id, columns, unknown = [], [], []
    for row in _annotations(Path(captions)):
        if row["id"] in known and row["image_id"] in place:
            column = texts[place[row["image_id"]]].get(_plain(row["caption"]))
            if column is None:
                unknown.append(row)
            else:
                caption_id.append(row["id"])
                columns.append(column)
    if unknown:
        first = unknown[0]
        raise UserError(
            f"{KEY}: {len(unknown)} captions are not among those of the test split, the first is {first['caption']!r} of image "
            f"{first['image_id']}; it must be COCO's Karpathy test split."
        )
    if missing := len(known) - len(caption_id):
        raise UserError(
            f"{KEY}: {missing} of the {len(known)} captions of ECCV Caption are not in the test split or not in {captions}; it needs "
            "the whole of COCO's Karpathy test split, and captions_val2014.json."
        )
    return CocoGallery(image_id, caption_id, torch.tensor(columns))


def eccv_metrics(scores_i2t: Tensor, scores_t2i: Tensor, gallery: CocoGallery, truth: Any = None) -> dict[str, float]:
    """ECCV Caption's R@1, R-Precision and mAP@R and CxC's recalls, in per cent.

    Args:
        scores_i2t: [I, T], higher is better; scores_t2i: [T, I].
        gallery: COCO's ids of the I images and of captions among the T texts.
        truth: what ``eccv_truth()`` gives.

    Returns:
        ``tr_`` (query = image) and ``ir_`` metrics: eccv_r1, eccv_r_precision, eccv_map_at_r, cxc_r1, cxc_r5, cxc_r10.
    """
    truth = truth or eccv_truth()
    metrics: dict[str, float] = {}
    for known, wanted in ((truth.eccv_gts, ("eccv_r1", "eccv_rprecision", "eccv_map_at_r")), (truth.cxc_gts, ("cxc_recalls",))):
        top = max(10, max(len(ids) for side in known.values() for ids in side.values()))  # no metric looks further down
        i2t = _best(scores_i2t, gallery.image_id, gallery.caption_id, known["i2t"], top, gallery.text)
        t2i = _best(scores_t2i[gallery.text], gallery.caption_id, gallery.image_id, known["t2i"], top)
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that cannot be switched off
            scores = truth.compute_all_metrics(i2t, t2i, target_metrics=wanted, Ks=(1, 5, 10))
        metrics |= {
            f"{SHORT[side]}_{name.replace('rprecision', 'r_precision')}": 100 * float(value)
            for name, sides in scores.items()
            for side, value in sides.items()
        }
    return metrics


def _best(
    scores: Tensor, queries: list[int], found: list[int], known: dict[int, list[int]], top: int, columns: Tensor | None = None
) -> dict[int, list[int]]:
    """Query id -> the ids of its ``top`` highest scores, best first, and of equal ones those that do not match."""
    place = {number: j for j, number in enumerate(found)}
    ids, best = torch.tensor(found), dict[int, list[int]]()
    for start in Bar(range(0, len(queries), AT_ONCE), desc="ECCV Caption", unit="batch", delay=1):
        part = scores[start : start + AT_ONCE]
        part = part if columns is None else part[:, columns]
        right = torch.zeros(part.shape, dtype=torch.bool)
        for row, query in enumerate(queries[start : start + AT_ONCE]):
            right[row, [place[number] for number in known.get(query, ()) if number in place]] = True
        orders = best_first(part, right)[:, :top]
        best |= {query: ids[order].tolist() for query, order in zip(queries[start : start + AT_ONCE], orders, strict=True)}
    return best


def _captions(dataset: Any, image: int) -> dict[str, int]:
    """An image's captions, plainly, and the place of each among the texts."""
    places = dataset.img2txt[image]
    written = [dataset.raw_text[t] for t in places] if hasattr(dataset, "raw_text") else dataset.annotation[image]["caption"]
    return {_plain(caption): place for place, caption in zip(places, written, strict=True)}


def _annotations(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text())["annotations"]
        if all({"id", "image_id", "caption"} <= row.keys() for row in rows[:1]):
            return rows
    except OSError as error:
        raise UserError(f"{KEY} is {str(path)!r}, which cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{KEY} is {str(path)!r}, which is not COCO's captions_val2014.json (annotations with id, image_id, caption).")


def _image_id(path: str) -> int:
    digits = re.search(r"(\d+)\.\w+$", str(path))
    if digits is None:
        raise UserError(f"{KEY} is set, but the image {path} of the test split is not one of COCO's (COCO_val2014_000000391895.jpg).")
    return int(digits[1])


def _plain(caption: str) -> str:
    """Letters and digits alone: the files differ in blanks and line ends."""
    return " ".join(re.findall(r"\w+", caption.lower()))
