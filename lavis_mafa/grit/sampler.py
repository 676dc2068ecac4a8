"""Who is served when: one global order, of which every rank reads its share, and how GRIT makes the next one (phase 4)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

INT32_ROWS = 2**31  # below so many rows, four bytes hold the number of one
PIECE = 2**20  # rows that are looked at at a time
ROW_TYPES = (torch.int32, torch.int64)  # of saved row numbers: before they were int32, all were int64


def seeded_generator(*parts: int | str) -> torch.Generator:
    """A CPU generator whose stream is a function of ``parts``: equal parts give equal streams, on every rank and machine.

    Sums such as ``seed + epoch`` make (seed 0, epoch 1) and (seed 1, epoch 0) draw the same numbers; here each part counts.

    Example:
        >>> a, b = seeded_generator(7, "epoch", 1), seeded_generator(7, "epoch", 1)
        >>> torch.equal(torch.randperm(9, generator=a), torch.randperm(9, generator=b))
        True
    """
    # A str seed goes through SHA-512 (random.Random), which Python's randomised hash() does not touch.
    return torch.Generator().manual_seed(random.Random("/".join(map(str, parts))).getrandbits(63))


def first_occurrences(index: Tensor) -> Tensor:
    """BoolTensor[n]: where each value of LongTensor[n] appears for the first time.

    Example:
        >>> first_occurrences(torch.tensor([4, 7, 4, 4]))
        tensor([ True,  True, False, False])
    """
    values, positions = torch.sort(index, stable=True)
    starts_run = torch.ones_like(values, dtype=torch.bool)
    starts_run[1:] = values[1:] != values[:-1]
    return torch.zeros_like(starts_run).index_fill_(0, positions[starts_run], True)


def row_type(rows: int) -> torch.dtype:
    """Of the numbers of so many rows: four bytes each where they suffice.

    Example:
        >>> row_type(400_000_000), row_type(5_000_000_000)
        (torch.int32, torch.int64)
    """
    return torch.int32 if rows < INT32_ROWS else torch.long


def present(lists: Sequence[Tensor], size: int) -> Tensor:
    """BoolTensor[size]: which of ``range(size)`` the lists hold, in one pass and without sorting."""
    found = torch.zeros(size, dtype=torch.bool, device="cpu")
    for rows in pieces(lists):
        found.index_fill_(0, rows.long(), True)
    return found


def first_met(rows: Tensor, seen: Tensor) -> Tensor:
    """BoolTensor[n]: which of ``rows`` [n] are met for the first time, after those in the bitmap ``seen``, which they are added to.

    Example:
        >>> first_met(torch.tensor([0, 2, 2]), torch.tensor([True, False, False]))
        tensor([False,  True, False])
    """
    rows = rows.long()
    new = first_occurrences(rows) & ~seen[rows]
    seen.index_fill_(0, rows, True)
    return new


def pieces(lists: Sequence[Tensor]) -> Iterator[Tensor]:
    """The lists in pieces: torch indexes with int64 alone, and a whole list of those may take gigabytes."""
    for rows in lists:
        yield from (rows[start : start + PIECE] for start in range(0, max(len(rows), 1), PIECE))


def next_epoch_order(
    grouped: list[Tensor],
    dataset_size: int,
    block: int,
    batch_shuffle: bool,
    generator_seed: int,
    global_batch: int | None = None,
) -> Tensor:
    """Make the next epoch's order of the whole data set from what the ranks grouped (GRIT-VLP, section 4.1, phase 4).

    The ranks' lists are joined in rank order to G. An index met twice keeps its first place. Each list is cut into blocks from
    its own beginning, and the samples of an incomplete block (the end of a list whose length is no multiple of ``block``, or a
    block that lost a duplicate) move to the end of G, so that an odd list never shifts the blocks of the ranks after it.

    The k samples that no rank grouped (the tail an incomplete last batch dropped, unreadable images) come first, shuffled:
    ``missing + G[k:] + G[:k]``. Blocks keep their alignment, missing samples are served before all others, and those they
    displace form the new tail. When more are missing than grouped, G is rotated only as far as alignment needs.

    Phase 4 then permutes whole blocks, with one seed for all ranks. It stays within the steps that are served; what lies
    behind the last whole global batch stays there, so that no shuffle can drop a sample twice in a row.

    Args:
        grouped: one tensor of integers per rank, from ``GritQueue.finish_epoch``; with ``batch_scope: global``, one list in all.
        dataset_size: N.
        block: samples that were grouped to be one batch: ``GritSampler.block``.
        batch_shuffle: phase 4 (GRIT-VLP's Table 4 without it: ``False``).
        generator_seed: equal on all ranks, another one each epoch.
        global_batch: W * B, samples per step over all ranks (``GritSampler.global_batch``); ``block`` when not given.

    Returns:
        IntTensor[N] (LongTensor from 2**31 samples on), a permutation of ``range(N)``.

    Raises:
        ValueError: an index lies outside the data set, or ``block`` does not divide ``global_batch``.

    Example:
        >>> next_epoch_order([torch.tensor([2, 0, 3, 1])], dataset_size=5, block=2, batch_shuffle=False, generator_seed=0)
        tensor([4, 0, 3, 1, 2], dtype=torch.int32)
    """
    global_batch = block if global_batch is None else global_batch
    if block < 1 or global_batch % block:
        raise ValueError(f"block is {block}, but must be at least 1 and divide global_batch ({global_batch}).")
    grouped, dtype = [_on_the_host(rows) for rows in grouped], row_type(dataset_size)
    _check_inside(grouped, dataset_size)
    found = present(grouped, dataset_size)
    ordered = [rows.to(dtype) for rows in _whole_blocks_first(grouped, found, block)]

    generator = seeded_generator("grit order", generator_seed)
    missing = (~found).nonzero().squeeze(1).to(dtype)
    # Neighbours in a data file are often captions of one image: in file order they would fill whole batches.
    missing = missing[torch.randperm(len(missing), generator=generator, device="cpu")]
    count = dataset_size - len(missing)
    displaced = len(missing) if len(missing) <= count else min(len(missing) % block, count)
    first, others = _split(ordered, displaced)
    order = torch.cat([missing, *others, *first])

    if batch_shuffle:
        blocks = dataset_size // global_batch * global_batch // block
        shuffled = torch.randperm(blocks, generator=generator, device="cpu")
        served = order[: blocks * block].view(blocks, block)
        served.copy_(served.index_select(0, shuffled))
    return order


def _on_the_host(rows: Tensor) -> Tensor:
    return rows.detach().to("cpu", rows.dtype if rows.dtype in ROW_TYPES else torch.long)


def _check_inside(grouped: list[Tensor], dataset_size: int) -> None:
    for rows in grouped:
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < dataset_size:
            outside = rows[(rows < 0) | (rows >= dataset_size)]
            raise ValueError(f"the grouped order holds index {int(outside[0])}, but the data set has {dataset_size} samples.")


def _whole_blocks_first(grouped: list[Tensor], found: Tensor, block: int) -> list[Tensor]:
    """G in pieces: the lists' whole blocks, then the samples of broken ones; each of those ``found`` once, where it is met first."""
    repeated = int(found.count_nonzero()) < sum(map(len, grouped))
    seen = torch.zeros_like(found) if repeated else found
    whole, rest = [], []
    for rows in grouped:
        cut = len(rows) // block * block
        blocks, end = rows[:cut].view(-1, block), rows[cut:]
        if repeated:
            kept = torch.cat([first_met(piece, seen) for piece in pieces([rows])])
            full = kept[:cut].view(-1, block).all(dim=1)
            kept[:cut].view(-1, block)[full] = False
            blocks, end = blocks[full], rows[kept]
        whole.append(blocks.flatten())
        rest.append(end)
    return whole + rest


def _split(lists: list[Tensor], at: int) -> tuple[list[Tensor], list[Tensor]]:
    """The first ``at`` of all their rows, and the others."""
    first, others = [], []
    for rows in lists:
        first.append(rows[:at])
        others.append(rows[at:])
        at = max(at - len(rows), 0)
    return first, others


class GritSampler(Sampler[int]):
    """Serves each rank its share of one global order, which is the same on all ranks.

    Step j of rank r serves ``order[j*W*B + r*B : j*W*B + (r+1)*B]``: a step of all ranks is a run of W * B samples of the
    order, so W ranks with batches of B see the same global batches as one rank with batches of W * B. Use it as
    ``DataLoader(sampler=sampler, batch_size=B, drop_last=True)``.

    An epoch's order is a seeded random permutation unless ``set_order`` gave one. Rank and world size are passed in, so that one
    process can stand for any rank.

    Args:
        dataset_size: N.
        batch_size: B, per rank.
        rank: r.
        world_size: W.
        batch_scope: "local" when each rank's queue groups batches of B, "global" when one order groups batches of W * B.
        seed: of the random permutations; equal on all ranks.

    Attributes:
        epoch: that iterating serves.
        order: IntTensor[N] (LongTensor from 2**31 samples on), this epoch's global order. It is never changed in place.
        grouped: whether GRIT made this epoch's order: smoothing (``smooth_when: grouped``) asks for it.
        block: samples that GRIT groups to be one batch.
        global_batch: W * B.

    Raises:
        ValueError: N is smaller than one global batch, ``rank`` is not below ``world_size``, or ``batch_scope`` is neither.

    Example:
        >>> sampler = GritSampler(dataset_size=5, batch_size=2, rank=1, world_size=2)
        >>> sampler.set_order(torch.tensor([4, 3, 2, 1, 0]), epoch=1, grouped=True)
        >>> list(sampler)
        [2, 1]
    """

    def __init__(
        self,
        dataset_size: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        batch_scope: str = "local",
        seed: int = 0,
    ) -> None:
        if batch_scope not in ("local", "global"):
            raise ValueError(f"batch_scope is {batch_scope!r}, but must be 'local' or 'global'.")
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size is {batch_size} and rank {rank} of {world_size}, but must be >= 1 and 0 <= rank < world_size."
            )
        self.dataset_size, self.batch_size = dataset_size, batch_size
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.global_batch = world_size * batch_size
        self.block = batch_size if batch_scope == "local" else self.global_batch
        if dataset_size < self.global_batch:
            raise ValueError(
                f"the data set has {dataset_size} samples, fewer than one global batch of {self.global_batch} "
                f"({world_size} ranks x {batch_size})."
            )
        self.steps_per_epoch = dataset_size // self.global_batch
        self._begin(self._random_order(0), epoch=0, grouped=False)

    @property
    def start_step(self) -> int:
        """The step iterating starts with, 0 but for a resumed epoch; ``steps_per_epoch`` is allowed and serves nothing."""
        return self._start_step

    @start_step.setter
    def start_step(self, step: int) -> None:
        if not 0 <= step <= self.steps_per_epoch:
            raise ValueError(f"start_step is {step}, but an epoch has {self.steps_per_epoch} steps.")
        self._start_step = step

    def __len__(self) -> int:
        """Samples per rank and epoch, ``(N // (W * B)) * B``; the same in a resumed epoch, as schedules and bars expect."""
        return self.steps_per_epoch * self.batch_size

    def __iter__(self) -> Iterator[int]:
        served = self.order[: self.steps_per_epoch * self.global_batch].view(self.steps_per_epoch, self.world_size, self.batch_size)
        # Bound now: setting the next order while a loader still prefetches this one must not mix the two.
        return _serve(served[self.start_step :, self.rank])

    def set_epoch(self, epoch: int) -> None:
        """Move to ``epoch`` in a random order. The epoch the sampler is in (by ``set_order``, a resume) is left as it is."""
        if epoch != self.epoch:
            self._begin(self._random_order(epoch), epoch, grouped=False)

    def set_order(self, order: Tensor, epoch: int, grouped: bool) -> None:
        """Move to ``epoch``, in this order. A loader that is already iterating is not disturbed.

        Args:
            order: [N] integers, a permutation of ``range(N)``, equal on all ranks.
            epoch: the epoch it is for.
            grouped: whether GRIT made it.

        Raises:
            ValueError: ``order`` is not such a permutation.
        """
        self._begin(self._checked(order), epoch, grouped)

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """Where the epoch stands, as tensors and numbers; the order is not copied.

        Args:
            step: steps of this epoch already trained (the sampler cannot know: a loader reads ahead); else ``start_step``.
        """
        return {
            "order": self.order,
            "epoch": self.epoch,
            "grouped": self.grouped,
            "start_step": self.start_step if step is None else step,
            "global_batch": self.global_batch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on in the saved epoch, after its last trained step. Ranks and batch size may differ if the global batches fit.

        Raises:
            ValueError: the saved order is for another data set, or what it already served is no whole number of steps here. The
                sampler is then as it was.
        """
        order = self._checked(saved_tensor(state, "order", ROW_TYPES, dims=1))
        saved_batch, steps = int(state["global_batch"]), int(state["start_step"])
        if saved_batch < 1 or not 0 <= steps <= self.dataset_size // saved_batch:
            raise ValueError(f"the saved epoch cannot stand after {steps} batches of {saved_batch} of {self.dataset_size} samples.")
        step, left = divmod(steps * saved_batch, self.global_batch)
        if steps == self.dataset_size // saved_batch:
            # A complete epoch stays complete, although other batches might squeeze one more step out of its tail.
            step = self.steps_per_epoch
        elif left:
            raise ValueError(
                f"the saved epoch stopped after {steps} batches of {saved_batch} samples over all ranks, which is no whole "
                f"number of batches of {self.global_batch}; resume with ranks x batch size = {saved_batch}."
            )
        self._begin(order, int(state["epoch"]), bool(state["grouped"]))
        self.start_step = step

    def _begin(self, order: Tensor, epoch: int, grouped: bool) -> None:
        self.order, self.epoch, self.grouped, self._start_step = order, epoch, grouped, 0

    def _random_order(self, epoch: int) -> Tensor:
        generator, dtype = seeded_generator("grit sampler", self.seed, epoch), row_type(self.dataset_size)
        return torch.randperm(self.dataset_size, generator=generator, dtype=dtype, device="cpu")  # the same numbers in both types

    def _checked(self, order: Tensor) -> Tensor:
        size = self.dataset_size
        order = _on_the_host(order)
        inside = order.shape == (size,) and 0 <= int(order.min()) <= int(order.max()) < size
        if not inside or not bool(present([order], size).all()):
            raise ValueError(f"the order ({list(order.shape)}) is not a permutation of the data set's {size} samples.")
        return order.to(row_type(size), copy=True)


def saved_tensor(state: Mapping[str, Any], name: str, dtypes: tuple[torch.dtype, ...], dims: int) -> Tensor:
    """``state[name]``, all of whose values are in memory: a stored view may repeat one number a billion times.

    Raises:
        ValueError: it is no tensor of one of these types, with so many dimensions.
    """
    value = state[name]
    plain = isinstance(value, Tensor) and value.layout is torch.strided and value.is_contiguous()
    if not plain or value.dtype not in dtypes or value.dim() != dims:
        raise ValueError(f"the saved {name} is no contiguous tensor of {' or '.join(map(str, dtypes))} with {dims} dimensions.")
    tensor: Tensor = value
    return tensor


def _serve(batches: Tensor) -> Iterator[int]:
    for batch in batches:  # a batch at a time: a list of all indices would be millions of Python ints
        yield from batch.tolist()
