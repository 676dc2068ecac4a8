"""The annotation file of a mining pass: the original pairs and the mined ones, readable by ``grit_pairs``."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from lavis_mafa.analysis.connections.source_rows import SourceRows
from lavis_mafa.datasets.formats import SAME_IMAGE
from lavis_mafa.datasets.ids import pc

ORIGINAL, MINED = "original", "mined"


def pairs_table(source: SourceRows, image_keys: np.ndarray, judged: pa.Table, mined: np.ndarray) -> pa.Table:
    """N original rows, then the mined ones, best first.

    Columns: ``image``; ``caption`` (text, or a list of texts where a row of the data has several); ``image_id``, equal for all rows of
    one image, and where the data count several paths as one, ``same_image``, which tells ``grit_pairs``; ``concept`` where the data
    have it, never for a mined pair, whose truth is not known; ``source`` (original, mined); ``score``, Con-D's probability (of the
    caption that was drawn, where there are several; null where an image could not be read); ``image_sample`` and ``text_sample``,
    data set rows.

    Args:
        source: annotations of the data.
        image_keys: [N].
        judged: as ``mining.judged`` writes it, R rows.
        mined: the rows of ``judged`` that become pairs.
    """
    rows = np.arange(len(source))
    caption = source.table["caption"]
    several = bool(pc.any(pc.greater(pc.list_value_length(caption), 1)).as_py())
    new = judged.take(mined[np.argsort(-judged["probability"].to_numpy()[mined], kind="stable")])
    kind = pa.list_(pa.string()) if several else pa.string()
    originals = {
        "image": source.table["image"],
        "caption": caption if several else pc.list_flatten(caption),
        "image_id": pa.array(image_keys),
        "source": pa.array([ORIGINAL]).take(pa.array(np.zeros(len(rows), dtype=np.int8))),
        "score": own_scores(judged, len(rows)),
        "image_sample": pa.array(rows),
        "text_sample": pa.array(rows),
    }
    texts = new["caption"].combine_chunks()
    if several:
        texts = pa.ListArray.from_arrays(np.arange(len(texts) + 1, dtype=np.int32), texts)
    additions = {
        "image": source.table["image"].take(new["image"]),
        "caption": texts,
        "image_id": pa.array(image_keys[new["image"].to_numpy()]),
        "source": pa.array([MINED]).take(pa.array(np.zeros(new.num_rows, dtype=np.int8))),
        "score": new["probability"],
        "image_sample": new["image"],
        "text_sample": new["text"],
    }
    paths = pc.index_in(source.table["image"], value_set=pc.unique(source.table["image"])).to_numpy().astype(np.int64)
    if len(np.unique(np.stack([image_keys, paths]), axis=1).T) > len(np.unique(image_keys)):
        originals[SAME_IMAGE], additions[SAME_IMAGE] = originals["image_id"], additions["image_id"]
    schema = {name: pa.int64() for name in originals} | {"image": pa.string(), "caption": kind, "source": pa.string()}
    schema["score"] = pa.float32()
    if "concept" in source.table.column_names:
        originals["concept"] = source.table["concept"]
        additions["concept"] = pa.nulls(new.num_rows, pa.string())
        schema["concept"] = pa.string()
    return pa.concat_tables([pa.table(part).cast(pa.schema(schema)) for part in (originals, additions)])


def own_scores(judged: pa.Table, count: int) -> pa.Array:
    """[N] probability of each sample's own pair, null where it was not judged."""
    scores = np.full(count, np.nan, dtype=np.float32)
    anchor = np.where(
        judged["direction"].to_numpy(zero_copy_only=False) == "text for image", judged["image"].to_numpy(), judged["text"].to_numpy()
    )
    scores[anchor] = judged["own_probability"].to_numpy()
    return pa.array(scores, mask=np.isnan(scores))
