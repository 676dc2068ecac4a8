"""``mafa_pretrain``: pre-training with MAFA, and retrieval on the evaluation splits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lavis.common.registry import registry
from torch import Tensor, nn

from lavis_mafa.config.schema import RunBlock
from lavis_mafa.datasets.ground_truth import NO_TRUTH
from lavis_mafa.distributed import gather_own_first, rank
from lavis_mafa.errors import UserError
from lavis_mafa.files import digest, replacing
from lavis_mafa.models.base import MafaModel
from lavis_mafa.models.con_d import GroundTruthDiscriminator
from lavis_mafa.tasks.retrieval_metrics import CocoGallery, QueryMetrics, averages, coco_gallery, eccv_metrics, query_metrics
from lavis_mafa.tasks.task import MafaTask


class MafaPretrainTask(MafaTask):
    """Builds data and model, hands the model's whole output to the runner, and evaluates retrieval.

    Where the data set knows which pairs truly match, the log also has the share of chosen hard negatives that are false, and Con-D's
    precision and recall on them.
    """

    def __init__(self, run: RunBlock | None = None) -> None:
        super().__init__(run)
        self.truth: Any = None
        self.coco: CocoGallery | None = None

    def build_datasets(self, cfg: Any) -> dict[str, Any]:
        datasets = super().build_datasets(cfg)
        known = [d["train"].truth for d in datasets.values() if getattr(d.get("train"), "truth", None) is not None]
        if len(known) == 1 and len(datasets) == 1:
            self.truth = known[0]
        if self.truth is None and (cfg.model_cfg.get("discriminator") or {}).get("arch") == "ground_truth":
            raise UserError(f"model.discriminator.arch is ground_truth, but {NO_TRUTH}.")
        if self.run.coco_captions is not None:  # now, so that a wrong file is found before hours of scoring
            tests = [d["test"] for d in datasets.values() if hasattr(d.get("test"), "img2txt")]
            if len(tests) != 1:
                raise UserError("run.coco_captions is set, but there is no test split of COCO; use datasets: coco_retrieval.")
            self.coco = coco_gallery(tests[0], self.run.coco_captions)
        return datasets

    def build_model(self, cfg: Any) -> nn.Module:
        model_class = registry.get_model_class(cfg.model_cfg.arch)
        if model_class is None or not issubclass(model_class, MafaModel):
            if (rank_by := self.run.rank_by) is not None:
                raise UserError(f"run.rank_by is {rank_by}, but {cfg.model_cfg.arch} ranks by LAVIS's own score; allowed: null.")
            if self.run.k_test == 0:
                raise UserError(f"run.k_test is 0, but {cfg.model_cfg.arch} ranks by its matching head alone; allowed: 1 or more.")
            return super().build_model(cfg)
        model: Any = model_class.from_config(self.model_block or cfg.model_cfg, self.run.grit.batch_scope)
        con_d = model.settings.discriminator
        if con_d is not None and con_d.arch == "ground_truth":
            model.set_discriminator(GroundTruthDiscriminator(self.truth))
        return model

    def step_output(self, model: nn.Module, samples: dict[str, Any]) -> dict[str, Any]:
        """The model's whole output, with metrics from ground truth where there is one."""
        output = model(samples)
        if self.truth is not None and output.get("verdicts") is not None:
            output["metrics"] = {**output["metrics"], **self._true_counts(output["verdicts"], samples)}
        return output

    @torch.no_grad()
    def _true_counts(self, verdicts: dict[str, Tensor], samples: dict[str, Any]) -> dict[str, Tensor]:
        concept, text_key = samples["concept"], samples["text_key"]
        if self.run.grit.batch_scope == "global":
            concept, text_key = gather_own_first(concept), gather_own_first(text_key)
        image, text = verdicts["image_position"].cpu(), verdicts["text_position"].cpu()
        pairs = concept.cpu()[image], text_key.cpu()[text]
        asked = verdicts["exists"] & self.truth.knows(*pairs).to(verdicts["exists"].device)
        match = self.truth.matches(*pairs).to(asked.device) & asked
        counts = {"asked": asked.sum(), "asked_true": match.sum()}
        if "positive" in verdicts:
            counts["found"] = (verdicts["positive"] & asked).sum()
            counts["found_true"] = (verdicts["positive"] & match).sum()
        return {f"count_{name}": value.float() for name, value in counts.items()}

    @staticmethod
    def derived_metrics(averages: dict[str, float]) -> dict[str, float]:
        """Ratios of averaged counts: ``false_negative_share``, ``con_d_precision``, ``con_d_recall``."""
        counts = {k.removeprefix("count_"): averages.pop(k) for k in list(averages) if k.startswith("count_")}
        if counts.get("asked"):
            averages["false_negative_share"] = counts["asked_true"] / counts["asked"]
        if counts.get("found"):
            averages["con_d_precision"] = counts["found_true"] / counts["found"]
        if counts.get("asked_true") and "found_true" in counts:
            averages["con_d_recall"] = counts["found_true"] / counts["asked_true"]
        return averages

    def evaluation(self, model: Any, data_loader: Any, cuda_enabled: bool = True, **kwargs: Any) -> dict[str, Any]:
        """Scores of every image and text of the split, and which of them match."""
        dataset = data_loader.dataset
        result: dict[str, Any] = {"dataset": dataset, "relevant": relevance(dataset)}
        if isinstance(model, MafaModel):
            scores = model.retrieval_scores(data_loader, self.run)
            return {**result, "i2t": scores.i2t, "t2i": scores.t2i, "cosine": scores.cosine, "rank_by": scores.rank_by}
        i2t, t2i = model.compute_sim_matrix(data_loader, task_cfg=self.run)  # LAVIS's models rank by their own score
        return {**result, "i2t": i2t, "t2i": t2i}

    def after_evaluation(self, val_result: dict[str, Any], split_name: str, epoch: Any, **kwargs: Any) -> dict[str, Any]:
        """The metrics of ``rank_by``'s score and, with ``itc_`` before their names, those of ITC's cosine alone.

        Those of each query go to ``result/<split>_queries.parquet``: these are their means.
        """
        relevant, cosine = val_result["relevant"], val_result.get("cosine")
        scores = {"": (torch.as_tensor(val_result["i2t"]), torch.as_tensor(val_result["t2i"]))}
        scores |= {} if cosine is None else {"itc_": (cosine, cosine.T)}
        queries = {score: query_metrics(*pair, relevant) for score, pair in scores.items()}
        metrics: dict[str, Any] = {}
        for score, pair in scores.items():
            found = averages(queries[score])
            if self.coco is not None and split_name == "test":  # ECCV Caption annotates COCO's test split alone
                found |= eccv_metrics(*pair, self.coco)
            metrics |= {f"{score}{name}": value for name, value in found.items()}
            metrics |= {"rank_by": val_result["rank_by"]} if "rank_by" in val_result else {}
        if rank() == 0:
            write_queries(split_name, queries, val_result["dataset"], relevant)
        return metrics


