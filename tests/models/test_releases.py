"""Published files, by their names alone, do what the tables of docs/downstream.md say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import families
import reduced
import reduced_blip2
import releases
from lavis_mafa.config.checkpoints import check_kinds
from lavis_mafa.config.schema import typed_block
from lavis_mafa.errors import UserError
from lavis_mafa.models.albef_nlvr import AlbefNlvrMafa
from lavis_mafa.models.albef_ve import AlbefVeMafa
from lavis_mafa.models.albef_vqa import AlbefVqaMafa
from lavis_mafa.models.con_d import build_discriminator

pytestmark = pytest.mark.slow

PAGE = Path(__file__).resolve().parents[2] / "docs" / "downstream.md"
REFUSED = r"without .*itm_head, which \w+ needs"
LARGE = {"image_encoder": {**reduced.SIZES["image_encoder"], "depth": 3, "width": 64}}


def tables() -> dict[tuple[str, str], str]:
    """File, and the head of its column -> what the page says."""
    found: dict[tuple[str, str], str] = {}
    part = PAGE.read_text(encoding="utf-8").split("### In: ")[1].split("### Out: ")[0]
    for table in part.split("\n\n"):
        rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines() if row.startswith("|")]
        for first, *cells in rows[2:]:
            files = [name for name in re.findall(r"`([\w.-]+)`", first) if name in releases.RELEASES]
            assert files, first
            found |= {(file, head): cell for file in files for head, cell in zip(rows[0][1:], cells, strict=True)}
    return found


TOLD = tables()
# of files that hold the same, the last one
DIFFERENT = list({(releases.RELEASES[file], column, told): (file, column) for (file, column), told in TOLD.items()}.values())


def test_the_page_names_every_file():
    assert {file for file, _ in TOLD} == set(releases.RELEASES)


OF_COLUMN: dict[str, Any] = {"`albef_ve_mafa`": AlbefVeMafa, "`albef_vqa_mafa`": AlbefVqaMafa, "`albef_nlvr_mafa`": AlbefNlvrMafa}


def downstream_block(arch: str, **changes: Any) -> Any:
    sizes = {name: reduced.SIZES[name] for name in ("tokenizer", "max_text_length", "image_encoder", "text_encoder")}
    return typed_block("model", {"arch": arch, "model_type": "tiny", **sizes, **changes})


def family_of(file: str) -> Any:
    return families.REDUCED["albef" if (file, "`albef_mafa`") in TOLD else "blip2" if "blip2" in file else "blip"]


def refuses(block: Any, message: str, evaluate: bool = False) -> None:
    with pytest.raises(UserError, match=message):
        check_kinds(block, evaluate=evaluate)


@pytest.mark.parametrize(("file", "column"), DIFFERENT)
def test_a_published_file_does_what_the_page_says(file, column, tmp_path, caplog):
    caplog.set_level("INFO")
    path, told, family = str(releases.write(file, tmp_path)), TOLD[file, column], family_of(file)
    if column in OF_COLUMN:
        return downstream(column, path, told)
    if column == "Con-D":
        return as_con_d(path, told, family)
    block = family.block(pretrained=path)
    if told == "no":
        return refuses(block, REFUSED)
    if told == "sized":
        refuses(block, "has an image encoder of 3 layers of width 64, but 2 layers of width 32 is set")
        block = family.block(pretrained=path, **LARGE)
    elif told == "with its ViT":
        with pytest.raises(UserError, match=r"name that encoder's file in model\.image_encoder\.init"):
            family.ours().load_from_pretrained(path)
        block.image_encoder.init = vit_file(tmp_path)
    elif told != "yes":
        head = {"without MLM": "MLM head", "without LM": "text decoder|LM head"}[told]
        refuses(block, f"has no ({head}).*which training would start at random")
        check_kinds(block, evaluate=True)
        (block.mlm if "MLM" in told else block.lm).weight = 0.0
    check_kinds(block)
    model = type(family.ours())(block)
    model.load_from_pretrained(path)
    lines = [record for record in caplog.records if "keeps its first values" in record.message]
    assert [record.levelname for record in lines] == (["INFO"] if told.startswith("without") else [])
    content = releases.RELEASES[file]()
    assert torch.equal(model.itm_head.weight, content.get("model", content)["itm_head.weight"])


def downstream(column: str, path: str, told: str) -> None:
    arch = column.strip("`")
    block = downstream_block(arch, pretrained=path)
    if told == "no":
        return refuses(block, "has a text decoder|has a classifier|no MLM head|5 (text )?layers|tells . classes apart")
    if told == "to train":
        refuses(block, "would guess", evaluate=True)
    check_kinds(block, evaluate=told == "yes")
    OF_COLUMN[column](downstream_block(arch)).load_from_pretrained(path)


def as_con_d(path: str, told: str, family: Any) -> None:
    con_d: dict[str, Any] = {"arch": family.SIZES["arch"], "checkpoint": path, "precision": "fp32"}
    if told == "sized":
        con_d |= LARGE
        con_d["image_encoder"] = {name: value for name, value in LARGE["image_encoder"].items() if name != "image_size"}
    elif told == "with its ViT":
        with pytest.raises(UserError, match="holds no image encoder"):
            build_discriminator(family.block(ecm={"enabled": True}, discriminator=con_d))
        con_d["image_encoder"] = {"init": vit_file(Path(path).parent)}
    block = family.block(ecm={"enabled": True}, discriminator=con_d)
    if told == "no":
        return refuses(block, REFUSED)
    check_kinds(block)
    found = build_discriminator(block).match_probability(family.batch(2), torch.arange(2), torch.arange(2))
    assert found.shape == (2,) and bool(((0 < found) & (found < 1)).all())


def vit_file(folder: Path) -> str:
    state = reduced_blip2.ours(5).visual_encoder.state_dict()
    torch.save(state, folder / "vit.pth")
    return str(folder / "vit.pth")


@pytest.mark.parametrize("layout", ["bin", "sharded"])
def test_folders_of_the_hub_in_their_other_layouts(layout, tmp_path):
    """As ``save_pretrained`` writes them: ``pytorch_model.bin``, or parts with an index, and a ``config.json`` beside."""
    state = {name: value.clone().contiguous() for name, value in releases.RELEASES["blip-itm-base-coco"]().items()}
    (tmp_path / "config.json").write_text("{}")
    if layout == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        names = sorted(state)
        parts = {f"model-0000{number}-of-00002.safetensors": names[number - 1 :: 2] for number in (1, 2)}
        for part, own in parts.items():
            save_file({name: state[name] for name in own}, tmp_path / part)
        index = {"metadata": {}, "weight_map": {name: part for part, own in parts.items() for name in own}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    model = families.REDUCED["blip"].ours()
    model.load_from_pretrained(str(tmp_path))
    assert torch.equal(model.visual_encoder.cls_token, state["vision_model.embeddings.class_embedding"])
