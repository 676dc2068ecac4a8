"""What `plan` computes against real steps at a small size, the paper's figures, and itself."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from lavis_mafa.cli.main import main
from lavis_mafa.config.schema import WITH_MATCHING, Grit, SoftMask, typed_block
from lavis_mafa.models.base import CONFIGS
from lavis_mafa.models.synthetic_texts import by_teacher
from lavis_mafa.tools import cost as cost_module
from lavis_mafa.tools.cost import (
    ATTENTION,
    CON_D,
    CON_D_VIT,
    IMAGE,
    ITM,
    LANGUAGE,
    LM,
    SOFT_MASKS,
    TEXT,
    Cost,
    StepSize,
    build,
    build_con_d,
    cost_of,
    samples_of,
)
from lavis_mafa.tools.plan import grit_flops_of_pair, host_memory

pytestmark = pytest.mark.slow

BATCH, LENGTH = 6, 12
JUDGED = {"ecm": {"enabled": True, "threshold": 1.0, "ambiguous_from": 1.0}}  # nothing found, so nothing added to the LM
SYNTHETIC = {"itm": {"synthetic": {"judge": False}}, "language_teacher": {"init": "bert-base-uncased"}}
ONE = {"depth": 1}
FEWER = {"image_encoder": {"depth": 2}, "text_encoder": {"layers": 2, "fusion_layer": 1}, "qformer": {"layers": 2}}
COLLECTS = ("albef with a teacher",)
BLOCKS = {
    "albef with a teacher": {  # with a second layer that looks at images, as soft masks need it
        "arch": "albef_mafa",
        "itc": {"momentum_distillation": {"queue_size": 24}},
        "text_encoder": {"layers": 3},
    },
    "albef, ITC alone, taught": {
        "arch": "albef_mafa",
        "itc": {"momentum_distillation": {"queue_size": 24, "mlm": False}},
        "itm": {"weight": 0},
        "mlm": {"weight": 0},
    },
    "visual entailment, taught": {"arch": "albef_ve_mafa", "momentum_distillation": {}},
    "questions": {"arch": "albef_vqa_mafa"},
    "blip": {"arch": "blip_mafa"},
    "blip2 without words": {"arch": "blip2_mafa", "lm": {"weight": 0}},
    "blip2, frozen": {"arch": "blip2_mafa", "image_encoder": {"freeze": True}},
    "stage 2": {"arch": "blip2_opt_mafa"},
    "albef, one layer of each": {
        **SYNTHETIC,
        "arch": "albef_mafa",
        "image_encoder": ONE,
        "text_encoder": {"layers": 2, "fusion_layer": 1},
    },
    "blip, one layer of each": {**SYNTHETIC, "arch": "blip_mafa", "image_encoder": ONE, "text_encoder": {"layers": 1}},
}


@pytest.fixture(autouse=True)
def small_teacher(monkeypatch):
    monkeypatch.setattr(cost_module, "_bert_sizes", lambda _: (64, 2, 2))


def tiny(name: str) -> Any:
    changes = dict(BLOCKS[name])
    arch = changes["arch"]
    if arch in WITH_MATCHING:
        changes |= {**JUDGED, "discriminator": {"arch": arch, "precision": "fp32"}, "max_text_length": LENGTH}
        changes |= {"mlm": {"mask_probability": 1.0}} if arch == "albef_mafa" else {}
    own = OmegaConf.load(CONFIGS / f"{arch}_tiny.yaml").model
    for part in FEWER.keys() & own.keys():
        own[part].update({key: count for key, count in FEWER[part].items() if key in own[part]})
    config: Any = OmegaConf.merge(own, changes, BLOCKS[name], {"model_type": "tiny"})
    return typed_block("model", config)


@cache
def plain_cost(name: str) -> Cost:
    """Of a block as it is; GRIT's separate pass is counted by itself."""
    block = tiny(name)
    length = LENGTH if hasattr(block, "ecm") else block.max_text_length
    return cost_of(block, StepSize(BATCH, length), collects=name in COLLECTS)


