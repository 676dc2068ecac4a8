"""What an epoch's order costs each rank when there are tens of millions of pairs: CPU seconds, memory, and bytes of a checkpoint.

    python benchmarks/order_at_scale.py [--rows 20000000] [--ranks 4] [--batch 96]

One process makes the parts: *order*, ``next_epoch_order`` of one rank's list; *set*, ``GritSampler.set_order``; *draw*, a random order.
Then R processes (gloo) do what a run does, with lists that stand for what each has grouped: *epoch's end*, ``GritFeed.end_epoch``,
which gathers the lists, makes the order and sets it; *save*, a checkpoint of all ranks, whose weights are next to nothing; *resume*,
from it.
CPU seconds are those of a process with one thread; the memory is what a process took at most beyond what it had before; of R processes,
the one that took most. Lists and orders have the type that the version gives them.

Measured with 20 M rows and 4 ranks on a 2-core AMD EPYC, other programs running beside it, torch 2.14.1, 2026-11-26, medians of three
rounds in turn. *Before*: rows sorted, in eight bytes, through pickle, the order in each rank's file.

                   before             now
                CPU s      MB    CPU s      MB
    order        3.94    1005     0.36     193
    set          1.23     800     0.24     100
    draw         0.80     160     0.76      80
    epoch's end  5.95    1185     0.65     295
    save         0.48     160     0.19       1
    resume       1.47     960     0.34     179
    a checkpoint          640               80
"""

from __future__ import annotations

import argparse
import datetime
import gc
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from grouping import machine

from lavis_mafa import distributed
from lavis_mafa.config.schema import Grit
from lavis_mafa.grit import GritSampler, next_epoch_order
from lavis_mafa.runners.checkpoint import CheckpointFolder, RunState
from lavis_mafa.runners.loading import GritFeed

NAME, PORT, UNSEEN = "1", 29577, 1000
Row = tuple[str, float, float]  # what, CPU seconds, MB


def measured(name: str, work: Callable[[], Any]) -> Row:
    """By the kernel's own mark of the highest memory, which is set back first."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before, begin = _status("VmRSS"), time.process_time()
    work()
    return name, time.process_time() - begin, (_status("VmHWM") - before) / 1e6


def _status(key: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)]
    return int(line.split()[1]) * 1024


def grouped_list(sampler: GritSampler) -> torch.Tensor:
    """What a rank's queue hands over: its share of all rows but the last few, which an incomplete batch dropped."""
    rows = torch.randperm(sampler.dataset_size, generator=torch.Generator().manual_seed(1), dtype=sampler.order.dtype)
    return rows[: len(rows) - UNSEEN][sampler.rank :: sampler.world_size].clone()


def parts(rows: int, batch: int) -> list[Row]:
    sampler, made = GritSampler(rows, batch), dict[str, torch.Tensor]()
    grouped = grouped_list(sampler)

    def order() -> None:
        made["order"] = next_epoch_order([grouped], rows, sampler.block, True, 0, sampler.global_batch)

    return [
        measured("order", order),
        measured("set", lambda: sampler.set_order(made["order"], 1, grouped=True)),
        measured("draw", lambda: sampler.set_epoch(2)),
    ]


def run_of(feed: GritFeed) -> RunState:
    """A run of which all but the feed is small."""
    model, nothing = torch.nn.Linear(1, 1), SimpleNamespace(state_dict=dict, load_state_dict=lambda *_: None)
    optimizer, rest = torch.optim.AdamW(model.parameters()), {"dataset": None, "config": {}, "device": torch.device("cpu")}
    state = RunState(model=model, optimizer=optimizer, scaler=None, feed=feed, log=nothing, bad_samples=nothing, **rest)  # type: ignore[arg-type]
    state.__dict__["data"] = []
    return state


def as_rank(rank: int, ranks: int, rows: int, batch: int, folder: Path, results: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(PORT))
    torch.set_num_threads(1)
    distributed.init_process_group(SimpleNamespace(get=lambda key, default=None: {"device": "cpu"}.get(key, default)))
    feed, checkpoints = GritFeed(Grit(), rows, batch, rank, ranks, seed=0), CheckpointFolder(folder)
    grouped = grouped_list(feed.sampler)
    feed.queue.finish_epoch = lambda: grouped  # type: ignore[method-assign, union-attr]
    state = run_of(feed)

    def save() -> None:
        content = state.content(0, 1, 0) if rank == 0 else None
        checkpoints.save(NAME, content, state.of_rank(0), rank)
        checkpoints.wait()

    works = {"epoch's end": lambda: feed.end_epoch(0), "save": save, "resume": lambda: state.restore(checkpoints.path(NAME))}
    results.put([measured(name, work) for name, work in works.items()])
    distributed.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--batch", type=int, default=96)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine('cpu')}, {datetime.date.today()}")
    print(f"{arguments.rows:,} rows, {arguments.ranks} ranks\n{'':14}{'CPU s':>8}{'MB at most':>12}")
    for name, seconds, memory in parts(arguments.rows, arguments.batch):
        print(f"{name:14}{seconds:8.2f}{memory:12.0f}", flush=True)
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    with tempfile.TemporaryDirectory() as name:
        shared = (arguments.ranks, arguments.rows, arguments.batch, Path(name), results)
        processes = [spawn.Process(target=as_rank, args=(rank, *shared)) for rank in range(arguments.ranks)]
        for process in processes:
            process.start()
        for rows in zip(*(results.get() for _ in processes), strict=True):  # the rank that took most, of each
            print(f"{rows[0][0]:14}{max(row[1] for row in rows):8.2f}{max(row[2] for row in rows):12.0f}", flush=True)
        for process in processes:
            process.join()
        files = {file.name: file.stat().st_size / 1e6 for file in sorted(Path(name).glob("*.pth"))}
    print(
        f"a checkpoint of {arguments.ranks} ranks: {sum(files.values()):.0f} MB ({', '.join(f'{size:.1f}' for size in files.values())})"
    )


if __name__ == "__main__":
    main()
