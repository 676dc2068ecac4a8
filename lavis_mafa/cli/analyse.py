"""``lavis-mafa analyse ...``: look into a trained model, without training."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavis_mafa.cli.options import positive, share
from lavis_mafa.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from lavis_mafa.tools.trained_model import Opened

SOFT_LABELS = "soft labels of S-ITC, the consistency loss and momentum distillation (MAFA Table 2)"
VISION_USAGE = "accuracy of predicted words with and without the image (GRIT-VLP's usage of vision)"
MINIMAL_PAIRS = "accuracy between captions that differ in one word, of which one is true of the image; chance is a half"
GROUNDING = "does Grad-CAM of the matching score lie on the thing that a text names? (ALBEF section 6)"
GRAD_CAM = "a page with a map per word of one text in one image: Grad-CAM of the matching score (ALBEF section 6)"
PICTURES = "a page of hard negatives (GRIT-VLP Figure 1) and of pseudo-targets (ALBEF Figures 2, 11, 12)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(
        dest="kind", required=True, metavar="{soft-labels,vision-usage,minimal-pairs,grounding,grad-cam,pictures}"
    )
    labels = kinds.add_parser("soft-labels", help=SOFT_LABELS, description=SOFT_LABELS)
    _add_common(labels, "run.batch_size_train")
    labels.add_argument(
        "--order", choices=("grouped", "random"), default="grouped", help="of the data (default: grouped, as GRIT does)"
    )
    labels.add_argument("--smoothing", type=share, metavar="ALPHA", help="of S-ITC (default: the YAML's, or 0.5 where that is 0)")
    labels.set_defaults(analyse=_soft_labels)
    usage = kinds.add_parser("vision-usage", help=VISION_USAGE, description=VISION_USAGE)
    _add_common(usage, "run.batch_size_eval")
    usage.add_argument("--split", help="of the data (default: val where the data have it, else train)")
    usage.add_argument("--passes", type=positive, default=1, help="masks drawn per caption, for masked language modelling (default: 1)")
    usage.add_argument("--mask-probability", type=share, nargs="+", metavar="P", help="one or more (default: the YAML's)")
    usage.set_defaults(analyse=_vision_usage)
    pairs = kinds.add_parser("minimal-pairs", help=MINIMAL_PAIRS, description=MINIMAL_PAIRS)
    _add_common(pairs, "run.batch_size_eval", "captions that have partners")
    pairs.add_argument("--split", default="val", help="of the data, one that is evaluated (default: val)")
    pairs.add_argument("--score", choices=("itm", "itc"), help="matching head or cosine (default: both, where the model has both)")
    pairs.set_defaults(analyse=_minimal_pairs)
    grounding = kinds.add_parser("grounding", help=GROUNDING, description=GROUNDING)
    _add_common(grounding, "run.batch_size_eval", "expressions")
    what = "Parquet, JSON or JSON lines: image, text, box, boxes (docs/data.md, grit_boxes)"
    grounding.add_argument("--boxes", required=True, type=Path, metavar="FILE", help=what)
    grounding.add_argument("--images", type=Path, metavar="DIR", help="that image paths start from (default: the folder of --boxes)")
    grounding.add_argument("--by", choices=("itm", "itc"), default="itm", help="matching logit or cosine (default: itm)")
    grounding.add_argument(
        "--layer", type=positive, metavar="N", help="of those that look at images, for itm (default: the middle one)"
    )
    grounding.set_defaults(analyse=_grounding)
    grad_cam = kinds.add_parser("grad-cam", help=GRAD_CAM, description=GRAD_CAM)
    _add_model(grad_cam)
    grad_cam.add_argument("--image", required=True, type=Path, metavar="FILE", help="a picture")
    grad_cam.add_argument("--text", required=True, help="what is said of it")
    grad_cam.add_argument("--layer", type=positive, metavar="N", help="of those that look at images (default: the middle one)")
    grad_cam.set_defaults(analyse=_grad_cam)
    pictures = kinds.add_parser("pictures", help=PICTURES, description=PICTURES)
    _add_common(pictures, "run.batch_size_train")
    pictures.add_argument("--split", help="of the data (default: val where the data have it, else train, whose images are augmented)")
    pictures.add_argument("--anchors", type=positive, default=8, metavar="N", help="images to show, with a caption each (default: 8)")
    pictures.set_defaults(analyse=_pictures)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cfg-path", required=True, metavar="YAML", help="a file, or a name that `lavis-mafa ls` shows")
    text = "weights of the YAML's model: a file, a run's folder, or the name of the package's"
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="FILE", help=text)
    parser.add_argument("--output", type=Path, help="a new folder; where it exists it gets a number (default: output/KIND)")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="override settings of the YAML")


def _add_common(parser: argparse.ArgumentParser, size: str, samples: str = "samples") -> None:
    _add_model(parser)
    parser.add_argument("--batch-size", type=positive, metavar="B", help=f"default: {size}")
    parser.add_argument("--max-samples", type=positive, metavar="N", help=f"a random N of the {samples} (default: all)")


def run(arguments: argparse.Namespace) -> int:
    if arguments.output is None:
        arguments.output = Path("output") / arguments.kind
    from lavis_mafa.named_weights import fetched

    arguments.checkpoint = Path(fetched(str(arguments.checkpoint), "--checkpoint"))
    arguments.analyse(arguments)
    return 0


def _soft_labels(arguments: argparse.Namespace) -> None:
    if arguments.batch_size is not None:
        _check_groups(arguments.batch_size)
    import torch

    from lavis_mafa.files import new_folder
    from lavis_mafa.runners.step import autocast
    from lavis_mafa.tools import soft_labels as analysis
    from lavis_mafa.tools.trained_model import Reader, open_checkpoint, open_split

    opened = open_checkpoint(arguments.cfg_path, arguments.checkpoint, arguments.options, teacher=True)
    run, model, itc = opened.run, opened.model, opened.model.settings.itc
    left_out = analysis.restore_teacher(model, arguments.checkpoint)
    size = arguments.batch_size or run.batch_size_train
    _check_groups(size)
    dataset = open_split(opened, "train")
    order = _draw(arguments, opened, dataset)
    if size > len(order):
        raise UserError(f"the batch size is {size}, but there are only {len(order)} samples; give a smaller --batch-size.")
    if arguments.order == "grouped" and size > run.grit.search_space:
        raise UserError(f"the batch size is {size}, but must not exceed run.grit.search_space ({run.grit.search_space}).")
    softening = analysis.Softening(
        smoothing=arguments.smoothing if arguments.smoothing is not None else itc.smoothing or 0.5,
        consistency=itc.consistency or 0.2,
        distillation=None if left_out is not None else itc.momentum_distillation.alpha,
    )
    output = new_folder(arguments.output)
    read, labels = Reader(dataset, opened, size, output), analysis.SortedLabels(size)
    with torch.no_grad(), autocast(run.precision, opened.device):
        if arguments.order == "grouped":
            features = read(order, "features for GRIT")
            order = analysis.grouped_order(model, features, order, size, run.grit, run.seed)
        for samples in read(order, "soft labels", drop_last=True):
            labels.add(analysis.soft_labels(model.encode(model.inputs(samples)).batch, softening))
    queue_size = 0 if left_out is not None else itc.momentum_distillation.queue_size
    print(
        f"{labels.anchors} anchors in {arguments.order} batches of {size}; alpha of S-ITC {softening.smoothing:g}, lambda of the "
        f"consistency loss {softening.consistency:g}"
        + (f", alpha of momentum distillation {softening.distillation:g}" if softening.distillation is not None else "")
    )
    print(analysis.format_table(labels, queue_size, left_out))
    groups = ("top1-5", "top6-B", "topB+1-B+Q")
    content = {
        **_about(arguments, opened, size),
        "order": arguments.order,
        "anchors": labels.anchors,
        "queue_size": queue_size,
        **asdict(softening),
        "left_out": {analysis.MOMENTUM: left_out} if left_out is not None else {},
        "sums": {method: dict(zip(groups, sums, strict=True)) for method, sums in labels.sums().items()},
        analysis.PAPER: {method: dict(zip(groups, sums, strict=True)) for method, sums in analysis.PAPERS_SUMS.items()},
        "mean_sorted_labels": {method: curve.tolist() for method, curve in labels.curves().items()},
    }
    (output / "soft_labels.png").write_bytes(analysis.plot_curves(labels))
    _write(output / "soft_labels.json", content)


def _vision_usage(arguments: argparse.Namespace) -> None:
    import torch

    from lavis_mafa.files import new_folder
    from lavis_mafa.runners.step import autocast
    from lavis_mafa.tools import vision_usage as analysis
    from lavis_mafa.tools.trained_model import Reader, open_checkpoint, open_split

    opened = open_checkpoint(arguments.cfg_path, arguments.checkpoint, arguments.options, teacher=False)
    settings, run = opened.model.settings, opened.run
    masked = hasattr(settings, "mlm")
    _check_masking(arguments, settings, masked)
    split = arguments.split or ("val" if "val" in opened.datasets else "train")
    dataset = open_split(opened, split)
    order = _draw(arguments, opened, dataset)
    size = arguments.batch_size or run.batch_size_eval
    if arguments.batch_size is not None and size > len(order):
        raise UserError(f"--batch-size is {size}, but there are only {len(order)} samples; give a smaller one.")
    output = new_folder(arguments.output)
    batches = Reader(dataset, opened, size, output)(order, f"words of {split}")
    with autocast(run.precision, opened.device):
        if masked:
            chances = arguments.mask_probability or [settings.mlm.mask_probability]
            found = analysis.masked_usage(opened.model, batches, chances, arguments.passes, run.seed)
            usage = {f"{100 * chance:g} % masked": one for chance, one in found.items()}
        else:
            usage = {"next word": analysis.next_word_usage(opened.model, batches)}
    rows = {name: one.metrics() for name, one in usage.items()}
    words = {name: one.words for name, one in usage.items()}
    print(f"{len(order)} captions of {split}; words predicted: {', '.join(f'{count} ({name})' for name, count in words.items())}")
    print(analysis.format_usage(rows))
    results = {name: {"words": words[name], **row} for name, row in rows.items()}
    more = {"split": split, "captions": len(order), "passes": arguments.passes, "seed": run.seed, "torch": torch.__version__}
    _write(output / "vision_usage.json", {**_about(arguments, opened, size), **more, "results": results})


def _minimal_pairs(arguments: argparse.Namespace) -> None:
    from torch.utils.data import Subset

    from lavis_mafa.config.schema import loss_weights
    from lavis_mafa.files import new_folder
    from lavis_mafa.runners.loading import check_evaluation_images, eval_loader
    from lavis_mafa.runners.step import autocast
    from lavis_mafa.tools import minimal_pairs as analysis
    from lavis_mafa.tools.trained_model import open_checkpoint, open_gallery

    opened = open_checkpoint(arguments.cfg_path, arguments.checkpoint, arguments.options, teacher=False)
    run, matches = opened.run, loss_weights(opened.model.settings)["itm"] != 0
    if arguments.score == "itm" and not matches:
        raise UserError("--score is itm, but model.itm is off: this model has no trained matching head; allowed: itc.")
    scores = [arguments.score] if arguments.score else [*(["itm"] if matches else []), "itc"]
    gallery = open_gallery(opened, arguments.split)
    pairs = analysis.find_pairs(gallery, run.seed, arguments.max_samples)
    size, output = arguments.batch_size or run.batch_size_eval, new_folder(arguments.output)
    images = pairs.image.unique()
    shown = Subset(gallery, images.tolist())
    check_evaluation_images({arguments.split: shown}, [arguments.split], run.num_workers, output)
    loader = eval_loader(shown, size, gallery.collater, run, opened.device.type == "cuda", shared=False)
    batches = ((part, samples["image"]) for part, samples in zip(images.split(size), loader, strict=True))
    with autocast(run.precision, opened.device):
        found = analysis.score_pairs(opened.model, batches, gallery.text, *pairs.scored(), scores)
    figures, cases = analysis.accuracies(pairs, found), analysis.examples(gallery, pairs, found)
    truth = getattr(gallery, "truth", None) is not None
    print(f"{len(pairs):,} captions of {len(images):,} images of {arguments.split}, each against others that differ in one word")
    what = "true of the image" if truth else "of the same image"
    print(f"({len(pairs.other):,} drawn of {pairs.possible:,} pairs; left out: captions that are {what})")
    print(analysis.format_results(figures, cases))
    counts = {"captions": len(pairs), "images": len(images), "pairs": len(pairs.other), "possible_pairs": pairs.possible}
    more = {"split": arguments.split, "seed": run.seed, "truth_known": truth, **counts, "chance": analysis.CHANCE}
    results = {name: asdict(one) for name, one in figures.items()}
    _write(output / "minimal_pairs.json", {**_about(arguments, opened, size), **more, "results": results, "examples": cases})


def _grounding(arguments: argparse.Namespace) -> None:
    if arguments.by == "itc" and arguments.layer is not None:
        raise UserError(f"--layer is {arguments.layer}, but --by itc reads the image encoder's last block; leave --layer out.")
    from lavis_mafa.config.data import AnnotationFile
    from lavis_mafa.datasets.boxes import GroundedImages, read_expressions
    from lavis_mafa.files import new_folder
    from lavis_mafa.runners.step import autocast
    from lavis_mafa.tools import grounding as analysis
    from lavis_mafa.tools.candidates import shuffled
    from lavis_mafa.tools.trained_model import open_model

    expressions = read_expressions([AnnotationFile(arguments.boxes, arguments.images)])
    opened, processors = open_model(arguments.cfg_path, arguments.checkpoint, arguments.options)
    run, looking = opened.run, _looking_layer(opened.model, arguments.layer)
    layer = looking if arguments.by == "itm" else None
    drawn = sorted(shuffled(len(expressions), run.seed, arguments.max_samples).tolist())
    size, grounded = arguments.batch_size or run.batch_size_eval, GroundedImages(*processors, [expressions[number] for number in drawn])
    with autocast(run.precision, opened.device):
        tally = analysis.ground(opened.model, grounded, arguments.by, layer, size)
    figures, images = tally.figures(), len(grounded)
    at = f" at layer {layer}" if layer else ""
    print(f"{len(drawn):,} expressions about {images:,} images; Grad-CAM of {arguments.by.upper()}{at}")
    print(analysis.format_figures(figures))
    if tally.blank:
        print(f"({tally.blank:,} maps are 0 everywhere, which counts as wrong)")
    results = {name: {**asdict(one), "chance": chance} for name, (one, chance) in figures.items()}
    counts = {"expressions": len(drawn), "images": images, "blank": tally.blank}
    more = {"boxes": str(arguments.boxes), "by": arguments.by, "layer": layer, "seed": run.seed, **counts, "results": results}
    _write(new_folder(arguments.output) / "grounding.json", {**_about(arguments, opened, size), **more})


def _grad_cam(arguments: argparse.Namespace) -> None:
    from lavis_mafa import __version__
    from lavis_mafa.config.schema import SoftMask, loss_weights
    from lavis_mafa.files import new_folder, write_text
    from lavis_mafa.runners.step import autocast
    from lavis_mafa.tools import grad_cam as analysis
    from lavis_mafa.tools.pictures import drawn
    from lavis_mafa.tools.report import render
    from lavis_mafa.tools.trained_model import open_model

    opened, processors = open_model(arguments.cfg_path, arguments.checkpoint, arguments.options)
    model, layer = opened.model, _looking_layer(opened.model, arguments.layer)
    if not loss_weights(model.settings)["itm"]:
        raise UserError("model.itm is off, so this model has no matching score to look into.")
    image, caption = analysis.open_pair(arguments.image, arguments.text, processors)
    with autocast(opened.run.precision, opened.device):
        found = analysis.text_maps(model, image, caption, SoftMask(layer=layer))
    output = new_folder(arguments.output)
    about = {"yaml": arguments.cfg_path, "options": arguments.options, "checkpoint": str(arguments.checkpoint)}
    about |= {"image": str(arguments.image), "layer": layer, "probability": found.probability}
    words = [{"word": word.word, **drawn(image.float(), word)} for word in (found.whole, *found.words)]
    page = render("grad_cam.html", about=about, caption=found.caption, words=words, version=__version__)
    write_text(output / "grad_cam.html", page)
    maps = {"whole": found.whole.cam.tolist(), "words": [[word.word, word.cam.tolist()] for word in found.words]}
    print(f"“{found.caption}” matches with probability {found.probability:.2f}; {len(found.words)} words at layer {layer}")
    _write(output / "grad_cam.json", {**about, "caption": found.caption, **maps})


def _pictures(arguments: argparse.Namespace) -> None:
    from lavis_mafa import __version__
    from lavis_mafa.config.schema import loss_weights
    from lavis_mafa.files import new_folder, write_text
    from lavis_mafa.models.momentum import by_momentum
    from lavis_mafa.runners.step import autocast
    from lavis_mafa.tools import pictures as analysis
    from lavis_mafa.tools.candidates import Known
    from lavis_mafa.tools.report import render
    from lavis_mafa.tools.soft_labels import restore_teacher
    from lavis_mafa.tools.trained_model import Reader, open_checkpoint, open_split

    opened = open_checkpoint(arguments.cfg_path, arguments.checkpoint, arguments.options, teacher=True)
    run, model, weights = opened.run, opened.model, loss_weights(opened.model.settings)
    no_momentum = restore_teacher(model, arguments.checkpoint)
    teacher = model if no_momentum is not None else by_momentum(model)
    split = arguments.split or ("val" if "val" in opened.datasets else "train")
    dataset = open_split(opened, split)
    order, size, space = _draw(arguments, opened, dataset), arguments.batch_size or run.batch_size_train, run.grit.search_space
    if size > space:
        raise UserError(f"the batch size is {size}, but must not exceed run.grit.search_space ({space}).")
    output = new_folder(arguments.output)
    with autocast(run.precision, opened.device):
        batches = Reader(dataset, opened, size, output)(order, f"features of {split}")
        pool = analysis.encode_pool(model, teacher, batches, analysis.truth_of(dataset.dataset))
        anchors = analysis.choose_anchors(pool.block, arguments.anchors)
        (samples,) = Reader(dataset, opened, len(anchors), output)(pool.block.index[anchors], "words")
        words = analysis.likeliest_words(teacher, samples, run.seed) if weights.get("mlm") else []
        looks, why_not = _where_words_look(model, weights["itm"] > 0, samples)
    ecm = model.settings.ecm
    found = analysis.negatives(pool.block, size, space, run.seed, Known(ecm.same_image, ecm.same_text))
    shown = analysis.of_anchors(found, anchors)
    probability = {}
    if weights["itm"]:
        pairs = shown.flatten(0, 2)
        probability = analysis.matching(opened, dataset, pool.block.index[pairs[pairs[:, 0] >= 0]], size)
    table = analysis.negatives_table(pool, found)
    content = analysis.page_data(pool, dataset.dataset, anchors, shown, probability, words)
    images = content.pop("images")
    about = {**_about(arguments, opened, size), "split": split, "pairs": len(pool.block), "search_space": space, "seed": run.seed}
    about["teacher"] = "the momentum model" if no_momentum is None else "the model itself"
    values = {"about": about, "table": table, "images": images, "kinds": analysis.KINDS, "top": analysis.TOP, "version": __version__}
    values |= {"looks": looks, "why_not": why_not}
    page = render("pictures.html", **values, **content)
    write_text(output / "pictures.html", page)
    for line in (table.head, *table.rows):
        print(f"{line[0]:28}" + "".join(f"{cell:>16}" for cell in line[1:]))
    _write(output / "pictures.json", {**about, "negatives": [table.head, *table.rows], **content})


def _looking_layer(model: Any, asked: int | None) -> int:
    """Which of the layers that look at images; UserError where words look at none."""
    from lavis_mafa.models.base import DualEncoder
    from lavis_mafa.models.soft_masks import looking_layers, middle

    if not isinstance(model, DualEncoder):
        raise UserError(f"model.arch is {model.settings.arch}, whose texts look at no patches; allowed here: albef_mafa, blip_mafa.")
    return asked or middle(len(looking_layers(model)))


def _where_words_look(model: Any, matches: bool, samples: dict[str, Any]) -> tuple[list[Any], str]:
    """Of each anchor its words with the pictures of their maps; where there are none, why not."""
    from lavis_mafa.config.schema import SoftMask
    from lavis_mafa.tools.pictures import drawn, word_maps_of

    how = getattr(model.settings.itm, "soft_mask", None) or SoftMask()
    if not matches or hasattr(model, "Qformer"):
        return [], "matching is off" if not matches else "queries stand between a BLIP-2's words and the patches"
    try:
        maps = word_maps_of(model, samples, how)
    except UserError as error:
        return [], str(error).removesuffix(".")
    each = zip(samples["image"], maps, strict=True)
    return [[{"word": word.word, **drawn(image.cpu().float(), word)} for word in found] for image, found in each], ""


def _draw(arguments: argparse.Namespace, opened: Opened, dataset: Any) -> Tensor:
    from lavis_mafa.tools.candidates import shuffled

    return shuffled(len(dataset), opened.run.seed, arguments.max_samples)


def _check_groups(batch_size: int) -> None:
    if batch_size < 6:
        raise UserError(f"the batch size is {batch_size}, but Table 2 sums Top1-5 and Top6-B; give a --batch-size of at least 6.")


def _check_masking(arguments: argparse.Namespace, settings: Any, masked: bool) -> None:
    if masked and 0 in (settings.mlm.weight, settings.mlm.mask_probability):
        key = "mask_probability" if settings.mlm.weight else "weight"
        raise UserError(f"model.mlm.{key} is 0: this model does not predict words, so there is nothing to measure.")
    if not masked and (arguments.passes != 1 or arguments.mask_probability):
        raise UserError(
            f"--passes and --mask-probability are for masked language modelling, but {settings.arch} predicts every next word."
        )
    if 0.0 in (arguments.mask_probability or ()):
        raise UserError("--mask-probability is 0, which masks no word; allowed: above 0, up to 1.")


def _about(arguments: argparse.Namespace, opened: Opened, size: int) -> dict[str, Any]:
    names = {"yaml": arguments.cfg_path, "checkpoint": str(opened.checkpoint), "options": arguments.options}
    return {**names, "arch": opened.model.settings.arch, "batch_size": size, "max_samples": arguments.max_samples}


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written: {path.parent}")