def real_step(block: Any, con_d: Any) -> tuple[float, int]:
    """FLOPs of a whole step of the real model on the CPU, and bytes that autograd saves in its forward."""
    torch.manual_seed(0)
    model = build(block)
    if hasattr(model, "set_discriminator"):
        model.set_discriminator(con_d)
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    # a byte tokenizer: "aaaa" is as many tokens, and with </s> and the line's end it is cut to the longest allowed
    caption = "a" * 60 if block.arch == "blip2_opt_mafa" else "a " * 40
    samples = {**samples_of(block, StepSize(BATCH, LENGTH), "cpu"), "text_input": [caption] * BATCH}
    keep(samples["image"])  # the batch is there in any case
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(samples).loss
        loss.backward()
    found = sum(size for storage, (size, _) in saved.items() if storage not in own)
    return float(counter.get_total_flops()), found


@pytest.mark.parametrize("name", BLOCKS)
def test_parts_add_up_to_a_real_step(name):
    block, cost = tiny(name), plain_cost(name)
    flops, found = real_step(block, build_con_d(block))
    # which pairs are mined decides how the texts of an image lie side by side, and a pair that is found twice is judged once
    assert sum(part.total for part in cost.flops.values()) == pytest.approx(flops, rel=0.06)
    assert sum(cost.saved.values()) == pytest.approx(found, rel=0.05)


def test_two_images_cost_twice_the_images_and_twice_the_fusion_layers():
    """torch's counter of FLOPs cannot follow modules that are called with views of what others made."""
    size = StepSize(BATCH, LENGTH)
    one, two, assigned = (
        cost_of(typed_block("model", {"arch": arch, "model_type": "tiny"}), size).flops
        for arch in ("albef_ve_mafa", "albef_nlvr_mafa", "albef_ta_mafa")
    )
    assert two[IMAGE].forward == 2 * one[IMAGE].forward == 2 * assigned[IMAGE].forward
    assert one[TEXT].forward < two[TEXT].forward < 2.2 * one[TEXT].forward and assigned[TEXT].forward > one[TEXT].forward


def test_synthetic_texts_are_counted_where_they_are_made_and_judged():
    size, block = StepSize(BATCH, LENGTH), tiny("blip, one layer of each")
    unjudged = plain_cost("blip, one layer of each").flops
    block.itm.synthetic.judge = True
    found = cost_of(block, size).flops
    ids, mask = torch.full((BATCH, LENGTH), 7), torch.ones(BATCH, LENGTH, dtype=torch.bool)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        by_teacher(build(block).language_teacher, mask, torch.device("cpu"))(ids, ids, ids[:, 0])
    assert found[LANGUAGE].total == counter.get_total_flops() > 0
    assert {part for part, flops in found.items() if flops != unjudged[part]} == {CON_D}
    assert found[CON_D].total > 1.2 * unjudged[CON_D].total


def test_soft_masks_are_counted_by_themselves_and_leave_the_images_to_matching():
    block = tiny("albef with a teacher")
    plain, size = plain_cost("albef with a teacher"), StepSize(BATCH, LENGTH)
    block.itm.soft_mask = SoftMask()
    found = cost_of(block, size)
    assert found.flops[SOFT_MASKS].forward > 0 and found.flops[SOFT_MASKS].backward == 0
    assert found.flops[ITM].forward > plain.flops[ITM].forward and found.saved[ITM] > plain.saved[ITM]
    rest = found.flops.keys() - {SOFT_MASKS, ITM, LM}  # LM finds keys and values there
    assert {part: found.flops[part] for part in rest} == {part: plain.flops[part] for part in rest}


def paper(arch: str, **changes: Any) -> Any:
    return typed_block("model", {"arch": arch, "discriminator": {"arch": arch}, **changes})


