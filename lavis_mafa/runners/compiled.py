"""``run.compile``: the parts of a model whose shapes stay the same, compiled in place.

These are the blocks of every ViT: one graph serves all of them, in training and in evaluation. Texts have other lengths in each batch:
their layers are compiled again and again, and are no faster for it.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils._triton import has_triton_package

from lavis_mafa.errors import UserError
from lavis_mafa.models.vit import Block

logger = logging.getLogger(__name__)


def compile_parts(model: nn.Module) -> int:
    """Compile the ViT blocks of a model on its device, of its momentum teacher and of its Con-D: returns how many there are.

    Names of parameters, state dicts, copies and whatever wraps the model later stay as they are; the compiling itself is done when a
    block first runs.

    Raises:
        UserError: nothing can be compiled here.
    """
    _try(next(model.parameters()).device)
    con_d: Any = getattr(getattr(model, "discriminator", None), "network", None)
    modules = [*model.modules(), *(() if con_d is None else con_d.modules())]
    blocks = [module for module in modules if isinstance(module, Block)]
    for block in blocks:
        block.compile()
    logger.info("run.compile: %d ViT blocks are compiled when they first run, which takes up to minutes", len(blocks))
    return len(blocks)


def check_compiler(on_gpu: bool) -> None:
    """What compiling needs is on this machine, as far as that can be said without touching a GPU; raises UserError."""
    if on_gpu and not has_triton_package():
        raise UserError("run.compile is true, but there is no triton, which compiles for GPUs; install it, or set run.compile: false.")
    if not on_gpu:
        _try(torch.device("cpu"))


def _try(device: torch.device) -> None:
    """Compile something small: whether a compiler is there and works is hard to say otherwise."""
    try:
        torch.compile(_twice)(torch.ones(2, device=device))
    except BackendCompilerFailed as error:
        reason = next(iter(str(error.inner_exception).strip().splitlines()), type(error.inner_exception).__name__).rstrip(".")
        needed = "a C++ compiler that works (g++, or what CXX names)" if device.type == "cpu" else "triton and a C compiler that work"
        raise UserError(
            f"run.compile is true, but torch cannot compile here ({reason}); needed: {needed}, or run.compile: false."
        ) from error


def _twice(values: Tensor) -> Tensor:
    return 2 * values
