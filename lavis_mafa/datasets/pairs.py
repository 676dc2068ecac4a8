"""One's own data, from annotation files: image-text pairs for training, galleries for retrieval, questions about images, sentences
with a label."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch.utils.data import Dataset, default_collate

from lavis_mafa.config.data import ENTAILMENT, STATEMENT, AnnotationFile
from lavis_mafa.datasets.annotations import clean_caption, image_keys, path_hint, read_annotations, shown
from lavis_mafa.datasets.formats import PAIRS, TWO, Columns
from lavis_mafa.datasets.ground_truth import GroundTruth
from lavis_mafa.datasets.ids import Id, collate_with_ids, pc, typed_ids
from lavis_mafa.datasets.images import load_rgb
from lavis_mafa.datasets.stored import Source, check_shards, image_source
from lavis_mafa.errors import EmptyCaption, UserError

Select = Callable[[pa.Table], pa.Table]
Process = Callable[[Any], Any]
GLANCE = 10  # rows: one missing image is a bad sample, so many from the beginning are a wrong folder
NAMING_QUESTION = "what is this?"


def open_annotations(
    vis_root: str | Path,
    ann_paths: Sequence[str | Path | AnnotationFile],
    select: Select | None,
    columns: Columns = PAIRS,
    allow_absolute_paths: bool = False,
    glance: int = 1,
) -> tuple[Path, pa.Table]:
    """The image folder and the annotations, checked as far as a glance can: all shards must be there, and of one of the first
    ``glance`` rows every image."""
    root = Path(vis_root)
    if not root.is_dir():
        raise UserError(
            f"The image folder {root} does not exist; set build_info.images.storage to the folder the image paths start from."
        )
    table = read_annotations(ann_paths, columns, allow_absolute_paths)
    if select is not None:
        table = select(table)
    check_shards(root, table)
    images = [[image_source(root, table, row, name) for name in columns.images] for row in range(min(glance, len(table)))]
    absent = [[image for image in of_row if not image.is_file()] for of_row in images]
    if all(absent):
        why = path_hint(root, table[columns.images[0]][0].as_py()) or f"is {root} the folder the paths start from?"
        raise UserError(f"{ann_paths[0]}, row 1: no image at {shown(absent[0][0])}; {why}")
    return root, table


class _AnnotatedImages(Dataset):
    """Rows of image and caption(s), as ``read_annotations`` gives them.

    Args:
        vis_processor: PIL RGB image -> tensor. text_processor: str -> str.
        vis_root: folder that relative image paths start from; ``allow_absolute_paths``: they may leave it.
        ann_paths: annotation files, see ``read_annotations``.
        truth: which image matches which text; None takes what the annotations tell, by ``concept`` or by ``facts``.
        select: the table -> the rows to use (at least one), with ``image`` and ``caption`` whatever the ``columns`` are.

    Raises:
        UserError: from the annotations, or the image folder or all of the first ``glance`` rows' images do not exist.
    """

    glance = 1

    def __init__(
        self,
        vis_processor: Process,
        text_processor: Process,
        vis_root: str | Path,
        ann_paths: Sequence[str | Path | AnnotationFile],
        truth: GroundTruth | None = None,
        select: Select | None = None,
        allow_absolute_paths: bool = False,
        columns: Columns = PAIRS,
    ) -> None:
        self.vis_root, self.table = open_annotations(vis_root, ann_paths, select, columns, allow_absolute_paths, self.glance)
        self.files = ", ".join(map(str, ann_paths))
        self.vis_processor = vis_processor
        self.text_processor = text_processor
        self.truth = truth or GroundTruth.from_table(self.table)

    def _concepts(self) -> torch.LongTensor | None:
        """[rows] numbers by the truth, None where nothing is known."""
        return None if self.truth is None else self.truth.images(self.table)


class ImageTextPairs(_AnnotatedImages):
    """Training pairs. Of several captions one is drawn at each access, by Python's ``random``, which whoever iterates seeds.

    Args: as above, and ``prefix_lm``: split each caption at a random word, for prefix language modelling (BLIP-2 with an
        encoder-decoder).

    Attributes:
        table: the annotations. image_keys: [N], one number per image.
        truth, concepts: the truth and [N] concept numbers by it; None where nothing is known.
    """

    glance = GLANCE

    def __init__(self, *args: Any, prefix_lm: bool = False, **named: Any) -> None:
        super().__init__(*args, **named)
        self.prefix_lm = prefix_lm
        self.image_keys = image_keys(self.table)
        self.concepts = self._concepts()

    def __len__(self) -> int:
        return self.table.num_rows

    def image_path(self, index: int) -> Source:
        return image_source(self.vis_root, self.table, index)

    def captions(self, index: int) -> list[str]:
        return self.table["caption"][index].as_py()

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample: ``image``, ``text_input``, ``index``, ``image_key`` and, with a truth, ``concept`` and ``text_key``.

        With ``prefix_lm`` the caption's beginning is ``text_input`` and its rest ``text_output``.

        Raises:
            OSError: the image cannot be read. The runner takes another sample in its place and counts it.
            EmptyCaption: processing leaves nothing of the caption; likewise.
        """
        source, captions = self.image_path(index), self.captions(index)
        read = getattr(self.vis_processor, "read", None)  # a processor that reads files itself may spare most of a large one
        caption = captions[0] if len(captions) == 1 else random.choice(captions)
        sample: dict[str, Any] = {
            "image": self.vis_processor(load_rgb(source)) if read is None else read(source),
            "text_input": clean_caption(self.text_processor, caption),
            "index": index,
            "image_key": int(self.image_keys[index]),
        }
        if self.truth is not None and self.concepts is not None:
            sample["concept"] = int(self.concepts[index])
            # Of the caption as written: processing may cut it or make two texts one.
            sample["text_key"] = self.truth.text_key(caption)
        if self.prefix_lm:
            sample["text_input"], sample["text_output"] = split_at_random(sample["text_input"])
        return sample

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch: images stacked, texts a list, numbers int64 tensors."""
        return default_collate(samples)


def split_at_random(caption: str) -> tuple[str, str]:
    """The words before a place that Python's ``random`` draws, and those after it: at least one each; a single word is all rest."""
    words = caption.split()
    cut = random.randrange(1, len(words)) if len(words) > 1 else 0
    return " ".join(words[:cut]), " ".join(words[cut:])