def test_the_papers_model_and_overhead():
    """MAFA Table 12: 210M, Con-D 210M, an epoch of 3 h 06 min where GRIT-VLP takes 2 h 30 min."""
    cost = cost_of(paper("albef_mafa"), StepSize(2, 30))
    parts, weights = cost.flops, cost.weights
    assert weights.trained == pytest.approx(210e6, rel=0.01) and weights.con_d == pytest.approx(210e6, rel=0.01)
    judging = sum(parts[name].total for name in (CON_D, CON_D_VIT))
    alone = sum(part.total for part in parts.values()) - judging
    assert 186 / 150 - 1 < judging / alone < 0.32  # of a step that computes less than theirs Con-D is more
    assert parts[IMAGE].backward == pytest.approx(2 * parts[IMAGE].forward, rel=0.01)  # the image itself wants no gradient


def test_a_con_d_with_the_frozen_vit_of_blip2_costs_a_twentieth():
    parts = cost_of(paper("blip2_mafa"), StepSize(2, 32), own_vit=True).flops
    alone = sum(part.total for name, part in parts.items() if name not in (CON_D, CON_D_VIT))
    assert alone / 2 == pytest.approx(696e9, rel=0.005) and parts[IMAGE].backward == 0
    assert parts[CON_D].total / alone == pytest.approx(0.042, abs=0.001)
    assert (parts[CON_D].total + parts[CON_D_VIT].total) / alone == pytest.approx(0.79, abs=0.005)


