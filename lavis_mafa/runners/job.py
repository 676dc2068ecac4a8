"""From a YAML to a running job: check first, then do what LAVIS's train.py does."""

from __future__ import annotations

import argparse
import datetime
import logging
import os
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError

from lavis_mafa.config.check import OURS, Checked, check_device, check_evaluates, check_splits, examine, fetch_named
from lavis_mafa.config.data import SETTINGS, SPLITS, check_lavis_info, check_processor, own_splits
from lavis_mafa.config.read import at, find_yaml, plain
from lavis_mafa.config.schema import MODEL_BLOCKS, RUN_BLOCKS, model_types
from lavis_mafa.distributed import is_one_of_several
from lavis_mafa.errors import Mistakes, RankLost, UserError, did_you_mean
from lavis_mafa.models.lavis_weights import build_model

PROCESSORS = ("vis_processor.train", "vis_processor.eval", "text_processor.train", "text_processor.eval")

# --- the job -----------------------------------------------------------------------------------------------------------


def prepare(
    name: str,
    options: list[str],
    files: bool = True,
    device: bool = True,
    joins: bool = False,
    runs: bool = False,
    data: bool = True,
) -> tuple[DictConfig, Any]:
    """Check, import LAVIS and register with it: the checked configuration, and LAVIS's ``Config`` that tasks build from.

    Args:
        name, options, files: as for :func:`lavis_mafa.config.check.check_yaml`.
        device: False where no model will be built, so that it does not matter what this machine can compute.
        joins: the job may be one of several processes; what the environment says of them is checked.
        runs: it will train or evaluate, and must have something to do.
        data: False where none will be read, so that LAVIS's need not be there.

    Raises:
        UserError: the first mistake found.
    """
    checked, found = examine(name, options, files)
    found.end()
    if files and (named := fetch_named(checked.config, getattr(getattr(checked.model, "ecm", None), "enabled", False))):
        checked, found = examine(name, [*options, *named], files)  # now their kinds and sizes are known
        found.end()
    if runs:
        found(check_evaluates, checked.config.run)
        found.end()
    if joins:
        is_one_of_several(checked.config.run.get("dist_url", "env://"))
    if device:
        _check_device(checked)  # before LAVIS is imported, which takes seconds
    return checked.config, _config(name, checked, data)


def all_mistakes(name: str, options: list[str], files: bool = True) -> list[str]:
    """Whatever keeps ``train`` or ``evaluate`` from its first step, as far as that is known before the model is built.

    Args:
        name, options: as for :func:`lavis_mafa.config.check.check_yaml`.
        files: False looks at the YAML alone, whose data, checkpoints and GPUs may be another machine's.
    """
    try:
        checked, of_yaml = examine(name, options, files)
    except UserError as error:
        return list(error.messages)
    of_yaml(check_evaluates, checked.config.run)
    found, ours = Mistakes(), _all_ours(checked)
    if not ours:
        if not found(_check_names, checked.config, _lavis_registry()):
            return of_yaml.messages + found.messages
        found(_check_lavis_blocks, checked.config.datasets, _lavis_registry())
    if (
        files and checked.readable and not (ours and of_yaml.messages)
    ):  # LAVIS takes seconds to import, and then knows where its data are
        found(_check_device, checked)
        own = checked.config.model  # LAVIS looks for the defaults of a type, and fails where there are none
        known = own.arch not in MODEL_BLOCKS or own.get("model_type") in model_types(own.arch)
        cfg = found(_config, name, checked) if known else None
        if cfg is not None and not of_yaml.messages + found.messages:
            found(_check_rows, cfg)
    return of_yaml.messages + [message for message in found.messages if message not in of_yaml.messages]


