"""Phases 1 to 3 of GRIT while an epoch trains: collect features, shuffle a full queue, group it (GRIT-VLP, section 4.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lavis_mafa.grit.grouping import Memory, group_by_similarity, group_sub_queues
from lavis_mafa.grit.sampler import ROW_TYPES, first_met, pieces, row_type, saved_tensor, seeded_generator

Rows = tuple[Tensor, Tensor, Tensor]  # index [n], image features [n, d], text features [n, d]


class GritQueue:
    """Collects the features an epoch computes anyway and turns them into the next epoch's order (GRIT-VLP, phases 1-3).

    Whenever ``queue_size`` (L) samples have been collected they are shuffled, cut into L / M sub-queues of ``search_space`` (M)
    and each sub-queue is ordered by ``group_by_similarity`` from a random start. That happens in one background thread, since
    the order is needed only by the end of the epoch; at most one full queue is being grouped while the next one fills.
    ``finish_epoch`` groups the short rest in the same way (its last sub-queue is shorter) and returns the whole order.

    The result is a function of (seed, epoch number, collected data): neither the thread's timing nor a stop and resume changes
    it. With ``batch_scope: local`` every rank has a queue of its own; give each its own seed. M should be a multiple of the
    batch (and of W * B with ``global``), or some batches straddle two sub-queues.

    The rows of GRIT-VLP's Table 4: "shuffle: no" is ``example_shuffle=False`` here and ``batch_shuffle=False`` in
    ``next_epoch_order``; "naive" collecting is the same queue, filled by a separate pass over the data before each epoch.

    Args:
        queue_size: L, samples grouped at a time.
        search_space: M, samples among which a chain looks for its next; must divide L.
        example_shuffle: phase 2; off, neighbours in the previous order stay in one sub-queue.
        seed: of phase 2 and of the starts.
        background: False groups inside ``collect``, in the caller's thread.
        memory: "matrix" or "rows", see ``group_by_similarity``.

    Raises:
        ValueError: M is below 1, above L, or does not divide L.

    Example:
        >>> queue = GritQueue(queue_size=4, search_space=2, seed=0)
        >>> queue.collect(torch.arange(6), torch.randn(6, 8), torch.randn(6, 8))
        >>> sorted(queue.finish_epoch().tolist())
        [0, 1, 2, 3, 4, 5]
    """

    def __init__(
        self,
        queue_size: int,
        search_space: int,
        example_shuffle: bool = True,
        seed: int = 0,
        background: bool = True,
        memory: Memory = "matrix",
    ) -> None:
        _check_sizes(queue_size, search_space)
        self.queue_size = queue_size
        self.search_space = search_space
        self.example_shuffle = example_shuffle
        self.seed = seed
        self.memory: Memory = memory
        self.epoch = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grit") if background else None
        self._grouping: Future[Tensor] | None = None
        self._arriving: HostCopy | None = None
        self._finished: list[Tensor] = []
        self._start_empty()

    def collect(self, index: Tensor, image_features: Tensor, text_features: Tensor) -> None:
        """Take one batch (phase 1). A sample already collected in this epoch is ignored.

        Features are copied to the CPU as fp32. From a GPU the copy is not waited for: it is taken in by the next call.

        Args:
            index: LongTensor[B], positions in the data set.
            image_features: [B, d], any floating dtype and device.
            text_features: [B, d].

        Raises:
            ValueError: shapes do not fit, ``index`` is not an integer tensor, or an index is negative.
            Exception: whatever the grouping of an earlier full queue raised; the queue raises it again at every later call.
        """
        if index.is_floating_point() or index.dtype == torch.bool:
            # fp32 cannot count past 2**24: indices would silently turn into their neighbours.
            raise ValueError(f"index is {index.dtype}, but must be an integer tensor.")
        shapes = [list(tensor.shape) for tensor in (index, image_features, text_features)]
        if index.dim() != 1 or image_features.dim() != 2 or shapes[1] != shapes[2] or len(index) != len(image_features):
            raise ValueError(
                "index, image_features and text_features are {}, {} and {}, but must be [B], [B, d], [B, d].".format(*shapes)
            )
        if self._waiting and self._waiting[0][1].shape[1] != shapes[1][1]:
            raise ValueError(f"features have {shapes[1][1]} dimensions, but {self._waiting[0][1].shape[1]} earlier in this epoch.")
        self._take_in()
        self._take_grouped(wait=False)
        self._arriving = copy_to_host(index, image_features, text_features)
        if self._arriving.arrived is None:
            self._take_in()

    def finish_epoch(self) -> Tensor:
        """The grouped order of everything collected in this epoch; the queue then starts the next epoch empty.

        Returns:
            IntTensor[n] (LongTensor where one is 2**31 or more), CPU: each collected index once, full queues in the order they
            filled, then the rest.

        Raises:
            Exception: as ``collect``.
        """
        self._take_in()
        if self._count:
            self._group()
        self._take_grouped(wait=True)
        order = _concatenate(self._finished)
        self.epoch += 1
        self._start_empty()
        return order

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on from here, in the middle of an epoch too: tensors and numbers only.

        Waits for the queue that is being grouped, so that its order is saved and its features need not be.
        """
        return self.snapshot()()

    def snapshot(self) -> Callable[[], dict[str, Any]]:
        """:meth:`state_dict` of this moment, made when it is called: by another thread, while this queue goes on.

        Example:
            >>> queue = GritQueue(queue_size=4, search_space=2)
            >>> state = queue.snapshot()
            >>> queue.collect(torch.arange(2), torch.eye(2), torch.eye(2))
            >>> len(state()["index"])  # as it was before that batch
            0
        """
        self._take_in()
        self._take_grouped(wait=False)
        # rows and orders are never changed once they are in these lists
        waiting, finished, grouping = [*self._waiting], [*self._finished], self._grouping
        numbers = {**self._settings(), "epoch": self.epoch, "queues_grouped": self._queues_grouped}

        def state() -> dict[str, Any]:
            columns = [torch.cat(column) for column in zip(*waiting, strict=True)] or [torch.empty(0, 0, device="cpu")] * 3
            return {
                **numbers,
                "finished": _concatenate([*finished, *([] if grouping is None else [grouping.result()])]),
                "index": columns[0].long().flatten(),
                "image_features": columns[1],
                "text_features": columns[2],
            }

        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where ``state_dict`` was taken; what this queue held is dropped.

        Raises:
            ValueError: the state was made with other settings, which would not give the same order, or its rows do not fit each
                other. The queue is then as it was.
        """
        for key, value in self._settings().items():
            if state[key] != value:
                raise ValueError(f"{key} is {value}, but the saved queue had {state[key]}; resume with the saved value.")
        epoch, queues_grouped = int(state["epoch"]), int(state["queues_grouped"])
        finished, index = (saved_tensor(state, name, ROW_TYPES, dims=1) for name in ("finished", "index"))
        image, text = (saved_tensor(state, f"{side}_features", (torch.float32,), dims=2) for side in ("image", "text"))
        # a queue is grouped the moment it is full
        fits = len(finished) == queues_grouped * self.queue_size and len(index) < self.queue_size
        if not fits or len(image) != len(index) or image.shape != text.shape:
            raise ValueError("the saved queue's rows do not fit each other.")
        if self._grouping is not None:
            self._grouping.exception()  # waits; what it found belongs to the state that is dropped
            self._grouping = None
        self._start_empty()
        self.epoch, self._queues_grouped = epoch, queues_grouped
        self._finished = [_narrow(finished).clone()]
        for rows in pieces([finished]):
            self._mark_seen(rows)
        self._arriving = copy_to_host(index, image, text)
        self._take_in()

    def _settings(self) -> dict[str, int]:
        return {
            "queue_size": self.queue_size,
            "search_space": self.search_space,
            "example_shuffle": int(self.example_shuffle),
            "seed": self.seed,
        }

    def _start_empty(self) -> None:
        self._arriving = None
        self._waiting: list[Rows] = []
        self._count = 0  # rows in _waiting, always below queue_size between calls
        self._finished = []
        self._queues_grouped = 0
        self._seen = torch.zeros(0, dtype=torch.bool, device="cpu")  # one byte a sample; a Python set of indices takes about 90

    def _take_in(self) -> None:
        """Add the batch that was on its way, and hand over the queue each time it is full."""
        if self._arriving is None:
            return
        arriving, self._arriving = self._arriving, None
        index, image_features, text_features = arriving.wait()
        new = self._mark_seen(index)
        rows = (index[new], image_features[new], text_features[new])
        while len(rows[0]):
            room = self.queue_size - self._count
            self._waiting.append((rows[0][:room], rows[1][:room], rows[2][:room]))
            self._count += len(self._waiting[-1][0])
            rows = (rows[0][room:], rows[1][room:], rows[2][room:])
            if self._count == self.queue_size:
                self._group()

    def _mark_seen(self, index: Tensor) -> Tensor:
        """BoolTensor[n]: which of these are met for the first time in this epoch."""
        if not len(index):
            return torch.zeros(0, dtype=torch.bool, device="cpu")
        if int(index.min()) < 0:
            raise ValueError(f"index {int(index.min())} is negative, but must be a position in the data set.")
        short = int(index.max()) + 1 - len(self._seen)
        if short > 0:  # at least doubling, so that growing costs O(1) per sample over an epoch
            self._seen = torch.cat([self._seen, self._seen.new_zeros(max(short, len(self._seen)))])
        return first_met(index, self._seen)

    def _group(self) -> None:
        """Hand the waiting rows over for grouping, after the previous ones are done: memory stays at two queues."""
        self._take_grouped(wait=True)
        rows, self._waiting, self._count = self._waiting, [], 0
        work = (rows, self.search_space, self.example_shuffle, (self.seed, self.epoch, self._queues_grouped), self.memory)
        self._queues_grouped += 1
        if self._thread is not None:
            self._grouping = self._thread.submit(shuffle_and_group, *work)
            return
        self._grouping = Future()
        try:
            self._grouping.set_result(shuffle_and_group(*work))
        except Exception as error:  # kept in the future, as the thread does, and raised by the next line
            self._grouping.set_exception(error)
        self._take_grouped(wait=True)

    def _take_grouped(self, wait: bool) -> None:
        if self._grouping is not None and (wait or self._grouping.done()):
            # A failed future stays in place: without its rows the epoch's order is wrong, so no later call may succeed.
            self._finished.append(self._grouping.result())
            self._grouping = None


def shuffle_and_group(rows: list[Rows], search_space: int, shuffle: bool, seed: tuple[int, int, int], memory: Memory) -> Tensor:
    """Phases 2 and 3 for the rows of one queue: shuffle, cut into sub-queues, order each.

    Args:
        rows: pieces of one queue in the order they were collected, n rows in all, at least one piece.
        search_space: M. The rows are cut into groups of M; when M does not divide n, the last one is shorter.
        shuffle: phase 2; without it the groups are cut from the rows as they came.
        seed: (seed, epoch, number of the queue in the epoch), of the shuffle and of each group's start.
        memory: see ``group_by_similarity``.

    Returns:
        [n] data-set indices, as ``finish_epoch`` says.

    Raises:
        ValueError: a feature is NaN or infinite; the message names the data-set indices.
    """
    index, image, text = (torch.cat(column) for column in zip(*rows, strict=True))
    bad = ~(image.isfinite().all(dim=1) & text.isfinite().all(dim=1))
    if bool(bad.any()):
        named = ", ".join(map(str, index[bad][:10].tolist()))
        raise ValueError(f"GRIT cannot group {int(bad.sum())} samples with non-finite features; data-set indices: {named}.")
    generator = seeded_generator("grit queue", *seed)
    count, dim = image.shape
    if shuffle:
        shuffled = torch.randperm(count, generator=generator, device="cpu")
        index, image, text = index[shuffled], image[shuffled], text[shuffled]
    queues, rest = divmod(count, search_space)
    whole = queues * search_space
    # Uniform over all rows of a group, the last included.
    start = torch.randint(search_space, (queues,), generator=generator, device="cpu")
    cut = (queues, search_space, dim)
    order = group_sub_queues(image[:whole].view(cut), text[:whole].view(cut), start, memory=memory)
    parts = [index[:whole].view(queues, search_space).gather(1, order).flatten()]
    if rest:
        first = int(torch.randint(rest, (), generator=generator, device="cpu"))
        parts.append(index[whole:][group_by_similarity(image[whole:], text[whole:], first, memory=memory)])
    return _narrow(torch.cat(parts))


@dataclass
class HostCopy:
    """CPU copies that may still be on their way; ``wait()`` returns them when they have arrived."""

    tensors: tuple[Tensor, ...]
    arrived: torch.cuda.Event | None = None

    def wait(self) -> tuple[Tensor, ...]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tensors


def copy_to_host(*tensors: Tensor) -> HostCopy:
    """Copy tensors to CPU memory of their own: floating ones as fp32, integer ones as int64.

    From a CUDA device the copies go to pinned memory and this returns at once, so that no training step waits for the GPU; from
    any other device they are complete on return (``arrived`` is None).

    Example:
        >>> copy_to_host(torch.tensor([1.5], dtype=torch.bfloat16)).wait()[0].dtype
        torch.float32
    """
    copies: list[Tensor] = []
    gpu: torch.device | None = None
    for tensor in tensors:
        dtype = torch.float32 if tensor.is_floating_point() else torch.long
        if tensor.is_cuda:
            gpu = tensor.device
            pinned = torch.empty(tensor.shape, dtype=dtype, pin_memory=True, device="cpu")
            copies.append(pinned.copy_(tensor.detach().to(dtype), non_blocking=True))
        else:
            copies.append(tensor.detach().to("cpu", dtype, copy=True))
    # Recorded on the stream that did the copies: a plain non_blocking copy gives no sign of its arrival.
    arrived = torch.cuda.current_stream(gpu).record_event() if gpu is not None else None
    return HostCopy(tuple(copies), arrived)


def _check_sizes(queue_size: int, search_space: int) -> None:
    if search_space < 1:
        raise ValueError(f"search_space is {search_space}, but must be at least 1.")
    if search_space > queue_size:
        raise ValueError(f"search_space is {search_space}, but must not exceed queue_size ({queue_size}); nearest: {queue_size}.")
    if queue_size % search_space:
        small = [number for number in range(1, int(queue_size**0.5) + 1) if queue_size % number == 0]
        divisors = small + [queue_size // number for number in small]
        nearest = min(divisors, key=lambda number: (abs(number - search_space), number))
        raise ValueError(f"search_space is {search_space}, but must divide queue_size ({queue_size}); nearest: {nearest}.")


def _concatenate(orders: list[Tensor]) -> Tensor:
    return torch.cat([torch.empty(0, dtype=torch.int32, device="cpu"), *orders])


def _narrow(rows: Tensor) -> Tensor:
    """In the smaller type that holds the largest of them."""
    return rows.to(row_type(int(rows.max()) + 1 if len(rows) else 0))
