"""``mafa_classification``: which label a sentence about one image or two has."""

from __future__ import annotations

import logging
from collections.abc import Hashable
from typing import Any, NamedTuple

from lavis_mafa.errors import UserError
from lavis_mafa.tasks.task import MafaTask, as_id, batches, joined_on_rank_0, rows_of, write_result

logger = logging.getLogger(__name__)


class Told(NamedTuple):
    """A sentence's id (or the number of its row), the number of the label that the model tells, and of the true one."""

    sentence_id: int | str
    predicted: int
    true: int


class MafaClassificationTask(MafaTask):
    """Trains on labels, and tells and scores them: ``albef_ve_mafa`` and LAVIS's ``albef_classification`` those of ``grit_entailment``
    and LAVIS's ``snli_ve``, ``albef_nlvr_mafa`` those of ``grit_statements`` and LAVIS's ``nlvr``."""

    evaluates = ("text_input", "label")

    def evaluation(self, model: Any, data_loader: Any, cuda_enabled: bool = True, **kwargs: Any) -> dict[str, Any] | None:
        """What was ``told``, by row, and the names of the ``labels``; None except on rank 0."""
        made: dict[Hashable, Told] = {}
        for samples in batches(data_loader, "labels", cuda_enabled):
            found = model.predict(samples)
            predicted, true = found["predictions"].argmax(dim=1).tolist(), found["targets"].tolist()
            rows = rows_of(samples, len(true))
            if None in rows:
                raise UserError("samples have neither 'index' nor 'instance_id', which tell what was counted already.")
            ids = map(as_id, samples.get("sentence_id", rows))
            made |= {row: Told(*told) for row, *told in zip(rows, ids, predicted, true, strict=True)}
        joined = joined_on_rank_0(made)
        return None if joined is None else {"told": joined, "labels": list(data_loader.dataset.class_labels)}

    def after_evaluation(self, val_result: dict[str, Any], split_name: str, epoch: Any, **kwargs: Any) -> dict[str, float]:
        """Writes ``result/<split>_classification_result.json``.

        Returns:
            ``accuracy`` in per cent, that of each label's sentences, and ``agg_metrics``, the accuracy of all.
        """
        told: list[Told] = list(val_result["told"].values())
        labels: list[str] = val_result["labels"]
        records = [{"sentence_id": t.sentence_id, "label": labels[t.predicted], "true_label": labels[t.true]} for t in told]
        write_result(f"{split_name}_classification_result", records)
        accuracy = _share_right(told)
        of_each = {label: [t for t in told if t.true == number] for number, label in enumerate(labels)}
        metrics = {f"accuracy_{label}": _share_right(its) for label, its in of_each.items() if its}
        return {"accuracy": accuracy, **metrics, "agg_metrics": accuracy}


def _share_right(told: list[Told]) -> float:
    """In per cent."""
    return 100 * sum(t.predicted == t.true for t in told) / len(told)
