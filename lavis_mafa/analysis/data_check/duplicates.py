"""Images of the same bytes, rows that are there twice, and captions that several images share; each refers to the first of its kind."""

from __future__ import annotations

import numpy as np

from lavis_mafa.analysis.data_check.judging import Verdicts
from lavis_mafa.analysis.data_check.rows import Numbers, Rows
from lavis_mafa.datasets.ids import pc


def duplicate_images(verdicts: Verdicts) -> Numbers:
    """[U] the first image of the same bytes; itself for the first and for bad ones."""
    first = np.arange(len(verdicts.image))
    good = np.flatnonzero(verdicts.image == 0)
    _, at, which = np.unique(verdicts.content[good], return_index=True, return_inverse=True)
    first[good] = good[at[which]]
    return first


def duplicate_captions(rows: Rows, verdicts: Verdicts) -> tuple[Numbers, Numbers]:
    """Of good captions of good images, by the caption as it was written.

    Returns:
        [C] the first caption of the same text and the same image, and [C] the first of the same text where that is another
        image's; itself where there is none.
    """
    same_pair, same_text = np.arange(len(rows.caption)), np.arange(len(rows.caption))
    image = rows.image_of[rows.row_of]
    captions_alone = np.array([text == "caption" for text in rows.text], dtype=bool)[rows.row_of]  # many images have one question
    good = np.flatnonzero(
        captions_alone & ~verdicts.caption & (image >= 0) & (verdicts.image[image] == 0 if len(verdicts.image) else False)
    )
    if not len(good):
        return same_pair, same_text
    captions = rows.caption.take(good)
    text = pc.index_in(captions, value_set=pc.unique(captions)).to_numpy().astype(np.int64)
    _, at, which = np.unique(text * len(rows.path) + image[good], return_index=True, return_inverse=True)
    same_pair[good] = good[at[which]]
    _, at, which = np.unique(text, return_index=True, return_inverse=True)
    first = good[at[which]]
    other = (image[first] != image[good]) & (same_pair[good] == good)
    same_text[good[other]] = first[other]
    return same_pair, same_text
