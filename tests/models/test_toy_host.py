"""A host by the list at the end of docs/reading-the-code.md: all that follows from its class, its schema block and its names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lavis.common.registry import registry
from lavis.models.base_model import BaseModel
from omegaconf import OmegaConf
from torch import Tensor, nn

from lavis_mafa.config import schema
from lavis_mafa.distributed import gather_own_first
from lavis_mafa.models.base import MafaModel, Texts
from lavis_mafa.models.con_d import ConD
from lavis_mafa.models.retrieval import without_autocast
from lavis_mafa.models.step import Encoded, StepInputs
from lavis_mafa.objectives.setting import as_in, setting

CAPTIONS = ["a red dog", "two birds on a roof", "a blue car", "the cat sleeps"]

# --- a schema block ----------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class ToyEncoder:
    init: str | None = setting(None, "a checkpoint")
    image_size: int = setting(..., "pixels")
    width: int = setting(..., "of its states")


@dataclass(kw_only=True)
class ToyBlock(schema.MafaBlock):
    arch: str = as_in(schema.MafaBlock, "arch", "toy_mafa")
    image_encoder: ToyEncoder = setting(..., "a linear layer")
    lm: schema.Lm = setting(schema.Lm, "the first letter from the image")


SIZES = """
model:
  arch: toy_mafa
  tokenizer: none
  max_text_length: 20
  embed_dim: 6
  temperature: 0.07
  image_encoder: {image_size: 8, width: 12}
"""


# --- a class with encode and its row functions -------------------------------------------------------------------------


@dataclass
class ToyPairs:
    model: ToyMafa
    images: Tensor  # [K, N, width]
    letters: Tensor  # LongTensor[K, T]

    def itm_logits(self, image_index: Tensor, text_index: Tensor) -> Tensor:
        return self.model.match_rows(self.images, (self.letters,), image_index, text_index)

    def lm_loss(self, image_index: Tensor, text_index: Tensor) -> Tensor:
        """The first letter from the image."""
        return F.cross_entropy(self.model.writer(self.images[image_index].mean(dim=1)), self.letters[text_index, 0])


class ToyMafa(MafaModel[ToyBlock], BaseModel):
    not_scoring = (*MafaModel.not_scoring, "writer")

    def __init__(self, settings: ToyBlock) -> None:
        super().__init__()
        self.settings, width = settings, settings.image_encoder.width
        self.visual_encoder, self.letters = nn.Linear(48, width), nn.Embedding(128, width)
        self.vision_proj, self.text_proj = nn.Linear(width, settings.embed_dim), nn.Linear(width, settings.embed_dim)
        self.itm_head, self.writer = nn.Linear(width, 2), nn.Linear(width, 128)
        self.temp = nn.Parameter(torch.tensor(settings.temperature))
        self._prepare_mafa()

    def encode(self, inputs: StepInputs) -> Encoded:
        images, image_feature = self.image_rows(inputs.image)
        (letters,), text_feature = self.text_rows(inputs.captions)
        batch = self.contrast(inputs, image_feature, text_feature)
        if self.gathers:
            images, letters = gather_own_first(images, with_gradient=True), gather_own_first(letters)
        return Encoded(ToyPairs(self, images, letters), batch, (image_feature.detach(), text_feature.detach()))

    def image_states(self, image: Tensor) -> Tensor:
        return self.visual_encoder(F.unfold(image, 4, stride=4).transpose(1, 2))

    def image_features(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.vision_proj(tokens.mean(dim=1)), dim=-1)

    def text_tokens(self, captions: list[str], gathered: bool = False) -> Texts:
        rows = [[ord(letter) for letter in caption.ljust(20)[:20]] for caption in captions]
        letters = torch.tensor(rows, device=self.device)
        return (gather_own_first(letters) if gathered else letters,)

    def text_features(self, texts: Texts) -> Tensor:
        return F.normalize(self.text_proj(self.letters(texts[0]).mean(dim=1)), dim=-1)

    def match_rows(self, image_tokens: Tensor, texts: Texts, image_index: Tensor, text_index: Tensor) -> Tensor:
        images, letters = image_tokens.mean(dim=1), self.letters(texts[0]).mean(dim=1)
        return without_autocast(self.itm_head, images[image_index] * letters[text_index])


# --- what follows ------------------------------------------------------------------------------------------------------


@pytest.fixture
def toy_yaml(tmp_path, monkeypatch) -> Path:
    """The host's names where the list says, a checkpoint of it that may judge, and a YAML that names that as Con-D."""
    monkeypatch.setitem(registry.mapping["model_name_mapping"], "toy_mafa", ToyMafa)  # plugin.py
    monkeypatch.setitem(schema.MODEL_BLOCKS, "toy_mafa", ToyBlock)
    monkeypatch.setitem(schema.FAMILIES, "toy_mafa", "toy_mafa")  # as of every block in MODEL_BLOCKS at import
    monkeypatch.setattr(schema, "MODEL_DEFAULTS", tmp_path)  # configs/models/
    (tmp_path / "toy_mafa_base.yaml").write_text(SIZES)
    torch.save({"model": judge().state_dict()}, tmp_path / "con_d.pth")
    path = tmp_path / "toy.yaml"
    path.write_text(
        f"""
model:
  arch: toy_mafa
  itc: {{smoothing: 0.0}}
  ecm: {{threshold: 0.5, ambiguous_from: 0.4}}
  discriminator: {{arch: toy_mafa, checkpoint: {tmp_path / "con_d.pth"}, precision: fp32}}
"""
    )
    return path


