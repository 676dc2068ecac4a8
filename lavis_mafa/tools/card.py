"""The model card of a shared model: from its run's checkpoint and records, what a stranger has to know, and nothing of the machine."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData
from markupsafe import Markup

from lavis_mafa import __version__
from lavis_mafa.config.schema import MODEL_DEFAULTS
from lavis_mafa.files import digest, numbered_checkpoints
from lavis_mafa.tools.run_files import last_epoch, read_metrics, run_evaluations

TEMPLATE = "card.md.jinja"
MARKS = re.compile(r"([\\`*_\[\]<>#|~$&])")  # what Markdown, or a table of it, might take for its own
WHAT = {  # arch -> what it is, which family it belongs to, and Hugging Face's name of its task
    "albef_mafa": ("ALBEF, pre-trained or fine-tuned for image-text retrieval", "albef", "feature-extraction"),
    "blip_mafa": ("BLIP, pre-trained or fine-tuned for image-text retrieval", "blip", "feature-extraction"),
    "blip2_mafa": ("the first stage of BLIP-2 (ViT and Q-Former)", "blip-2", "feature-extraction"),
    "blip2_opt_mafa": ("the second stage of BLIP-2, with an OPT that writes captions and answers", "blip-2", "image-to-text"),
    "albef_ve_mafa": ("ALBEF for visual entailment: does a sentence follow from an image", "albef", None),
    "albef_nlvr_mafa": ("ALBEF for NLVR2: does a sentence hold of two images", "albef", None),
    "albef_ta_mafa": ("ALBEF after text assignment, from which models of two images start", "albef", None),
    "albef_vqa_mafa": ("ALBEF that answers questions about images", "albef", "visual-question-answering"),
}
SETTINGS = {  # what is told of a training -> how it is called
    "model.ecm.enabled": "mined connections (ECM)",
    "model.ecm.threshold": "match probability above which a hard negative becomes a positive",
    "model.ecm.ambiguous_from": "match probability above which it is no negative",
    "model.discriminator.arch": "model of Con-D",
    "model.itc.smoothing": "S-ITC's smoothing",
    "model.itc.smooth_when": "which epochs are smoothed",
    "model.itm.negatives": "negatives of ITM",
    "model.mlm.mask_probability": "masked words",
    "run.grit.enabled": "GRIT batches",
    "run.grit.queue_size": "GRIT's L, samples that are shuffled and grouped together",
    "run.grit.search_space": "GRIT's M, samples among which the most similar one comes next",
    "run.batch_size_train": "samples a process and step",
    "world_size": "processes",
    "run.accum_grad_iters": "steps accumulated",
    "run.max_epoch": "epochs",
    "run.max_steps": "steps at most",
    "run.precision": "precision",
    "run.init_lr": "learning rate",
    "run.weight_decay": "weight decay",
    "run.seed": "seed",
}
ONLY_WITH = {
    "model.itc.smooth_when": "model.itc.smoothing",
    "model.ecm": "model.ecm.enabled",
    "model.discriminator": "model.ecm.enabled",
    "run.grit": "run.grit.enabled",
}
CURVE = ("loss", "loss_itc", "loss_itm", "loss_mlm", "loss_lm", "temperature", "itm_accuracy_positive", "itm_accuracy_negative")
FOUND = {  # shares of the last epoch -> what they are of
    "false_negative_share": "of the chosen hard negatives are false, by the truth of the data",
    "new_positive_share": "of the chosen hard negatives became positives, since Con-D says that they match",
    "ambiguous_share": "of the chosen hard negatives were ambiguous to Con-D",
    "con_d_precision": "of the new positives do match, by the truth of the data",
    "con_d_recall": "of the false negatives became positives, by the truth of the data",
}
NOT_IN_FRONT = ("itc_", "agg_")  # metrics that the table has and a leader board need not have


def model_card(name: str, trained: Any, content: dict[str, Any], checkpoint: Path, weights: int, licence: str | None) -> str:
    """The text of ``README.md``: YAML that Hugging Face reads, then Markdown.

    Args:
        name: of the shared folder.
        trained: the typed block of the model as it was trained.
        content: of the checkpoint, without its weights; the records of its run are read beside it.
        weights: how many numbers the model has.
        licence: by Hugging Face's name; null: the card asks for one.
    """
    config, run, epoch = content["config"], checkpoint.parent, content.get("epoch")
    what, family, task = WHAT[trained.arch]
    last, best = checkpoint in numbered_checkpoints(run)[:1], checkpoint.stem == "checkpoint_best"
    scores = run_evaluations(run, {epoch, *(["last"] if last else []), *(["best"] if best else [])})
    metrics = [record for record in read_metrics(run) if epoch is not None and record["epoch"] <= epoch]
    data = _data(config.get("datasets") or {}, content.get("data") or [])
    of = ", ".join(row["name"] for row in data) or "unknown"
    results = [
        EvalResult(task or "image-text-matching", of, split, metric, round(value, 4), dataset_split=split)
        for split, record in scores.items()
        for metric, value in record.items()
        if not metric.startswith(NOT_IN_FRONT)
    ]
    front = ModelCardData(
        license=licence or "unknown",
        library_name="lavis-mafa",
        tags=["mafa", "vision-language", "image-text", family],
        pipeline_tag=task,
        datasets=[row["name"] for row in data] or None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    mined = getattr(getattr(trained, "ecm", None), "enabled", False)
    end = last_epoch(metrics) if metrics else {}
    return _template().render(
        front=Markup(front.to_yaml()),
        name=name,
        arch=Markup(trained.arch),
        what=what,
        licence=licence,
        version=__version__,
        weights=weights,
        size=trained.image_encoder.image_size,
        words=trained.max_text_length,
        matches=hasattr(trained, "ecm"),
        queries=hasattr(trained, "qformer"),
        mined=mined,
        epoch=epoch,
        step=content.get("step"),
        start=_named(trained.pretrained),
        data=data,
        settings=_settings(dataclasses.asdict(trained), config.get("run") or {}, content.get("world_size")),
        con_d=_named(trained.discriminator.checkpoint) if mined and trained.discriminator else None,
        curve={key: end[key] for key in CURVE if key in end},
        found={text: end[key] for key, text in FOUND.items() if key in end},
        scores=scores,
        measured=list(dict.fromkeys(metric for record in scores.values() for metric in record)),
    )


def _template() -> jinja2.Template:
    def marked(value: Any) -> Any:
        return value if isinstance(value, Markup) else escaped(value)

    loader = jinja2.FileSystemLoader(MODEL_DEFAULTS.parent, encoding="utf-8")
    made = jinja2.Environment(  # noqa: S701 - no HTML; what is not ours is escaped for Markdown
        loader=loader,
        finalize=marked,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return made.get_template(TEMPLATE)


def escaped(value: Any) -> str:
    """One line of Markdown that shows a value as it is.

    Example:
        >>> escaped("<b>| a_b"), escaped(0.20000000298)
        ('\\\\<b\\\\>\\\\| a\\\\_b', '0.2')
    """
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return MARKS.sub(r"\\\1", " ".join(text.split()))


def _data(datasets: dict[str, Any], record: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a data set: its name, the names of its training files, and of the parts it is read as the rows and a fingerprint."""
    rows = []
    for name, block in datasets.items():
        info = (block or {}).get("build_info") or {}
        storage = ((info.get("annotations") or {}).get("train") or {}).get("storage") or info.get("root") or []
        files = [_named(str(file)) for file in ([storage] if isinstance(storage, str) else storage)]
        rows.append({"name": str(name), "files": files, "rows": None, "fingerprint": None})
    if len(rows) == len(record):
        for row, part in zip(rows, record, strict=True):
            row |= {"rows": part["rows"], "fingerprint": digest(part["columns"])}
    return rows


def _named(place: str | None) -> str | None:
    """The last name of a path, which tells nothing of the machine or its user."""
    return None if place is None else Path(place).name


def _settings(model: dict[str, Any], run: dict[str, Any], world_size: int | None) -> dict[str, Any]:
    """What :data:`SETTINGS` names, where it is set and does something."""
    tree = {"model": model, "run": run, "world_size": world_size}

    def of(key: str) -> Any:
        value: Any = tree
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    found = {}
    for key, text in SETTINGS.items():
        on = next((switch for start, switch in ONLY_WITH.items() if key.startswith(start) and key != switch), None)
        if (value := of(key)) is not None and (on is None or of(on)):
            found[text] = {True: "on", False: "off"}[value] if isinstance(value, bool) else value
    return found
