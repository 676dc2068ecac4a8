"""What a pair of a gallery scores, by the matching head, by the cosine and by both; and what is left outside the top k."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from lavis.common.registry import registry
from lavis.models.base_model import BaseModel
from lavis.tasks.base_task import BaseTask
from omegaconf import OmegaConf

import families
from lavis_mafa.config.schema import RunBlock
from lavis_mafa.errors import UserError
from lavis_mafa.models.albef import AlbefMafa
from lavis_mafa.models.base import MafaModel
from lavis_mafa.models.blip import BlipMafa
from lavis_mafa.models.blip2 import Blip2Mafa
from lavis_mafa.models.retrieval import retrieval_scores, without_autocast
from lavis_mafa.runners.runner_mafa import evaluate_split
from lavis_mafa.tasks import pretrain
from lavis_mafa.tasks.pretrain import MafaPretrainTask
from lavis_mafa.tasks.retrieval_metrics import retrieval_metrics

IMAGES, TEXTS = 7, 9
SCORES = ["itm", "itm+itc", "itc"]


class Model(MafaModel[Any], BaseModel):
    """Given cosines and given matching logits; image i is the number i, and text j too."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.cosine = 2 * torch.rand(IMAGES, TEXTS, generator=generator) - 1
        self.logits = 4 * torch.randn(IMAGES, TEXTS, generator=generator) + offset
        self.matched = 0
        self.temp = torch.nn.Parameter(torch.ones(1))  # a LAVIS model knows its device by a parameter

    def text_rows(self, captions: list[str]) -> Any:
        number = torch.tensor([int(caption) for caption in captions])
        return (number[:, None],), torch.eye(TEXTS)[number]

    def image_rows(self, image: torch.Tensor) -> Any:
        return image, self.cosine[image[:, 0].long()]

    def match_rows(
        self, image_states: torch.Tensor, text: tuple[torch.Tensor, ...], image_index: torch.Tensor, text_index: torch.Tensor
    ) -> torch.Tensor:
        self.matched += len(image_index)
        right = self.logits[image_states[image_index, 0].long(), text[0][text_index, 0]]
        return torch.stack([-right, right], dim=1)


class Gallery:
    dataset = SimpleNamespace(text=[str(j) for j in range(TEXTS)], image=["x"] * IMAGES)

    def __iter__(self) -> Any:
        numbers = torch.arange(float(IMAGES))[:, None]
        yield from ({"image": part} for part in numbers.split(4))


def by_loops(cosine: torch.Tensor, logits: torch.Tensor, top_k: int, rank_by: str) -> torch.Tensor:
    """One pair at a time: [Q, G] -> [Q, G]."""
    scores = torch.empty_like(cosine)
    for q, row in enumerate(cosine):
        order = sorted(range(len(row)), key=lambda j: -float(row[j]))
        for place, j in enumerate(order):
            of_pair = {"itm": logits[q, j], "itm+itc": logits[q, j] + row[j], "itc": row[j]}[rank_by]
            scores[q, j] = of_pair if rank_by == "itc" or place < top_k else -100.0
    return scores


@pytest.mark.parametrize("top_k", [1, 4, 50])
@pytest.mark.parametrize("rank_by", SCORES)
def test_equals_the_loops(rank_by, top_k):
    model = Model()
    found = retrieval_scores(model, Gallery(), top_k, rank_by, pairs_at_once=5)
    torch.testing.assert_close(found.i2t, by_loops(model.cosine, model.logits, top_k, rank_by))
    torch.testing.assert_close(found.t2i, by_loops(model.cosine.T, model.logits.T, top_k, rank_by))
    torch.testing.assert_close(found.cosine, model.cosine)
    assert model.matched == (0 if rank_by == "itc" else IMAGES * min(top_k, TEXTS) + TEXTS * min(top_k, IMAGES))


@pytest.mark.parametrize("rank_by", SCORES)
def test_nothing_outside_the_top_k_comes_before_what_is_inside(rank_by):
    """Also with logits below the score of what was not matched, as a diverged head has them."""
    model = Model(offset=-1000.0)
    found = retrieval_scores(model, Gallery(), 3, rank_by)
    for scores, cosine in ((found.i2t, model.cosine), (found.t2i, model.cosine.T)):
        best = scores.argsort(dim=1, descending=True)[:, :3].sort().values
        assert torch.equal(best, cosine.topk(3, dim=1).indices.sort().values)


