"""Seconds GRIT needs to order one group of M pairs, d = 256 (GRIT-VLP, eq. 5).

    python benchmarks/grouping.py [--threads 2] [--device cpu]

Columns: one group from similarity matrices; per group when four sub-queues go together; one group in O(M * d) memory.
The data are noisy clusters, image and text of a pair in the same one, so that chains are as long and as crowded as in training.
Each figure is the best of a few runs. GRIT's budget is 0.5 % of an epoch at M = 4800.

Measured on an idle 2-core Xeon at 2.5 GHz, 2 threads, torch 2.14.1, 2026-11-22, seconds a group:

    M        matrices    four at once    O(M * d)
      960    0.036       0.019            0.053
     1920    0.077       0.060            0.138
     4800    0.532       0.256            0.640
     9600    1.32                         3.36
    20000                                21.0
"""

from __future__ import annotations

import argparse
import datetime
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lavis_mafa.grit import group_by_similarity, group_sub_queues

DIM = 256
SIZES = (960, 1920, 4800, 9600, 20000)
LARGEST_MATRIX = 9600  # 737 MB of similarities
LARGEST_BATCHED = 4800


def noisy_clusters(queues: int, size: int, device: str) -> tuple[Tensor, Tensor]:
    """Unit features [Q, M, d] of images and texts."""
    generator = torch.Generator().manual_seed(0)
    cluster = torch.randint(50, (queues, size), generator=generator)
    centres = torch.randn(50, DIM, generator=generator)[cluster]
    noise = torch.randn(2, queues, size, DIM, generator=generator)
    image, text = torch.nn.functional.normalize(centres + noise, dim=-1).to(device)
    return image, text


def seconds(work: Callable[[], Tensor], repeat: int) -> float:
    best = float("inf")
    for _ in range(repeat):
        begin = time.perf_counter()
        work().cpu()  # waits for a GPU as well
        best = min(best, time.perf_counter() - begin)
    return best


def machine(device: str) -> str:
    if device != "cpu":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    print(f"{datetime.date.today()}  {machine(arguments.device)}")
    print(f"seconds per group, d = {DIM}\n{'M':>6} {'matrix':>9} {'4 at once':>9} {'rows':>9}")
    for size in SIZES:
        repeat = 3 if size <= LARGEST_BATCHED else 1
        image, text = noisy_clusters(4 if size <= LARGEST_BATCHED else 1, size, arguments.device)
        start = torch.zeros(len(image), dtype=torch.long)
        cells = ["-"] * 3
        if size <= LARGEST_MATRIX:
            cells[0] = f"{seconds(partial(group_by_similarity, image[0], text[0]), repeat):.3f}"
        if size <= LARGEST_BATCHED:
            cells[1] = f"{seconds(partial(group_sub_queues, image, text, start), repeat) / len(image):.3f}"
        cells[2] = f"{seconds(partial(group_by_similarity, image[0], text[0], memory='rows'), repeat):.3f}"
        print(f"{size:>6} " + " ".join(f"{cell:>9}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