class RetrievalPairs(_AnnotatedImages):
    """A gallery: every distinct image against every distinct text, with the attributes LAVIS's retrieval evaluation reads.

    Attributes:
        image: [N] paths of the distinct images. text: [T] distinct captions, processed; raw_text: as they were written.
        img2txt: image -> its own texts; txt2img: text -> the images it is written for.
        relevant: Bool [N, T], which text is right for which image: all that the truth knows to match, and the own pairs. Of these,
            where the truth is told by facts, only those of which it does not know whether they match.
        image_ids: [N] the annotations' own where all of them are whole numbers (``007`` stays that text), else 0 to N-1.
        concepts: [N] or None. text_keys: [T] or None.

    Raises:
        UserError: as above, a caption holds no word, or by their facts no caption is right for any image.
    """

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.first_rows = first_rows = list[int]()
        number: dict[str, int] = {}
        self.img2txt: dict[int, list[int]] = {}
        self.txt2img: dict[int, list[int]] = {}
        # keys count images in the order of their first rows, so the key is the place in the gallery
        keys = image_keys(self.table).tolist()
        for row, (image, captions) in enumerate(zip(keys, self.table["caption"].to_pylist(), strict=True)):
            if image == len(first_rows):
                first_rows.append(row)
            own = self.img2txt.setdefault(image, [])
            for caption in captions:
                text = number.setdefault(caption, len(number))
                if text not in own:
                    own.append(text)
                    self.txt2img.setdefault(text, []).append(image)
        self.image: list[str] = [str(self.vis_root / path) for path in self.table["image"].take(first_rows).to_pylist()]
        self.raw_text: list[str] = list(number)
        try:
            self.text: list[str] = [clean_caption(self.text_processor, caption) for caption in self.raw_text]
        except EmptyCaption as error:
            raise UserError(
                f"{self.files}: {error} Evaluation replaces nothing; `lavis-mafa check-data --clean` leaves it out."
            ) from error

        self.concepts: torch.Tensor | None = None
        self.text_keys: torch.Tensor | None = None
        self.relevant = torch.zeros(len(self.image), len(self.text), dtype=torch.bool)
        for image, texts in self.img2txt.items():
            self.relevant[image, texts] = True
        if self.truth is not None and (concepts := self._concepts()) is not None:
            self.concepts = concepts[first_rows]
            self.text_keys = torch.tensor([self.truth.text_key(caption) for caption in self.raw_text])
            if self.truth.facts is not None:  # these tell of a wrong caption, too
                self.relevant &= ~self.truth.knows(self.concepts[:, None], self.text_keys)
            self.relevant |= self.truth.matrix(self.concepts, self.text_keys)
        if not self.relevant.any():
            raise UserError(
                f"{self.files}: by 'facts' and 'caption_facts' no caption is right for any image, so there is nothing to find; "
                f"allowed: a caption all of whose facts some image has."
            )

        # what captioning names its captions by: the annotations' own ids where they are numbers, as COCO's are
        ids = typed_ids(self.table.take(first_rows), "image_id") if "image_id" in self.table.column_names else []
        given = [one for one in ids if one is not None and str(one).isdecimal()]
        self.image_ids: list[Id] = given if len(set(given)) == len(self.image) else list(range(len(self.image)))

    def __len__(self) -> int:
        return len(self.image)

    def image_path(self, index: int) -> Source:
        return image_source(self.vis_root, self.table, self.first_rows[index])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.vis_processor(load_rgb(self.image_path(index))), "index": index, "image_id": self.image_ids[index]}

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        return collate_with_ids(samples, "image_id")


