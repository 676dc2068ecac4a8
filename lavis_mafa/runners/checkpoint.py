"""Saving a run whole, beside the training, and going on from what was saved.

``checkpoint_NAME.pth`` has LAVIS's layout; ``checkpoint_NAME.rankR.pth`` beside it holds what only rank R knows: queue, random states,
what is not logged yet. The order of the epoch, which all ranks share, is in rank 0's; the others' have its checksum.
"""

from __future__ import annotations

import concurrent.futures
import functools
import logging
import random
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lavis.models.blip2_models.blip2 import Blip2Base
from torch import Tensor, nn

from lavis_mafa import signals as interrupt
from lavis_mafa.datasets.fingerprint import data_difference, data_record
from lavis_mafa.distributed import host_group, rank, world_size
from lavis_mafa.errors import UserError
from lavis_mafa.files import numbered_checkpoints, replacing
from lavis_mafa.grit.sampler import ROW_TYPES, saved_tensor
from lavis_mafa.runners.loading import BadSamples, GritFeed
from lavis_mafa.runners.log import MetricsLog
from lavis_mafa.weights import damage, load_exactly, read_checkpoint, write_atomically

logger = logging.getLogger(__name__)
KEY = "run.resume_ckpt_path"
RankState = Callable[[], dict[str, Any]]


class CheckpointFolder:
    """Writes the checkpoints of a run in a thread, one at a time, on all ranks alike.

    ``keep`` of the numbered ones stay, and the best one.
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        self.folder, self.keep = folder, keep
        self.written = [
            path.stem.removeprefix("checkpoint_") for path in reversed(numbered_checkpoints(folder))
        ]  # of a run that goes on
        self._group = host_group()  # of its own: the training uses the others meanwhile
        self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: concurrent.futures.Future[None] | None = None

    @property
    def failed(self) -> bool:
        """Whether the last one could not be written; :meth:`wait` raises what was in the way."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def path(self, name: str) -> Path:
        return self.folder / f"checkpoint_{name}.pth"

    def save(self, name: str, content: dict[str, Any] | None, rank_state: RankState | None, rank: int) -> None:
        """Copy ``content`` (on rank 0 alone) to the host and write it while the training goes on; every rank must call it.

        ``rank_state`` is called by the thread that writes. The checkpoint before that could not be written raises UserError.
        """
        self.wait()
        self._writing = self._thread.submit(self._write, name, host_copy(content), rank_state, rank)

    def wait(self) -> None:
        """Until the last one is complete; raises UserError where it could not be written, here or on another rank."""
        self.last_chance()
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def last_chance(self) -> None:
        """Let the last one come to its end, whatever that is: the run has failed because of something else."""
        if self._writing is not None:
            concurrent.futures.wait([self._writing])

    def _write(self, name: str, content: dict[str, Any] | None, rank_state: RankState | None, rank: int) -> None:
        """Each rank's state first, then from rank 0 (the one with ``content``) the weights: their file is the sign that all of the
        checkpoint is there. Nothing older goes before."""
        path = self.path(name)
        with interrupt.finished_first():
            if rank_state is not None:
                self._agree(lambda: write_atomically(rank_state(), rank_file(path, rank)))
            self._agree(lambda: _write_weights(content, path))
            if name == "best":
                return
            self.written = [*(n for n in self.written if n != name), name]
            old, self.written = self.written[: -self.keep], self.written[-self.keep :]
            try:
                for path in map(self.path, old):
                    if content is not None:
                        path.unlink(missing_ok=True)  # first, so that no weights stand without their states
                    rank_file(path, rank).unlink(missing_ok=True)
            except OSError as error:  # it takes room, but nothing is lost
                logger.warning("an old checkpoint cannot be removed: %s", error)

    def _agree(self, work: Callable[[], None]) -> None:
        """Do this, and go on when all ranks have; raises UserError where some rank could not."""
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

    def take_best_along(self, resumed: Path, epoch: int | None, metric: float) -> bool:
        """Copy the best checkpoint so far from the folder of the run that this one goes on with; False where it is not there, is
        damaged, or is a later one."""
        best, own = resumed.with_name("checkpoint_best.pth"), self.path("best")
        if epoch is None or not best.is_file():
            return False
        if damage(best) is not None:
            logger.warning("%s is damaged: the best checkpoint is looked for anew", best)
            return False
        content = read_checkpoint(best)
        if (content.get("best_epoch"), content.get("best_metric")) != (epoch, metric):
            return False
        if not (own.is_file() and own.samefile(best)):
            with replacing(own) as part:
                shutil.copyfile(best, part)
        return True


