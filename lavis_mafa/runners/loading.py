"""What a run reads: loaders, the order that GRIT gives them, workers that are killed, samples and images that cannot be read."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import ImageFile
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Subset

from lavis_mafa.config.schema import Grit, RunBlock
from lavis_mafa.datasets.images import BROKEN
from lavis_mafa.datasets.indexed import REASON, UNREADABLE, IndexedDataset, image_path, of_a_decoder, seeded
from lavis_mafa.distributed import gather_in_rank_order, gather_objects, gather_rows, host_group, rank, world_size
from lavis_mafa.errors import UserError, death_of_a_worker
from lavis_mafa.grit import GritQueue, GritSampler, next_epoch_order
from lavis_mafa.grit.sampler import ROW_TYPES, saved_tensor
from lavis_mafa.progress import Bar
from lavis_mafa.signals import patient_worker

logger = logging.getLogger(__name__)
CHECK_DATA = "`lavis-mafa check-data` finds all of them, and writes annotations without them."
SHOWN = 5  # images in a message; the file has all
FEW = 200  # images that one process reads sooner than workers are started


# --- loaders -----------------------------------------------------------------------------------------------------------


def train_loader(
    dataset: Any, batch_size: int, grit: Grit | None, settings: RunBlock, pin: bool, two_views: bool = False
) -> tuple[DataLoader, GritFeed]:
    """The training loader, with ``two_views`` of each image, and the feed that orders it.

    Its batches want :meth:`IndexedDataset.normalised`, on the device.

    Raises:
        UserError: a stream, or fewer samples than one global batch.
    """
    if isinstance(dataset, tuple | list | IterableDataset):
        raise UserError("run.runner runner_mafa trains on map-style data sets; use LAVIS's runner_iter for webdataset streams.")
    indexed = IndexedDataset(dataset, settings.seed, bytes_if_possible=True, two_views=two_views)
    try:
        feed = GritFeed(grit, len(indexed), batch_size, rank(), world_size(), settings.seed)
    except ValueError as error:
        raise UserError(f"run.batch_size_train is {batch_size}: {error}") from error
    return _loader(indexed, batch_size, feed.sampler, indexed.collate, settings.num_workers, pin, train=True), feed


def eval_loader(dataset: Any, batch_size: int, collate: Any, settings: RunBlock, pin: bool, shared: bool) -> DataLoader:
    """A loader in data set order; ``shared`` gives each rank a part, as LAVIS's ``use_dist_eval_sampler`` asks."""
    sampler: Any = DistributedSampler(dataset, shuffle=False) if shared else None
    return _loader(dataset, batch_size, sampler, collate, settings.num_workers, pin)


def _loader(
    dataset: Any, batch_size: int, sampler: Any, collate: Any, workers: int = 0, pin: bool = False, train: bool = False
) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=workers,
        pin_memory=pin,
        collate_fn=collate,
        drop_last=train,
        worker_init_fn=patient_worker,
        persistent_workers=train and workers > 0,
        generator=torch.Generator(),  # else each pass over a loader draws from the generator of dropout and masking
    )


# --- GRIT --------------------------------------------------------------------------------------------------------------


