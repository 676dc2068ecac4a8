"""A run folder written by hand: what a run leaves, with captions that bite, a missing and a torn image."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CONFIG = """
model: {arch: albef_mafa, model_type: tiny, ecm: {enabled: true, threshold: 0.8, ambiguous_from: 0.5}, itc: {smoothing: SMOOTHING}}
datasets:
  grit_pairs:
    build_info:
      annotations: {train: {storage: data/pairs.jsonl}}
      images: {storage: data/images}
run: {task: mafa_pretrain, output_dir: output, max_epoch: 2}
"""
CONCEPTS = ["dog", "cat", "pizza", "clock"]
BITES = "<script>window.bitten = true</script> & \"a\" </script> <img src=x onerror='window.bitten = true'>"
ROWS = 24
MISSING, TORN = 4, 5


def caption(row: int) -> str:
    return BITES if row == 3 else f"a {CONCEPTS[row % 4]} in picture {row}"


def connection(direction: str, image: int, text: int, probability: float, epoch: int = 0, step: int = 0) -> dict:
    verdict = "positive" if probability > 0.8 else "ambiguous" if probability > 0.5 else "negative"
    return {
        "epoch": epoch,
        "step": step,
        "direction": direction,
        "image": image,
        "text": text,
        "probability": probability,
        "verdict": verdict,
    }


def write_connections(folder: Path, rows: list[dict]) -> None:
    (folder / "connections").mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    for name in ("direction", "verdict"):
        table = table.set_column(table.schema.get_field_index(name), name, table[name].dictionary_encode())
    pq.write_table(table, folder / "connections" / "epoch_0_rank_0.parquet")


def write_data(folder: Path) -> None:
    (folder / "images").mkdir(parents=True)
    rows = []
    for row in range(ROWS):
        if row != MISSING:
            Image.linear_gradient("L").resize((128, 96)).rotate(15 * row).save(folder / f"images/{row}.jpg")
        rows.append({"image": f"{row}.jpg", "caption": caption(row), "concept": CONCEPTS[row % 4]})
    (folder / f"images/{TORN}.jpg").write_bytes((folder / f"images/{TORN}.jpg").read_bytes()[:300])
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_metrics(path: Path) -> None:
    with open(path, "w") as file:
        for step in range(1, 9):
            losses = {"loss": 9.0 / step, "loss_itc": 4.0 / step, "loss_itm": 0.5 / step, "loss_mlm": 4.5 / step}
            record = {"epoch": (step - 1) // 4, "step": step, "samples_seen": 16 * step, **losses, "false_negative_share": 0.1 * step}
            file.write(json.dumps({**record, "learning_rate": 1e-4}) + "\n")
        file.write('{"epoch": 1, "st')  # it was killed while writing


def write_run(folder: Path, connections: list[dict] | None, smoothing: float = 0.5, metrics: bool = True) -> Path:
    """With ``metrics=False`` it is a run without curves, whose page is made at once."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG.replace("SMOOTHING", str(smoothing)))
    if metrics:
        write_metrics(folder / "metrics.jsonl")
    evaluation = {"split": "val", "epoch": "last", "tr_r1": 40.0 + smoothing, "ir_r1": 30.0 - smoothing, "agg_metrics": 35.0}
    (folder / "evaluation.jsonl").write_text(json.dumps(evaluation) + "\n")
    if connections is not None:
        write_connections(folder, connections)
    return folder


def many(count: int) -> list[dict]:
    """Distinct pairs in both directions, their scores spread over [0, 1]; the indices go round the rows."""
    rows = []
    for n in range(count):
        pair = n // 2 % (ROWS * (ROWS - 1))
        image = pair // (ROWS - 1)
        text = (image + 1 + pair % (ROWS - 1)) % ROWS
        rows.append(connection(("text for image", "image for text")[n % 2], image, text, 1 - n / count, epoch=n % 2, step=n))
    return rows


def write_scores(folder: Path, right: float, seed: int = 0, images: int = 30, texts: int = 60, matches: int = 0) -> Path:
    """What an evaluation of ``val`` leaves, of a model that adds ``right`` to what matches: also the metrics of each query.

    Each text is written for one image; ``matches``, a seed, gives further pairs.
    """
    import torch
    from lavis.common.registry import registry

    from lavis_mafa.tasks.pretrain import MafaPretrainTask

    own = torch.arange(texts) % images
    relevant = torch.rand(images, texts, generator=torch.Generator().manual_seed(matches)) < 0.05
    relevant[own, torch.arange(texts)] = True
    noise = torch.Generator().manual_seed(seed)
    i2t, t2i, cosine = (torch.randn(images, texts, generator=noise) + right * relevant for _ in range(3))
    dataset = SimpleNamespace(
        text=[f"text {n}" for n in range(texts)], img2txt={i: [*range(i, texts, images)] for i in range(images)}, relevant=relevant
    )
    result = {"i2t": i2t, "t2i": t2i.T, "cosine": cosine, "rank_by": "itm", "dataset": dataset, "relevant": relevant}
    with mock.patch.dict(registry.mapping["paths"], {"result_dir": str(folder / "result")}):
        metrics = MafaPretrainTask().after_evaluation(result, "val", "last")
    (folder / "evaluation.jsonl").write_text(json.dumps({"split": "val", "epoch": "last", **metrics}) + "\n")
    return folder
