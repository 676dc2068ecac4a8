"""`validate` says, all at once, what `train` and `evaluate` would refuse; settings that are accepted are applied."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from omegaconf import OmegaConf

import lavis_mafa
from lavis_mafa.cli.main import COMMANDS, _arguments, main
from lavis_mafa.config import schema
from lavis_mafa.config.check import check_yaml, expand_settings
from lavis_mafa.config.schema import MODEL_BLOCKS, OLD_NAMES, PATHS, RUN_BLOCKS, RunBlock, kind_of_setting, typed_block
from lavis_mafa.errors import UserError
from lavis_mafa.weights import shipped


@pytest.fixture
def told(capsys):
    """What `validate` finds in a file, one message each."""

    def run(yaml: Path, *options: str, flags: tuple[str, ...] = ()) -> list[str]:
        capsys.readouterr()
        code = main(["validate", *flags, str(yaml), *(["--options", *options] if options else [])])
        said = capsys.readouterr().err.splitlines()
        assert code == (2 if said else 0) and all(line.startswith(f"{yaml}: ") for line in said), said
        return [line.removeprefix(f"{yaml}: ") for line in said]

    return run


# --- all at once, and what train says ----------------------------------------------------------------------------------


def test_all_mistakes_are_told_at_once(told, run_yaml):
    wrong = {
        "run.max_epoch=-5": "run.max_epoch is -5",
        "run.treshold=1": "run.treshold is not a setting",
        "run.seed=x": "run.seed is 'x'",
        "model.ecm.enabld=true": "model.ecm.enabld is not a setting",
        "model.embed_dim=0": "model.embed_dim is 0",
        "model.image_encoder.heads=[1]": "model.image_encoder.heads is [1]",
        "model.pretrained=none.pth": "model.pretrained is 'none.pth'",
        "model.tokenizer=./none": "model.tokenizer is './none'",
        "datasets.grit_pairs.build_info.annotations.train.storage=none.csv": "none.csv: no such annotation file",
        "datasets.grit_pairs.build_info.images.storage=none": "The image folder none does not exist",
        "datasets.grit_pairs.vis_processor.eval.image_siz=3": "vis_processor.eval.image_siz is not a key",
        "run.output_dir=run.yaml/x": "run.output_dir: cannot write",
        "extra.block=1": "extra is not a block",
        "run.runner=runner_mfa": "run.runner is 'runner_mfa', which is not registered",
    }
    said = told(run_yaml, *wrong)
    for words in wrong.values():
        assert sum(words in line for line in said) == 1, words
    assert len(said) == len(wrong), said


TRAIN = "datasets.grit_pairs.build_info.annotations.train.storage"
NOT_TRAINED = [  # options, words of the message
    ([f"{TRAIN}=none.jsonl"], "none.jsonl: no such annotation file"),
    ([f"{TRAIN}=[DATA/pairs.jsonl, none.csv]"], "none.csv: no such annotation file"),
    (["datasets.grit_pairs.build_info.images.storage=none"], "The image folder none does not exist"),
    (["run.valid_splits=[val]"], "run.valid_splits is 'val', but grit_pairs has: train. Its file is"),
    (["run.test_splits=[tset]"], "Did you mean 'test'? Its file is datasets.grit_pairs.build_info.annotations.test.storage"),
    (["run.test_splits=[train]"], "run.test_splits names 'train', whose samples are pairs to train on"),
    (["run.valid_splits=[val]", "datasets.grit_pairs.build_info.annotations.val.storage=none.csv"], "val.storage: none.csv: no such"),
    (["run.train_splits=[train, vla]"], "run.train_splits is 'vla'"),
    (["run.runner=runner_iter"], "run.runner is runner_iter, which cannot run mafa_pretrain; allowed: runner_mafa"),
    (["run.runner=runner_base"], "run.runner is runner_base, which cannot run mafa_pretrain; allowed: runner_mafa"),
    (["run.lr_sched=linear_warmup_step_lr"], "run.lr_decay_rate is null; set the factor of an epoch"),
    (["run.lr_decay_rate=0.9"], "run.lr_decay_rate is 0.9, but warmup_cosine_per_step has no use for it"),
    (
        ["run.lr_sched=linear_warmup_step_lr", "run.lr_decay_rate=0.9", "run.lr_horizon_epochs=9"],
        "run.lr_horizon_epochs is 9, but linear",
    ),
    (["run.batch_size_train=32", "run.grit={queue_size: 64, search_space: 32}"], "has 20 samples"),
    (["datasets={grit_emoji: {build_info: {root: none}, vis_processor: SIZE}}"], "none holds no emoji data"),
    (["datasets={coco_caption: {build_info: {images: {storage: none}}}}"], "images.storage is 'none', but there is no folder"),
    (
        ["datasets={coco_caption: {build_info: {images: {storage: DATA}}}}", "run.test_splits=[dev]"],
        "run.test_splits is 'dev', but grit_pairs, coco_caption has: train, val, test",
    ),
    (["datasets={coco_caption: {type: large}}"], "datasets.coco_caption.type is 'large'; allowed: default"),
    ([f"{TRAIN}=DATA/plain.csv"], "discriminator.arch is ground_truth, but the training data tell no truth"),
    (["run.task=captioning"], "run.num_beams is missing, but captioning needs it."),
    (
        ["datasets.grit_pairs.text_processor.train.name=albef_image_eval"],
        "text_processor.train.name is 'albef_image_eval', which is of images",
    ),
    (
        ["datasets.grit_pairs.vis_processor.eval={name: blip_question}"],
        "eval.name is 'blip_question', which is of texts; allowed here: albef",
    ),
    (["run.compile=3"], "run.compile is 3, but must be true or false"),
    (["run.task=captioning", "run.compile=yes"], "run.compile is true, but captioning is a task of LAVIS's"),
    (["run.beta2=1"], "run.beta2 is 1.0, but must be between 0 and 0.999999"),
    (['run.output_dir="a\\0b"'], "run.output_dir is 'a\\x00b'; allowed: a path, which holds no NUL"),
    (["datasets={coco_caption: {build_info: {annotations: {train: [1]}}}}"], "annotations.train is [1], but must be a block"),
]


@pytest.mark.parametrize(("options", "words"), NOT_TRAINED, ids=[" ".join(row[0])[-60:] for row in NOT_TRAINED])
def test_validate_says_what_train_says(refused, told, run_yaml, pairs, options, words):
    (pairs / "plain.csv").write_text("image,caption\n" + "".join(f"{n}.png,square {n}\n" for n in range(20)))
    size = "{train: {image_size: 16}, eval: {image_size: 16}}"
    options = [option.replace("DATA", str(pairs)).replace("SIZE", size) for option in options]
    said = refused("train", "--cfg-path", run_yaml, "--options", *options).strip().removeprefix("lavis-mafa train: ")
    assert words in said and said in told(run_yaml, *options)


def test_validate_reads_the_rows(told, run_yaml, pairs):
    assert told(run_yaml) == []
    rows = [json.loads(line) for line in (pairs / "pairs.jsonl").read_text().splitlines()]
    rows[6]["caption"] = ""
    (pairs / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (said,) = told(run_yaml)
    assert "row 7: the caption is empty" in said


def test_no_files_looks_at_the_yaml_alone(told, run_yaml):
    elsewhere = [f"{TRAIN}=/cluster/pairs.parquet", "datasets.grit_pairs.build_info.images.storage=/cluster/images"]
    elsewhere += ["model.discriminator={arch: albef_mafa, checkpoint: /cluster/c.pth}", "run.resume_ckpt_path=/cluster/r.pth"]
    assert len(told(run_yaml, *elsewhere)) == 4
    assert told(run_yaml, *elsewhere, flags=("--no-files",)) == []
    said = told(run_yaml, *elsewhere, "run.lr_sched=cosine", "run.valid_splits=[val]", flags=("--no-files",))
    assert len(said) == 2 and "run.valid_splits is 'val'" in said[0] and "run.lr_sched is 'cosine'" in said[1]


def test_evaluating_without_a_split(refused_early, run_yaml, trained, told):
    options = [f"model.pretrained={trained}/checkpoint_0_3.pth"]
    said = refused_early("evaluate", "--cfg-path", run_yaml, "--options", *options)
    assert "there is nothing to evaluate on" in said and "run.test_splits=[test]" in said
    (line,) = told(run_yaml, *options, "run.evaluate=true")
    assert line in said


# --- settings that are accepted are applied ----------------------------------------------------------------------------


def leaves(schema: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, hint in ((name, kind_of_setting(hint)[0]) for name, hint in get_type_hints(schema).items()):
        if dataclasses.is_dataclass(hint):
            yield from leaves(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hint


SCHEMAS = [("model", name, schema) for name, schema in MODEL_BLOCKS.items()] + [("run", n, s) for n, s in RUN_BLOCKS.items()]


def test_every_setting_is_read_somewhere():
    """By its name, as an attribute or a text, in a file that does not merely declare it."""
    package = Path(lavis_mafa.__file__).parent
    read: set[str] = set()
    for file in package.rglob("*.py"):
        if file.name in ("schema.py", "check.py", "agreement.py", "resuming.py"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            read |= {node.attr} if isinstance(node, ast.Attribute) else set()
            read |= {node.value} if isinstance(node, ast.Constant) and isinstance(node.value, str) else set()
    declared = {key.split(".")[-1] for _, _, schema in SCHEMAS for key, _ in leaves(schema)}
    of_lavis = {"train_splits", "valid_splits", "weight_decay", "beta2", "max_epoch"}  # its RunnerBase reads them
    assert declared - read <= of_lavis | {"inference"}, declared - read  # that is for check.inference_of, which the task asks


NO_PATHS = {
    "arch",
    "model_type",
    "smooth_when",
    "false_negatives",
    "negatives",
    "precision",
    "task",
    "runner",
    "lr_sched",
    "batch_scope",
}
NO_PATHS |= {"collect", "memory", "device", "dist_url", "dist_backend", "prompt", "rank_by", "mode", "generator", "by", "heat"}
NO_PATHS |= {"inference"}


def test_paths_expand_in_every_setting_that_is_one(run_yaml, monkeypatch, tmp_path):
    texts = {f"{name}.{key}" for name, _, schema in SCHEMAS for key, hint in leaves(schema) if hint is str}
    assert {key for key in texts if key.split(".")[-1] not in NO_PATHS} <= set(PATHS)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("RUNS", "/runs")
    config = OmegaConf.load(run_yaml)
    for key in PATHS:
        OmegaConf.update(config, key, "~/x", force_add=True)
    config.run.output_dir = "${oc.env:RUNS}/x"
    info = config.datasets.grit_pairs.build_info
    info.annotations.train.storage, info.images.storage = ["~/a", "$RUNS/b", "c"], "$HOME/c"
    OmegaConf.resolve(config)
    expand_settings(config)
    assert all(OmegaConf.select(config, key) == ("/runs/x" if key == "run.output_dir" else "/home/me/x") for key in PATHS)
    assert (list(info.annotations.train.storage), info.images.storage) == (["/home/me/a", "/runs/b", "c"], "/home/me/c")


def test_weights_of_the_package_have_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = OmegaConf.create(
        {"model": {"pretrained": "scenes_start", "tokenizer": "scenes_start", "discriminator": {"checkpoint": "mine"}}}
    )
    expand_settings(config)
    assert config.model.pretrained == str(shipped("scenes_start")) and shipped("scenes_start").is_file()
    assert (config.model.tokenizer, config.model.discriminator.checkpoint) == ("scenes_start", "mine")
    config.model.pretrained = "scenes_start"
    (tmp_path / "scenes_start").touch()  # a file of one's own comes first
    expand_settings(config)
    assert config.model.pretrained == "scenes_start"


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("run.output_dir=$NOT_SET_HERE/x", "run.output_dir is '$NOT_SET_HERE/x', but the environment has no NOT_SET_HERE"),
        ("model.pretrained=", "--options model.pretrained=: there is no value; write model.pretrained=null for none"),
        ("run.output_dir=~nobody_here/x", "there is no user nobody_here"),
        (f"{TRAIN}=[$NOT_SET_HERE]", "train.storage.0 is '$NOT_SET_HERE'"),
        ("run.output_dir=${HOME}/x", "A variable of the environment is $NAME in a path"),
        (r"run.output_dir=\${x}", "cannot hold ${...} as text"),
    ],
)
def test_paths_that_cannot_be_expanded(refused_early, run_yaml, option, words):
    assert words in refused_early("train", "--cfg-path", run_yaml, "--options", option)


def test_a_run_writes_where_the_tilde_points(run_yaml, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert main(["train", "--cfg-path", str(run_yaml), "--options", "run.output_dir=~/runs", "run.max_steps=1"]) == 0
    assert not (tmp_path / "~").exists()
    (folder,) = (tmp_path / "home/runs").glob("2*")
    assert OmegaConf.load(folder / "config.yaml").run.output_dir == str(tmp_path / "home/runs")


def test_the_step_schedule_decays(run_yaml, tmp_path):
    options = ["run.lr_sched=linear_warmup_step_lr", "run.lr_decay_rate=0.5", "run.max_epoch=3", "run.min_lr=0", "run.init_lr=0.01"]
    assert main(["train", "--cfg-path", str(run_yaml), "--options", *options]) == 0
    rows = [json.loads(line) for line in next(tmp_path.glob("output/2*/metrics.jsonl")).read_text().splitlines()]
    assert [rows[at]["learning_rate"] for at in (5, 10)] == pytest.approx([0.005, 0.0025])


def test_an_old_name_is_told_the_new_one():
    for block in ("model", "run"):
        schemas = [schema for kind, _, schema in SCHEMAS if kind == block]
        known = {f"{block}.{key}" for schema in schemas for key, _ in leaves(schema)}
        old = {key: new for key, new in OLD_NAMES.items() if key.startswith(f"{block}.")}
        assert not set(old) & known
        with pytest.raises(UserError) as caught:
            typed_block(block, {key.split(".")[1]: 1 for key in old})
        assert [f" Here it is {new}." in said for said, new in zip(caught.value.messages, old.values(), strict=True)] == [True] * len(
            old
        )
    declared = {f"{kind}.{key}" for kind, _, schema in SCHEMAS for key, _ in leaves(schema)}
    parents = {key.rpartition(".")[0] for key in declared}
    new_names = [word.rstrip(":,") for new in OLD_NAMES.values() for word in new.split() if word.startswith(("run.", "model."))]
    assert set(new_names) <= declared | parents


def test_a_start_reads_the_file_and_types_each_block_once(run_yaml, monkeypatch):
    counts: Counter[str] = Counter()
    typed, compose = schema._typed, yaml.compose

    def counting(kind: Any, values: Any, key: str) -> Any:
        counts[key] += key in ("model", "run")
        return typed(kind, values, key)

    monkeypatch.setattr(schema, "_typed", counting)
    monkeypatch.setattr(yaml, "compose", lambda *args: counts.update(["file"]) or compose(*args))
    assert main(["train", "--cfg-path", str(run_yaml), "--options", "run.max_steps=1"]) == 0
    assert {key: count for key, count in counts.items() if count} == {"model": 1, "run": 1, "file": 1}


ODD: list[Any] = [{"a": 1}, [["x"]], None, "x", float("nan")]


@pytest.mark.parametrize("odd", ODD, ids=str)
@pytest.mark.parametrize(("kind", "name", "schema"), SCHEMAS, ids=[row[1] for row in SCHEMAS])
def test_something_else_in_every_place_is_a_message_each(kind, name, schema, odd):
    """A mapping where a list belongs, a scalar where a block belongs, null for a block, and so on."""
    chooses = "arch" if kind == "model" else "task"
    block = OmegaConf.create({chooses: name})
    keys = [key for key, _ in leaves(schema) if key not in ("arch", "task") and not key.startswith("discriminator.")]
    for key in keys:
        OmegaConf.update(block, key, odd, force_add=True, merge=False)
    with pytest.raises(UserError) as caught:
        typed_block(kind, block)
    assert all(len(message.splitlines()) == 1 for message in caught.value.messages)
    if isinstance(odd, dict | list):
        assert {message.split(" is ")[0] for message in caught.value.messages} == {f"{kind}.{key}" for key in keys}


def test_braces_for_brackets_are_told_as_such():
    with pytest.raises(UserError, match=r"run.test_splits is .*, but must be a list, which has brackets: \[val, test\]"):
        typed_block("run", {"test_splits": {"val": None, "test": None}})


# --- flags -------------------------------------------------------------------------------------------------------------


NEEDED = {
    "train": ["--cfg-path", "x"],
    "evaluate": ["--cfg-path", "x"],
    "quickstart": [],
    "count-false-negatives": ["--cfg-path", "x", "--con-d", "y"],
    "mine": ["--cfg-path", "x", "--con-d", "y"],
    "ablate": [],
    "plan": ["x"],
    "check-data": ["--cfg-path", "x"],
    "validate": ["x"],
}


@pytest.mark.parametrize("command", NEEDED)
def test_options_given_twice_are_joined(command):
    given = _arguments([command, *NEEDED[command], "--options", "a=1", "b=2", "--options", "c=3"])
    assert given.options == ["a=1", "b=2", "c=3"]
    assert _arguments([command, *NEEDED[command]]).options == []


def test_a_second_options_counts(refused_early, run_yaml):
    said = refused_early("train", "--cfg-path", run_yaml, "--options", "run.max_epoch=-5", "--options", "run.seed=3")
    assert "run.max_epoch is -5" in said


def test_other_flags_given_twice(refused, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    joined = _arguments(["ablate", "--seeds", "1", "--seeds", "2", "3", "--rows", "1", "--rows", "2"])
    assert (joined.seeds, joined.rows) == ([1, 2, 3], [1, 2]) and _arguments(["ablate"]).seeds == [42, 43, 44]
    assert _arguments(["train", "--cfg-path", "x", "--resume", "auto", "--resume", "auto"]).resume == "auto"
    assert _arguments(["mine", "--cfg-path=~/x", "--con-d=~/y", "--output=$HOME/z"]).output == Path("/home/me/z")
    for command in (
        ["train", "--cfg-path", "x", "--resume", "auto", "--resume", "y"],
        ["train", "--cfg-path", "x", "--cfg-path", "y"],
        ["plan", "x", "--gpus", "1", "--gpus", "2"],
    ):
        assert "is given twice" in refused(*command)
    assert "--resume is auto, but --options has" in refused(
        "train", "--cfg-path", "x", "--resume", "auto", "--options", "run.resume_ckpt_path=y"
    )
    assert "this command evaluates" in refused("evaluate", "--cfg-path", "x", "--options", "run.evaluate=false")


def test_help_waits_for_no_library():
    code = (
        "import sys; from lavis_mafa.cli.main import main\n"
        "for name in sys.argv[1:]:\n"
        "    try: main([name, '--help'])\n"
        "    except SystemExit: pass\n"
        "sys.exit(' '.join(m for m in ('torch', 'pyarrow', 'transformers') if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *COMMANDS], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr


def test_a_run_block_of_lavis_is_refused_where_its_runner_would_fail(told, run_yaml):
    lavis = ["model={arch: albef_pretrain, model_type: base, load_finetuned: false}", "run.task=image_text_pretrain"]
    said = told(run_yaml, *lavis, "run.runner=runner_iter", "run.lr_sched=warmup_cosine_per_step", flags=("--no-files",))
    assert [line.split(" is ")[0] for line in said] == ["run.lr_sched", "run.max_iters", "run.iters_per_inner_epoch"]


def test_plan_takes_the_rows_of_the_yamls_own_data(run_yaml, pairs, capsys):
    assert main(["plan", str(run_yaml)]) == 0
    assert "20 pairs an epoch, those of the YAML's data." in capsys.readouterr().out
    (pairs / "pairs.jsonl").unlink()
    assert main(["plan", str(run_yaml)]) == 0
    assert "5,000,000 pairs an epoch, 4M-Noisy's, assumed" in capsys.readouterr().out


def test_what_a_message_is_made_of():
    error = UserError("first", "second")
    assert str(error) == "first" and error.messages == ("first", "second")
    assert RunBlock().lr_decay_rate is None


def test_a_list_of_all_is_the_first_of_train(run_yaml):
    with pytest.raises(UserError) as caught:
        check_yaml(str(run_yaml), ["run.seed=x", "run.max_epoch=0"])
    assert len(caught.value.messages) == 2 and caught.value.messages[0] == str(caught.value)


def test_validate_reads_the_rows_of_lavis_data_for_a_task_of_lavis(told, tmp_path):
    rows = [{"image": f"{n}.jpg", "caption": f"square {n}", "image_id": n} for n in range(8)]
    del rows[3]["image"]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    path = tmp_path / "lavis.yaml"
    path.write_text(f"""
model: {{arch: albef_pretrain, model_type: base, load_finetuned: false, pretrained: null}}
datasets:
  vg_caption:
    vis_processor: {{train: {{name: albef_image_train, image_size: 16}}}}
    text_processor: {{train: {{name: albef_caption}}}}
    build_info:
      annotations: {{train: {{url: ["{tmp_path}/rows.json"], storage: ["{tmp_path}/rows.json"]}}}}
      images: {{storage: "{tmp_path}"}}
run: {{task: image_text_pretrain, runner: runner_mafa, max_epoch: 1, init_lr: 1e-4, weight_decay: 0.05, batch_size_train: 4,
  batch_size_eval: 4, num_workers: 0, output_dir: output, train_splits: [train], device: cpu}}
""")
    (said,) = told(path)
    assert "datasets.vg_caption, split 'train', row 4 of its annotations: image is missing" in said