def test_who_ranks_by_what():
    assert (AlbefMafa.rank_by, BlipMafa.rank_by, Blip2Mafa.rank_by) == ("itm", "itm+itc", "itm+itc")
    model, plain = Model(), OmegaConf.create({"k_test": 4})
    for own in ("itm", "itc"):
        model.rank_by = own
        assert model.retrieval_scores(Gallery(), plain).rank_by == own
        assert model.retrieval_scores(Gallery(), OmegaConf.create({"k_test": 4, "rank_by": "itm+itc"})).rank_by == "itm+itc"
        wanted = retrieval_scores(model, Gallery(), 4, own)
        for matrix, scores in zip(model.compute_sim_matrix(Gallery(), plain), (wanted.i2t, wanted.t2i), strict=True):
            assert torch.equal(torch.from_numpy(matrix), scores)
    with pytest.raises(UserError, match="run.rank_by is 'cosine', but must be one of itm, "):
        model.compute_sim_matrix(Gallery(), OmegaConf.create({"k_test": 4, "rank_by": "cosine"}))
    model.rank_by = "itm"
    cosine = model.retrieval_scores(Gallery(), OmegaConf.create({"k_test": 0}))
    assert cosine.rank_by == "itc" and torch.equal(cosine.i2t, model.cosine) and torch.equal(cosine.t2i, model.cosine.T)
    model.rank_by = "itc"
    for run in ({"k_test": 0}, {"k_test": -1}, {}):
        assert model.retrieval_scores(Gallery(), OmegaConf.create(run)).rank_by == "itc", "which has no use for it"
        with pytest.raises(UserError, match=f"run.k_test is {run.get('k_test')}, but must be a whole number, 1 or more"):
            model.retrieval_scores(Gallery(), OmegaConf.create({**run, "rank_by": "itm"}))
    empty = Gallery()
    empty.dataset = SimpleNamespace(**{**vars(Gallery.dataset), "text": []})
    with pytest.raises(UserError, match="images and 0 texts to score"):
        model.retrieval_scores(empty, plain)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("cosine", r"9 of 63 retrieval cosines are NaN or infinite, those of 1 of 7 images: image 2 \(from 0\) has 9 of 9"),
        ("logits", r"2 of 63 retrieval scores are NaN or infinite, those of 1 of 7 images: image 2 \(from 0\) has 2 of 9"),
    ],
)
def test_scores_that_are_not_finite_are_an_error_that_names_the_query(part, message):
    model = Model()
    getattr(model, part)[2, 4:6] = torch.tensor([float("nan"), float("inf")])
    with pytest.raises(UserError, match=message):
        retrieval_scores(model, Gallery(), 50, "itm")


def test_a_score_that_only_texts_ask_for_is_looked_at_too():
    model = Model()
    best_text, best_image = model.cosine.argmax(dim=1), model.cosine.argmax(dim=0)
    text = next(t for t, image in enumerate(best_image.tolist()) if best_text[image] != t)
    model.logits[best_image[text], text] = float("inf")
    with pytest.raises(UserError, match=f"1 of 63 retrieval scores are NaN or infinite, those of 1 of 9 texts: text {text} "):
        retrieval_scores(model, Gallery(), 1, "itm")


@pytest.mark.parametrize("family", ["albef", "blip", "blip2"])
def test_matching_logits_of_every_family_are_fp32(family):
    model = families.build((family, False)).eval()
    samples = families.batch((family, False), 2)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        text, _ = model.text_rows(samples["text_input"])
        own = torch.arange(2)
        logits = model.match_rows(model.image_rows(samples["image"])[0], text, own, own)
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())


