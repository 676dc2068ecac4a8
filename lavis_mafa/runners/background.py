"""One checkpoint at a time is written beside the training, which waits only while its tensors are copied."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lavis_mafa import signals as interrupt
from lavis_mafa.distributed import host_group, world_size
from lavis_mafa.errors import UserError


def host_copy(tree: Any, copied: dict[Any, Tensor] | None = None) -> Any:
    """Dictionaries, lists and tuples with every tensor copied to new host memory, so that training may go on changing the old.

    Tensors that share all their memory (tied weights) share the copy's too.

    Example:
        >>> host_copy({"a": [torch.ones(1)]})
        {'a': [tensor([1.])]}
    """
    copied = {} if copied is None else copied
    if isinstance(tree, dict):
        return {key: host_copy(value, copied) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(host_copy(value, copied) for value in tree)
    if not isinstance(tree, Tensor):
        return tree
    place = (tree.device, tree.data_ptr(), tree.shape, tree.stride(), tree.dtype)
    if place not in copied or not tree.numel():
        copied[place] = tree.detach().to("cpu", copy=True)
    return copied[place]


class BackgroundWriter:
    """Runs one piece of work at a time in a thread, on all ranks alike.

    The work may call :meth:`agree`; an error of any rank's is raised on all of them by the next :meth:`wait`.

    Example:
        >>> writer = BackgroundWriter()
        >>> writer.start(lambda: path.write_text("done"))
        >>> writer.wait()
    """

    def __init__(self) -> None:
        # a group of its own, on the host: the training uses the others meanwhile
        self._group = host_group()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether the last work has failed: :meth:`wait` will say how."""
        return self._error is not None

    def start(self, work: Callable[[], None]) -> None:
        """Wait for the work before, then begin this one."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            UserError: what was written last could not be, here or on another rank.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def join(self) -> None:
        """Let what is being written come to its end, whatever that is: the process ends because of something else."""
        if self._thread is not None:
            self._thread.join()

    def agree(self, work: Callable[[], None]) -> None:
        """Inside of the work: do this part of it, and go on when all ranks have.

        Raises:
            UserError: some rank could not.
        """
        problem = failure = None
        try:
            work()
        except UserError as error:
            problem = str(error)
        except Exception as error:  # the others must hear of it before it ends this thread
            problem, failure = f"{type(error).__name__}: {error}", error
        problems: list[str | None] = [problem]
        if self._group is not None:
            problems = [None] * world_size()
            dist.all_gather_object(problems, problem, group=self._group)
        if failure is not None:
            raise failure
        found = [f"rank {rank}: {p}" if len(problems) > 1 else p for rank, p in enumerate(problems) if p]
        if found:
            raise UserError("; ".join(found))

    def _run(self, work: Callable[[], None]) -> None:
        with interrupt.finished_first():
            try:
                work()
            except BaseException as error:  # raised again where the training waits
                self._error = error
