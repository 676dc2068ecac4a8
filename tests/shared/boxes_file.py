"""Four images, each with one of four squares, and expressions about these with their boxes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CORNERS = [(0, 0, 8, 6), (20, 0, 32, 10), (2, 14, 10, 24), (18, 12, 30, 22)]


def box(left: float, top: float, right: float, bottom: float) -> dict[str, float]:
    return {"left": left, "top": top, "right": right, "bottom": bottom}


def write_boxes(folder: Path) -> Path:
    """``boxes.parquet`` and ``boxes.jsonl`` of images 32 wide and 24 high."""
    rows = []
    for number, (left, top, right, bottom) in enumerate(CORNERS):
        pixels = np.full((24, 32, 3), 30 * number, dtype=np.uint8)
        pixels[top:bottom, left:right] = 255
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "text": "the square", "box": box(*CORNERS[number]), "boxes": [box(*c) for c in CORNERS]})
    pq.write_table(pa.Table.from_pylist(rows), folder / "boxes.parquet")
    (folder / "boxes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "boxes.parquet"