def run_job(name: str, options: list[str], make_page: Callable[[Path], Path] | None = None) -> Any:
    """Check, then build task, data, model and runner, and run. Returns the runner.

    ``make_page`` writes a page about a finished run's folder, for trackers that keep files.

    Raises:
        UserError: a mistake, or ranks that differ. RankLost: another rank died or hangs.
    """
    _, cfg = prepare(name, options, joins=True, runs=True)
    import numpy as np
    from lavis.common.registry import registry

    from lavis_mafa.distributed import init_process_group, rank, rank_timeout_minutes
    from lavis_mafa.runners.agreement import check_ranks_agree
    from lavis_mafa.runners.watchdog import mark, rank_watch

    init_process_group(cfg.run_cfg)
    seed = (int(cfg.run_cfg.get("seed", 42)) + rank()) % 2**32
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    # LAVIS logs to the root, at every access of some properties; our runner says what matters for its tasks too
    logging.getLogger("lavis_mafa").setLevel(logging.INFO if rank() == 0 else logging.WARNING)
    try:
        with rank_watch(rank_timeout_minutes(cfg.run_cfg), url=cfg.run_cfg.get("dist_url", "env://")):
            check_ranks_agree(cfg)  # the runner does so again, with data and model
            task = _task(cfg)
            mark("reading the data sets")
            datasets = _datasets(task, cfg)
            mark("building the model")
            model = build_model(task, cfg) if cfg.checked.model is None else task.build_model(cfg)
            runner_class = registry.get_runner_class(cfg.run_cfg.get("runner", "runner_mafa"))
            job_id = datetime.datetime.now().strftime("%Y%m%d%H%M%S")
            runner = runner_class(cfg=cfg, job_id=job_id, task=task, model=model, datasets=datasets)
            runner.make_page = make_page
            runner.train()
    finally:
        # a group that has lost a rank may wait for it forever
        if torch.distributed.is_initialized() and not isinstance(sys.exc_info()[1], RankLost):
            torch.distributed.destroy_process_group()
    return runner


def _check_device(checked: Checked) -> None:
    """``run.device: cuda`` falls back to the CPU where there is none, and half-precision weights would not run there.

    And what ``run.compile`` needs on the one that is taken.
    """
    on_gpu = torch.cuda.is_available()
    if checked.model is not None and not on_gpu:
        check_device(checked.model, "cpu", "fp32" if checked.run is None else checked.run.precision)
    if checked.run is not None and checked.run.compile:
        from lavis_mafa.runners.compiled import check_compiler  # here: torch's compiler takes seconds to import

        check_compiler(on_gpu and checked.run.device.startswith("cuda"))


def _check_rows(cfg: Any) -> None:
    """Read the data as training does: rows that it refuses, and too few of them; raises UserError. Nothing is downloaded."""
    from lavis.common.utils import get_cache_path

    for name, data in cfg.datasets_cfg.items():
        storages = [info.get("storage") for info in (at(data, "build_info.annotations") or {}).values() if info]
        files = [file for storage in storages for file in ([storage] if isinstance(storage, str) else storage or [])]
        if name not in SPLITS and not all(Path(get_cache_path(file)).is_file() for file in files):
            return
    from lavis.datasets.data_utils import concat_datasets, reorg_datasets_by_split

    from lavis_mafa.runners.loading import train_loader
    from lavis_mafa.runners.run_block import run_settings

    task, run = _task(cfg), cfg.run_cfg
    datasets = concat_datasets(reorg_datasets_by_split(_datasets(task, cfg)))
    if run.get("runner", "runner_mafa") == "runner_mafa" and not run.get("evaluate", False) and "train" in datasets:
        settings = run_settings(cfg.checked.run or run, cfg.checked.run is not None)
        grit = None if cfg.checked.run is None else settings.grit
        train_loader(datasets["train"], settings.batch_size_train, grit, settings, pin=False)


def _task(cfg: Any) -> Any:
    """The task; LAVIS's own look for their settings without a default. Raises UserError."""
    import lavis.tasks as tasks

    try:
        return tasks.setup_task(cfg)
    except ConfigAttributeError as error:
        raise UserError(f"{error.full_key} is missing, but {cfg.run_cfg.task} needs it.") from error