class ImageQuestions(Dataset):
    """A question a row.

    Args: as above, and
        table: columns ``image``, ``question``, ``answer`` (a list of right answers, or what people said) and optionally
            ``question_id``, as ``read_annotations`` with ``QUESTIONS`` gives it; ``source``: where it is from, for messages.

    Attributes:
        questions: [N] as they were written. answers: [N] lists.
        question_ids: [N] the column, texts or numbers as they were, or the row's number from 0.

    Raises:
        UserError: some rows have no ``question_id``, or it is there twice.
    """

    def __init__(
        self, vis_processor: Process, text_processor: Process, vis_root: str | Path, table: pa.Table, source: str = "questions"
    ) -> None:
        self.vis_root, self.table = Path(vis_root), table
        self.vis_processor = vis_processor
        self.text_processor = text_processor
        self.question_ids = ids_of_rows(table, "question_id", source)

    @cached_property
    def questions(self) -> list[str]:
        return self.table["question"].to_pylist()

    @cached_property
    def answers(self) -> list[list[str]]:
        return self.table["answer"].to_pylist()

    def distinct_answers(self) -> list[str]:
        """In the order of their first rows."""
        return pc.unique(pc.list_flatten(self.table["answer"])).to_pylist()

    def __len__(self) -> int:
        return self.table.num_rows

    def image_path(self, index: int) -> Source:
        return image_source(self.vis_root, self.table, index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample: ``image``, ``text_input`` (the question), ``question_id``, ``index``; and ``answers``, each once, with
        ``weights``, which share of the people gave it.

        Raises:
            OSError: the image cannot be read.
        """
        said = Counter(self.table["answer"][index].as_py())
        return {
            "image": self.vis_processor(load_rgb(self.image_path(index))),
            "text_input": self.text_processor(self.table["question"][index].as_py()),
            "answers": list(said),
            "weights": [count / said.total() for count in said.values()],
            "question_id": self.question_ids[index],
            "index": index,
        }

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """As LAVIS's VQA sets: ``answer`` and ``weight`` of all questions one after another, ``n_answers`` of each."""
        answers = {
            "answer": [answer for sample in samples for answer in sample["answers"]],
            "weight": torch.tensor([weight for sample in samples for weight in sample["weights"]]),
            "n_answers": torch.tensor([len(sample["answers"]) for sample in samples]),
        }
        rest = [{name: value for name, value in sample.items() if name not in ("answers", "weights")} for sample in samples]
        # joined with another data set's, they have only what both have
        return answers | (collate_with_ids(rest, "question_id") if "question_id" in rest[0] else default_collate(rest))


class LabelledSentences(Dataset):
    """A sentence about an image a row, with what it is to the image: for visual entailment.

    Args: as above, and
        table: columns ``image``, ``sentence`` (a list of one), ``label`` and optionally ``sentence_id``, as ``read_annotations`` with
            ``SENTENCES`` gives it; ``source``: where it is from, for messages.

    Attributes:
        sentence_ids: [N] the column, texts or numbers as they were, or the row's number from 0.
        class_labels: each label's number, as LAVIS's data sets of labels have it.

    Raises:
        UserError: some rows have no ``sentence_id``, or it is there twice.
    """

    class_labels = {label: number for number, label in enumerate(ENTAILMENT)}
    images: tuple[str, ...] = ("image",)  # columns, and what samples call them

    def __init__(
        self, vis_processor: Process, text_processor: Process, vis_root: str | Path, table: pa.Table, source: str = "sentences"
    ) -> None:
        self.vis_root, self.table = Path(vis_root), table
        self.vis_processor = vis_processor
        self.text_processor = text_processor
        self.source = source
        self.sentence_ids = ids_of_rows(table, "sentence_id", source)

    @cached_property
    def image_keys(self) -> torch.Tensor:
        return image_keys(self.table)

    def check_sentences(self) -> None:
        """For evaluation, which replaces nothing: UserError where processing leaves nothing of a sentence."""
        for row, (sentence,) in enumerate(self.table["sentence"].to_pylist(), 1):
            try:
                clean_caption(self.text_processor, sentence)
            except EmptyCaption as error:
                raise UserError(f"{self.source}, row {row}: {error} Evaluation replaces nothing; leave the row out.") from error

    def __len__(self) -> int:
        return self.table.num_rows

    def image_path(self, index: int) -> Source | str:
        return image_source(self.vis_root, self.table, index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample: ``images``, ``text_input`` (the sentence), ``label``, ``sentence_id``, ``index``.

        Raises:
            OSError: the image cannot be read. In training, the runner takes another sample in its place and counts it.
            EmptyCaption: processing leaves nothing of the sentence; likewise.
        """
        paths = {name: image_source(self.vis_root, self.table, index, name) for name in self.images}
        return {
            **{name: self.vis_processor(load_rgb(path)) for name, path in paths.items()},
            "text_input": clean_caption(self.text_processor, self.table["sentence"][index].as_py()[0]),
            "label": self.class_labels[self.table["label"][index].as_py()],
            "sentence_id": self.sentence_ids[index],
            "index": index,
        }

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        return collate_with_ids(samples, "sentence_id")


class Statements(LabelledSentences):
    """A sentence about two images a row, and whether it holds of them: for NLVR2.

    Args: as above, but for the columns ``image0`` and ``image1``, as ``read_annotations`` with ``STATEMENTS`` gives them.
    """

    class_labels = {label: number for number, label in enumerate(STATEMENT)}
    images = TWO

    @cached_property
    def image_keys(self) -> torch.Tensor:
        return torch.arange(len(self))  # no two rows show the same one image

    def image_path(self, index: int) -> str:
        return " and ".join(str(image_source(self.vis_root, self.table, index, name)) for name in self.images)


def ids_of_rows(table: pa.Table, name: str, source: str) -> list[Id]:
    """[N] the column as it was, or the rows' numbers from 0; UserError where some rows have none, or one is there twice."""
    given = typed_ids(table, name) if name in table.column_names else range(table.num_rows)
    ids: list[Id] = []
    row_of: dict[Id, int] = {}
    for row, one in enumerate(given, 1):
        if one is None:
            raise UserError(f"{source}, row {row}: no {name}; allowed: one in every row, or no such column.")
        if row_of.setdefault(one, row) != row:
            raise UserError(f"{source}: {name} {one} is there twice, in rows {row_of[one]} and {row}; allowed: once.")
        ids.append(one)
    return ids


def naming_questions(pairs: pa.Table, truth: GroundTruth) -> pa.Table:
    """``what is this?`` for each row of an image and its ``concept``, as ``ImageQuestions`` takes them; right is every name and alias
    that truly holds for it.
    """
    names = torch.tensor([key for key in range(len(truth.texts)) if truth.text_kind(key) in ("name", "alias")])
    right = truth.matrix(truth.concepts.find_all(pairs["concept"]), names)
    answers = [[truth.text(int(key)) for key in names[row]] for row in right]
    questions = pa.array([NAMING_QUESTION] * pairs.num_rows)
    return pa.table({"image": pairs["image"], "question": questions, "answer": pa.array(answers, pa.list_(pa.string()))})