def host_copy(tree: Any, copied: dict[Any, Tensor] | None = None) -> Any:
    """Dictionaries, lists and tuples with every tensor copied to new host memory, so that training may go on changing the old.

    Tensors that share all their memory (tied weights) share the copy's too.
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


def _write_weights(content: dict[str, Any] | None, path: Path) -> None:
    if content is None:
        return
    bad = [name for name, value in content["model"].items() if value.is_floating_point() and bool(value.isnan().any())]
    if bad:
        raise UserError(f"{path} is not written: {len(bad)} of the model's weights hold NaN, the first {bad[0]}.")
    write_atomically(content, path)


def rank_file(checkpoint: Path, rank: int) -> Path:
    return checkpoint.with_name(f"{checkpoint.stem}.rank{rank}.pth")


# --- everything that a run is ------------------------------------------------------------------------------------------


@dataclass
class RunState:
    """The parts of a run that a checkpoint holds: gathered from here when it is saved, put back here when it is resumed."""

    model: nn.Module  # without DDP
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    feed: GritFeed
    log: MetricsLog
    bad_samples: BadSamples
    dataset: Any  # the training set
    config: dict[str, Any]
    device: torch.device
    best_metric: float = float("-inf")
    best_epoch: int | None = None

    @functools.cached_property
    def data(self) -> list[dict[str, Any]]:
        """What there is to train on, by content: an order of rows means nothing for other rows."""
        return data_record(self.dataset)

    def content(self, epoch: int, next_epoch: int, step: int) -> dict[str, Any]:
        """Of ``checkpoint_NAME.pth``, after ``epoch`` or in it; ``step`` steps of ``next_epoch`` are done."""
        return {
            "model": model_state(self.model),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "config": self.config,
            "epoch": epoch,
            "next_epoch": next_epoch,
            "step": step,
            "best_metric": self.best_metric,
            "best_epoch": self.best_epoch,
            "world_size": world_size(),
            "data": self.data,
        }

    def of_rank(self, step: int) -> RankState:
        """Of ``checkpoint_NAME.rankR.pth``, as of now; the writing thread waits for the queue that is being grouped."""
        feed = self.feed.snapshot(step)
        state = {"random": random_state(self.device), "log": self.log.state_dict(), "bad_samples": self.bad_samples.state_dict()}
        state = host_copy(state)
        return lambda: {"feed": _own_part(feed(), rank()), **state}

    def restore(self, path: Path) -> tuple[int, int, dict[str, Any]]:
        """Go on where ``path``, ours or LAVIS's own, was saved.

        Returns:
            the epoch to go on with, how many of its steps are done, and the settings that the checkpoint was saved under.

        Raises:
            UserError: a file is missing, damaged, or of other data, settings or ranks.
        """
        content, state = read_resumable(path)
        load_model(self.model, content["model"], path)
        try:
            load_optimizer(self.optimizer, content["optimizer"])
            if self.scaler is not None and content.get("scaler"):
                self.scaler.load_state_dict(content["scaler"])
            self.best_metric, self.best_epoch = float(content.get("best_metric", float("-inf"))), content.get("best_epoch")
            if state is None:
                epoch, step = int(content["epoch"]) + 1, 0
            else:
                epoch, step = int(content["next_epoch"]), int(content["step"])
                _take_order(state["feed"]["sampler"], path)
                self._check_data(content.get("data"), state)
                _check_position(state["feed"]["sampler"], epoch, step)
                self.feed.load_state_dict(state["feed"])
                step = self.feed.sampler.start_step  # another batch size counts other steps
                _check_ranks(self.feed, content.get("world_size", world_size()))
                self.log.load_state_dict(state.get("log"), self.device)
                self.bad_samples.load_state_dict(state.get("bad_samples"))
                restore_random_state(state["random"], self.device)
        except ValueError as error:
            raise UserError(f"{KEY}: {path}: {error}") from error
        except (TypeError, KeyError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
            raise UserError(f"{KEY}: {path} is damaged: {type(error).__name__}: {' '.join(str(error).split())}") from error
        return epoch, step, content.get("config") or {}

    def _check_data(self, saved: Any, state: dict[str, Any]) -> None:
        """The order, the queue and the image keys of a checkpoint are numbers of rows."""
        if saved is None:  # written by a version that did not say
            then, now = len(state["feed"]["sampler"]["order"]), sum(part["rows"] for part in self.data)
            different = f"the data had {then} rows, now {now}" if then != now else None
            if different is None:
                logger.warning("the checkpoint does not say what its rows held: that they are the same cannot be checked")
        else:
            different = data_difference(saved, self.data)
        if different is not None:
            raise ValueError(
                f"{different}; its order would be that of other rows. Go on with the data it was trained on, or start a new run, "
                "which model.pretrained may give its weights."
            )


def read_resumable(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """A checkpoint and this rank's state; the latter is None for LAVIS's own checkpoints, which have none."""
    content = read_checkpoint(path, KEY)
    for key in ("model", "optimizer", "epoch"):
        if key not in content:
            raise UserError(f"{KEY}: {path} has no {key!r}; only a checkpoint of a run can be resumed.")
    if "next_epoch" not in content:
        return content, None
    return content, _read_state(path, rank())


def _read_state(path: Path, rank: int) -> dict[str, Any]:
    file = rank_file(path, rank)
    if not file.is_file():
        raise UserError(f"{KEY}: {file.name} is missing beside {path}; it holds rank {rank}'s order and queue.")
    return read_checkpoint(file, KEY)


def _own_part(feed: dict[str, Any], rank: int) -> dict[str, Any]:
    """What a rank's file holds of the feed's state: of ranks other than 0, the order's checksum in its place."""
    sampler = feed["sampler"]
    return feed if rank == 0 else {**feed, "sampler": {**sampler, "order": _checksum(sampler["order"])}}


