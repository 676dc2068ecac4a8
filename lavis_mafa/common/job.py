"""From a YAML to a running job: check first, then do what LAVIS's train.py does."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lavis_mafa.common.check import check_device
from lavis_mafa.common.errors import RankLost, UserError, did_you_mean
from lavis_mafa.common.projects import find_yaml
from lavis_mafa.common.typed import MODEL_BLOCKS, RUN_BLOCKS, typed_block
from lavis_mafa.common.yaml_file import check_processor_name
from lavis_mafa.common.yaml_file import check_yaml as check_yaml


def prepare(name: str, options: list[str], files: bool = True, device: bool = True) -> tuple[DictConfig, Any]:
    """Check, import LAVIS and register with it: the checked configuration, and LAVIS's ``Config`` that tasks build from.

    Args:
        name, options, files: as for :func:`check_yaml`.
        device: False where no model will be built, so that it does not matter what this machine can compute.

    Raises:
        UserError: the first mistake found.
    """
    checked = check_yaml(name, options, files)
    import torch

    if device and checked.model.arch in MODEL_BLOCKS:
        _check_device(checked, torch.cuda.is_available())

    with _quiet_imports():
        import lavis.common.optims  # noqa: F401 - registers LAVIS's schedulers
        import lavis.runners
        import lavis.tasks  # noqa: F401
        from lavis.common.registry import registry

    from lavis_mafa.plugin import register

    register()
    _known_names(checked, registry)
    registry.mapping["paths"]["cache_root"] = os.environ.get("LAVIS_CACHE", str(Path.cwd() / ".lavis_cache"))
    _check_lavis_blocks(checked.datasets, registry)
    cfg = _lavis_config(find_yaml(name), options, checked)
    _check_annotations(cfg.datasets_cfg)
    _check_processor_names(cfg.datasets_cfg)
    return checked, cfg


def run_job(name: str, options: list[str]) -> Any:
    """Check, then build task, data, model and runner, and run. Returns the runner.

    Raises:
        UserError: a mistake, or ranks that differ.
        RankLost: another rank died or hangs.
    """
    checked, cfg = prepare(name, options)
    import lavis.tasks as tasks
    import numpy as np
    import torch
    from lavis.common.registry import registry

    from lavis_mafa.common.agreement import check_ranks_agree
    from lavis_mafa.common.checkpoint_kinds import report_keys
    from lavis_mafa.common.distributed import init_process_group, rank, rank_timeout_minutes
    from lavis_mafa.common.rank_watch import mark, rank_watch
    from lavis_mafa.datasets.lavis_rows import check_rows, explained

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
            task = tasks.setup_task(cfg)
            mark("reading the data sets")
            with explained(cfg.datasets_cfg):
                datasets = task.build_datasets(cfg)
            check_rows(datasets)
            mark("building the model")
            model = task.build_model(cfg)
            if checked.model.arch not in MODEL_BLOCKS:
                report_keys(model, cfg.model_cfg)
            runner_class = registry.get_runner_class(cfg.run_cfg.get("runner", "runner_mafa"))
            job_id = datetime.datetime.now().strftime("%Y%m%d%H%M%S")
            runner = runner_class(cfg=cfg, job_id=job_id, task=task, model=model, datasets=datasets)
            runner.train()
    finally:
        # a group that has lost a rank may wait for it forever
        if torch.distributed.is_initialized() and not isinstance(sys.exc_info()[1], RankLost):
            torch.distributed.destroy_process_group()
    return runner


def _check_device(config: DictConfig, gpu: bool) -> None:
    """``run.device: cuda`` falls back to the CPU where there is none, and half-precision weights would not run there."""
    if not gpu:
        precision = str(config.run.get("precision", "fp32")) if config.run.get("task") in RUN_BLOCKS else "fp32"
        check_device(typed_block("model", config.model), "cpu", precision)


def _lavis_config(path: Path, options: list[str], checked: DictConfig) -> Any:
    from lavis.common.config import Config

    class CheckedConfig(Config):
        """LAVIS's configuration, except that what ``--options`` names (a model type, a data set) gets its defaults too."""

        @staticmethod
        def build_model_config(config: Any, **_: Any) -> Any:
            return Config.build_model_config(OmegaConf.create({**config, "model": checked.model}))

        @staticmethod
        def build_dataset_config(config: Any) -> Any:
            return Config.build_dataset_config(OmegaConf.create({**config, "datasets": checked.datasets}))

    return CheckedConfig(argparse.Namespace(cfg_path=str(path), options=list(options)))