def test_matching_logits_are_fp32_under_autocast():
    head, states = torch.nn.Linear(8, 2), torch.randn(50, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = without_autocast(head, states)
    assert logits.dtype == torch.float32 and torch.equal(logits, head(states))


@pytest.fixture
def result_dir(tmp_path, monkeypatch) -> Path:
    """Where a run's results go."""
    monkeypatch.setitem(registry.mapping["paths"], "result_dir", str(tmp_path / "result"))
    return tmp_path / "result"


def test_an_evaluation_has_the_figures_of_its_score_and_of_the_cosine(tmp_path, caplog, result_dir):
    caplog.set_level("INFO")
    model, gallery = Model(), Gallery()
    relevant = torch.zeros(IMAGES, TEXTS, dtype=torch.bool)
    relevant[torch.arange(IMAGES), torch.arange(IMAGES)] = True
    img2txt = {i: [i] for i in range(IMAGES - 1)} | {IMAGES - 1: [*range(IMAGES - 1, TEXTS), 2]}  # text 2 is written for two
    gallery.dataset = SimpleNamespace(**vars(Gallery.dataset), relevant=relevant, img2txt=img2txt)
    task = MafaPretrainTask(RunBlock(k_test=4, rank_by="itm"))
    stats = evaluate_split(task, model, gallery, gallery.dataset, "val", 3, tmp_path, cuda_enabled=False)
    record = json.loads((tmp_path / "evaluation.jsonl").read_text())
    assert stats is not None and record == {"split": "val", "epoch": 3, **stats} and record["rank_by"] == "itm"
    logits, cosine = by_loops(model.cosine, model.logits, 4, "itm"), model.cosine
    wanted = retrieval_metrics(logits, by_loops(cosine.T, model.logits.T, 4, "itm"), relevant)
    wanted |= {f"itc_{name}": value for name, value in retrieval_metrics(cosine, cosine.T, relevant).items()}
    assert {name: value for name, value in stats.items() if name != "rank_by"} == pytest.approx(wanted)
    assert stats["agg_metrics"] != stats["itc_agg_metrics"]
    queries = pq.read_table(result_dir / "val_queries.parquet").to_pandas()
    asked = queries[queries.direction == "ir"]
    assert asked["query"].tolist() == asked["image"].tolist() == [*range(IMAGES)]  # two texts match nothing
    assert asked["itc_map_at_r"].mean() == pytest.approx(stats["itc_ir_map_at_r"])
    assert f"val: tr_r1 {stats['tr_r1']:.2f}" in caplog.text and "rank_by itm" in caplog.text


def test_lavis_models_rank_by_their_own_score(monkeypatch, result_dir):
    class OfLavis(torch.nn.Module):
        def compute_sim_matrix(self, loader: Any, task_cfg: Any) -> Any:
            return torch.eye(3).numpy(), torch.eye(3).numpy()

    of_lavis = OfLavis()
    task = MafaPretrainTask(RunBlock())
    loader: Any = SimpleNamespace(dataset=SimpleNamespace(image=["x"] * 3, text=["a", "b", "c"], img2txt={0: [0], 1: [1], 2: [2]}))
    figures = task.after_evaluation(task.evaluation(of_lavis, loader), "val", 0)
    queries = pq.read_table(result_dir / "val_queries.parquet")
    assert queries["image"].to_pylist() == [0, 1, 2] * 2 and set(queries["r_precision"].to_pylist()) == {100.0}
    assert queries.column_names == ["direction", "query", "image", "r1", "r5", "r10", "r_precision", "map_at_r"]
    monkeypatch.setattr(pretrain, "rank", lambda: 1)
    task.after_evaluation(task.evaluation(of_lavis, loader), "test", 0)
    assert [file.name for file in result_dir.iterdir()] == ["val_queries.parquet"]
    assert figures["tr_r1"] == 100 and not any("itc" in name or name == "rank_by" for name in figures)
    monkeypatch.setattr(BaseTask, "build_model", lambda self, cfg: of_lavis)
    cfg = SimpleNamespace(model_cfg=SimpleNamespace(arch="albef_retrieval", get=lambda *_: None))
    assert task.build_model(cfg) is of_lavis
    with pytest.raises(UserError, match="run.rank_by is itc, but albef_retrieval ranks by LAVIS's own score"):
        MafaPretrainTask(RunBlock(rank_by="itc")).build_model(cfg)
