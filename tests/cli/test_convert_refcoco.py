"""`convert-refcoco` on files of RefCOCO+'s form: the rows it writes, and what it refuses; its pickle runs nothing."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from PIL import Image

from lavis_mafa.cli.convert_refcoco import read_refs
from lavis_mafa.cli.main import main
from lavis_mafa.config.data import AnnotationFile
from lavis_mafa.datasets.boxes import GroundedImages, read_expressions
from lavis_mafa.errors import UserError

SPLITS = ("train", "val", "testA", "testB")


def ref(number: int, split: str, *texts: str) -> dict:
    sentences = [
        {"sent_id": 10 * number + n, "sent": text, "raw": text.upper(), "tokens": text.split()} for n, text in enumerate(texts)
    ]
    return {"ref_id": number, "ann_id": 100 + number, "image_id": number, "split": split, "sentences": sentences, "category_id": 1}


@pytest.fixture
def files(tmp_path):
    """Four images, 40 x 30, each with a thing of one split; write them again with `save`."""
    content = {
        "refs": [ref(number, split, f"thing {number}", "the left one") for number, split in enumerate(SPLITS)],
        "instances": {
            "images": [{"id": n, "file_name": f"{n}.jpg", "width": 40, "height": 30, "license": 1} for n in range(4)],
            "annotations": [{"id": 100 + n, "image_id": n, "bbox": [n + 0.5, 2, 10.25, 20], "area": 1.0} for n in range(4)],
        },
        "detections": {str(n): [[n, 2, 10, 20, 1, 0.9], [30, 10, 20, 30, 2, 0.8], [5, 5, 0, 3, 2, 0.1]] for n in (1, 2, 3)},
    }

    def save() -> list[str]:
        (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(content["refs"], protocol=2))
        names = {"refs": tmp_path / "refs(unc).p"}
        for name in ("instances", "detections"):
            names[name] = tmp_path / f"{name}.json"
            names[name].write_text(json.dumps(content[name]))
        return ["convert-refcoco", *(part for name, path in names.items() for part in (f"--{name}", str(path)))]

    return content, save


def rows(folder: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def test_each_split_is_written_as_it_is_read(files, tmp_path):
    _, save = files
    folder = tmp_path / "converted"
    assert main([*save(), "--output", str(folder)]) == 0
    assert sorted(path.stem for path in folder.iterdir()) == sorted(SPLITS)
    assert rows(folder, "train") == [
        {"image": "0.jpg", "text": "thing 0", "expression_id": 0},
        {"image": "0.jpg", "text": "the left one", "expression_id": 1},
    ]
    for number, split in enumerate(SPLITS[1:], 1):
        Image.new("RGB", (40, 30)).save(tmp_path / f"{number}.jpg")
        expressions = read_expressions([AnnotationFile(folder / f"{split}.jsonl", tmp_path)])
        assert [one.expression_id for one in expressions] == [10 * number, 10 * number + 1]
        assert [one.text for one in expressions] == [f"thing {number}", "the left one"]
        first = GroundedImages(lambda picture: picture, str, expressions).expressions[0]
        assert first.box == (number + 0.5, 2, number + 10.75, 22)
        assert first.boxes == ((number, 2, number + 10, 22), (30, 10, 40, 30)), "cut at the image's edge; without area left out"
        assert first.hits == 1


class Attack:
    def __reduce__(self):
        return print, ("it ran",)


def test_no_pickle_runs_anything(tmp_path, capsys):
    for number, attack in enumerate(
        (
            pickle.dumps([ref(0, "train", "a"), Attack()]),
            pickle.dumps([{"split": print}], protocol=0),
            b"\x80\x04\x8c\x08builtins\x8c\x05print\x93\x8c\x06it ran\x85R.",  # STACK_GLOBAL
            b"cos\nsystem\n(S'echo it ran'\ntR.",
            b"\x80\x02\x82\x01.",  # a class by its number in copyreg
            b"Pelsewhere\n.",  # a persistent id
            b"\x80\x02]q\x00(",
            b"",
            b"\x00" * 9,
        )
    ):
        path = tmp_path / f"{number}.p"
        path.write_bytes(attack)
        with pytest.raises(UserError, match="is refused: it asks for|is no pickle of plain data, or torn") as raised:
            read_refs(path)
        assert len(raised.value.messages) == 1 and "it ran" not in capsys.readouterr().out
    with pytest.raises(UserError, match="it asks for builtins.print, and plain data have no need of code"):
        read_refs(tmp_path / "0.p")


def test_texts_of_python_2_are_read(tmp_path):
    (tmp_path / "refs.p").write_bytes(b"\x80\x02}U\x05splitU\x03vals.")  # byte strings, as the official file has them
    assert read_refs(tmp_path / "refs.p") == {"split": "val"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["detections"].pop("2"), "--refs, entry 2 is about image 2 of testA, of which --detections has nothing."),
        (lambda c: c["instances"]["images"].pop(1), "--refs, entry 1 is about image 1, which --instances does not know."),
        (lambda c: c["instances"]["annotations"].pop(), "--refs, entry 3 is about annotation 103, which --instances does not know."),
        (lambda c: c["instances"]["annotations"][1].update(bbox=[50, 2, 3, 4]), "annotation 101 has no area in its image of 40 x 30"),
        (lambda c: c["instances"]["annotations"][1].update(bbox=[1, 2]), "--instances has no 'annotations', each with id and bbox"),
        (lambda c: c.update(instances=[]), "--instances has no 'images', each with id, file_name, width and height"),
        (lambda c: c.update(detections=[{"image_id": 1, "box": [1, 2, 3, 4]}]), "--detections has another form; allowed: {image id:"),
        (lambda c: c["detections"].update({"1": [["a", 2, 3, 4]]}), "--detections has another form"),
        (lambda c: c["refs"][1].pop("sentences"), "--refs, entry 1 has no split, image_id, ann_id or sentences"),
        (
            lambda c: c["refs"][1].update(split="minival"),
            "--refs, entry 1 is of split 'minival'; allowed: train, val, testA, testB, test.",
        ),
        (lambda c: c.update(refs=[]), "--refs has no expressions"),
        (lambda c: c.update(refs={"a": 1}), "--refs, entry 0 has no split"),
    ],
)
def test_what_does_not_fit_is_one_message(files, tmp_path, refused, change, message):
    content, save = files
    change(content)
    assert message in refused(*save(), "--output", tmp_path / "converted") and not (tmp_path / "converted").exists()


def test_files_that_are_not_there_or_broken(files, tmp_path, refused):
    command = [*files[1](), "--output", tmp_path / "converted"]
    (tmp_path / "instances.json").write_text("{")
    assert "--instances: " in (said := refused(*command)) and "is not valid JSON" in said
    (tmp_path / "instances.json").unlink()
    assert "--instances is " in (said := refused(*command)) and "there is no such file" in said
    assert "--output is " in (said := refused(*command[:-1], tmp_path)) and "which exists; allowed: a new folder" in said
