# PYTHON_ARGCOMPLETE_OK
"""``lavis-mafa``: one sub-command a file. A user's mistake is one message and exit code 2; ctrl-C is 130."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import os
import select
import sys
import warnings
from typing import Any, NoReturn

from lavis_mafa import __version__
from lavis_mafa import signals as interrupt
from lavis_mafa.cli.complete import complete
from lavis_mafa.errors import RankLost, UserError, WorkerLost, death_of_a_worker, did_you_mean, of_the_file_system
from lavis_mafa.plugin import beyond_tested

COMMANDS = {
    "train": "pre-train or fine-tune from a YAML (same flags as LAVIS's train.py)",
    "evaluate": "evaluate from a YAML, without training",
    "quickstart": "train random batches, GRIT and MAFA on scenes and show what was found",
    "count-false-negatives": "how many false negatives do these data have, before training anything",
    "mine": "find missing image-text connections and write them as an annotation file",
    "train-teacher": "train a small language model on a YAML's captions, for ViLTA",
    "analyse": "look into a trained model, without training it",
    "ablate": "run the rows of a paper's ablation table, several seeds, and print it",
    "report": "one HTML page about one or more runs: curves, connections, retrieval",
    "explore": "look at a run's connections in a browser and mark which are right",
    "compare": "is one run better than another: retrieval query by query, with intervals and p",
    "plan": "parameters, memory, FLOPs and hours that a YAML will take",
    "check-data": "find images and captions that training could not use, and write annotations without them",
    "audit": "check, count and mine one's pairs before any training, on one page",
    "export": "write a checkpoint as LAVIS's own classes, or transformers, load it, or as a folder to share",
    "index-shards": "index tar shards, so that they are trained on without unpacking them",
    "pack": "put images and captions into one Arrow file, from Parquet with image bytes or from folders",
    "regroup": "write tar shards whose runs of a batch are GRIT groups, for readers of streams",
    "build-emoji": "build the embedded emoji data into a folder",
    "build-scenes": "build scenes of emoji whose truth is known, with questions and sentences about them",
    "convert-refcoco": "write RefCOCO+'s official files and a detector's boxes as grit_boxes reads them",
    "init": "write a YAML for one's own pairs, whose sizes fit data and machine",
    "validate": "check YAMLs without running them",
    "ls": "list the project YAMLs that come with this package",
    "cp": "copy one of them to edit it",
}

EXAMPLES = {  # shown by `lavis-mafa COMMAND --help`
    "train": """
  lavis-mafa train --cfg-path my.yaml
  lavis-mafa train --cfg-path my.yaml --resume auto --options run.max_epoch=5 model.discriminator.checkpoint=output/con_d/latest
  torchrun --nproc_per_node=8 -m lavis_mafa train --cfg-path mafa/blip2/train/stage_1.yaml""",
    "evaluate": """
  lavis-mafa evaluate output/mafa/latest
  lavis-mafa evaluate output/mafa/latest --options run.test_splits=[test] run.batch_size_eval=128
  lavis-mafa evaluate --cfg-path mafa/albef/eval/retrieval_own.yaml --options model.pretrained=output/mafa/latest""",
    "quickstart": """
  lavis-mafa quickstart
  lavis-mafa quickstart --model blip2 --folder trial""",
    "audit": """
  lavis-mafa audit pairs.csv --images images
  lavis-mafa audit pairs.csv --images images --con-d output/con_d/latest
  lavis-mafa audit cc3m.tsv --images cc3m --columns image=filepath caption=title --con-d lavis:albef_retrieval/coco --samples 2e4""",
    "init": """
  lavis-mafa init --data pairs.csv --images images --model albef --size tiny --output con_d.yaml
  lavis-mafa init --data pairs.csv --images images --model albef --size tiny --con-d output/con_d/latest --output mafa.yaml
  lavis-mafa init --data cc3m.tsv --images cc3m --model blip --size base --con-d lavis:blip_retrieval/coco --output cc3m.yaml""",
    "count-false-negatives": """
  lavis-mafa count-false-negatives --cfg-path my.yaml --con-d output/con_d/latest
  lavis-mafa count-false-negatives --cfg-path my.yaml --con-d lavis:albef_retrieval/coco --batch-size 96 384 --samples 1e5""",
    "mine": """
  lavis-mafa mine --cfg-path my.yaml --con-d output/con_d/latest
  lavis-mafa mine --cfg-path my.yaml --con-d output/con_d/latest --margin 0.95 --per-image 5 --output output/mined
  lavis-mafa mine --again output/mine --reviewed output/mine/marks.parquet --output output/reviewed
  lavis-mafa mine --annotations pairs.csv --features images.npy texts.npy --guide-features guide_images.npy guide_texts.npy""",
    "train-teacher": """
  lavis-mafa train-teacher --cfg-path my.yaml --output output/teacher""",
    "analyse": """
  lavis-mafa analyse pictures --cfg-path my.yaml --checkpoint output/mafa/latest
  lavis-mafa analyse grad-cam --cfg-path my.yaml --checkpoint output/mafa/latest --image dog.jpg --text 'a dog on a beach'""",
    "ablate": """
  lavis-mafa ablate --list --table mafa-4
  lavis-mafa ablate --table mafa-4 --scenes --seeds 42""",
    "report": """
  lavis-mafa report output/mafa/latest
  lavis-mafa report output/grit/latest output/mafa/latest --output both.html
  lavis-mafa report output/count output/mine --output found.html""",
    "explore": """
  lavis-mafa explore output/mine
  lavis-mafa explore output/mafa/latest --port 0 --open""",
    "compare": """
  lavis-mafa compare output/grit/latest output/mafa/latest""",
    "plan": """
  lavis-mafa plan my.yaml
  lavis-mafa plan mafa/albef/train/pretrain.yaml --gpus 4 --samples 5e6""",
    "check-data": """
  lavis-mafa check-data --cfg-path my.yaml
  lavis-mafa check-data --annotations train.csv val.csv --images images --clean clean.jsonl""",
    "export": """
  lavis-mafa export output/albef/latest --for albef_retrieval --output albef_retrieval.pth
  lavis-mafa export ALBEF.pth --for albef_vqa --image-size 384 --output albef_vqa.pth
  lavis-mafa export output/blip/latest --for hf-blip --output blip-itm
  lavis-mafa export output/mafa/latest --for hub --license apache-2.0 --output my-albef""",
    "index-shards": """
  lavis-mafa index-shards 'data/{00000..00099}.tar' --output pairs.arrow
  lavis-mafa index-shards 'data/*.tar' --caption-key caption --output pairs.arrow""",
    "pack": """
  lavis-mafa pack 'data/train-*.parquet' --caption text --output pairs.arrow
  lavis-mafa pack 00000.parquet --image jpg --output pairs.arrow
  lavis-mafa pack pairs.jsonl --images /data/images --output pairs.arrow""",
    "regroup": """
  lavis-mafa regroup --shards 'data/{00000..00099}.tar' --features img_emb.npy text_emb.npy --batch-size 96 --output grouped""",
    "convert-refcoco": """
  lavis-mafa convert-refcoco --refs 'refs(unc).p' --instances instances.json --detections dets.json --output data/refcoco_plus""",
    "build-emoji": """
  lavis-mafa build-emoji data/emoji""",
    "build-scenes": """
  lavis-mafa build-scenes data/scenes""",
    "validate": """
  lavis-mafa validate my.yaml
  lavis-mafa validate --no-files my.yaml --options run.batch_size_train=192""",
    "ls": """
  lavis-mafa ls
  lavis-mafa ls blip2""",
    "cp": """
  lavis-mafa cp mafa/albef/train/pretrain.yaml my.yaml""",
}

# flags and arguments that are paths, beside those of type Path
PATHS = ("cfg_path", "yaml", "con_d", "miner", "base", "finetune", "resume")


class _Store(argparse.Action):
    """A flag given twice: lists are joined, two values that contradict are a mistake. argparse would take the last in silence."""

    given: Any = None

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        if self.nargs in ("+", "*") and option is not None:
            values = [*(self.given or []), *values]
        elif option is not None and self.given is not None and self.given != values:
            parser.error(f"{option} is given twice: {self.given} and {values}")
        self.given = values
        setattr(namespace, self.dest, values)


class _Parser(argparse.ArgumentParser):
    """argparse, except for flags that are given twice, and that a wrong argument is one line like every other mistake, without the
    usage before it."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.register("action", None, _Store)
        self.register("action", "store", _Store)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See `{self.prog} --help`.")