class GritFeed:
    """The sampler of the training set and, with GRIT, the queue that makes its next order (GRIT-VLP section 4.1).

    ``batch_scope: local``: each rank groups what it saw. ``global``: features are gathered in rank order and rank 0 groups them all, so
    that the order does not depend on the number of ranks.

    Raises:
        ValueError: fewer samples than one global batch, or a search space smaller than a grouped batch.
    """

    def __init__(self, grit: Grit | None, dataset_size: int, batch_size: int, rank: int, world_size: int, seed: int) -> None:
        self.grit = grit if grit is not None and grit.enabled else None
        self.seed = seed
        self.scope = grit.batch_scope if grit is not None else "local"
        self.sampler = GritSampler(dataset_size, batch_size, rank, world_size, self.scope, seed)
        self.queue: GritQueue | None = None  # with global scope on rank 0 alone
        if self.grit is None:
            return
        if self.sampler.block > self.grit.search_space:
            raise ValueError(
                f"a grouped batch has {self.sampler.block} samples, more than run.grit.search_space ({self.grit.search_space})"
            )
        if dataset_size < self.grit.search_space:
            logger.warning(
                "the data set has %d samples, fewer than run.grit.search_space (%d): GRIT groups all of them in one search space",
                *(dataset_size, self.grit.search_space),
            )
        self._group = host_group()
        if self.scope == "local" or rank == 0:
            memory: Any = self.grit.memory
            sizes = (self.grit.queue_size, self.grit.search_space)
            self.queue = GritQueue(*sizes, self.grit.example_shuffle, seed + rank, memory=memory)

    def collects(self, when: str) -> bool:
        """Is this ``run.grit.collect``?"""
        return self.grit is not None and self.grit.collect == when

    def collect(self, index: Tensor, image_features: Tensor, text_features: Tensor) -> None:
        """Phase 1: enqueue a batch's features, [B], [B, d], [B, d]."""
        if self.grit is not None and self.scope == "global":
            index = gather_in_rank_order(index)
            image_features, text_features = gather_in_rank_order(image_features), gather_in_rank_order(text_features)
        if self.queue is None:
            return
        # the features of a step that was not applied may be anything, but its samples must be in the next order too
        image_features, text_features = (f.detach().nan_to_num(0.0, 0.0, 0.0) for f in (image_features, text_features))
        self.queue.collect(index, image_features, text_features)

    def end_epoch(self, epoch: int) -> None:
        """Phases 2-4: the next epoch's order, the same on all ranks."""
        if self.collects("training"):
            self.sampler.set_order(self._next_order(epoch + 1), epoch + 1, grouped=True)

    def separate_pass(self, epoch: int, batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
        """GRIT-VLP Table 4's naive variant: a reshuffled pass without training, grouped for this very epoch."""
        for index, image_features, text_features in batches:
            self.collect(index, image_features, text_features)
        self.sampler.set_order(self._next_order(epoch), epoch, grouped=True)

    def _next_order(self, epoch: int) -> Tensor:
        assert self.grit is not None
        sampler, seed = self.sampler, self.seed * 100_003 + epoch
        grouped = torch.empty(0) if self.queue is None else self.queue.finish_epoch()
        lists = gather_rows(grouped.to(sampler.order.dtype), self._group)
        return next_epoch_order(lists, sampler.dataset_size, sampler.block, self.grit.batch_shuffle, seed, sampler.global_batch)

    def snapshot(self, step: int) -> Callable[[], dict[str, Any]]:
        """What serves the same samples after ``step`` steps of this epoch again. Another thread may call the function that is returned;
        there it waits for a queue that is being grouped."""
        sampler, queue = self.sampler.state_dict(step), None if self.queue is None else self.queue.snapshot()
        return lambda: {"sampler": sampler, "queue": None if queue is None else queue(), "scope": self.scope}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`snapshot` was taken; raises ValueError for another data set or other settings."""
        queue, scope = state["queue"], state.get("scope", self.scope)
        if self.grit is not None and self.sampler.world_size > 1 and scope != self.scope:
            raise ValueError(f"run.grit.batch_scope is {self.scope}, but the saved order was made with {scope}; resume with that.")
        for name in ("finished", "index") if queue is not None else ():
            rows = saved_tensor(queue, name, ROW_TYPES, dims=1)
            if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < self.sampler.dataset_size:
                raise ValueError(f"the saved {name} holds positions outside the data set of {self.sampler.dataset_size} samples.")
        self.sampler.load_state_dict(state["sampler"])
        if self.queue is not None and queue is not None:
            self.queue.load_state_dict(queue)


# --- workers that are killed -------------------------------------------------------------------------------------------


def patient(loader: DataLoader, first_step: int, lost: Callable[[str], None]) -> Iterator[Any]:
    """The loader's batches, those that a lost worker owes included: killed by the kernel for want of memory, say.

    PyTorch raises the news of a dead worker in the main thread wherever that is, in the middle of the optimizer's step too, after
    which nothing is worth saving. Here it is told only where a batch is waited for, and what is left of the accumulation window is
    read by this process itself: a sample depends on (seed, epoch, index) alone.

    Args:
        loader: with a ``GritSampler``.
        first_step: of the epoch, that it starts with.
        lost: called with what is known about the death.
    """
    step = first_step
    sampler: Any = loader.sampler
    sampler.start_step = step

    def read_here(error: RuntimeError) -> Iterator[Any]:
        if (death := death_of_a_worker(error)) is None:
            raise error
        lost(death)
        sampler.start_step = step
        return iter(_loader(loader.dataset, sampler.batch_size, sampler, loader.collate_fn, pin=loader.pin_memory, train=True))

    try:
        iterator: Iterator[Any] = iter(loader)
    except RuntimeError as error:  # died between two epochs
        iterator = read_here(error)
    with _news_when_asked(loader.num_workers > 0) as look:
        while True:
            try:
                look()
                batch = next(iterator)
            except StopIteration:
                return
            except RuntimeError as error:
                iterator = read_here(error)
                continue
            yield batch
            step += 1


@contextlib.contextmanager
def _news_when_asked(workers: bool) -> Iterator[Callable[[], object]]:
    """Inside, PyTorch's handler of SIGCHLD, which raises the news, is called only by the function that this gives."""
    tell = signal.getsignal(signal.SIGCHLD)
    if not workers or not callable(tell) or threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield lambda: tell(signal.SIGCHLD, None)
    finally:
        signal.signal(signal.SIGCHLD, tell)


# --- samples that cannot be read ---------------------------------------------------------------------------------------


class BadSamples:
    """Counts the bad samples of one rank, lists them in a file that all ranks share, and stops a run that has too many.

    A line is ``{"index": ..., "reason": ..., "image": ..., "rank": ...}``, each sample once, ``image`` where the data set tells it.
    ``count`` and ``seen`` count a sample in each epoch; ``max_share`` of their ratio is looked at from 100 samples on.
    """

    def __init__(self, path: Path, max_share: float) -> None:
        self.path, self.max_share = path, max_share
        self.count = self.seen = 0
        self.own: list[dict[str, Any]] = []  # what this rank listed
        self.listed: set[int] = set()  # by whichever rank
        self._read = 0  # bytes of the file that are in `listed`

    def add(self, samples: dict[str, Any], batch_size: int) -> None:
        """Take ``bad_samples`` out of a batch and account for it.

        Raises:
            UserError: the share is exceeded, or nothing of the batch could be read.
        """
        bad = samples.pop("bad_samples", [])
        self.seen += batch_size
        self.count += len(bad)
        if bad:
            if not self.own:
                logger.warning("a sample cannot be read, its neighbour stands in: %s (all: %s)", bad[0]["reason"], self.path)
            self.own += self._list([{**sample, "rank": rank()} for sample in bad])
        if not samples:
            raise UserError(
                f"no sample of a whole batch could be read, the first because of {bad[0]['reason']} (all: {self.path}). {CHECK_DATA}"
            )
        if self.seen >= 100 and self.count > self.max_share * self.seen:
            raise UserError(
                f"{self.count} of {self.seen} samples could not be read, more than run.max_bad_share ({self.max_share:g}); "
                f"they are listed in {self.path}. {CHECK_DATA}"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "seen": self.seen, "listed": [dict(sample) for sample in self.own]}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on counting where a run was stopped. What it had listed is listed here too: a resumed run may have a folder of its own."""
        if state is None:  # of a checkpoint that was written without
            return
        self.count, self.seen = state["count"], state["seen"]
        self.own = [dict(sample) for sample in state["listed"]]
        self._list(self.own)

    def _list(self, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Append those that no rank has listed yet, and return them: in another epoch a sample may have been on another rank."""
        if not samples:
            return []
        with self.path.open("a+b", buffering=0) as file:
            file.seek(self._read)
            for line in file.read().splitlines(keepends=True):
                if line.endswith(b"\n"):
                    self._read += len(line)
                    self.listed.add(json.loads(line)["index"])
            new = [sample for sample in samples if sample["index"] not in self.listed]
            for sample in new:  # one write a line: what other ranks append at the same time comes before or after it
                file.write(json.dumps(sample).encode() + b"\n")
        return new


# --- images to evaluate ------------------------------------------------------------------------------------------------


def check_evaluation_images(datasets: dict[str, Any], splits: Sequence[str], workers: int, folder: Path) -> None:
    """Read each image of the splits as evaluation will, before the first step: a torn one is found now and not after an epoch.

    Costs what reading them for one evaluation costs, about 10 ms an image of COCO's size, shared by ranks and workers.

    Raises:
        UserError: on all ranks: some cannot be used, with the first of them; ``folder/bad_evaluation_images.jsonl`` lists all.
    """
    bad = [{"split": split, **image} for split in dict.fromkeys(splits) for image in unreadable(datasets[split], split, workers)]
    everywhere = list(itertools.chain(*gather_objects(bad)))
    if not everywhere:
        return
    path = folder / "bad_evaluation_images.jsonl"
    if rank() == 0:
        path.write_text("".join(json.dumps(image) + "\n" for image in everywhere))
    shown = "; ".join(f"{image['split']}: {image['reason']}" for image in everywhere[:SHOWN])
    more = f" (and {len(everywhere) - SHOWN} more, all in {path})" if len(everywhere) > SHOWN else ""
    raise UserError(
        f"{len(everywhere)} of the images to evaluate cannot be used, and evaluation replaces none: {shown}{more}. Repair them, or "
        "leave them out: `lavis-mafa check-data --annotations FILE --images FOLDER --clean clean.jsonl`."
    )


def unreadable(dataset: Any, split: str, workers: int) -> list[dict[str, Any]]:
    """This rank's part of the images that cannot be used: ``reason`` and, where it is known, ``image``."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        return []
    rows = one_row_an_image(dataset)[rank() :: world_size()]
    many = len(rows) > FEW
    loader = _loader(_Tried(dataset), 16, rows, list, workers if many else 0)
    if many:
        logger.info("%s: reading its %d images once before training", split, len(rows))
    looked_at = Bar(itertools.chain.from_iterable(loader), total=len(rows), desc=f"images of {split}", unit="image", delay=1)
    return [result for result in looked_at if result is not None]


def one_row_an_image(dataset: Any) -> list[int]:
    """A row for each file; all rows where the data set does not tell its files. Five questions about an image read it once."""
    first: dict[Any, int] = {}
    for row in range(len(dataset)):
        path = _file(dataset, row)
        first.setdefault(row if path is None else path, row)
    return [*first.values()]


class _Tried(Dataset):
    """None for a row that can be read, else what is wrong with it."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, Any] | None:
        ImageFile.LOAD_TRUNCATED_IMAGES = False  # LAVIS's own data sets would fill the rest of a torn image with grey
        try:
            with seeded(0, 0, row):
                self.dataset[row]
            return None
        except (*UNREADABLE, *BROKEN) as error:
            if not isinstance(error, UNREADABLE) and not of_a_decoder(error):
                raise
            path, words = _file(self.dataset, row), " ".join(str(error)[:REASON].split())
        return {"image": path, "reason": words if path is None or path in words else f"{path}: {words}"}


def _file(dataset: Any, row: int) -> str | None:
    """Where the image of a row is; None where the data set does not tell."""
    if isinstance(dataset, Subset):
        return _file(dataset.dataset, dataset.indices[row])
    return image_path(dataset, row)
