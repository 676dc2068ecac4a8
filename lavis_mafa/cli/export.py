"""``lavis-mafa export CHECKPOINT --for albef_vqa --output X.pth``: for LAVIS's own classes, transformers, or sharing."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from lavis_mafa.cli.options import positive
from lavis_mafa.errors import UserError

ARGUMENT = "CHECKPOINT"
OF_ALBEF = ("albef_pretrain", "albef_retrieval", "albef_classification", "albef_vqa", "albef_nlvr")
OF_BLIP = ("blip_pretrain", "blip_retrieval", "blip_caption", "blip_vqa", "blip_classification", "blip_nlvr")
HF_BLIP, HUB = "hf-blip", "hub"
TARGETS = (*OF_ALBEF, *OF_BLIP, "blip2", HF_BLIP)  # of lavis_mafa.tools.export, for which --help need not wait
LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", type=Path, metavar=ARGUMENT, help="ours, LAVIS's, the authors' or Hugging Face's: a file, or a folder")
    text = f"LAVIS's class that is to load it ({', '.join(TARGETS[:-1])}), {HF_BLIP}, a folder for transformers, or {HUB}, one to share"
    add("--for", dest="target", required=True, choices=(*TARGETS, HUB), metavar="CLASS", help=text)
    add("--output", type=Path, required=True, metavar="X.pth", help=f"a new file; of {HF_BLIP} and {HUB} a new folder")
    add("--queue-size", type=positive, metavar="N", help="features in the queues of pre-training and retrieval (default: LAVIS's)")
    add("--image-size", type=positive, metavar="PIXELS", help="resize position embeddings for such images (default: as they are)")
    add("--tokenizer", metavar="NAME", help=f"of {HF_BLIP} (default: that of the training, else bert-base-uncased)")
    add("--license", metavar="NAME", help=f"of {HUB}: by Hugging Face's name, such as apache-2.0 (default: the card asks for one)")


def run(arguments: argparse.Namespace) -> int:
    target, output = arguments.target, arguments.output
    if output.exists() or output.is_symlink():
        raise UserError(f"--output: {output} exists already and is not overwritten; give another name.")
    if target not in (HF_BLIP, HUB) and output.suffix not in (".pth", ".pt"):
        raise UserError(f"--output is {str(output)!r}, but LAVIS reads files that torch writes; give a name that ends in .pth.")
    if target != HF_BLIP and arguments.tokenizer is not None:
        raise UserError(f"--tokenizer is given, but {target} takes none; allowed with: {HF_BLIP}.")
    if target == HUB and arguments.image_size is not None:
        raise UserError(f"--image-size is given, but {HUB} writes a model as it was trained; allowed with the others.")
    if arguments.license is not None and target != HUB:
        raise UserError(f"--license is given, but {target} has no model card; allowed with: {HUB}.")
    if arguments.license is not None and not LICENCE.fullmatch(arguments.license):
        raise UserError(
            f"--license is {arguments.license!r}; allowed: a name of Hugging Face's list, such as mit, apache-2.0, cc-by-4.0."
        )
    from lavis_mafa.named_weights import fetched
    from lavis_mafa.tools import export
    from lavis_mafa.weights import read_weights, write_atomically

    queued = [name for name, to in export.TARGETS.items() if to.queue]
    if arguments.queue_size is not None and target not in queued:
        raise UserError(f"--queue-size is given, but {target} has no queues; allowed with: {', '.join(queued)}.")
    path = Path(fetched(str(arguments.checkpoint), ARGUMENT))
    if target == HUB:
        from lavis_mafa.tools.hub import share

        files = share(path, output, ARGUMENT, arguments.license)
        print(f"{output}: {', '.join(files)}. Nothing was uploaded; read README.md, and fill in what it asks for, before it is.")
        return 0
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