def _take_order(sampler: dict[str, Any], path: Path) -> None:
    """Rank 0's order into the state of another rank, which may have one of its own: an earlier version wrote it there."""
    wanted = sampler["order"]
    if isinstance(wanted, int):
        sampler["order"] = saved_tensor(_read_state(path, 0)["feed"]["sampler"], "order", ROW_TYPES, dims=1)
        if _checksum(sampler["order"]) != wanted:
            raise ValueError(f"the order in {rank_file(path, 0).name} is not the one that {rank_file(path, rank()).name} names.")


def _checksum(order: Tensor) -> int:
    return zlib.crc32(order.numpy().data)


def _check_position(sampler: dict[str, Any], epoch: int, step: int) -> None:
    """A rank's file and the one of the run must be of one moment."""
    own = (sampler["epoch"], sampler["start_step"])
    # between two epochs the next order is there only if GRIT made it
    if own != (epoch, step) and (step or own != (epoch - 1, 0)):
        raise ValueError(f"it stands at epoch {own[0]}, step {own[1]}, but the checkpoint beside it at epoch {epoch}, step {step}.")


def _check_ranks(feed: GritFeed, saved: int) -> None:
    if saved != world_size() and feed.queue is not None and feed.scope == "local":
        raise ValueError(
            f"it was saved by {saved} processes and is resumed by {world_size()}, but with run.grit.batch_scope: local each holds "
            f"a part of the order; resume with {saved}."
        )


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """AdamW's averages and steps; all settings but the learning rate, which is the scheduler's, are those of now."""
    groups = zip(saved["param_groups"], optimizer.state_dict()["param_groups"], strict=False)
    merged = [{**own, "params": group["params"], "lr": group["lr"]} for group, own in groups]
    optimizer.load_state_dict({**saved, "param_groups": merged})
    for parameter, state in optimizer.state.items():
        if any(state[name].shape != parameter.shape for name in ("exp_avg", "exp_avg_sq")):
            raise ValueError("the saved optimizer's averages are not of this model's sizes.")


def load_model(model: nn.Module, state: dict[str, Any], source: str | Path) -> None:
    """Load a run's weights. LAVIS leaves all frozen weights out of its checkpoints, we those with a file of their own."""
    parameters = model.named_parameters(remove_duplicate=False)  # a tied weight has two names
    frozen = tuple(name for name, parameter in parameters if not parameter.requires_grad)
    may_miss = unsaved_parts(model) if any(name in state for name in frozen) else frozen
    # what the texts in a teacher's queue are is not known to checkpoints from before this was kept
    load_exactly(model, state, f"{KEY}: {source}", may_miss=(*may_miss, "text_queue_keys"))


def model_state(model: nn.Module) -> dict[str, Any]:
    """The weights that a checkpoint holds: all but frozen ones that come from a file of their own (a ViT-g, a language model)."""
    left_out = unsaved_parts(model)
    return {name: value for name, value in model.state_dict().items() if not (left_out and name.startswith(left_out))}


def unsaved_parts(model: Any) -> tuple[str, ...]:
    """Beginnings of the names that a checkpoint leaves out: our models say it; of LAVIS's BLIP-2 what it has frozen."""
    if hasattr(model, "unsaved_parts"):
        return model.unsaved_parts()
    parts = ("visual_encoder", "opt_model", "t5_model") if isinstance(model, Blip2Base) else ()
    frozen = (part for part in parts if hasattr(model, part) and not any(p.requires_grad for p in getattr(model, part).parameters()))
    return tuple(f"{part}." for part in frozen)


def random_state(device: torch.device) -> dict[str, Any]:
    """All random generators as tensors and numbers, so that reading them back runs no code."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # the legacy tuple
    state: dict[str, Any] = {
        "python": {"version": version, "numbers": torch.tensor(numbers), "gauss": gauss},
        "numpy": {"name": name, "keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)), "rest": [position, has_gauss, cached]},
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Go on where :func:`random_state` was taken."""
    python, numpy = state["python"], state["numpy"]
    if not 0 <= numpy["rest"][0] <= len(numpy["keys"]):  # numpy would read past its end without a word
        raise ValueError(f"the saved state of numpy's generator has position {numpy['rest'][0]} of {len(numpy['keys'])}.")
    random.setstate((python["version"], tuple(python["numbers"].tolist()), python["gauss"]))
    np.random.set_state((numpy["name"], numpy["keys"].numpy().astype(np.uint32), *numpy["rest"]))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
