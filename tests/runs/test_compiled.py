"""What ``run.compile`` compiles, and how often."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import families
from lavis_mafa.config.check import check_combinations
from lavis_mafa.config.schema import RunBlock
from lavis_mafa.errors import UserError
from lavis_mafa.models.con_d import build_discriminator
from lavis_mafa.models.vit import Block
from lavis_mafa.runners import compiled

FAMILY = ("albef", True)
CAPTIONS = ["a cat", "two green birds sit there", "one", "a house by the sea in the rain"]


@pytest.fixture
def traced(monkeypatch) -> list[Any]:
    """Blocks are traced as ever, and run as they are: that takes no compiler."""
    blocks: list[Any] = []

    def traced(block: Block) -> None:
        blocks.append(block)
        nn.Module.compile(block, backend="eager")

    monkeypatch.setattr(compiled, "_try", lambda device: None)
    monkeypatch.setattr(Block, "compile", traced)
    torch._dynamo.reset()
    counters.clear()
    return blocks


def model_with_con_d(folder: Path, **changes: Any) -> Any:
    torch.save({"model": families.REDUCED["albef"].ours(1).state_dict()}, folder / "con_d.pth")
    named = {"arch": "albef_mafa", "checkpoint": str(folder / "con_d.pth")}
    model = families.build(FAMILY, families.Always(0.9), discriminator=named, **changes)
    model.set_discriminator(build_discriminator(model.settings, model))
    return model


def test_blocks_of_model_teacher_and_con_d_and_no_name_changes(tmp_path, traced):
    model = model_with_con_d(tmp_path)
    names, of_con_d = list(model.state_dict()), list(model.discriminator.network.state_dict())
    assert compiled.compile_parts(model) == len(traced)
    vits = model.visual_encoder, model.visual_encoder_m, model.discriminator.network.visual_encoder
    assert traced == [block for vit in vits for block in vit.blocks]
    assert names == list(model.state_dict()) and of_con_d == list(model.discriminator.network.state_dict())
    copy = deepcopy(model.visual_encoder)
    assert all(torch.equal(a, b) for a, b in zip(copy.state_dict().values(), model.visual_encoder.state_dict().values(), strict=True))


def test_one_graph_serves_every_block_whatever_the_texts(tmp_path, traced):
    """One with gradients, one without for the teacher, and one for Con-D's half precision; other lengths of texts add none."""
    model, plain = model_with_con_d(tmp_path), model_with_con_d(tmp_path)
    plain.load_state_dict(model.state_dict())
    compiled.compile_parts(model)
    for texts in (CAPTIONS, CAPTIONS[::-1], [f"{text} and more" for text in CAPTIONS]):
        batch = families.batch(FAMILY, text_input=texts)
        (found, gradients), (wanted, others) = families.step(model, batch), families.step(plain, batch)
        assert torch.equal(found.loss, wanted.loss) and all(torch.equal(value, others[name]) for name, value in gradients.items())
    assert counters["frames"]["ok"] == counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]


def test_a_model_without_such_parts_is_refused():
    with pytest.raises(UserError, match="run.compile is true, but a model of LAVIS's has no part that is compiled"):
        check_combinations(None, RunBlock(compile=True, device="cpu"))


@pytest.mark.parametrize("changes", [{"drop_path": 0.1}, {"gradient_checkpointing": True}], ids=["drop_path", "checkpoints"])
def test_graphs_stay_few(traced, changes):
    """A rate of every block is a number in one graph; below the eight at which torch gives up."""
    model = families.build(FAMILY, image_encoder={"depth": 6, **changes})
    compiled.compile_parts(model)
    for _ in range(2):
        families.step(model, families.batch(FAMILY))
        model.eval()
        for size in (3, 2, 4):
            with torch.no_grad():
                model.image_states(families.batch(FAMILY)["image"][:size])
        model.train()
    assert counters["stats"]["unique_graphs"] <= 6
