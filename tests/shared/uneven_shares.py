"""Evaluation and training of data whose number no two processes can share evenly; run it as two processes, or as one.

python uneven_shares.py OUT: rank 0 writes what came out as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf
from torch.utils.data import Dataset

from lavis_mafa.config.schema import CaptioningRun, ClassificationRun, Grit, RunBlock, VqaRun
from lavis_mafa.distributed import gather_objects, gather_rows, host_group, init_process_group, is_distributed, rank, world_size
from lavis_mafa.models.retrieval import retrieval_scores
from lavis_mafa.runners.loading import eval_loader, train_loader
from lavis_mafa.runners.runner_mafa import evaluate_split
from lavis_mafa.tasks.captioning import MafaCaptioningTask
from lavis_mafa.tasks.classification import MafaClassificationTask
from lavis_mafa.tasks.vqa import MafaVqaTask

SETTINGS = RunBlock(num_workers=0)


class Numbers(Dataset):
    """``count`` samples, all texts their own number."""

    collater = staticmethod(torch.utils.data.default_collate)
    class_labels = {"even": 0, "odd": 1}

    def __init__(self, count: int) -> None:
        self.image = [f"{n}.jpg" for n in range(count)]
        self.text = self.raw_text = [f"number {n}" for n in range(count)]
        self.img2txt = {n: [n] for n in range(count)}
        self.answers = [[str(n)] for n in range(count)]

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = torch.tensor([float(index)])
        ids = {"image_id": index, "question_id": index, "sentence_id": index, "index": index}
        return {"image": number, "text_input": f"{index}?", "label": index % 2, **ids}


class Model(torch.nn.Module):
    """Knows every answer, and counts what it is asked."""

    device = "cpu"
    asked = 0

    def before_evaluation(self, **_: Any) -> None: ...

    def generate(self, samples: dict[str, Any], **_: Any) -> list[str]:
        Model.asked += len(samples["image"])
        return [f"number {int(n)}" for n in samples["image"]]

    def predict_answers(self, samples: dict[str, Any], **_: Any) -> list[str]:
        return [str(int(n)) for n in samples["image"]]

    def predict(self, samples: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Of the first sample the wrong label: it is the one that a sampler gives out twice."""
        told = (samples["label"] + (samples["index"] == 0)) % 2
        return {"predictions": torch.nn.functional.one_hot(told, 2).float(), "targets": samples["label"]}

    def text_rows(self, captions: list[str]) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        numbers = torch.tensor([[float(caption.split()[1])] for caption in captions])
        return (numbers,), torch.cat([numbers.cos(), numbers.sin()], dim=1)

    def image_rows(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return image[:, None], torch.cat([image.cos(), image.sin()], dim=1)

    def match_rows(
        self, image_states: torch.Tensor, text: tuple[torch.Tensor, ...], image_index: torch.Tensor, text_index: torch.Tensor
    ) -> torch.Tensor:
        words = text[0][text_index]
        return torch.cat([torch.zeros_like(words), image_states[image_index, 0] - words], dim=1)


def generated(task: Any, count: int, folder: Path) -> list[Any]:
    """Each rank's metrics."""
    loader = eval_loader(Numbers(count), 2, Numbers.collater, SETTINGS, False, shared=is_distributed())
    return gather_objects(evaluate_split(task, Model(), loader, loader.dataset, f"of{count}", 0, folder, False))


def retrieval(count: int) -> list[Any]:
    loader = eval_loader(Numbers(count), 2, Numbers.collater, SETTINGS, False, shared=False)
    scores = retrieval_scores(Model(), loader, top_k=2, rank_by="itm+itc")  # type: ignore[arg-type]
    return [scores.i2t.tolist(), scores.t2i.tolist()]


def trained(count: int) -> list[list[list[int]]]:
    """The rows of each batch of each rank."""
    loader, feed = train_loader(Numbers(count), 3, Grit(enabled=False), SETTINGS, False)
    loader.dataset.set_epoch(0)
    feed.sampler.set_epoch(0)
    return gather_objects([batch["index"].tolist() for batch in loader])


def rows_of_all() -> list[list[list[int]]]:
    """What each rank has of every rank's rows, of which rank 0 has none and the last has the most."""
    group, found = host_group(), []
    for dtype in (torch.int32, torch.int64):
        rows = torch.arange(0, 10 * rank(), 2, dtype=dtype) + rank()
        found.append([of_rank.tolist() for of_rank in gather_rows(rows, group) if of_rank.dtype == dtype])
    assert len(found[0]) == world_size() and found[0] == found[1]
    return gather_objects(found[0])


def write_results(folder: Path) -> None:
    before = registry.mapping["paths"].get("result_dir")
    registry.mapping["paths"]["result_dir"] = str(folder / "result")
    captioning, vqa, telling = MafaCaptioningTask(CaptioningRun()), MafaVqaTask(VqaRun()), MafaClassificationTask(ClassificationRun())
    results = {
        "captions": {count: generated(captioning, count, folder) for count in (1, 5)},
        "asked": gather_objects(Model.asked),
        "answers": {count: generated(vqa, count, folder) for count in (1, 5)},
        "labels": {count: generated(telling, count, folder) for count in (1, 5)},
        "retrieval": {count: retrieval(count) for count in (1, 3, 5)},
        "trained": trained(20),
        "rows": rows_of_all(),
    }
    registry.mapping["paths"]["result_dir"] = before
    if rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    init_process_group(OmegaConf.create({"device": "cpu"}))
    write_results(Path(sys.argv[1]))
    if is_distributed():
        torch.distributed.destroy_process_group()
