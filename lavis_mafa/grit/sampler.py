"""Who is served when: one global order, of which every rank reads its share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from lavis_mafa.grit.saved import saved_number, saved_tensor, saved_value
from lavis_mafa.grit.seeding import seeded_generator


class GritSampler(Sampler[int]):
    """Serves each rank its share of one global order, which is the same on all ranks.

    Step j of rank r serves ``order[j*W*B + r*B : j*W*B + (r+1)*B]``: a step of all ranks is a run of W * B samples of the
    order, so W ranks with batches of B see the same global batches as one rank with batches of W * B. Use it as
    ``DataLoader(sampler=sampler, batch_size=B, drop_last=True)``.

    An epoch's order is a seeded random permutation unless ``set_order`` gave one; ``grouped`` tells which. Rank and world size
    are passed in, so that one process can stand for any rank.

    Args:
        dataset_size: N.
        batch_size: B, per rank.
        rank: r.
        world_size: W.
        batch_scope: "local" when each rank's queue groups batches of B, "global" when one order groups batches of W * B.
        seed: of the random permutations; equal on all ranks.

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
        self.dataset_size = dataset_size
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
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
    def epoch(self) -> int:
        """The epoch that iterating serves."""
        return self._epoch

    @property
    def grouped(self) -> bool:
        """Whether GRIT made this epoch's order: smoothing (``smooth_when: grouped``) asks for it."""
        return self._grouped

    @property
    def order(self) -> Tensor:
        """LongTensor[N], this epoch's global order."""
        return self._order

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
        served = self._order[: self.steps_per_epoch * self.global_batch].view(self.steps_per_epoch, self.world_size, self.batch_size)
        # Bound now: setting the next order while a loader still prefetches this one must not mix the two.
        return _serve(served[self._start_step :, self.rank])

    def set_epoch(self, epoch: int) -> None:
        """Move to ``epoch`` in a random order. The epoch the sampler is in (by ``set_order``, a resume) is left as it is."""
        if epoch != self._epoch:
            self._begin(self._random_order(epoch), epoch, grouped=False)

    def set_order(self, order: Tensor, epoch: int, grouped: bool) -> None:
        """Move to ``epoch``, in this order. A loader that is already iterating is not disturbed.

        Args:
            order: LongTensor[N], a permutation of ``range(N)``, equal on all ranks.
            epoch: the epoch it is for.
            grouped: whether GRIT made it.

        Raises:
            ValueError: ``order`` is not such a permutation.
        """
        self._begin(self._checked(order), epoch, grouped)

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """Where the epoch stands, as tensors and numbers.

        Args:
            step: steps of this epoch already trained (the sampler cannot know: a loader reads ahead); else ``start_step``.
        """
        return {
            "order": self._order.clone(),
            "epoch": self._epoch,
            "grouped": self._grouped,
            "start_step": self._start_step if step is None else step,
            "global_batch": self.global_batch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on in the saved epoch, after its last trained step. Ranks and batch size may differ if the global batches fit.

        Raises:
            ValueError: the saved order is for another data set, what it already served is no whole number of steps here, or an
                entry is missing or malformed. The sampler is then as it was.
        """
        order = self._checked(saved_tensor(state, "order", torch.long, dims=1))
        epoch, grouped = saved_number(state, "epoch"), saved_value(state, "grouped")
        if not isinstance(grouped, bool):
            raise ValueError(f"the saved grouped is {grouped!r}, but must be True or False.")
        saved_batch = saved_number(state, "global_batch", least=1, most=self.dataset_size)
        steps = saved_number(state, "start_step", most=self.dataset_size // saved_batch)
        step, left = divmod(steps * saved_batch, self.global_batch)
        if steps == self.dataset_size // saved_batch:
            # A complete epoch stays complete, although other batches might squeeze one more step out of its tail.
            step = self.steps_per_epoch
        elif left:
            raise ValueError(
                f"the saved epoch stopped after {steps} batches of {saved_batch} samples over all ranks, which is no whole "
                f"number of batches of {self.global_batch}; resume with ranks x batch size = {saved_batch}."
            )
        self._begin(order, epoch, grouped)
        self.start_step = step

    def _begin(self, order: Tensor, epoch: int, grouped: bool) -> None:
        self._order, self._epoch, self._grouped, self._start_step = order, epoch, grouped, 0

    def _random_order(self, epoch: int) -> Tensor:
        return torch.randperm(self.dataset_size, generator=seeded_generator("grit sampler", self.seed, epoch))

    def _checked(self, order: Tensor) -> Tensor:
        order = order.detach().to("cpu", torch.long, copy=True)
        if order.shape != (self.dataset_size,) or not torch.equal(order.sort().values, torch.arange(self.dataset_size)):
            raise ValueError(f"the order ({list(order.shape)}) is not a permutation of the data set's {self.dataset_size} samples.")
        return order


def _serve(batches: Tensor) -> Iterator[int]:
    for batch in batches:  # a batch at a time: a list of all indices would be millions of Python ints
        yield from batch.tolist()
