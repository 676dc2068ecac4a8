"""``mafa_captioning``: training on captions, and caption metrics on the evaluation splits."""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Hashable
from typing import Any, NamedTuple

from lavis_mafa.models.blip2 import Blip2Mafa
from lavis_mafa.tasks.caption_metrics import Id, metrics_by_domain, read_references, runnable
from lavis_mafa.tasks.task import MafaTask, as_id, batches, joined_on_rank_0, known_ids, rows_of, write_result

logger = logging.getLogger(__name__)


class Captioned(NamedTuple):
    """A row of an evaluation set."""

    image: str | None  # its path, where the data set lists it
    image_id: Id
    caption: str  # the one that was made
    own: list[str]  # the data set's


class MafaCaptioningTask(MafaTask):
    """Generates a caption for each image of a split, writes them down, and scores them where there are references.

    References come from ``run.caption_references`` (COCO's format; also NoCaps with its domains), else from the evaluation data
    set: the texts of a gallery, or the captions in the annotations of LAVIS's data sets, those of all rows of an image.

    Raises:
        UserError: at construction, an unknown name in ``run.caption_metrics`` or a wrong ``run.caption_references``.
    """

    evaluates = ("image", "image_id")

    def __init__(self, run: Any) -> None:
        super().__init__(run)
        # Now, so that a mistake is found before hours of generating.
        self.metric_names = runnable(run.caption_metrics)
        self.references: dict[Id, list[str]] | None = None
        self.domains: dict[Id, str] = {}
        if run.caption_references is not None:
            self.references, self.domains = read_references(run.caption_references, "run.caption_references")

    def evaluation(self, model: Any, data_loader: Any, cuda_enabled: bool = True, **kwargs: Any) -> dict[str, Any] | None:
        """The captions by image id, and the data set's own references of these images; None except on rank 0."""
        settings = self._settings(model)
        dataset = data_loader.dataset
        made: dict[Hashable, Captioned] = {}
        for samples in batches(data_loader, "captions", cuda_enabled):
            captions = model.generate(samples, **settings)
            for given, row, caption in zip(samples["image_id"], rows_of(samples, len(captions)), captions, strict=True):
                if row is None:
                    made[as_id(given)] = Captioned(None, as_id(given), caption.strip(), [])
                else:
                    path, one = own_path(dataset, row), own_id(dataset, row, given)
                    made[row] = Captioned(path, one, caption.strip(), own_references(dataset, row))
        joined = joined_on_rank_0(made)
        if joined is None:
            return None
        return _by_image(list(joined.values())) | {"listed": isinstance(getattr(dataset, "image", None), list)}

    def after_evaluation(self, val_result: dict[str, Any], split_name: str, epoch: Any, **kwargs: Any) -> dict[str, float] | None:
        """Writes ``result/<split>_epoch<epoch>.json``.

        Returns:
            The metrics, and ``agg_metrics``: CIDEr plus BLEU-4, whichever of them were asked for. None without references.
        """
        captions = val_result["captions"]
        paths = val_result["paths"] if val_result["listed"] else {}
        rows = [{"image_id": i, "caption": text} | ({"image": paths[i]} if i in paths else {}) for i, text in captions.items()]
        write_result(f"{split_name}_epoch{epoch}", rows)
        references = val_result["references"] if self.references is None else known_ids(captions, self.references)
        if not references:
            logger.info("%s has no reference captions: no metrics.", split_name)
            return None
        metrics = metrics_by_domain(references, captions, known_ids(captions, self.domains), self.metric_names)
        chosen = [metrics[name] for name in ("cider", "bleu_4") if name in metrics]
        return {**metrics, "agg_metrics": sum(chosen)} if chosen else metrics

    def _settings(self, model: Any) -> dict[str, Any]:
        run = self.run
        before = 1 if isinstance(model, Blip2Mafa) else 0  # its lengths count [DEC], as LAVIS's
        settings = {"max_length": run.max_len + before, "min_length": run.min_len + before}
        settings |= {"num_beams": run.num_beams, "use_nucleus_sampling": False}
        if "length_penalty" in inspect.signature(model.generate).parameters:
            settings["length_penalty"] = run.length_penalty
        elif run.length_penalty != 1:
            logger.warning("run.length_penalty is %s, but this model generates without one: it is ignored.", run.length_penalty)
        return settings


def _by_image(rows: list[Captioned]) -> dict[str, Any]:
    """Rows of one image joined: its first caption, all references; by its id or, where another image has that too, its path."""
    images: dict[Hashable, list[Captioned]] = {}
    for row in rows:
        images.setdefault(row.image_id if row.image is None else f"path {row.image}", []).append(row)
    same_id = {name: count for name, count in Counter(of_image[0].image_id for of_image in images.values()).items() if count > 1}
    if same_id:
        text = "%d images have an image_id that another has too, the first is %r: they are written down by their paths."
        logger.warning(text, sum(same_id.values()), next(iter(same_id)))
    named: dict[Id, list[Captioned]] = {}
    for first, *others in images.values():
        named[first.image if first.image is not None and first.image_id in same_id else first.image_id] = [first, *others]
    own = {name: list(dict.fromkeys(text for row in of_image for text in row.own)) for name, of_image in named.items()}
    return {
        "captions": {name: of_image[0].caption for name, of_image in named.items()},
        "references": {name: texts for name, texts in own.items() if texts},
        "paths": {name: of_image[0].image for name, of_image in named.items() if of_image[0].image is not None},
    }


def own_references(dataset: Any, row: int) -> list[str]:
    """The captions that the evaluation data set itself has for its row's image; empty where it has none."""
    if hasattr(dataset, "img2txt") and hasattr(dataset, "raw_text"):
        return [dataset.raw_text[text] for text in dataset.img2txt[row]]
    captions = _annotation(dataset, row).get("caption", [])
    return [captions] if isinstance(captions, str) else list(captions)


def own_path(dataset: Any, row: int) -> str | None:
    """Where the image of a row is, for a data set that says it."""
    images = getattr(dataset, "image", None)
    path = images[row] if isinstance(images, list) else _annotation(dataset, row).get("image")
    return None if path is None else str(path)


def own_id(dataset: Any, row: int, given: Any) -> Id:
    """The id of a row's image as it is, but for COCO's, which LAVIS makes of the file's name: 000000391895 is a number."""
    name, annotation = as_id(given), _annotation(dataset, row)
    written = {str(annotation.get(key)) for key in ("image_id", "img_id")}
    return int(name) if isinstance(name, str) and name.isdecimal() and annotation and name not in written else name


def _annotation(dataset: Any, row: int) -> dict[str, Any]:
    return dataset.annotation[row] if hasattr(dataset, "annotation") else {}
