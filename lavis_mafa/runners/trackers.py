"""Where figures, pictures and files of a training go beside its folder: TensorBoard, Weights & Biases, MLflow (docs/tracking.md)."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from omegaconf import OmegaConf
from PIL import Image

from lavis_mafa.config.read import flat
from lavis_mafa.datasets.indexed import generators_kept
from lavis_mafa.files import write_text
from lavis_mafa.signals import Stopped

logger = logging.getLogger(__name__)
PAUSE = 1800.0  # seconds until one that failed is asked again: one that waits for its server may take a minute and a half each time
KEPT = 10_000  # of what it is told then, so many calls at most
PROJECT = "lavis_mafa"  # of W&B, and MLflow's experiment, where the environment names none
FALSE_NEGATIVES = ("new_positive", "ambiguous", "false_negative", "con_d", "extra_judged")


def tag(name: str) -> str:
    """What a name of ``metrics.jsonl`` is called in all trackers, which group by what comes before the slash.

    Example:
        >>> [tag(name) for name in ("loss", "loss_itc", "itm_accuracy_positive", "con_d_recall", "learning_rate")]
        ['loss/total', 'loss/itc', 'itm/accuracy_positive', 'false_negatives/con_d_recall', 'training/learning_rate']
    """
    if name == "loss":
        return "loss/total"
    group, _, rest = name.partition("_")
    if group in ("loss", "itm"):
        return f"{group}/{rest}"
    return f"{'false_negatives' if name.startswith(FALSE_NEGATIVES) else 'training'}/{name}"


@dataclass(frozen=True)
class Picture:
    image: Image.Image
    caption: str


class Tracker(Protocol):
    """Made with a run's folder, its configuration, and the steps that are done already (of the checkpoint it goes on from, else 0)."""

    def __init__(self, folder: Path, config: dict[str, Any], first_step: int) -> None: ...
    @staticmethod
    def failures() -> tuple[type[Exception], ...]: ...  # what it raises where it, its server or its disk is gone
    def scalars(self, values: Mapping[str, float], step: int) -> None: ...
    def missed(self, values: Mapping[str, float], step: int) -> None: ...  # of a resumed run: what is before its checkpoint
    def pictures(self, name: str, pictures: list[Picture], step: int) -> None: ...
    def files(self, paths: list[Path]) -> None: ...
    def close(self, code: int) -> None: ...


class Trackers:
    """All of a run, on its first rank; none on the others. They are closed at the end of ``with``, however that comes.

    A tracker that fails does not fail the training: the log says so once, and half an hour later it is told what it missed.
    """

    def __init__(self, names: Iterable[str], folder: Path, config: dict[str, Any]) -> None:
        self.names = list(dict.fromkeys(names))
        self.first_step = 0  # set by who resumes, before anything is told
        self._all = [_Patient(name, partial(self._open, name, folder, config)) for name in self.names]

    def _open(self, name: str, folder: Path, config: dict[str, Any], again: bool = False) -> Tracker:
        return KINDS[name](folder, config, 0 if again else self.first_step)

    @property
    def keep_files(self) -> bool:
        return any(KINDS[name] is not TensorBoard for name in self.names)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """``values`` by their tags, after ``step`` steps of the run."""
        self._tell("scalars", values, step)

    def missed(self, values: Mapping[str, float], step: int) -> None:
        """The same from before the checkpoint that a run goes on from, for those that lack it: they are new, or were killed."""
        self._tell("missed", values, step)

    def pictures(self, name: str, pictures: list[Picture], step: int) -> None:
        if pictures:
            self._tell("pictures", name, pictures, step)

    def files(self, paths: list[Path]) -> None:
        """What the run has written, for those that keep files."""
        self._tell("files", [path for path in paths if path.is_file()])

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        code = 0 if kind is None else int(error.code or 1) if isinstance(error, Stopped) else 130 if kind is KeyboardInterrupt else 1
        for one in self._all:
            one.close(code)

    def _tell(self, method: str, *arguments: Any) -> None:
        for one in self._all:
            one.tell(method, *arguments)