def test_half_precision_saves_memory_and_checkpointing_more():
    block = paper("albef_mafa", image_encoder={"depth": 3}, text_encoder={"layers": 2, "fusion_layer": 1})
    size = StepSize(64, 30)
    full, half = (cost_of(block, size, precision, "cuda") for precision in ("fp32", "bf16"))
    saved, less = sum(full.saved.values()), sum(half.saved.values())
    assert 0.5 * saved < less < saved
    block.image_encoder.gradient_checkpointing = True
    again = cost_of(block, size, "bf16", "cuda")
    assert sum(again.saved.values()) < less - 0.5 * half.saved[IMAGE]
    vit = block.image_encoder
    last = 2 * size.batch * (1 + (vit.image_size // vit.patch_size) ** 2) * vit.width * 4 * vit.width
    recomputed = half.flops[IMAGE].forward - vit.depth * last  # a block's last product is needed by the next one alone
    assert again.flops[IMAGE].backward == pytest.approx(half.flops[IMAGE].backward + recomputed, rel=0.02)


def test_what_con_d_finds_and_the_other_ranks_rows_are_counted():
    block, plain = tiny("blip"), plain_cost("blip")
    more, gathered = cost_of(block, StepSize(BATCH, LENGTH, 1, 0.5)), cost_of(block, StepSize(BATCH, LENGTH, 4))
    assert more.flops[LM].forward == pytest.approx(1.5 * plain.flops[LM].forward)
    assert more.flops[IMAGE] == gathered.flops[IMAGE] == plain.flops[IMAGE] and gathered.logits == plain.logits == BATCH * 11 * 30524
    assert sum(gathered.saved.values()) > sum(plain.saved.values())


def test_what_con_d_is_spared_is_counted():
    plain, seldom, half = (
        plain_cost("blip"),
        cost_of(with_con_d("blip", every=4), StepSize(BATCH, LENGTH)),
        cost_of(with_con_d("blip", image_size=24), StepSize(BATCH, LENGTH)),
    )
    for part in (CON_D, CON_D_VIT):
        assert seldom.flops[part].forward == pytest.approx(plain.flops[part].forward / 4)
    assert seldom.flops[IMAGE] == half.flops[IMAGE] == plain.flops[IMAGE]
    assert half.flops[CON_D_VIT].forward < 0.4 * plain.flops[CON_D_VIT].forward


def with_con_d(name: str, every: int = 1, image_size: int | None = None) -> Any:
    block = tiny(name)
    block.ecm.every, block.discriminator.image_size = every, image_size
    return block


def test_grits_separate_pass_is_the_encoders_once_more():
    cost = plain_cost("albef with a teacher")
    assert cost.features == pytest.approx(cost.flops[IMAGE].forward + cost.flops[TEXT].forward, rel=0.01)


def test_grits_memory_is_that_of_two_queues():
    """L rows of two fp32 vectors and an index; matrices of both directions, a sub-queue of 4,800 at a time being 184 MB."""
    memory = host_memory(Grit(queue_size=48000, search_space=4800), 256, 1000)
    assert memory["queue"] == 2 * 48000 * (2 * 256 * 4 + 8) and memory["grouping"] == memory["queue"] + 2 * 2 * 4800**2 * 4
    assert host_memory(Grit(queue_size=48000, search_space=4800, memory="rows"), 256, 1000)["grouping"] == memory["queue"]
    assert grit_flops_of_pair(Grit(search_space=4800), 256) == 4 * 4800 * 256
    assert host_memory(Grit(enabled=False), 256, 1000)["queue"] == grit_flops_of_pair(Grit(enabled=False), 256) == 0


def test_the_command_prints_and_writes(tmp_path, capsys):
    file = tmp_path / "plan.json"
    small = ["--gpus", "2", "--options", "model.image_encoder.depth=1", "model.text_encoder={layers: 2, fusion_layer: 1}"]
    assert main(["plan", "--cfg-path", "mafa/albef/train/tcl.yaml", "--batch-size", "2", *small]) == 0
    assert "albef_mafa: 2 pairs a GPU, 2 GPUs, texts of 25 tokens" in capsys.readouterr().out
    command = ["plan", "mafa/quickstart/train/mafa.yaml", "--batch-size", "4", "--samples", "1000", "--throughput", "100"]
    assert main([*command, "--measure", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert "Computed, not measured" in text and "Measured on " in text and "250 steps an epoch, 4,000 in all" in text
    plan = json.loads(file.read_text())
    assert plan["hours"] == pytest.approx(16 * 1000 / 100 / 3600) and plan["measured"]["kind"] == "measured"
    assert plan["kind"] == "computed" and plan["weights"]["trained"] > 4e6 and plan["measured"]["seconds"] > 0


def test_public_sets_need_not_be_here(capsys):
    tiny_sizes = ["model.model_type=tiny", "model.image_encoder={image_size: 16, patch_size: 8}", "run.batch_size_train=4"]
    crop = "datasets.snli_ve.vis_processor={train: {image_size: 16}, eval: {image_size: 16}}"
    assert main(["plan", "mafa/albef/finetune/snli_ve.yaml", "--options", *tiny_sizes, crop]) == 0
    text = capsys.readouterr().out
    assert "529,527 pairs an epoch, as published" in text and "momentum teacher" in text and "classifier" in text


def test_what_cannot_be_planned_is_one_line(tmp_path, capsys):
    yaml = tmp_path / "lavis.yaml"
    yaml.write_text("model: {arch: albef_pretrain}\ndatasets: {coco_caption: {}}\nrun: {task: mafa_pretrain}\n")
    for arguments, message in (
        ([str(yaml)], "model.arch is 'albef_pretrain'"),
        (["mafa/albef/eval/retrieval_coco.yaml"], "run.evaluate is true"),
        (["mafa/albef/train/pretrain.yaml", "--text-length", "99"], "--text-length is 99"),
        (["mafa/albef/train/pretrain.yaml", "--json", "none/x.json"], "--json is 'none/x.json', but there is no folder none"),
        (["mafa/albef/train/pretrain.yaml", "--samples", "1.5"], "'1.5' is not a whole number of at least 1"),
        (["mafa/albef/train/pretrain.yaml", "--samples", "1e6", "--gpus", "20000"], "but an epoch has 1,000,000 (as given)"),
        (["mafa/albef/train/pretrain.yaml", "--batch-size", "0"], "'0' is not a whole number of at least 1"),
        (
            ["mafa/blip2/train/stage_2.yaml", "--options", "model.language_model.init=facebook/opt-350m"],
            "whose size is not known",
        ),
    ):
        assert main(["plan", *arguments]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and len(error.splitlines()) == 1