def _datasets(task: Any, cfg: Any) -> dict[str, Any]:
    """The task's data, every row looked at: by our tasks themselves, for LAVIS's own here."""
    from lavis_mafa.datasets.lavis_rows import read_checked

    return task.build_datasets(cfg) if cfg.run_cfg.task in RUN_BLOCKS else read_checked(task.build_datasets, cfg)


# --- LAVIS's configuration ---------------------------------------------------------------------------------------------


def _config(name: str, checked: Checked, data: bool = True) -> Any:
    """LAVIS's ``Config`` of what was checked, with its data sets' defaults; the typed blocks are its ``checked``.

    Raises:
        UserError: a name that nobody registered, or ``data`` that are not there.
    """
    registry = _lavis_registry()
    from lavis.common.config import Config

    _check_names(checked.config, registry)
    _check_lavis_blocks(checked.config.datasets, registry)
    registry.mapping["paths"]["cache_root"] = os.environ.get("LAVIS_CACHE", str(Path.cwd() / ".lavis_cache"))

    class CheckedConfig(Config):
        """The file is not read again: overrides and expanded paths are in what was checked."""

        def __init__(self) -> None:
            registry.register("configuration", self)
            self.args, self.checked = argparse.Namespace(cfg_path=str(find_yaml(name)), options=None), checked
            model, datasets = self.build_model_config(checked.config), self.build_dataset_config(checked.config)
            self.config = OmegaConf.merge({"run": checked.config.run}, model, datasets)

    cfg = CheckedConfig()
    found = Mistakes()
    if data:
        found(_check_lavis_files, cfg.datasets_cfg)
    for key in [f"{dataset}.{which}" for dataset in cfg.datasets_cfg for which in PROCESSORS]:
        # a processor's name may come from the data set's defaults; LAVIS looks for one without a name all the same
        if isinstance(processor := at(cfg.datasets_cfg, key), DictConfig) and not isinstance(processor.get("name"), str):
            found(check_processor, f"datasets.{key}", plain(processor))
    of_files = Mistakes(f" ({find_yaml(name)})")
    of_files(check_splits, plain(cfg.config), _splits(cfg.datasets_cfg))
    found.messages += of_files.messages
    found.end()
    return cfg


def _lavis_registry() -> Any:
    """LAVIS's, once it knows our names and its own."""
    _quiet_imports()
    from lavis.common.registry import registry

    from lavis_mafa.plugin import register

    register()
    return registry