class _Patient:
    """One tracker, opened when it is first told something, and what it has still to be told, in order."""

    def __init__(self, name: str, open_it: Callable[..., Tracker]) -> None:
        self.name, self.open = name, open_it
        self.tracker: Tracker | None = None
        self.left: deque[tuple[str, tuple[Any, ...]]] = deque(maxlen=KEPT)
        self.again = float("-inf")
        self.warned = False

    def tell(self, method: str, *arguments: Any) -> None:
        self.left.append((method, arguments))
        if time.monotonic() >= self.again:
            self._hand_over()

    def close(self, code: int) -> None:
        if self.tracker is None and not self.left:
            return
        self.left.append(("close", (code,)))
        self._hand_over()
        if len(self.left) > 1:  # beside this
            logger.warning("%s has not got the last %d records; the run's folder has all of them", self.name, len(self.left) - 1)

    def _hand_over(self) -> None:
        try:
            with generators_kept():  # what a library draws is no part of the training, which resumes to the bit
                if self.tracker is None:
                    self.tracker = self.open()
                    self.open = partial(self.open, again=True)
                while self.left:
                    method, arguments = self.left[0]
                    getattr(self.tracker, method)(*arguments)
                    self.left.popleft()
        except KINDS[self.name].failures() as error:
            if isinstance(self.tracker, TensorBoard):  # a writer that failed once writes no more
                self.tracker = None
            self.again = time.monotonic() + PAUSE
            said = " ".join(str(error).split())[:300] or type(error).__name__
            if not self.warned:
                logger.warning(
                    "%s fails (%s); the training goes on, and it is asked again every %d minutes", self.name, said, PAUSE / 60
                )
            self.warned = True


class TensorBoard:
    """Event files in ``<run>/tensorboard``. Of a resumed run it forgets what came after the checkpoint, which is told once more."""

    def __init__(self, folder: Path, config: dict[str, Any], first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1 if first_step else None)
        self._text("config", OmegaConf.to_yaml(OmegaConf.create(config)), first_step)

    @staticmethod
    def failures() -> tuple[type[Exception], ...]:
        return (OSError,)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # so that a run that is killed loses none

    def missed(self, values: Mapping[str, float], step: int) -> None:
        """It lacks nothing."""

    def pictures(self, name: str, pictures: list[Picture], step: int) -> None:
        for number, picture in enumerate(pictures, start=1):
            self.writer.add_image(f"{name}/{number}", np.asarray(picture.image), step, dataformats="HWC")
        self._text(name, _captions(pictures), step)

    def files(self, paths: list[Path]) -> None:
        """They are beside the event files."""

    def close(self, code: int) -> None:
        self.writer.close()

    def _text(self, name: str, text: str, step: int) -> None:
        """It is read as Markdown, where four spaces before a line keep it as it is."""
        self.writer.add_text(name, "".join(f"    {line}\n" for line in text.splitlines()), step)


class _Kept:
    """A tracker whose own run goes on with ours: ``<run>/<name>.json`` has the id, and of each group of tags the last step that it has.

    It takes back nothing that came after the checkpoint; a resumed run, which makes the same figures again, leaves those out.
    """

    name: str
    id: str | None

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"{self.name}.json"
        kept = json.loads(self.path.read_text()) if self.path.is_file() else {}
        self.id, self.steps = kept.get("id"), kept.get("steps", {})

    def unknown(self, values: Mapping[str, Any], step: int) -> dict[str, Any]:
        return {name: value for name, value in values.items() if step > self.steps.get(name.split("/")[0], -1)}

    def told(self, values: Mapping[str, Any], step: int) -> None:
        self.steps |= {name.split("/")[0]: step for name in values}

    def save(self) -> None:
        write_text(self.path, json.dumps({"id": self.id, "steps": self.steps}))