def _known_names(config: DictConfig, registry: Any) -> None:
    """Registered names, checked before LAVIS answers an unknown one with ``NoneType``."""
    wanted = [
        ("model.arch", config.model.get("arch"), registry.list_models()),
        ("run.task", config.run.get("task"), registry.list_tasks()),
        ("run.runner", config.run.get("runner", "runner_mafa"), registry.list_runners()),
        ("run.lr_sched", config.run.get("lr_sched", "warmup_cosine_per_step"), registry.list_lr_schedulers()),
        *((f"datasets.{name}", name, registry.list_datasets()) for name in config.datasets),
    ]
    processors = sorted(registry.mapping["processor_name_mapping"])
    for dataset in config.datasets:
        for which in ("vis_processor.train", "vis_processor.eval", "text_processor.train", "text_processor.eval"):
            key = f"datasets.{dataset}.{which}.name"
            if (processor := OmegaConf.select(config, key)) is not None:
                wanted.append((key, processor, processors))
    for key, value, known in wanted:
        if value not in known:
            raise UserError(f"{key} is {value!r}, which is not registered.{did_you_mean(str(value), known)} Known: {', '.join(known)}.")


def _check_lavis_blocks(datasets: DictConfig, registry: Any) -> None:
    """A misspelt key below LAVIS's own data sets would change nothing; their defaults tell which there are."""
    from lavis_mafa.datasets.build_info import SPLITS, check_lavis_info

    for name in map(str, datasets):
        builder = registry.get_builder_class(name)
        kind, known = datasets[name].get("type", "default"), getattr(builder, "DATASET_CONFIG_DICT", {})
        if (
            name in SPLITS
            or not builder.__module__.startswith("lavis.")
            or not isinstance(datasets[name].get("build_info"), DictConfig)
        ):
            continue
        if kind not in known:
            raise UserError(f"datasets.{name}.type is {kind!r}; allowed: {', '.join(known)}.{did_you_mean(str(kind), known)}")
        defaults = OmegaConf.load(builder.default_config_path(kind)).datasets
        check_lavis_info(name, datasets[name].build_info, next(iter(defaults.values())).build_info)


def _check_annotations(datasets: DictConfig) -> None:
    """LAVIS's builders answer an annotation file that is neither there nor anywhere to download with a traceback."""
    from lavis.common.utils import get_cache_path

    from lavis_mafa.datasets.build_info import SPLITS

    for name in (name for name in map(str, datasets) if name not in SPLITS):
        for split, info in (OmegaConf.select(datasets[name], "build_info.annotations") or {}).items():
            urls, files = ([v] if isinstance(v, str) else list(v or []) for v in (info.get("url"), info.get("storage")))
            if len(urls) != len(files):
                key = f"datasets.{name}.build_info.annotations.{split}"
                raise UserError(
                    f"{key} has {len(urls)} url and {len(files)} storage; allowed: as many of both, where url may be the local file."
                )
            for url, file in zip(urls, files, strict=True):
                if "://" not in url and not Path(url).is_file() and not Path(get_cache_path(file)).is_file():
                    key = f"datasets.{name}.build_info.annotations.{split}.storage"
                    raise UserError(f"{key} is {file!r}, but there is no file {get_cache_path(file)}, and {url!r} is no address.")


def _check_processor_names(datasets: DictConfig) -> None:
    """A processor's name may come from the data set's defaults; LAVIS looks for one without a name all the same."""
    for dataset in map(str, datasets):
        for part in ("vis_processor", "text_processor"):
            for split in ("train", "eval"):
                processor = OmegaConf.select(datasets, f"{dataset}.{part}.{split}")
                if isinstance(processor, DictConfig):
                    check_processor_name(f"datasets.{dataset}.{part}.{split}", processor)


@contextlib.contextmanager
def _quiet_imports() -> Iterator[None]:
    """LAVIS's and fairscale's deprecation warnings on import are not the user's business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
