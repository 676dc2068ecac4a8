"""``mafa_grounding``: trained on images and texts alone, which box does a text mean? (ALBEF section 6.4)"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

from lavis_mafa.datasets.boxes import CORNERS, Box, Expression, overlap
from lavis_mafa.datasets.ids import Id
from lavis_mafa.models.grounding import expression_maps, heat_of, hottest_box
from lavis_mafa.tasks.pretrain import MafaPretrainTask
from lavis_mafa.tasks.task import batches, joined_on_rank_0, write_result


class Found(NamedTuple):
    """The hottest of an expression's boxes (None: none scores above 0), how it lies on the thing, and what there was to choose from."""

    expression_id: Id
    box: Box | None
    iou: float
    right: bool
    hits: int
    boxes: int


class MafaGroundingTask(MafaPretrainTask):
    """Trains as ``mafa_pretrain`` does, and ranks each expression's boxes by where the model looks: on ``grit_boxes``."""

    def evaluation(self, model: Any, data_loader: Any, cuda_enabled: bool = True, **kwargs: Any) -> Any:
        """What was ``found``, by expression; None except on rank 0."""
        run, dataset = self.run, data_loader.dataset
        made: dict[Hashable, Found] = {}
        for samples in batches(data_loader, f"Grad-CAM of {run.heat.upper()}", cuda_enabled):
            images = samples["index"].tolist()
            rows, of_image = dataset.asked(images)
            texts = [dataset.texts[row] for row in rows]
            maps = expression_maps(model, samples["image"], texts, of_image, run.heat, run.layer)
            for row, place, cam in zip(rows, of_image.tolist(), maps, strict=True):
                one: Expression = dataset.expressions[row]
                box = hottest_box(heat_of(cam, *dataset.sizes[images[place]]), one.boxes, run.area_power)
                iou = 0.0 if box is None else overlap(one.box, box)
                made[row] = Found(one.expression_id, box, iou, one.right(box), one.hits, len(one.boxes))
        joined = joined_on_rank_0(made)
        return None if joined is None else {"found": joined}

    def after_evaluation(self, val_result: dict[str, Any], split_name: str, epoch: Any, **kwargs: Any) -> dict[str, float]:
        """Writes ``result/<split>_grounding_result.json``.

        Returns:
            in per cent of the expressions ``accuracy`` and ``agg_metrics``, the same; ``chance``, what guessing would have; those
            ``without_hit``, none of whose boxes is right; and those ``without_box``, none of whose boxes scores above 0.
        """
        found: list[Found] = list(val_result["found"].values())
        records = [
            {
                "expression_id": one.expression_id,
                "box": None if one.box is None else dict(zip(CORNERS, one.box, strict=True)),
                "iou": round(one.iou, 4),
                "right": one.right,
            }
            for one in found
        ]
        write_result(f"{split_name}_grounding_result", records)
        shares: dict[str, list[Any]] = {
            "accuracy": [one.right for one in found],
            "chance": [one.hits / one.boxes if one.boxes else 0.0 for one in found],
            "without_hit": [one.hits == 0 for one in found],
            "without_box": [one.box is None for one in found],
        }
        metrics = {name: 100 * sum(values) / len(found) for name, values in shares.items()}
        return {**metrics, "agg_metrics": metrics["accuracy"]}
