"""What a whole training step costs: ours with GRIT and with MAFA, and LAVIS's ``albef_pretrain``, turn by turn on equal batches.

    python -W ignore benchmarks/step.py --size small|large|paper [--device cpu|cuda] [--rounds 9] [--precision fp32|bf16] [--compile]
                                        [--json FILE] [--without-lavis]

Measured: forward, backward, gradient norm and AdamW (fused; LAVIS's row as its runner has it) on random images and captions; CPU time
of one thread, or elapsed time on a GPU, the median of the rounds. Con-D is a model of the same size, untrained, so its answers are
replaced: it finds nothing, or calls every hard negative positive. Loading is not in it. ``saved`` is what forward leaves for backward.
ViLTA's row is GRIT's with cross-distillation and synthetic texts, by a teacher of the text encoder's size; SoftMask's is GRIT's with
softly masked images.

``--without-lavis`` imports neither LAVIS nor transformers, so that it runs wherever torch does; then there is no row of LAVIS.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import json
import platform
import random
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

ABSENT = ("lavis", "transformers", "timm", "fairscale", "omegaconf", "iopath", "yaml", "webdataset")
SMALL = {"image": 48, "patch": 6, "width": 192, "depth": 6, "heads": 3, "layers": 6, "fusion": 3, "words": 2000, "dim": 64}
LARGE = {"image": 224, "patch": 16, "width": 384, "depth": 6, "heads": 6, "layers": 6, "fusion": 3, "words": 2000, "dim": 256}
PAPER = {"image": 256, "patch": 16, "width": 768, "depth": 12, "heads": 12, "layers": 12, "fusion": 6, "words": 30522, "dim": 256}
TRY = {"image": 16, "patch": 8, "width": 32, "depth": 2, "heads": 2, "layers": 3, "fusion": 1, "words": 200, "dim": 16}
SIZES: dict[str, dict[str, Any]] = {
    "small": SMALL | {"batch": 96, "text": 16, "full": True},
    "large": LARGE | {"batch": 32, "text": 25, "full": False},
    "paper": PAPER | {"batch": 96, "text": 25, "full": False},
    "try": TRY | {"batch": 4, "text": 8, "full": False},
}
QUEUE = 16  # batches that LAVIS's queue holds: small, so that its row is not slow for that
SPECIAL = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "mask_token_id": 3}
DROPPED = 0.5


# --- without LAVIS -----------------------------------------------------------------------------------------------------


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules of what is not installed, in which every name is an empty class: our layers and losses call nothing of them."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in ABSENT else None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: self.named(spec.name, name)  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass

    @staticmethod
    def named(module: str, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "BaseModel":
            return type(name, (nn.Module,), {"device": property(lambda model: next(model.parameters()).device)})
        return type(name, (), {"__class_getitem__": lambda _: Any})


# --- what is measured --------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer of captions that are numbers."""

    def __init__(self, words: int) -> None:
        self.words = self.vocab_size = words
        self.__dict__.update(SPECIAL)

    def __len__(self) -> int:
        return self.words

    def convert_ids_to_tokens(self, ids: range) -> list[str]:
        return [str(number) if number > max(SPECIAL.values()) else f"[{number}]" for number in ids]

    def __call__(self, captions: list[str], max_length: int, **_: Any) -> Any:
        ids = [[SPECIAL["cls_token_id"], *map(int, caption.split()), SPECIAL["sep_token_id"]][:max_length] for caption in captions]
        width = max(map(len, ids))
        text = types.SimpleNamespace(
            input_ids=torch.tensor([row + [0] * (width - len(row)) for row in ids]),
            attention_mask=torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids]),
        )

        def to(device: Any) -> Any:
            text.input_ids, text.attention_mask = text.input_ids.to(device), text.attention_mask.to(device)
            return text

        text.to = to
        return text


class Judge:
    """Asks Con-D, and answers for it."""

    def __init__(self, con_d: Any, answer: float) -> None:
        self.con_d, self.answer, self.network = con_d, answer, con_d.network

    def match_probability(self, samples: dict[str, Any], image_index: Tensor, text_index: Tensor) -> Tensor:
        return self.con_d.match_probability(samples, image_index, text_index).detach() * 0 + self.answer


