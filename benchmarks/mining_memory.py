"""Main memory of an offline pass over many synthetic rows: one block, whatever the size of the data.

    python benchmarks/mining_memory.py [--rows 200000] [--search-space 4800] [--tokens 17] [--width 96]

Con-D is a stand-in that gives random features and token states, so that the rows are what is measured; Linux only (/proc).

Measured 2026-11-22 with 200,000 rows: 87 MB above the start after the first block, 91 MB after the last, at most 160 MB after any (the
formula of one block with its grouping: 216 MB; the states of all rows would be 1,245 MB).
"""

from __future__ import annotations

import argparse
import datetime
import os
import time
from pathlib import Path
from typing import Any

import torch
from grouping import machine
from torch import Tensor

from lavis_mafa.tools.candidates import (
    Encoder,
    ReadableRows,
    batches_of,
    blocks_of,
    encoded_blocks,
    grouped_order,
    hardest_negatives,
    match_probabilities,
    shuffled,
)

DIM, TEXT = 256, 12


class Features:
    """A Con-D without a network."""

    def __init__(self, tokens: int, width: int) -> None:
        self.tokens, self.width = tokens, width

    def image_rows(self, image: Tensor) -> tuple[Tensor, Tensor]:
        states = image.mean(dim=1)[:, None, None].expand(-1, self.tokens, self.width)
        return states, torch.nn.functional.normalize(torch.randn(len(image), DIM), dim=1)

    def text_rows(self, captions: list[str]) -> tuple[tuple[Tensor, Tensor], Tensor]:
        ids = torch.ones(len(captions), TEXT, dtype=torch.long)
        return (ids, ids), torch.nn.functional.normalize(torch.randn(len(captions), DIM), dim=1)

    def match_rows(self, states: Tensor, texts: tuple[Tensor, ...], image_index: Tensor, text_index: Tensor) -> Tensor:
        return states[:, 0, :2]


class Rows:
    """N samples that cost nothing to read."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": torch.full((4,), float(index % 7)), "text_input": "a"}

    @staticmethod
    def collater(samples: list[dict[str, Any]]) -> dict[str, Any]:
        return {"image": torch.stack([s["image"] for s in samples]), "text_input": [s["text_input"] for s in samples]}


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--search-space", type=int, default=4800)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=17)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{datetime.date.today()}  {machine('cpu')}")
    space, tokens, width = arguments.search_space, arguments.tokens, arguments.width
    rows = ReadableRows(Rows(arguments.rows), batch_size=480)
    encoder = Encoder(Features(tokens, width), torch.device("cpu"))
    before, begin, most = resident_mb(), time.perf_counter(), 0.0
    for block in encoded_blocks(encoder, rows, blocks_of(shuffled(len(rows), 0), space)):
        found = hardest_negatives(block, batches_of(grouped_order(block, space, 0), arguments.batch_size))
        match_probabilities(encoder, block, found.image, found.text)
        most = max(most, resident_mb())
        if block.number in (0, 9, 19) or (block.number + 1) * space >= arguments.rows:
            done = min((block.number + 1) * space, arguments.rows)
            print(
                f"{done:>9,} rows: {resident_mb() - before:>6.0f} MB above the start, {time.perf_counter() - begin:>6.1f} s", flush=True
            )
    formula = (space * (tokens * width * 4 + 2 * TEXT * 8 + 2 * DIM * 4) + 8 * space**2) / 2**20
    everything = arguments.rows * tokens * width * 4 / 2**20
    print(f"most after a block: {most - before:.0f} MB; formula, with grouping: {formula:.0f} MB; all states: {everything:,.0f} MB")


if __name__ == "__main__":
    main()