def relevance(dataset: Any) -> Tensor:
    """BoolTensor[I, T] of an evaluation set: its ``relevant`` where it knows one, else LAVIS's ``img2txt``."""
    if getattr(dataset, "relevant", None) is not None:
        return dataset.relevant
    relevant = torch.zeros(len(dataset.image), len(dataset.text), dtype=torch.bool)
    for image, texts in dataset.img2txt.items():
        relevant[image, texts] = True
    return relevant


def write_queries(split: str, queries: dict[str, dict[str, QueryMetrics]], dataset: Any, relevant: Tensor) -> Path:
    """``<split>_queries.parquet`` in the run's ``result`` folder: a row a query.

    Columns: ``direction`` (``tr`` or ``ir``), ``query`` (its place among images or texts), ``image`` (the query itself or, of a text,
    the first image that it is written for), and every metric in per cent. The file's ``gallery`` changes with texts and matches.

    Args:
        queries: of each score what comes before the metrics' names -> direction -> metrics.
        relevant: BoolTensor[I, T], of the ``dataset`` with ``text`` and ``img2txt``.
    """
    own = torch.zeros(len(dataset.text), dtype=torch.long)
    for image, texts in reversed(dataset.img2txt.items()):
        own[texts] = image
    parts = []
    for side, of in queries[""].items():
        values = {f"{score}{name}": 100 * each for score, by in queries.items() for name, each in by[side].values.items()}
        columns = {"query": of.query.int(), "image": (of.query if side == "tr" else own[of.query]).int(), **values}
        direction = pa.array([side] * len(of.query)).dictionary_encode()
        parts.append(pa.table({"direction": direction, **{name: column.numpy() for name, column in columns.items()}}))
    gallery = digest([list(dataset.text), relevant.nonzero().tolist()])
    path = Path(registry.get_path("result_dir")) / f"{split}_queries.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        pq.write_table(pa.concat_tables(parts).unify_dictionaries().replace_schema_metadata({"gallery": gallery}), part)
    return path
