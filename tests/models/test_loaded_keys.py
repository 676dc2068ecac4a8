"""What LAVIS's own models took from a checkpoint is told by what they hold afterwards."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import families
from lavis_mafa.errors import UserError
from lavis_mafa.models.lavis_weights import build_model, check_start, report_keys

ALBEF, BLIP = families.REDUCED["albef"], families.REDUCED["blip"]


def save(state: dict[str, Any], folder: Path) -> str:
    torch.save({"model": state}, folder / "file.pth")
    return str(folder / "file.pth")


def config(path: str, arch: str = "albef_retrieval", key: str = "pretrained") -> Any:
    return OmegaConf.create({"arch": arch, "load_finetuned": key == "finetuned", key: path})


def loading(model: Any, cfg: Any) -> Any:
    """A task whose model loads as LAVIS's from_config does."""

    def build(_: Any) -> Any:
        model.load_checkpoint_from_config(cfg)
        return model

    return build_model(SimpleNamespace(build_model=build), SimpleNamespace(model_cfg=cfg))


def test_renamed_weights_count_as_taken(tmp_path, caplog):
    """LAVIS takes ``bert.`` out of the names of our text encoder."""
    caplog.set_level("INFO")
    state = ALBEF.ours().state_dict()
    model = loading(ALBEF.lavis_retrieval(), config(save(state, tmp_path)))
    head = {n for n in state if n.startswith("text_encoder.cls.")}
    teacher = [n for n in model.state_dict() if "_m." in n or n.endswith(("queue", "queue_ptr"))]
    teacher = [n for n in teacher if not n.endswith("position_ids")]
    found = re.search(r"(\d+) weights taken from .*?; (\d+) missing \((.*?)\); (\d+) left over", caplog.text)
    assert found is not None
    assert [int(found[1]), int(found[2])] == [len(state) - len(head), len(teacher)]
    assert "text_encoder " not in found[3] and "visual_encoder " not in found[3]
    caplog.clear()
    with torch.no_grad():
        model.text_encoder.encoder.layer[1].output.dense.weight.add_(1.0)  # what the model no longer holds is not taken
    report_keys(model, config(save(state, tmp_path)))
    assert f"{int(found[1]) - 1} weights taken" in caplog.text and "text_encoder 1" in caplog.text


def test_a_checkpoint_that_gives_nothing_is_an_error(tmp_path):
    sizes = {"width": 16, "depth": 1, "heads": 1, "image_size": ALBEF.SIZE, "patch_size": ALBEF.PATCH, "init": None}
    text = {"width": 16, "layers": 2, "fusion_layer": 1, "heads": 1, "init": None}
    tiny = ALBEF.ours(image_encoder=sizes, text_encoder=text, embed_dim=8).state_dict()
    with pytest.raises(UserError, match=r"gave albef_retrieval none of its weights: .*\[1, 1, 16\] \(wanted \[1, 1, 32\]\)"):
        loading(ALBEF.lavis_retrieval(), config(save(tiny, tmp_path)))
    with pytest.raises(UserError, match="model.finetuned: .* is of another size than albef_retrieval: size mismatch for"):
        loading(ALBEF.lavis_retrieval(), config(save(tiny, tmp_path), key="finetuned"))
    wrapped = {f"module.{name}": value for name, value in ALBEF.lavis_retrieval(5).state_dict().items()}
    with pytest.raises(UserError, match="none of its weights"):
        loading(ALBEF.lavis_retrieval(), config(save(wrapped, tmp_path), key="finetuned"))


def test_files_that_lavis_cannot_start_from_are_named(tmp_path):
    plain = save(BLIP.ours().state_dict(), tmp_path)
    for arch in ("albef_vqa", "blip_retrieval", "blip_classification"):
        with pytest.raises(UserError, match=f"no momentum teacher .*which LAVIS's {arch} reads from it"):
            check_start(config(plain, arch))
    with pytest.raises(UserError, match="albef_nlvr fails at every such file"):
        check_start(config(plain, "albef_nlvr"))
    with pytest.raises(UserError, match="use_distill is false, but LAVIS 1.0.2's albef_vqa then fails"):
        check_start(OmegaConf.merge(config(plain, "albef_vqa"), {"use_distill": False}))
    with pytest.raises(UserError, match="file.pth --for albef_nlvr --output X.pth` writes one for model.finetuned"):
        check_start(config(plain, "albef_nlvr"))
    answering = {"visual_encoder_m.pos_embed": torch.zeros(1, 1, 1), "text_decoder.cls.predictions.bias": torch.zeros(1)}
    with pytest.raises(UserError, match="albef_vqa makes itself here; give the file as model.finetuned"):
        check_start(config(save(answering, tmp_path), "albef_vqa"))
    with_teacher = BLIP.ours(itc={"momentum_distillation": {"queue_size": 8}}).state_dict()
    model = loading(BLIP.lavis_retrieval(), config(save(with_teacher, tmp_path), "blip_retrieval"))
    assert torch.equal(model.visual_encoder_m.cls_token, with_teacher["visual_encoder_m.cls_token"])
