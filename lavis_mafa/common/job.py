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
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lavis_mafa.common.check import check_combinations, typed_block
from lavis_mafa.common.errors import UserError, did_you_mean
from lavis_mafa.common.projects import find_yaml

OUR_MODELS = {"albef_mafa": ("base", "tiny")}
MODEL_DEFAULTS = Path(__file__).resolve().parents[1] / "configs" / "models"


def check_yaml(name: str, options: list[str]) -> DictConfig:
    """Read a YAML with overrides and check all that can be checked without LAVIS, data or weights.

    Returns:
        the merged configuration (model type's defaults, then the file, then the overrides).

    Raises:
        UserError: the first mistake found.
    """
    path = find_yaml(name)
    try:
        config = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UserError(f"{path} is not readable as YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(config, DictConfig):
        raise UserError(f"{path} must have the blocks model, datasets and run at its top level.")
    for option in options:
        if "=" not in option:
            raise UserError(f"--options takes KEY=VALUE, not {option!r}.")
    config = OmegaConf.merge(config, OmegaConf.from_dotlist(list(options)))
    assert isinstance(config, DictConfig)
    for block in ("model", "datasets", "run"):
        if not isinstance(config.get(block), DictConfig):
            raise UserError(f"{block} is missing; a YAML has the blocks model, datasets and run. ({path})")
    for key in config:
        if key not in ("model", "datasets", "run", "preprocess"):
            hint = did_you_mean(str(key), ("model", "datasets", "run"))
            raise UserError(f"{key} is not a block.{hint} Allowed: model, datasets, run. ({path})")
    arch = config.model.get("arch")
    model = None
    if arch in OUR_MODELS:
        kind = config.model.get("model_type")
        if kind not in OUR_MODELS[arch]:
            raise UserError(f"model.model_type is {kind!r}, but {arch} has: {', '.join(OUR_MODELS[arch])}. ({path})")
        config = OmegaConf.merge(OmegaConf.load(MODEL_DEFAULTS / f"{arch}_{kind}.yaml"), config)
        assert isinstance(config, DictConfig)
        model = typed_block("model", config.model, str(path))
    run = typed_block("run", config.run, str(path)) if config.run.get("task") == "mafa_pretrain" else None
    check_combinations(model, run, str(path))
    _check_files(config, str(path))
    return config


def run_job(name: str, options: list[str]) -> Any:
    """Check, then build task, data, model and runner, and run. Returns the runner."""
    checked = check_yaml(name, options)
    import numpy as np
    import torch

    with _quiet_imports():
        import lavis.common.optims  # noqa: F401 - registers LAVIS's schedulers
        import lavis.runners  # noqa: F401
        import lavis.tasks as tasks
        from lavis.common.registry import registry

    from lavis_mafa.common.distributed import init_process_group, rank
    from lavis_mafa.plugin import register

    register()
    _known_names(checked, registry)
    registry.mapping["paths"]["cache_root"] = os.environ.get("LAVIS_CACHE", str(Path.cwd() / ".lavis_cache"))
    cfg = _lavis_config(find_yaml(name), options, checked)
    init_process_group(cfg.run_cfg)
    seed = int(cfg.run_cfg.get("seed", 42)) + rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    level = logging.INFO if rank() == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    try:
        task = tasks.setup_task(cfg)
        datasets = task.build_datasets(cfg)
        model = task.build_model(cfg)
        runner_class = registry.get_runner_class(cfg.run_cfg.get("runner", "runner_mafa"))
        job_id = datetime.datetime.now().strftime("%Y%m%d%H%M%S")
        runner = runner_class(cfg=cfg, job_id=job_id, task=task, model=model, datasets=datasets)
        runner.train()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return runner


def _lavis_config(path: Path, options: list[str], checked: DictConfig) -> Any:
    from lavis.common.config import Config

    class CheckedConfig(Config):
        """LAVIS's configuration, except that ``--options model.model_type=`` picks that type's defaults too."""

        @staticmethod
        def build_model_config(config: Any, **_: Any) -> Any:
            return Config.build_model_config(OmegaConf.create({**config, "model": checked.model}))

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
    for key, value, known in wanted:
        if value not in known:
            raise UserError(f"{key} is {value!r}, which is not registered.{did_you_mean(str(value), known)} Known: {', '.join(known)}.")


def _check_files(config: DictConfig, where: str) -> None:
    for key in ("model.pretrained", "model.discriminator.checkpoint", "run.resume_ckpt_path"):
        value = OmegaConf.select(config, key)
        if isinstance(value, str) and "://" not in value and not Path(value).is_file():
            raise UserError(f"{key} is {value!r}, but there is no such file. ({where})")


@contextlib.contextmanager
def _quiet_imports() -> Iterator[None]:
    """LAVIS's and fairscale's deprecation warnings on import are not the user's business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
