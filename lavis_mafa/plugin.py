"""Everything we register with LAVIS, and the hook that does it. At import this needs the standard library alone.

``install_hook`` is called by torch at the end of ``import torch`` (entry-point group ``torch.backends``, by way of
``lavis_mafa_autoload``), in every program of the environment. It must therefore be tiny, never raise, and do nothing until LAVIS is
imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.metadata
import importlib.util
import logging
import os
import re
import sys
from typing import Any

REGISTRY = "lavis.common.registry"
# what the last line of LAVIS's __init__ registers, in 1.0.2 as in later versions, whatever order they import their parts in
LAST_OF_LAVIS = "SPLIT_NAMES"
FIRST_UNTESTED = (4, 58)  # of transformers: setup.py has it too


def install_hook() -> None:
    """Register with LAVIS as soon as it has been imported; ``LAVIS_MAFA_AUTOLOAD=0`` switches this off."""
    if os.environ.get("LAVIS_MAFA_AUTOLOAD", "1") == "0" or any(isinstance(f, _AfterLavis) for f in sys.meta_path):
        return
    if REGISTRY not in sys.modules:
        sys.meta_path.insert(0, _AfterLavis())
    elif LAST_OF_LAVIS not in sys.modules[REGISTRY].Registry.mapping["state"]:  # LAVIS is importing torch
        _fit_transformers()
        _register_at_the_end(sys.modules[REGISTRY].Registry)
    # else LAVIS came first: whoever imports lavis_mafa registers by hand


def register() -> None:
    """Put our models, tasks, runner, builders, processors and scheduler into LAVIS's registry; again is harmless."""
    import lavis.common.dist_utils as dist_utils
    from lavis.common.registry import registry

    import lavis_mafa.datasets.builders  # these two register their own: they may be half imported now
    import lavis_mafa.processors  # noqa: F401
    from lavis_mafa.distributed import init_process_group
    from lavis_mafa.models.albef import AlbefMafa
    from lavis_mafa.models.albef_nlvr import AlbefNlvrMafa
    from lavis_mafa.models.albef_ta import AlbefTaMafa
    from lavis_mafa.models.albef_ve import AlbefVeMafa
    from lavis_mafa.models.albef_vqa import AlbefVqaMafa
    from lavis_mafa.models.blip import BlipMafa
    from lavis_mafa.models.blip2 import Blip2Mafa
    from lavis_mafa.models.blip2_opt import Blip2OptMafa
    from lavis_mafa.runners.runner_mafa import RunnerMafa
    from lavis_mafa.runners.schedule import WarmupCosinePerStep
    from lavis_mafa.tasks.captioning import MafaCaptioningTask
    from lavis_mafa.tasks.classification import MafaClassificationTask
    from lavis_mafa.tasks.grounding import MafaGroundingTask
    from lavis_mafa.tasks.pretrain import MafaPretrainTask
    from lavis_mafa.tasks.vqa import MafaGqaTask, MafaVqaTask

    kinds: dict[str, dict[str, Any]] = {
        "model_name_mapping": {
            "albef_mafa": AlbefMafa,
            "blip_mafa": BlipMafa,
            "blip2_mafa": Blip2Mafa,
            "blip2_opt_mafa": Blip2OptMafa,
            "albef_ve_mafa": AlbefVeMafa,
            "albef_nlvr_mafa": AlbefNlvrMafa,
            "albef_ta_mafa": AlbefTaMafa,
            "albef_vqa_mafa": AlbefVqaMafa,
        },
        "task_name_mapping": {
            "mafa_pretrain": MafaPretrainTask,
            "mafa_classification": MafaClassificationTask,
            "mafa_grounding": MafaGroundingTask,
            "mafa_captioning": MafaCaptioningTask,
            "mafa_vqa": MafaVqaTask,
            "mafa_gqa": MafaGqaTask,
        },
        "runner_name_mapping": {"runner_mafa": RunnerMafa},
        "lr_scheduler_name_mapping": {"warmup_cosine_per_step": WarmupCosinePerStep},
    }
    for kind, entries in kinds.items():
        registry.mapping[kind].update(entries)
    if not hasattr(dist_utils.init_distributed_mode, "of_lavis"):
        dist_utils.init_distributed_mode = _device_aware(dist_utils.init_distributed_mode, init_process_group)


def _device_aware(of_lavis: Any, ours: Any) -> Any:
    """LAVIS starts nccl whatever the device; leave it alone on a GPU and start gloo elsewhere."""

    def init_distributed_mode(args: Any) -> None:
        import torch

        on_gpu = str(args.get("device", "cuda")).startswith("cuda") and torch.cuda.is_available()
        (of_lavis if on_gpu else ours)(args)

    init_distributed_mode.of_lavis = of_lavis  # type: ignore[attr-defined]
    return init_distributed_mode


def _register_at_the_end(registry: Any) -> None:
    """Let LAVIS's last line register us too; then ``registry.register`` is again what it was.

    Our own modules are no obstacle: packages whose modules need LAVIS import it before anything else, or register their own.
    """
    of_lavis = vars(registry)["register"]

    def register_and_us(name: str, obj: Any) -> None:
        of_lavis.__get__(None, registry)(name, obj)
        if name != LAST_OF_LAVIS:
            return
        registry.register = of_lavis
        try:
            register()
        except ImportError as error:  # an incomplete install must not break programs that only use LAVIS
            logging.getLogger("lavis_mafa").warning("lavis_mafa could not register with LAVIS: %s", error)

    registry.register = staticmethod(register_and_us)


def beyond_tested() -> str | None:
    """What to say where transformers is newer than those that LAVIS and our models were tested with; None where it is not."""
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return None
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or tuple(map(int, found.groups())) < FIRST_UNTESTED:
        return None
    newest = f"{FIRST_UNTESTED[0]}.{FIRST_UNTESTED[1] - 1}"
    return f"transformers is {version}, but LAVIS and lavis-mafa run with 4.25 to {newest}; docs/install.md says how to install one."


def _fit_transformers() -> None:
    """Warn of a release that is too new, and put back three functions where LAVIS 1.0.2 imports them from."""
    if (message := beyond_tested()) is not None:
        logging.getLogger("lavis_mafa").warning(message)
    try:
        from transformers import modeling_utils, pytorch_utils
    except ImportError:  # LAVIS will say so
        return
    for name in ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer"):
        if not hasattr(modeling_utils, name) and hasattr(pytorch_utils, name):
            setattr(modeling_utils, name, getattr(pytorch_utils, name))


class _AfterLavis(importlib.abc.MetaPathFinder):
    """Finds LAVIS's registry as usual, and sees to it that LAVIS's last line registers us."""

    searching = False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != REGISTRY or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(importlib.abc.Loader):
    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        _fit_transformers()
        self.loader.exec_module(module)
        _register_at_the_end(module.Registry)
