"""The commands as functions, for scripts and notebooks: ``from lavis_mafa import api as mafa`` (docs/python.md).

Each does what the command of its name does; a flag is an argument of its name, and messages name the flag. A mistake is a
:class:`UserError`. Nothing is printed but progress; results are returned, and can be printed. Importing this module is cheap: LAVIS
and PyTorch are imported by the function that needs them.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lavis_mafa.errors import RankLost, UserError
from lavis_mafa.signals import Stopped

if TYPE_CHECKING:
    from lavis_mafa.tools.count_pass import CountResult, Same
    from lavis_mafa.tools.frames import Connections, Data
    from lavis_mafa.tools.mine_pass import MineResult
    from lavis_mafa.tools.passes import Pass
    from lavis_mafa.tools.run_files import Run

__all__ = [
    "RankLost",
    "UserError",
    "connections",
    "count_false_negatives",
    "evaluate",
    "init",
    "mine",
    "open_data",
    "open_run",
    "report",
    "train",
]

Name = str | Path
Options = Mapping[str, Any] | Sequence[str]  # {"run.max_epoch": 1}, or ["run.max_epoch=1"]

# --- data ---------------------------------------------------------------------------------------------------------------


def open_data(
    data: Name | Sequence[Name], images: Name | None = None, columns: Mapping[str, str] | None = None, options: Options = ()
) -> Data:
    """Image-text pairs: their captions and paths are read and looked at, no image is opened yet.

    Args:
        data: annotation files (.csv, .tsv, .json, .jsonl, .parquet, .arrow), folders or patterns of them; or a YAML, of which the
            training data are meant: a file, or a name that ``lavis-mafa ls`` shows.
        images: of files, the folder that their image paths start from.
        columns: of files, what they call ours, where that differs: ``{"image": "filepath", "caption": "title"}``.
        options: of a YAML, overrides.

    Returns:
        ``len(data)``, ``data.frame`` (a DataFrame: ``image_path``, ``caption``) and ``data.image(row)`` (PIL).

    Raises:
        UserError: a file that is not there or cannot be read, or a row that cannot be trained on; it names file and row.

    Example:
        >>> data = mafa.open_data("pairs.csv", images="images")
        >>> data.frame.head(), data.image(0, side=128)
    """
    from lavis_mafa.tools.frames import open_files, open_yaml

    files = _paths(data) or []
    if len(files) == 1 and _is_yaml(files[0]):
        if images is not None or columns:
            raise UserError("images and columns belong to files of pairs; a YAML names its own.")
        return open_yaml(str(files[0]), _overrides(options))
    if options:
        raise UserError("options belong to a YAML; files of pairs have none.")
    return open_files(files, None if images is None else Path(images), columns or {})


def _pass(data: Data | Name, options: Options, **given: Any) -> Pass:
    """The pass of one of the two functions below, as the commands would have it from their flags."""
    from lavis_mafa.tools.passes import Pass

    where = _where(data)
    for name in ("con_d", "miner"):
        given[name] = None if given.get(name) is None else str(given[name])
    for name in ("features", "scores", "guide_features"):
        given[name] = _paths(given[name])
    where = {**where, "options": [*where.get("options", ()), *_overrides(options)]}
    return Pass(**where, **given)


def count_false_negatives(
    data: Data | Name,
    *,
    con_d: Name | None = None,
    miner: Name | None = None,
    features: Name | Sequence[Name] | None = None,
    scores: Name | Sequence[Name] | None = None,
    guide_features: Name | Sequence[Name] | None = None,
    guide_margin: float | None = None,
    batch_size: int | Sequence[int] | None = None,
    search_space: int | Sequence[int] | None = None,
    threshold: float | Sequence[float] | None = None,
    correction: float | Name = 1.0,
    random_only: bool = False,
    same_image: Same | None = None,
    same_text: Same | None = None,
    samples: int | None = None,
    seed: int | None = None,
    force: bool = False,
    output: Name | None = None,
    options: Options = (),
) -> CountResult:
    """How many of the hardest negatives in random and in GRIT batches are false ones, before any training (MAFA Tables 1 and 9).

    Someone judges: a Con-D; or, of pairs in files and without any model, ``scores`` or ``guide_features`` of those that ``features``
    mine.

    Args:
        data: of :func:`open_data`, or a YAML.
        con_d: a checkpoint, a run's folder, or a name such as ``lavis:albef_retrieval/coco``.
        miner: another checkpoint, whose similarities find the hardest negatives (default: Con-D's own).
        features: or features that do: ``[images.npy, texts.npy]`` or one .parquet, a row a pair.
        scores: .parquet or .csv with ``image_row``, ``text_row`` and ``probability``, by any judge.
        guide_features, guide_margin: of a second dual encoder, whose cosines judge; a match is above the own pair's less the margin.
        batch_size, search_space: B and M, one or several (default: those of the YAML; 96 and 4800, as far as there are pairs).
        threshold: Con-D calls a pair a match above it (default: 0.5); the first of several is for table and plot.
        correction: human correction factor (0.83 in the paper), or a file of marks of ``lavis-mafa explore`` that tells it.
        random_only: no GRIT batches.
        same_image, same_text: "count" or "exclude" samples of the same image or text as each other's negatives.
        samples: only so many, a random part. seed: of it, and of GRIT's starts.
        force: give a result even where the scores say that they cannot judge.
        output: a new folder for ``count.json`` and ``count.png`` (default: nothing is written).
        options: overrides of the YAML's settings, or of those made for files, such as ``{"run.num_workers": 8}``.

    Returns:
        ``print(counted)`` is the table, ``counted.frame()`` a DataFrame of it, ``counted.results`` everything; a notebook shows the
        plot.

    Raises:
        UserError: something does not go together, is not there, or cannot judge these data.

    Example:
        >>> counted = mafa.count_false_negatives(data, con_d="output/con_d/latest", samples=20_000)
    """
    from lavis_mafa.tools.count_pass import CountResult, run_count

    of = _pass(
        data,
        options,
        con_d=con_d,
        miner=miner,
        features=features,
        scores=scores,
        guide_features=guide_features,
        guide_margin=guide_margin,
        samples=samples,
        seed=seed,
        force=force,
    )
    counted = run_count(
        of,
        None if output is None else Path(output),
        batch_size=_several(batch_size),
        search_space=_several(search_space),
        threshold=_several(threshold),
        correction=correction if isinstance(correction, float | int) else Path(correction),
        random_only=random_only,
        same_image=same_image,
        same_text=same_text,
    )
    assert isinstance(counted, CountResult), "no pairs were asked for"
    return counted


def mine(
    data: Data | Name,
    *,
    output: Name,
    con_d: Name | None = None,
    features: Name | Sequence[Name] | None = None,
    scores: Name | Sequence[Name] | None = None,
    guide_features: Name | Sequence[Name] | None = None,
    guide_margin: float | None = None,
    batch_size: int | None = None,
    search_space: int | None = None,
    threshold: float | None = None,
    margin: float | None = None,
    per_image: int | None = None,
    at_most: int | None = None,
    reviewed: Name | None = None,
    samples: int | None = None,
    seed: int | None = None,
    force: bool = False,
    options: Options = (),
) -> MineResult:
    """Find missing image-text connections and write them as training data (MAFA section G.8).

    Args:
        output: a folder, in which a pass that was stopped goes on.
        threshold: keep pairs above this probability (default: 0.8).
        margin: and of at least this share of the own pair's probability.
        per_image, at_most: so many new pairs an image, and in all; the most probable ones.
        reviewed: a file of marks of ``lavis-mafa explore``: what people accepted and rejected.
        others: as of :func:`count_false_negatives`.

    Returns:
        ``print(mined)`` shows what was found and what was skipped and why, ``mined.results`` is all of it, ``mined.pairs`` the file for
        training; :func:`connections` shows the pairs.

    Raises:
        UserError: as of :func:`count_false_negatives`; or the folder holds something else.

    Example:
        >>> mined = mafa.mine(data, con_d="output/con_d/latest", output="output/mined", per_image=5)
        >>> mafa.connections(mined).frame.head()
    """
    from lavis_mafa.tools.mine_pass import MineResult, run_mine

    of = _pass(
        data,
        options,
        con_d=con_d,
        features=features,
        scores=scores,
        guide_features=guide_features,
        guide_margin=guide_margin,
        samples=samples,
        seed=seed,
        force=force,
    )
    mined = run_mine(
        of,
        Path(output),
        batch_size=batch_size,
        search_space=search_space,
        threshold=threshold,
        margin=margin,
        per_image=per_image,
        at_most=at_most,
        reviewed=None if reviewed is None else Path(reviewed),
    )
    assert isinstance(mined, MineResult), "no pairs were asked for"
    return mined


# --- training -----------------------------------------------------------------------------------------------------------


def init(
    data: Data | Name,
    output: Name,
    *,
    model: Literal["albef", "blip", "blip2"],
    size: Literal["tiny", "base"],
    con_d: Name | None = None,
    val: Name | Sequence[Name] | None = None,
    test: Name | Sequence[Name] | None = None,
) -> Path:
    """Write a YAML that trains on one's own pairs, with sizes that fit them and this machine; every line may be changed.

    Args:
        data: files of pairs, by :func:`open_data`.
        output: a new .yaml file.
        size: "tiny" for a CPU and from scratch, "base" the paper's, for a GPU.
        con_d: with one, it trains with MAFA.
        val, test: files with pairs on which retrieval is evaluated, after each epoch and at the end.

    Returns:
        ``output``.

    Raises:
        UserError: the file exists, or data or checkpoint cannot be trained with.

    Example:
        >>> mafa.init(data, "my.yaml", model="albef", size="tiny", con_d="output/con_d/latest")
    """
    from lavis_mafa.tools.own_data import write_yaml

    where = _where(data)
    if where.get("images") is None:
        raise UserError("init writes a YAML for files of pairs with a folder of images; give mafa.open_data(files, images=FOLDER).")
    files = {"val": _paths(val), "test": _paths(test)}
    judge = None if con_d is None else str(con_d)
    columns = where["columns"]
    write_yaml(where["annotations"], where["images"], Path(output), model=model, size=size, con_d=judge, columns=columns, **files)
    return Path(output)


def train(name: Name, options: Options = (), resume: Name | None = None) -> Run:
    """Pre-train or fine-tune as a YAML says, in this process.

    The program's random numbers and logging are as before afterwards. A signal (a notebook's stop) ends the training when the step is
    done and saved, and raises ``KeyboardInterrupt``.

    Args:
        name: a file, or a name that ``lavis-mafa ls`` shows.
        options: overrides, ``{"run.max_epoch": 1, "model.pretrained": "output/con_d/latest"}``.
        resume: "auto", a checkpoint or a run's folder, to go on from.

    Returns:
        the run, as :func:`open_run` opens it.

    Raises:
        UserError: a mistake in the YAML, the options, the data or the checkpoints. RankLost: a process of the job died.

    Example:
        >>> run = mafa.train("my.yaml", {"run.max_epoch": 1})
        >>> pd.DataFrame(run.metrics).plot(x="samples_seen", y="loss")
    """
    from lavis_mafa.runners.train import train

    return _finished(lambda: train(str(name), _overrides(options), None if resume is None else str(resume), _page))


def evaluate(what: Run | Name, options: Options = ()) -> dict[str, dict[str, Any]]:
    """Evaluate without training: the best checkpoint of a run, with its own settings, on its test splits; or as a YAML says.

    Args:
        what: a run, its folder, or a YAML.
        options: overrides.

    Returns:
        the metrics of each split.

    Raises:
        UserError: as of :func:`train`; or the run has no checkpoint.

    Example:
        >>> mafa.evaluate(run)["test"]["tr_r1"]
    """
    from lavis_mafa.runners.train import evaluate

    name = _folder(what)
    return _finished(lambda: evaluate(str(name) if _is_yaml(name) else name, _overrides(options))).evaluations


def _page(run: Path) -> Path:
    from lavis_mafa.tools.report import write_run_page  # here: it needs matplotlib and scipy

    return write_run_page(run)


def _finished(job: Any) -> Run:
    try:
        folder = job().output_dir
    except Stopped as stopped:  # which ends a command, and a program with it
        raise KeyboardInterrupt(stopped.message) from None
    gc.collect()  # a runner refers to itself: its model would stay in memory, and its threads would go on
    return open_run(folder)


# --- runs ---------------------------------------------------------------------------------------------------------------


def open_run(run: Name) -> Run:
    """What a run wrote: ``run.folder``, ``run.config``, ``run.metrics`` (a record every ``run.log_freq`` steps, for ``pd.DataFrame``)
    and ``run.evaluations`` (the metrics of each split); raises UserError where it is no folder of a run."""
    from lavis_mafa.tools.run_files import open_runs

    return open_runs([Path(run)])[0]


def connections(run: Run | MineResult | Name) -> Connections:
    """What the judge said of the pairs that a run was trained with, or that were mined.

    Returns:
        ``found.frame``, a DataFrame (:class:`lavis_mafa.tools.frames.Connections` names its columns), ``found.show(frame)`` with
        images, and ``found.image(row)``.

    Raises:
        UserError: the run recorded none.

    Example:
        >>> found = mafa.connections("output/mafa/latest")
        >>> found.show(found.frame.query("verdict == 'positive'"), most=10)
    """
    from lavis_mafa.tools.frames import read_connections

    return read_connections(_folder(run))


def report(
    runs: Run | CountResult | MineResult | Name | Sequence[Run | CountResult | MineResult | Name],
    output: Name = "report.html",
    gallery: int = 5000,
) -> Path:
    """One HTML page about runs, counts and what was mined, with the ``gallery`` surest connections. Returns where it is; raises
    UserError."""
    from lavis_mafa.tools.report import write_report

    several = runs if isinstance(runs, Sequence) and not isinstance(runs, str) else [runs]
    write_report([_folder(one) for one in several], Path(output), gallery)
    return Path(output)


# --- as the commands take it --------------------------------------------------------------------------------------------


def _folder(run: Any) -> Path:
    folder = run if isinstance(run, str | Path) else run.folder
    if folder is None:
        raise UserError("this count is in no folder; give count_false_negatives an output.")
    return Path(folder)


def _where(data: Data | Name) -> Mapping[str, Any]:
    """The fields of a pass that name data; of a YAML they are not opened yet, since the options may change them."""
    if not isinstance(data, str | Path):
        return data.where
    return {"cfg_path": str(data)} if _is_yaml(data) else open_data(data).where


def _is_yaml(name: Name) -> bool:
    return Path(name).suffix in (".yaml", ".yml")


def _paths(names: Name | Sequence[Name] | None) -> list[Path] | None:
    return None if names is None else [Path(one) for one in ([names] if isinstance(names, str | Path) else names)]


def _several(values: Any) -> list[Any] | None:
    import numpy as np

    return None if values is None else np.atleast_1d(values).tolist()


def _overrides(options: Options) -> list[str]:
    """``KEY=VALUE``, as ``--options`` takes them."""
    if isinstance(options, Mapping):
        return [f"{key}={json.dumps(str(value) if isinstance(value, Path) else value)}" for key, value in options.items()]
    return [options] if isinstance(options, str) else list(options)