class _Help(argparse.HelpFormatter):
    """Indented lines, of examples, are kept as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = text.splitlines()
        return "\n".join(line if line.startswith(" ") else super(_Help, self)._fill_text(line, width, indent) for line in lines)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    # threads that wait by spinning take the cores from the data loader: ten times slower on a busy two-core machine
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a caption in any script is no traceback on a terminal that has not its letters
            stream.reconfigure(errors="backslashreplace")
    own_process = argv is None
    if own_process and "_ARGCOMPLETE" in os.environ:
        complete(_parser)
    argv = sys.argv[1:] if argv is None else argv
    name = " ".join(["lavis-mafa", *(n for n in argv[:1] if n in COMMANDS)])
    goodbye = f"{name}: stopped; what was saved before is kept."
    if own_process:
        interrupt.watch(goodbye)
        warnings.simplefilter("ignore", FutureWarning)  # of what LAVIS imports, which its user cannot change
    try:
        arguments = _arguments(argv)
        code = int(arguments.run(arguments) or 0)
        sys.stdout.flush()  # here, where a reader that has left is no traceback
        return code
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except RankLost as error:
        if str(error):  # else another rank has said it
            print(f"{name}: {error}", file=sys.stderr)
        return RankLost.EXIT_CODE
    except interrupt.Stopped as stopped:
        if stopped.message:
            with contextlib.suppress(OSError):  # of a terminal that was closed
                print(f"{name}: {stopped.message}", file=sys.stderr)
        return int(stopped.code or 0)
    except (Exception, KeyboardInterrupt) as error:
        if own_process and interrupt.asked():
            interrupt.leave()
        if isinstance(error, KeyboardInterrupt):
            print(goodbye, file=sys.stderr)
            return interrupt.exit_code()
        if isinstance(error, BrokenPipeError) and _reader_left():
            return 1
        if (death := death_of_a_worker(error)) is not None:
            print(f"{name}: {WorkerLost(death, 'What was saved before is kept.')}", file=sys.stderr)
            return WorkerLost.EXIT_CODE
        message = of_the_file_system(error) if isinstance(error, OSError) else None
        if message is None:
            raise
        print(f"{name}: {message}", file=sys.stderr)
        return 2


def _arguments(argv: list[str]) -> argparse.Namespace:
    asked = argv[0] if argv else ""
    if asked not in COMMANDS and not asked.startswith("-"):
        wrong = f"{asked!r} is no command" if asked else "a command is missing"
        raise UserError(f"{wrong}; allowed: {', '.join(COMMANDS)}.{did_you_mean(asked, COMMANDS)}")
    if asked in COMMANDS and sys.version_info >= (3, 12) and importlib.util.find_spec("lavis") is None:
        here = ".".join(map(str, sys.version_info[:2]))
        raise UserError(
            f"LAVIS 1.0.2 needs Python 3.11 or older, and this is {here}; lavis_mafa.objectives and lavis_mafa.grit work here."
        )
    if asked in COMMANDS and (message := beyond_tested()) is not None:
        raise UserError(message)
    parser = _parser(asked)
    try:
        arguments = parser.parse_args(argv)
    finally:
        sys.stdout.flush()  # of --help
    from lavis_mafa.config.read import expand_arguments  # needs OmegaConf, for which --help need not wait

    expand_arguments(arguments, PATHS)
    return arguments


def _parser(asked: str) -> argparse.ArgumentParser:
    """Of all commands; only the asked one has its arguments, since only its module is imported: `lavis-mafa ls` must not wait for
    torch."""
    parser = _Parser(prog="lavis-mafa", description="MAFA for LAVIS: manage false negatives in pre-training.")
    parser.add_argument("--version", action="version", version=f"lavis-mafa {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, formatter_class=_Help)
        if asked == name:
            module = importlib.import_module(f"lavis_mafa.cli.{name.replace('-', '_')}")  # noqa: TID251 - of the table above
            module.add_arguments(command)
            command.epilog = "\n".join(filter(None, (f"examples:{EXAMPLES.get(name, '')}", command.epilog)))
            command.set_defaults(run=module.run)
    return parser


def _reader_left() -> bool:
    """Is the other end of our output closed (``lavis-mafa ls | head``)? Then what is left of it goes nowhere."""
    output = sys.stdout.fileno()
    poll = select.poll()  # a broken pipe may also be that of a worker, or of another rank
    poll.register(output, 0)
    closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return closed