def judge() -> ToyMafa:
    torch.manual_seed(1)
    return ToyMafa(schema.typed_block("model", {"arch": "toy_mafa", "ecm": {"enabled": False}})).eval()


def build(path: Path, **changes: Any) -> ToyMafa:
    torch.manual_seed(0)
    return ToyMafa.from_config(OmegaConf.merge(OmegaConf.load(path).model, OmegaConf.create(changes))).train()


def batch() -> dict[str, Any]:
    image = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    return {"image": image, "text_input": list(CAPTIONS), "index": torch.arange(4), "image_key": torch.arange(4)}


def test_it_trains_a_step_with_a_con_d_of_its_own_kind(toy_yaml):
    model = build(toy_yaml)
    assert isinstance(model.discriminator, ConD) and model.discriminator.network.writer is None
    output = model(batch())
    output.loss.backward()
    assert output.loss.isfinite() and {"loss_itc", "loss_itm", "loss_lm"} <= output.stats.keys()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    with torch.no_grad():
        images, _ = judge().image_rows(batch()["image"])
        (letters,), _ = judge().text_rows(CAPTIONS)
        verdicts = output.verdicts
        logits = judge().match_rows(images, (letters,), verdicts["image"], verdicts["text"])
    torch.testing.assert_close(verdicts["probability"], logits.softmax(dim=1)[:, 1])
    assert verdicts["positive"].any()


def test_its_con_d_computes_in_bf16_too(toy_yaml):
    probabilities = []
    for precision in ("fp32", "bf16"):
        con_d = {"discriminator": {"precision": precision}}
        probabilities.append(build(toy_yaml, **con_d)(batch()).verdicts["probability"])
    assert not torch.equal(*probabilities)
    torch.testing.assert_close(*probabilities, atol=0.02, rtol=0)


def test_grit_and_retrieval_follow(toy_yaml):
    model = build(toy_yaml)
    output = model(batch())
    for found, wanted in zip(model.grit_features(batch()), (output.image_features, output.text_features), strict=True):
        torch.testing.assert_close(found, wanted)

    class Gallery:
        text, image = CAPTIONS, CAPTIONS
        dataset: Any

        def __iter__(self) -> Any:
            yield batch()

    gallery = Gallery()
    gallery.dataset = gallery
    scores = model.eval().retrieval_scores(gallery, schema.RunBlock(k_test=2))
    assert scores.i2t.shape == scores.t2i.shape == (4, 4) and (scores.i2t > -100).sum() == 8