def _quiet_imports() -> None:
    """LAVIS's and fairscale's deprecation warnings on import are not the user's business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lavis.common.optims
        import lavis.runners
        import lavis.tasks  # noqa: F401 - each registers what it has


def _all_ours(checked: Checked) -> bool:
    """Nothing that only LAVIS knows: its names, or the defaults of its data sets."""
    config = checked.config
    processors = [at(config, f"datasets.{name}.{which}.name") for name in config.datasets for which in PROCESSORS]
    return (
        config.model.arch in MODEL_BLOCKS
        and config.run.task in RUN_BLOCKS
        and config.run.get("runner", "runner_mafa") == "runner_mafa"
        and config.run.get("lr_sched", OURS) == OURS
        and all(name in SPLITS or not isinstance(name, str) for name in config.datasets)
        and all(not isinstance(name, str) or name in SETTINGS for name in processors)
    )


def _check_names(config: DictConfig, registry: Any) -> bool:
    """Registered names, checked before LAVIS answers an unknown one with ``NoneType``; raises UserError, else it is True."""
    wanted = [
        ("model.arch", config.model.get("arch"), registry.list_models()),
        ("run.task", config.run.get("task"), registry.list_tasks()),
        ("run.runner", config.run.get("runner", "runner_mafa"), registry.list_runners()),
        ("run.lr_sched", config.run.get("lr_sched", OURS), registry.list_lr_schedulers()),
        *((f"datasets.{name}", name, registry.list_datasets()) for name in config.datasets),
    ]
    processors = sorted(registry.mapping["processor_name_mapping"])
    for dataset in config.datasets:
        for which in PROCESSORS:
            key = f"datasets.{dataset}.{which}.name"
            if (processor := at(config, key)) is not None:
                wanted.append((key, processor, processors))
    found = Mistakes()
    for key, value, known in wanted:
        if value not in known:
            found.add(f"{key} is {value!r}, which is not registered.{did_you_mean(str(value), known)} Known: {', '.join(known)}.")
    found.end()
    arch, kind = config.model.arch, config.model.get("model_type")
    types = getattr(registry.get_model_class(arch), "PRETRAINED_MODEL_CONFIG_DICT", {})
    if arch not in MODEL_BLOCKS and kind not in types:  # of ours it is said already
        raise UserError(f"model.model_type is {kind}, but {arch} has: {', '.join(types)}.{did_you_mean(str(kind), types)}")
    return True


def _check_lavis_blocks(datasets: DictConfig, registry: Any) -> None:
    """A misspelt key below LAVIS's own data sets would change nothing; their defaults tell which there are."""
    found = Mistakes()
    for name in (name for name in map(str, datasets) if name not in SPLITS):
        builder, info = registry.get_builder_class(name), datasets[name].get("build_info")
        if not builder.__module__.startswith("lavis."):
            continue
        kind, known = datasets[name].get("type", "default"), getattr(builder, "DATASET_CONFIG_DICT", {})
        if kind not in known:
            found.add(f"datasets.{name}.type is {kind!r}; allowed: {', '.join(known)}.{did_you_mean(str(kind), known)}")
            continue
        if isinstance(info, DictConfig):
            defaults = OmegaConf.load(builder.default_config_path(kind)).datasets
            found(check_lavis_info, name, info, next(iter(defaults.values())).build_info)
    found.end()


def _splits(datasets: DictConfig) -> dict[str, tuple[str, ...]]:
    """What each data set will have; LAVIS's builders go by the annotations that are named, and a few by something else."""
    splits = {}
    for name, data in ((str(name), data) for name, data in datasets.items()):
        if name in SPLITS:
            splits[name] = own_splits(name, data)
        elif annotations := at(data, "build_info.annotations"):
            splits[name] = tuple(map(str, annotations))
    return splits


def _check_lavis_files(datasets: DictConfig) -> None:
    """LAVIS's builders answer an annotation file that is neither there nor anywhere to download with a traceback, and train on
    an image folder that is not there."""
    from lavis.common.utils import get_cache_path

    found = Mistakes()
    for name in (name for name in map(str, datasets) if name not in SPLITS):
        info = datasets[name].get("build_info") or {}
        for split, files_of in (info.get("annotations") or {}).items():
            urls, files = ([v] if isinstance(v, str) else list(v or []) for v in (files_of.get("url"), files_of.get("storage")))
            if len(urls) != len(files):
                found.add(
                    f"datasets.{name}.build_info.annotations.{split} has {len(urls)} url and {len(files)} storage; allowed: as many of "
                    "both, where url may be the local file."
                )
            for url, file in zip(urls, files, strict=False):
                if "://" not in url and not Path(url).is_file() and not Path(get_cache_path(file)).is_file():
                    key = f"datasets.{name}.build_info.annotations.{split}.storage"
                    found.add(f"{key} is {file!r}, but there is no file {get_cache_path(file)}, and {url!r} is no address.")
        folder = at(info, "images.storage")
        if isinstance(folder, str) and not Path(get_cache_path(folder)).is_dir():
            key = f"datasets.{name}.build_info.images.storage"
            found.add(f"{key} is {folder!r}, but there is no folder {get_cache_path(folder)}.")
    found.end()
