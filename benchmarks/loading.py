"""How many images a second one core makes ready for training: a JPEG from a file to a cropped, augmented 256 x 256 tensor.

    python -W ignore benchmarks/loading.py [--workers 2] [--images 48] [--rounds 9]

Rows: ours as the runner trains (bytes); ours as a processor alone gives it (floats); LAVIS's caption data set with its
``blip_image_train``; torchvision's v2 transforms on its own decoder. All crop 20 to 100 % of the area, flip, and augment with
RandAugment; torchvision's applies both of its operations to every image, the others one on average. The JPEGs are noise
as smooth as photographs are, of a photograph's size on disk. Medians of alternating rounds of CPU time.

The pipeline is a ``DataLoader`` of ``--workers`` processes, with the CPU time that workers and main process together spend on an
image: what it is above one core's figure goes into collating, sending and, for bytes, normalising. With a core for each, W workers
load about W / that time; the images a second that are printed are those of this machine as it was.

Measured with ``--images 24 --rounds 7`` on a 2-core AMD EPYC at 2.6 GHz beside other programs, torch 2.14.1, 2026-11-26:

    500 x 375, 52 KB
    ours, bytes               303 images/s    3.30 ms alone, 4.66 ms in the pipeline of 2 workers
    ours, floats              257 images/s    3.89 ms alone, 5.21 ms in the pipeline of 2 workers
    LAVIS                     220 images/s    4.55 ms alone, 5.92 ms in the pipeline of 2 workers
    torchvision               240 images/s    4.17 ms alone, 5.28 ms in the pipeline of 2 workers
    1024 x 768, 147 KB
    ours, bytes               194 images/s    5.15 ms alone, 6.19 ms in the pipeline of 2 workers
    ours, floats              152 images/s    6.57 ms alone, 9.03 ms in the pipeline of 2 workers
    LAVIS                     107 images/s    9.33 ms alone, 10.97 ms in the pipeline of 2 workers
    torchvision               161 images/s    6.21 ms alone, 8.27 ms in the pipeline of 2 workers
    2048 x 1536, 482 KB
    ours, bytes               109 images/s    9.17 ms alone, 10.46 ms in the pipeline of 2 workers
    ours, floats               53 images/s   18.97 ms alone, 20.67 ms in the pipeline of 2 workers
    LAVIS                      39 images/s   25.86 ms alone, 27.30 ms in the pipeline of 2 workers
    torchvision                73 images/s   13.72 ms alone, 15.38 ms in the pipeline of 2 workers
    collate 96 floats      47.9 ms
    collate 96 bytes       18.1 ms
    normalise 96 here      51.0 ms
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import os
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from grouping import machine
from lavis.datasets.datasets.caption_datasets import CaptionDataset
from lavis.processors.blip_processors import BlipCaptionProcessor, BlipImageTrainProcessor
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from lavis_mafa.datasets.indexed import IndexedDataset
from lavis_mafa.datasets.pairs import ImageTextPairs
from lavis_mafa.processors import AlbefCaptionProcessor, AlbefImageTrainProcessor

BATCH = 96
SIDE = 256
SIZES = {(500, 375): 90, (1024, 768): 87, (2048, 1536): 87}  # and JPEG's quality: 52, 143 and some 500 KB
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def photograph(width: int, height: int, draw: np.random.Generator) -> Image.Image:
    """Noise with the spectrum of photographs, its three colours alike."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width) * width)
    frequency[0, 0] = 1
    waves = draw.standard_normal((4, 2, *frequency.shape))
    waves = (waves[:, 0] + 1j * waves[:, 1]) / frequency**1.5
    colours = np.fft.irfft2(waves[0] + 0.4 * waves[1:], s=(height, width))
    colours = (colours - colours.mean((1, 2), keepdims=True)) / colours.std((1, 2), keepdims=True)
    return Image.fromarray((50 * colours + 120).clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


class Torchvision(Dataset):
    """torchvision's decoder and its v2 transforms."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(SIDE, scale=(0.2, 1), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.RandAugment(2, 7),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.transform(decode_image(str(self.paths[index]), mode=ImageReadMode.RGB))}


def data_sets(folder: Path, size: tuple[int, int], images: int) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    for number in range(images):
        photograph(*size, draw).save(folder / f"{number}.jpg", quality=SIZES[size])
    rows = [{"image": f"{n}.jpg", "image_id": n, "caption": "a dog runs over a green field"} for n in range(images)]
    (folder / "rows.json").write_text(json.dumps(rows))
    ours = ImageTextPairs(AlbefImageTrainProcessor(SIDE), AlbefCaptionProcessor(), folder, [folder / "rows.json"])
    lavis = BlipImageTrainProcessor(SIDE, min_scale=0.2), BlipCaptionProcessor(), str(folder), [str(folder / "rows.json")]
    return {
        "ours, bytes": IndexedDataset(ours, bytes_if_possible=True),
        "ours, floats": IndexedDataset(ours),
        "LAVIS": CaptionDataset(*lavis),
        "torchvision": Torchvision([folder / f"{n}.jpg" for n in range(images)]),
    }


def read_all(dataset: Any) -> None:
    if isinstance(dataset, IndexedDataset):
        dataset.__getitems__(range(len(dataset)))
    else:
        for index in range(len(dataset)):
            dataset[index]


def medians(works: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of CPU time of each, in turn in every round."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds):
        for name, work in works.items():
            random.seed(number), np.random.seed(number), torch.manual_seed(number)
            began = time.process_time()
            work()
            found[name].append(time.process_time() - began)
    return {name: statistics.median(times) for name, times in found.items()}


def pipeline(dataset: Any, workers: int, epochs: int) -> tuple[float, float]:
    """Images a second, and seconds of CPU time an image, of workers and this process together."""

    def spent() -> float:
        parts = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
        return sum(part.ru_utime + part.ru_stime for part in parts)

    collate = dataset.collate if isinstance(dataset, IndexedDataset) else default_collate
    order = [*range(len(dataset))] * epochs
    before, began, count = spent(), time.perf_counter(), 0
    for batch in DataLoader(dataset, BATCH, sampler=order, num_workers=workers, collate_fn=collate):
        batch = dataset.normalised(batch) if isinstance(dataset, IndexedDataset) else batch
        count += len(batch["image"])
    return count / (time.perf_counter() - began), (spent() - before) / count


@contextlib.contextmanager
def folder_of(size: tuple[int, int], images: int) -> Iterator[tuple[dict[str, Any], float]]:
    with tempfile.TemporaryDirectory() as name:
        sets = data_sets(Path(name), size, images)
        yield sets, statistics.mean(os.path.getsize(path) for path in Path(name).glob("*.jpg")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    print(f"{datetime.date.today()}  {machine('cpu')}")
    for size in SIZES:
        with folder_of(size, arguments.images) as (sets, kilobytes):
            print(f"\n{size[0]} x {size[1]}, {kilobytes:.0f} KB    one core        {arguments.workers} workers")
            works = {name: functools.partial(read_all, dataset) for name, dataset in sets.items()}
            alone = medians(works, arguments.rounds)
            for name, seconds in alone.items():
                rate, spent = pipeline(sets[name], arguments.workers, max(1, 4 * BATCH // arguments.images))
                print(
                    f"{name:20} {arguments.images / seconds:8.0f} images/s   {rate:5.0f} images/s   "
                    f"{1000 * seconds / arguments.images:5.2f} ms, in the pipeline {1000 * spent:5.2f} ms of CPU an image"
                )
    floats, pixels = torch.rand(3, SIDE, SIDE), torch.zeros(SIDE, SIDE, 3, dtype=torch.uint8).permute(2, 0, 1)
    batches = {"floats": [floats] * BATCH, "bytes": [pixels] * BATCH}
    normalise = functools.partial(AlbefImageTrainProcessor(SIDE).normalised, default_collate(batches["bytes"]))
    works = {f"collate {BATCH} {name}": functools.partial(default_collate, batch) for name, batch in batches.items()}
    print()
    for name, seconds in medians({**works, f"normalise {BATCH} here": normalise}, arguments.rounds).items():
        print(f"{name:20} {1000 * seconds:6.1f} ms")


if __name__ == "__main__":
    main()
