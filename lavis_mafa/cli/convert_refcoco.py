"""``lavis-mafa convert-refcoco``: RefCOCO+'s official files and a detector's boxes as ``grit_boxes`` reads them."""

from __future__ import annotations

import argparse
import json
import pickle  # noqa: TID251 - its reader below makes no object of any class
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from lavis_mafa.config.data import SPLITS as SPLITS_OF
from lavis_mafa.errors import UserError

SPLITS = SPLITS_OF["grit_boxes"]
CORNERS = ("left", "top", "right", "bottom")
Box = tuple[float, float, float, float]
Made = TypeVar("Made")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--refs", required=True, type=Path, metavar="FILE", help="'refs(unc).p': expressions, and what they are about")
    add("--instances", required=True, type=Path, metavar="FILE", help="instances.json: images, and the boxes of things")
    text = "image id -> [[left, top, width, height, ...], ...], such as MAttNet's; needed for the splits that are evaluated"
    add("--detections", required=True, type=Path, metavar="FILE", help=text)
    add("--output", required=True, type=Path, metavar="FOLDER", help="a new folder, for a .jsonl file of each split")


def run(arguments: argparse.Namespace) -> int:
    if arguments.output.exists():
        raise UserError(f"--output is {str(arguments.output)!r}, which exists; allowed: a new folder.")
    from lavis_mafa.files import write_text

    refs, instances = read_refs(arguments.refs), _read_json(arguments.instances, "--instances")
    rows = converted(refs, instances, _read_json(arguments.detections, "--detections"))

    arguments.output.mkdir(parents=True)
    for split, of_split in rows.items():
        write_text(arguments.output / f"{split}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in of_split))
        images = len({row["image"] for row in of_split})
        print(f"{arguments.output / split}.jsonl: {len(of_split):,} expressions about {images:,} images")
    return 0


# --- reading ----------------------------------------------------------------------------------------------------------


class _PlainData(pickle.Unpickler):
    """Lists, dictionaries, texts and numbers; whatever else a pickle asks for is refused before it is made."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise UserError(f"it asks for {module}.{name}, and plain data have no need of code")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise UserError("it asks for an object that is elsewhere")


def read_refs(path: Path) -> Any:
    """The content of ``refs(unc).p``, a pickle; nothing in it can run.

    Raises:
        UserError: there is no such file, it is torn, or holds anything but plain data.
    """
    with _opened(path, "--refs") as file:
        try:
            return _PlainData(file, encoding="utf-8", errors="replace").load()
        except UserError as error:
            raise UserError(f"--refs: {path} is refused: {error}.") from error
        except Exception as error:  # a torn pickle can raise anything
            raise UserError(f"--refs: {path} is no pickle of plain data, or torn ({type(error).__name__}).") from error


def _read_json(path: Path, flag: str) -> Any:
    with _opened(path, flag) as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{flag}: {path} is not valid JSON ({error}).") from error


def _opened(path: Path, flag: str) -> Any:
    if not path.is_file():
        raise UserError(f"{flag} is {str(path)!r}, but there is no such file.")
    return path.open("rb")


# --- converting -------------------------------------------------------------------------------------------------------


def converted(refs: Any, instances: Any, detections: Any) -> dict[str, list[dict[str, Any]]]:
    """Split -> rows of ``grit_boxes``; those to train on have an image and a text alone.

    Boxes are cut where they leave their image, and detections without area left out: they can be neither hot nor right.

    Raises:
        UserError: a file has not its form, or knows nothing of what another names.
    """
    form = "allowed: that of RefCOCO+"
    images: dict[int, tuple[str, int, int]] = _expected(
        lambda: {int(i["id"]): (i["file_name"].strip(), int(i["width"]), int(i["height"])) for i in instances["images"]},
        f"--instances has no 'images', each with id, file_name, width and height; {form}.",
    )
    things: dict[int, Box] = _expected(
        lambda: {int(one["id"]): _box(one["bbox"]) for one in instances["annotations"]},
        f"--instances has no 'annotations', each with id and bbox; {form}.",
    )
    found: dict[int, list[Box]] = _expected(
        lambda: {int(image): [_box(box) for box in boxes] for image, boxes in detections.items()},
        "--detections has another form; allowed: {image id: [[left, top, width, height, ...], ...], ...}.",
    )
    rows: dict[str, list[dict[str, Any]]] = {}
    for number, ref in enumerate(refs if isinstance(refs, list) else [refs]):
        where = f"--refs, entry {number}"
        split, image, thing, sentences = _expected(
            lambda ref=ref: (  # type: ignore[misc]
                str(ref["split"]),
                int(ref["image_id"]),
                int(ref["ann_id"]),
                [(int(one["sent_id"]), one["sent"].strip()) for one in ref["sentences"]],
            ),
            f"{where} has no split, image_id, ann_id or sentences; {form}.",
        )
        if split not in SPLITS:
            raise UserError(f"{where} is of split {split!r:.60}; allowed: {', '.join(SPLITS)}.")
        if image not in images or thing not in things:
            what = f"image {image}" if image not in images else f"annotation {thing}"
            raise UserError(f"{where} is about {what}, which --instances does not know.")
        name, *size = images[image]
        boxes: dict[str, Any] = {}
        if split != "train":
            if image not in found:
                raise UserError(f"{where} is about image {image} of {split}, of which --detections has nothing.")
            box, *others = (_corners(one, *size) for one in (things[thing], *found[image]))
            if box is None:
                raise UserError(f"--instances: annotation {thing} has no area in its image of {size[0]} x {size[1]} pixels.")
            boxes = {"box": box, "boxes": [one for one in others if one is not None]}
        for sentence, text in sentences:
            rows.setdefault(split, []).append({"image": name, "text": text, **boxes, "expression_id": sentence})
    if not rows:
        raise UserError(f"--refs has no expressions; {form}.")
    return rows


def _box(values: Any) -> Box:
    left, top, width, height = map(float, values[:4])
    return left, top, left + width, top + height


def _corners(box: Box, width: int, height: int) -> dict[str, float] | None:
    """What of a box is within its image; None where that is nothing."""
    left, top, right, bottom = max(box[0], 0.0), max(box[1], 0.0), min(box[2], float(width)), min(box[3], float(height))
    return dict(zip(CORNERS, (left, top, right, bottom), strict=True)) if left < right and top < bottom else None


def _expected(get: Callable[[], Made], message: str) -> Made:
    """What is there where a file has the form that it should have."""
    try:
        return get()
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(message) from error
