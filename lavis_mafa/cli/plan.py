"""``lavis-mafa plan YAML``: parameters, memory, FLOPs and hours of a training, computed before it starts (MAFA Table 12)."""

from __future__ import annotations

import argparse
import json
import logging
import os
import warnings
from dataclasses import asdict, replace
from pathlib import Path

from lavis_mafa.cli.options import number, positive, share
from lavis_mafa.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("yaml", nargs="?", default=argparse.SUPPRESS, help="a file, or a name that `lavis-mafa ls` shows")
    which.add_argument("--cfg-path", dest="yaml", metavar="YAML", help="the same, as of `lavis-mafa train`")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--batch-size", type=positive, metavar="N", help="pairs per GPU instead of run.batch_size_train")
    parser.add_argument("--gpus", type=positive, default=1, metavar="N", help="default: 1")
    parser.add_argument(
        "--samples",
        type=positive,
        metavar="N",
        help="pairs of an epoch; default: the YAML's data where they are here, else what is published, or 5e6 (4M-Noisy)",
    )
    parser.add_argument("--text-length", type=positive, metavar="N", help="tokens of a caption; default: the longest allowed")
    parser.add_argument(
        "--new-positives", type=_of_batch, default=0.0, metavar="SHARE", help="pairs that Con-D adds to the LM, of a batch"
    )
    parser.add_argument("--own-vit", action="store_true", help="Con-D's ViT has other weights than a BLIP-2's frozen one")
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument("--throughput", type=number, metavar="X", help="pairs a second of all GPUs")
    speed.add_argument("--peak", type=number, metavar="X", help="TFLOP/s of a GPU; default: an A100's in run.precision")
    parser.add_argument("--share", type=share, default=0.4, metavar="X", help="of the peak that is reached; default: 0.4")
    parser.add_argument("--measure", action="store_true", help="also time a few steps on this machine (small models)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there, in bytes, FLOPs and seconds")


def run(arguments: argparse.Namespace) -> int:
    from lavis_mafa.config.check import check_yaml
    from lavis_mafa.config.schema import MODEL_BLOCKS, RUN_BLOCKS, typed_block

    _check_json(arguments.json)
    batch = [] if arguments.batch_size is None else [f"run.batch_size_train={arguments.batch_size}"]
    config = check_yaml(arguments.yaml, [*arguments.options, *batch], files=False)
    arch, task = config.model.arch, config.run.task
    if arch not in MODEL_BLOCKS:
        raise UserError(f"model.arch is {arch!r}, of which only LAVIS knows the sizes; plan knows: {', '.join(MODEL_BLOCKS)}.")
    if task not in RUN_BLOCKS:
        raise UserError(f"run.task is {task!r}, but plan knows: {', '.join(RUN_BLOCKS)}.")
    model, job = typed_block("model", config.model), typed_block("run", config.run)
    if job.evaluate:
        raise UserError(f"run.evaluate is true, but a plan is of a training. ({arguments.yaml})")
    if arguments.text_length is not None and not 3 <= arguments.text_length <= model.max_text_length:
        raise UserError(f"--text-length is {arguments.text_length}, but must be 3 to model.max_text_length ({model.max_text_length}).")

    logging.disable(logging.INFO)  # LAVIS logs what it builds
    with warnings.catch_warnings():  # of LAVIS's dependencies
        warnings.simplefilter("ignore")
        from lavis_mafa.tools.plan import Wanted, make_plan, measure, published_rows, table, training_rows

        rows = training_rows(config) if arguments.samples is None else None
    names = ("gpus", "text_length", "new_positives", "own_vit", "throughput", "peak", "share")
    wanted = Wanted(**{name: getattr(arguments, name) for name in names})
    if arguments.samples is not None:
        wanted = replace(wanted, samples=arguments.samples, samples_from="as given")
    elif rows is not None:
        wanted = replace(wanted, samples=rows, samples_from="those of the YAML's data")
    elif (published := published_rows(config)) is not None:
        wanted = replace(wanted, samples=published, samples_from="as published: the YAML's data are not here (--samples)")
    plan = make_plan(model, job, wanted)
    timed = None
    if arguments.measure:
        timed = measure(model, job, plan, wanted.own_vit)
        if wanted.throughput is None and wanted.peak is None:
            speed = arguments.gpus * plan.size.batch / timed.seconds
            plan = replace(plan, pairs_a_second=speed, assumption=f"{speed:,.1f} pairs a second, as measured below")
    print(table(plan))
    if timed is not None:
        print("\n" + timed.line(plan.size.batch, job.grit.search_space))
    if arguments.json is not None:
        measured = None if timed is None else {"kind": "measured", **asdict(timed)}
        content = {"yaml": arguments.yaml, **plan.as_dict(), "measured": measured}
        arguments.json.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return 0


def _of_batch(text: str) -> float:
    return share(text, 2.0)  # Con-D may add two pairs for each own one


def _check_json(path: Path | None) -> None:
    """The file can be written: said before the work; raises UserError."""
    if path is not None and not path.absolute().parent.is_dir():
        raise UserError(f"--json is {str(path)!r}, but there is no folder {path.parent}.")
    if path is not None and (path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK)):
        raise UserError(f"--json is {str(path)!r}, which cannot be written; give a file.")
