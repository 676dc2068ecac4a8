"""``mafa_captioning``: training on captions, and caption metrics on the evaluation splits."""

from __future__ import annotations

import inspect
import logging
from typing import Any

from lavis_mafa.common.caption_metrics import Id, metrics_by_domain, runnable
from lavis_mafa.common.caption_references import read_references
from lavis_mafa.tasks.generating import as_id, batches, joined_on_rank_0, write_result
from lavis_mafa.tasks.mafa_task import MafaTask

logger = logging.getLogger(__name__)


class MafaCaptioningTask(MafaTask):
    """Generates a caption for each image of a split, writes them down, and scores them where there are references.

    References come from ``run.caption_references`` (COCO's format; also NoCaps with its domains), else from the evaluation data
    set: the texts of a gallery, or the captions in the annotations of LAVIS's data sets.

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
            references, domains = read_references(run.caption_references, "run.caption_references")
            self.references = {as_id(image): texts for image, texts in references.items()}
            self.domains = {as_id(image): domain for image, domain in domains.items()}

    def evaluation(self, model: Any, data_loader: Any, cuda_enabled: bool = True, **kwargs: Any) -> dict[str, Any] | None:
        """The captions by image id, and the data set's own references of these images; None except on rank 0."""
        settings = self._settings(model)
        made: dict[Id, tuple[str, list[str], str | None]] = {}
        for samples in batches(data_loader, "captions", cuda_enabled):
            captions = model.generate(samples, **settings)
            # Which row of the data set a sample is: our data sets give an index, LAVIS's an instance_id.
            rows = samples["index"] if "index" in samples else samples.get("instance_id", [None] * len(captions))
            for image, row, caption in zip(samples["image_id"], rows, captions, strict=True):
                own = [] if row is None or self.references is not None else own_references(data_loader.dataset, int(row))
                made[as_id(image)] = (caption.strip(), own, None if row is None else own_path(data_loader.dataset, int(row)))
        joined = joined_on_rank_0(made)
        if joined is None:
            return None
        return {
            "captions": {image: caption for image, (caption, _, _) in joined.items()},
            "references": self.references or {image: own for image, (_, own, _) in joined.items() if own},
            "paths": {image: path for image, (_, _, path) in joined.items() if path is not None},
        }

    def after_evaluation(self, val_result: dict[str, Any], split_name: str, epoch: Any, **kwargs: Any) -> dict[str, float] | None:
        """Writes ``result/<split>_epoch<epoch>.json``.

        Returns:
            The metrics, and ``agg_metrics``: CIDEr plus BLEU-4, whichever of them were asked for. None without references.
        """
        captions = val_result["captions"]
        paths = val_result.get("paths", {})
        rows = [{"image_id": i, "caption": text} | ({"image": paths[i]} if i in paths else {}) for i, text in captions.items()]
        write_result(f"{split_name}_epoch{epoch}", rows)
        if not val_result["references"]:
            logger.info("%s has no reference captions: no metrics.", split_name)
            return None
        metrics = metrics_by_domain(val_result["references"], captions, self.domains, self.metric_names)
        chosen = [metrics[name] for name in ("cider", "bleu_4") if name in metrics]
        return {**metrics, "agg_metrics": sum(chosen)} if chosen else metrics

    def _settings(self, model: Any) -> dict[str, Any]:
        run = self.run
        settings = {
            "num_beams": run.num_beams,
            "max_length": run.max_len,
            "min_length": run.min_len,
            "use_nucleus_sampling": False,
        }
        if "length_penalty" in inspect.signature(model.generate).parameters:
            settings["length_penalty"] = run.length_penalty
        elif run.length_penalty != 1:
            logger.warning("run.length_penalty is %s, but this model generates without one: it is ignored.", run.length_penalty)
        return settings


def own_references(dataset: Any, row: int) -> list[str]:
    """The captions that the evaluation data set itself has for its row's image; empty where it has none."""
    if hasattr(dataset, "img2txt") and hasattr(dataset, "raw_text"):
        return [dataset.raw_text[text] for text in dataset.img2txt[row]]
    captions = dataset.annotation[row].get("caption", []) if hasattr(dataset, "annotation") else []
    return [captions] if isinstance(captions, str) else list(captions)


def own_path(dataset: Any, row: int) -> str | None:
    """Where the image of a row is, for a data set that lists its images."""
    images = getattr(dataset, "image", None)
    return str(images[row]) if isinstance(images, list) else None