def ours(size: dict[str, Any], device: torch.device, con_d: str | None, dropped: float = 0.0, method: str = "") -> nn.Module:
    """``con_d``: None for GRIT, nothing, all, or half: as nothing, by a Con-D at half the image side. ``method``: vilta or softmask."""
    from lavis_mafa.config.schema import AlbefBlock, ImageEncoder, SoftMask, Synthetic, TextEncoder
    from lavis_mafa.models.albef import AlbefMafa
    from lavis_mafa.models.con_d import as_con_d
    from lavis_mafa.models.language_teacher import untrained_teacher

    class Model(AlbefMafa):
        def build_tokenizer(self, name: str) -> Any:
            return Words(size["words"])

    vit = {"init": None, "patch_size": size["patch"], "width": size["width"], "depth": size["depth"], "heads": size["heads"]}
    text = {"init": None, "width": size["width"], "layers": size["layers"], "fusion_layer": size["fusion"], "heads": size["heads"]}

    def model(side: int, ecm: bool, **of_vit: Any) -> Any:
        block = AlbefBlock(
            arch="albef_mafa",
            tokenizer="",
            max_text_length=size["text"],
            embed_dim=size["dim"],
            temperature=0.07,
            image_encoder=ImageEncoder(image_size=side, **vit, **of_vit),
            text_encoder=TextEncoder(**text),
        )
        block.ecm.enabled = ecm
        if method == "vilta":
            block.mlm.cross_distillation, block.itm.synthetic = 0.5, Synthetic()
        if method == "softmask":
            block.itm.soft_mask = SoftMask()
        return Model(block)

    trained = model(size["image"], con_d is not None, **({"drop_patches": dropped} if dropped else {})).to(device).train()
    if method == "vilta":
        trained.set_language_teacher(untrained_teacher(size["words"], size["width"], size["layers"], size["heads"]))
    if con_d is not None:
        judge = as_con_d(model(size["image"] // 2 if con_d == "half" else size["image"], False).to(device), "fp32")
        trained.set_discriminator(Judge(judge, 0.9 if con_d == "all" else 0.1))
        trained.con_d_check = None
    return trained


def of_lavis(size: dict[str, Any], device: torch.device) -> nn.Module:
    from functools import partial

    from lavis.common.utils import get_abs_path
    from lavis.models.albef_models.albef_pretrain import AlbefPretrain
    from lavis.models.med import BertForMaskedLM
    from lavis.models.vit import VisionTransformerEncoder
    from transformers import BertConfig

    class Model(AlbefPretrain):
        @classmethod
        def init_tokenizer(cls) -> Any:
            return Words(size["words"])

    vit = VisionTransformerEncoder(
        img_size=size["image"],
        patch_size=size["patch"],
        embed_dim=size["width"],
        depth=size["depth"],
        num_heads=size["heads"],
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    vit.vision_width = size["width"]
    config = BertConfig.from_json_file(get_abs_path("configs/models/med_config_albef.json"))
    config.update({"hidden_size": size["width"], "intermediate_size": 4 * size["width"], "num_hidden_layers": size["layers"]})
    config.update({"num_attention_heads": size["heads"], "fusion_layer": size["fusion"], "encoder_width": size["width"]})
    config.update({"vocab_size": size["words"]})
    return (
        Model(vit, BertForMaskedLM(config), QUEUE * size["batch"], embed_dim=size["dim"], max_txt_len=size["text"]).to(device).train()
    )


def batch_of(size: dict[str, Any], number: int, device: torch.device) -> dict[str, Any]:
    """Captions as long as the model reads, or as long as those of the web: 4 to 25 tokens, 12 on average."""
    rng, side = random.Random(number), size["image"]
    lengths = [
        size["text"] if size["full"] else min(max(round(rng.lognormvariate(2.4, 0.45)), 4), size["text"]) for _ in range(size["batch"])
    ]
    captions = [" ".join(str(rng.randrange(10, size["words"])) for _ in range(length - 2)) for length in lengths]
    index = torch.arange(size["batch"], device=device) + size["batch"] * number
    image = torch.randn(size["batch"], 3, side, side, generator=torch.Generator().manual_seed(number)).to(device)
    more = {"image_key": index, "grouped": True, "epoch": 1, "iters": 5, "num_iters_per_epoch": 10}
    return {"image": image, "text_input": captions, "index": index, **more}


class Row:
    """A model and its optimizer, and what its steps took."""

    def __init__(self, name: str, build: Callable[[], nn.Module], precision: str, compiled: bool) -> None:
        self.name, self.precision = name, precision
        torch.manual_seed(0)
        self.model = build()
        if compiled:
            compile_parts(self.model)
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(weights, lr=1e-5, weight_decay=0.02, fused=None if name.startswith("LAVIS") else True)
        self.seconds: list[float] = []
        self.saved = self.peak = 0

    def step(self, samples: dict[str, Any], device: torch.device, counted: bool) -> None:
        kept: dict[int, int] = {}
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begin = now(device)
        half = torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")
        if counted:
            with half:
                loss = self.model(samples).loss
        else:  # a step of the warm-up, in which nothing is timed
            with half, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = self.model(samples).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if counted:
            self.seconds.append(now(device) - begin)
        else:
            self.saved = sum(kept.values())
        if device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated()


def compile_parts(model: Any) -> None:
    from lavis_mafa.runners.compiled import compile_parts as compiled

    compiled(model)


def now(device: torch.device) -> float:
    """Seconds: elapsed on a GPU, whose work is waited for; CPU time elsewhere, which other programs do not disturb as much."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch-size", type=int, help="pairs a step; a size has its own")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--only", nargs="*", help="beginnings of the names of rows; default: all")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--without-lavis", action="store_true")
    arguments = parser.parse_args()
    if arguments.without_lavis:
        sys.meta_path.insert(0, StandIns())
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    size, device = dict(SIZES[arguments.size]), torch.device(arguments.device)
    size["batch"] = arguments.batch_size or size["batch"]

    builders: dict[str, Callable[[], nn.Module]] = {
        "GRIT": lambda: ours(size, device, None),
        "ViLTA": lambda: ours(size, device, None, method="vilta"),
        "SoftMask": lambda: ours(size, device, None, method="softmask"),
        "MAFA, nothing found": lambda: ours(size, device, "nothing"),
        "MAFA, all found": lambda: ours(size, device, "all"),
        "MAFA, Con-D of half the side": lambda: ours(size, device, "half"),
        "MAFA, half side, half the patches": lambda: ours(size, device, "half", DROPPED),
        "LAVIS albef_pretrain": lambda: of_lavis(size, device),
    }
    if arguments.without_lavis:
        del builders["LAVIS albef_pretrain"]
    if arguments.only:
        builders = {name: build for name, build in builders.items() if name.startswith(tuple(arguments.only))}
    rows = [Row(name, build, arguments.precision, arguments.compile and "LAVIS" not in name) for name, build in builders.items()]
    batches = [batch_of(size, number, device) for number in range(3)]
    for number in range(arguments.rounds + 1):
        for row in rows:
            row.step(batches[number % 3], device, counted=number > 0)
            print(f"\rround {number} of {arguments.rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    card = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, one thread"
    kind = f"{arguments.precision}{', compiled' if arguments.compile else ''}"
    print(f"{arguments.size}, {size['batch']} pairs, {kind}; torch {torch.__version__}; {card}")
    print(f"{'':36}{'median':>9}{'min':>9}{'max':>9}{'pairs/s':>10}{'saved':>10}{'peak':>10}")
    medians = {row.name: median(row.seconds) for row in rows}
    for row in rows:
        spread = f"{medians[row.name]:9.3f}{min(row.seconds):9.3f}{max(row.seconds):9.3f}"
        peak = f"{row.peak / 1e9:7.2f} GB" if row.peak else ""
        print(f"{row.name:36}{spread}{size['batch'] / medians[row.name]:10.1f}{row.saved / 1e6:7.0f} MB{peak:>10}")
    ratios = {
        name: round(median(a / b for a, b in zip(over.seconds, under.seconds, strict=True)), 4) for name, over, under in pairs_of(rows)
    }
    for name, ratio in ratios.items():
        print(f"{name:36}{ratio:9.3f} (median of the rounds' ratios)")
    if arguments.json:
        what = {"size": arguments.size, "device": card, "precision": arguments.precision, "rounds": arguments.rounds}
        figures = {
            "ratios": ratios,
            "seconds": medians,
            "saved": {row.name: row.saved for row in rows},
            "peak": {row.name: row.peak for row in rows},
        }
        arguments.json.write_text(json.dumps({**what, **figures}, indent=1) + "\n", encoding="utf-8")


def pairs_of(rows: list[Row]) -> list[tuple[str, Row, Row]]:
    """Which rows are compared, by name."""
    by_name = {row.name: row for row in rows}
    wanted = {
        "mafa_over_lavis": ("MAFA, nothing found", "LAVIS albef_pretrain"),
        "vilta_over_grit": ("ViLTA", "GRIT"),
        "softmask_over_grit": ("SoftMask", "GRIT"),
        "mafa_over_grit": ("MAFA, nothing found", "GRIT"),
        "mafa_all_over_grit": ("MAFA, all found", "GRIT"),
        "grit_over_lavis": ("GRIT", "LAVIS albef_pretrain"),
        "half_con_d_over_grit": ("MAFA, Con-D of half the side", "GRIT"),
        "half_con_d_over_lavis": ("MAFA, Con-D of half the side", "LAVIS albef_pretrain"),
        "half_patches_over_lavis": ("MAFA, half side, half the patches", "LAVIS albef_pretrain"),
    }
    return [(name, by_name[a], by_name[b]) for name, (a, b) in wanted.items() if a in by_name and b in by_name]


if __name__ == "__main__":
    main()
