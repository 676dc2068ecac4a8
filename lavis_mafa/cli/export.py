"""``lavis-mafa export CHECKPOINT --for albef_vqa --output X.pth``: a checkpoint for LAVIS's own classes, or for transformers."""

from __future__ import annotations

import argparse
from pathlib import Path

from lavis_mafa.cli.options import positive
from lavis_mafa.errors import UserError

ARGUMENT = "CHECKPOINT"
OF_ALBEF = ("albef_pretrain", "albef_retrieval", "albef_classification", "albef_vqa", "albef_nlvr")
OF_BLIP = ("blip_pretrain", "blip_retrieval", "blip_caption", "blip_vqa", "blip_classification", "blip_nlvr")
HF_BLIP = "hf-blip"
TARGETS = (*OF_ALBEF, *OF_BLIP, "blip2", HF_BLIP)  # of lavis_mafa.tools.export, for which --help need not wait


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", type=Path, metavar=ARGUMENT, help="ours, LAVIS's, the authors' or Hugging Face's: a file, or a folder")
    text = f"LAVIS's class that is to load it ({', '.join(TARGETS[:-1])}), or {HF_BLIP}, a folder for transformers"
    add("--for", dest="target", required=True, choices=TARGETS, metavar="CLASS", help=text)
    add("--output", type=Path, required=True, metavar="X.pth", help=f"a new file; of {HF_BLIP} a new folder")
    add("--queue-size", type=positive, metavar="N", help="features in the queues of pre-training and retrieval (default: LAVIS's)")
    add("--image-size", type=positive, metavar="PIXELS", help="resize position embeddings for such images (default: as they are)")
    add("--tokenizer", metavar="NAME", help=f"of {HF_BLIP} (default: that of the training, else bert-base-uncased)")


def run(arguments: argparse.Namespace) -> int:
    target, output = arguments.target, arguments.output
    if output.exists() or output.is_symlink():
        raise UserError(f"--output: {output} exists already and is not overwritten; give another name.")
    if target != HF_BLIP and output.suffix not in (".pth", ".pt"):
        raise UserError(f"--output is {str(output)!r}, but LAVIS reads files that torch writes; give a name that ends in .pth.")
    if target != HF_BLIP and arguments.tokenizer is not None:
        raise UserError(f"--tokenizer is given, but {target} is written without one; allowed with: {HF_BLIP}.")
    from lavis_mafa.named_weights import fetched
    from lavis_mafa.tools import export
    from lavis_mafa.weights import read_weights, write_atomically

    queued = [name for name, to in export.TARGETS.items() if to.queue]
    if arguments.queue_size is not None and target not in queued:
        raise UserError(f"--queue-size is given, but {target} has no queues; allowed with: {', '.join(queued)}.")
    path = Path(fetched(str(arguments.checkpoint), ARGUMENT))
    source, before = f"{ARGUMENT}: {path}", read_weights(path, ARGUMENT)
    if target == HF_BLIP:
        trained = export.trained_by(path, ARGUMENT)
        after = export.write_hf_blip(before, trained, output, source, arguments.tokenizer, arguments.image_size)
        use = "BlipForImageTextRetrieval.from_pretrained reads it"
    else:
        after = export.exported(before, target, source, arguments.queue_size, arguments.image_size)
        write_atomically({"model": after}, output)
        use = f"give it as {export.TARGETS[target].given_as}"
    print(f"{output}: {export.summary(before, after, target)}. For {target}: {use}.")
    return 0