class Wandb(_Kept):
    """Weights & Biases, below ``<run>/wandb``; login, mode, project, entity, ... are those of its environment (``WANDB_*``).

    Its process writes late: if ours is killed, it has what it had at the last regular end, and a resumed run tells it the rest again.
    """

    name = "wandb"

    def __init__(self, folder: Path, config: dict[str, Any], first_step: int) -> None:
        super().__init__(folder)
        # it would write into the home folder, wait for ever, report its errors to its makers, and print beside our progress bar
        own = {"CACHE_DIR": f"{folder}/wandb/cache", "DATA_DIR": f"{folder}/wandb/data", "ERROR_REPORTING": "false", "CONSOLE": "off"}
        own |= {"FINISH_TIMEOUT": "60", "LOGIN_TIMEOUT": "60"}
        _set_defaults("WANDB", own)
        import wandb

        self.wandb: Any = wandb
        self.run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=os.environ.get("WANDB_NAME") or folder.name,
            dir=folder,
            id=self.id,
            resume="allow",
            reinit="create_new",
            config=config,
        )
        self.id = self.run.id
        self.save()
        self.run.define_metric("step", hidden=True)  # W&B's own only grows, and a resumed run may have to fill in an evaluation
        self.run.define_metric("*", step_metric="step")

    @staticmethod
    def failures() -> tuple[type[Exception], ...]:
        import wandb
        from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError  # its process is gone

        return wandb.Error, OSError, ValueError, HandleAbandonedError, MailboxClosedError  # ValueError: a variable of its environment

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._log(values, step)

    missed = scalars

    def pictures(self, name: str, pictures: list[Picture], step: int) -> None:
        self._log({name: [self.wandb.Image(picture.image, caption=picture.caption) for picture in pictures]}, step)

    def files(self, paths: list[Path]) -> None:
        artifact = self.wandb.Artifact(f"run-{self.id}", type="run")
        for path in paths:
            artifact.add_file(str(path), policy="immutable")  # else it is copied first
        self.run.log_artifact(artifact)

    def close(self, code: int) -> None:
        self.run.finish(exit_code=code)
        self.save()

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        if values := self.unknown(values, step):
            self.run.log({**values, "step": step})
            self.told(values, step)


class Mlflow(_Kept):
    """MLflow at ``MLFLOW_TRACKING_URI``, else in the folder ``mlruns`` beside the run, which all runs there share."""

    name = "mlflow"

    def __init__(self, folder: Path, config: dict[str, Any], first_step: int) -> None:
        super().__init__(folder)
        # it would not write into a folder, wait four minutes for a server that is gone, and tell its makers about its use
        own = {"ALLOW_FILE_STORE": "true", "HTTP_REQUEST_MAX_RETRIES": "2", "HTTP_REQUEST_TIMEOUT": "20", "DISABLE_TELEMETRY": "true"}
        _set_defaults("MLFLOW", own)
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self.client: Any = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or (folder.parent / "mlruns").as_uri())
        if self.id is not None:
            self.client.update_run(self.id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        experiment = self.client.get_experiment_by_name(name)
        number = self.client.create_experiment(name) if experiment is None else experiment.experiment_id
        self.id = self.client.create_run(number, run_name=folder.name).info.run_id
        self.save()
        # longer ones are refused by older servers
        settings = [Param(_allowed(key), str(value)[:500]) for key, value in flat(config).items()]
        for first in range(0, len(settings), 100):  # as many as it takes
            self.client.log_batch(self.id, params=settings[first : first + 100])

    @staticmethod
    def failures() -> tuple[type[Exception], ...]:
        from mlflow.exceptions import MlflowException

        return MlflowException, OSError, ValueError  # the last: a variable of its environment

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        if values := self.unknown(values, step):
            now = int(time.time() * 1000)
            self.client.log_batch(self.id, metrics=[Metric(_allowed(name), value, now, step) for name, value in values.items()])
            self.told(values, step)
            self.save()

    missed = scalars

    def pictures(self, name: str, pictures: list[Picture], step: int) -> None:
        if self.unknown({name: pictures}, step):
            for number, picture in enumerate(pictures, start=1):
                self.client.log_image(self.id, picture.image, key=f"{name}/{number}", step=step)
            self.client.log_text(self.id, _captions(pictures), f"captions/{name}_{step}.txt")
            self.told({name: pictures}, step)
            self.save()

    def files(self, paths: list[Path]) -> None:
        for path in paths:
            self.client.log_artifact(self.id, str(path))

    def close(self, code: int) -> None:
        self.client.set_terminated(self.id, "FINISHED" if code == 0 else "KILLED" if code > 128 else "FAILED")


KINDS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": Mlflow}


def _captions(pictures: list[Picture]) -> str:
    return "".join(f"{number}. {picture.caption}\n" for number, picture in enumerate(pictures, start=1))


def _allowed(name: str) -> str:
    """As MLflow takes it; a kind of question or a label may hold anything."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def _set_defaults(prefix: str, variables: dict[str, str]) -> None:
    """Of the environment, by which both libraries take settings whatever their version; the user's own stay."""
    for name, value in variables.items():
        os.environ.setdefault(f"{prefix}_{name}", value)
