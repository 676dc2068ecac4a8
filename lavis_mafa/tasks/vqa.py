"""``mafa_vqa`` and ``mafa_gqa``: answering questions about images."""

from __future__ import annotations

import logging
from collections.abc import Hashable
from typing import Any, NamedTuple

from lavis.datasets.datasets.vg_vqa_datasets import VGVQADataset
from lavis.datasets.datasets.vqa_datasets import VQADataset
from lavis.models.albef_models.albef_vqa import AlbefVQA
from lavis.models.blip_models.blip_vqa import BlipVQA
from torch import nn

from lavis_mafa.config.check import OF_GENERATING, inference_of
from lavis_mafa.config.read import at
from lavis_mafa.datasets.pairs import ImageQuestions
from lavis_mafa.errors import UserError
from lavis_mafa.models.albef_vqa import CANDIDATES, AlbefVqaMafa
from lavis_mafa.models.blip2_opt import Blip2OptMafa
from lavis_mafa.tasks.answer_list import check_answers, own_answers, read_answers
from lavis_mafa.tasks.task import MafaTask, as_id, batches, joined_on_rank_0, known_ids, rows_of, write_result
from lavis_mafa.tasks.vqa_accuracy import Question, accuracy, check_known, load_lemmatizer, official_accuracy, read_people

logger = logging.getLogger(__name__)

EXAMPLES = 3
DIRECT = "direct_answers"  # A-OKVQA's name for what ten people said


class Answered(NamedTuple):
    """A question, the model's answer, and the true answers where they are known."""

    question_id: int | str
    question: str
    answer: str
    truth: list[str]


class VisualGenomeAnswers(VGVQADataset):
    """LAVIS's, whose answers weigh 0.2, by a weight of one's own: 0.5 in ALBEF's training."""

    def __init__(self, of_lavis: VGVQADataset, weight: float) -> None:
        self.__dict__ |= vars(of_lavis)
        self.weight = weight

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**super().__getitem__(index), "weights": [self.weight]}


class MafaVqaTask(MafaTask):
    """Gives an answer to each question of a split, writes them down, and scores them where the right answers are known.

    An answer is the likeliest of a list, or generated (``run.inference``).

    VQAv2 and OK-VQA (LAVIS's ``coco_vqa``, ``ok_vqa``) get the official accuracy, overall and by type of answer; A-OKVQA that of its
    ``direct_answers``; a data set with ``answers`` that of ``vqa_accuracy.accuracy``. Training is on prompt and answer, each answer by
    its weight, for the models that read them.

    Raises:
        UserError: at construction, ``run.lemmatize`` without spaCy's English model, or a ``run.answer_list`` that is none.
    """

    evaluates = ("image", "text_input", "question_id")
    arch = ""  # of the model

    def __init__(self, run: Any) -> None:
        super().__init__(run)
        # Now, so that a missing model is found before hours of generating.
        self.lemmatized = load_lemmatizer("run.lemmatize") if run.lemmatize else None
        self.people: dict[str, dict[int | str, Question]] = {}
        self.given = read_answers(run.answer_list) if run.answer_list else None
        self.ranked: dict[int, list[str]] = {}  # of a data set, by its identity

    @classmethod
    def setup_task(cls, cfg: Any = None, **kwargs: Any) -> Any:
        task = super().setup_task(cfg, **kwargs)
        task.arch = cfg.model_cfg.arch
        return task

    def build_datasets(self, cfg: Any) -> dict[str, Any]:
        """LAVIS's, with a look at the answers of all splits: they are needed at the end, or not there to train on."""
        datasets = super().build_datasets(cfg)
        for name, parts in datasets.items():
            weight = at(cfg.datasets_cfg, f"{name}.build_info.answer_weight")
            if weight is not None and isinstance(parts.get("train"), VGVQADataset):
                parts["train"] = VisualGenomeAnswers(parts["train"], weight)
            for split in [] if self.run.evaluate else self.run.train_splits:
                if split in parts and not _has_answers(parts[split]):
                    raise UserError(
                        f"datasets.{name} has no answers in its split {split!r}, but {self.run.task} trains on them; grit_vqa, and "
                        "LAVIS's coco_vqa, ok_vqa, aok_vqa, gqa and vg_vqa have."
                    )
            for split in {*self.run.valid_splits, *self.run.test_splits} & parts.keys():
                self._people_of(parts[split], f"datasets.{name}, split {split!r}")
                self._list_answers(parts, split, f"datasets.{name}, split {split!r}")
        return datasets

    def _list_answers(self, parts: dict[str, Any], split: str, where: str) -> None:
        """Whether a split's answers are ranked, and which; raises UserError where there are none to rank."""
        dataset, run = parts[split], self.run
        trained = run.train_splits if run.evaluate else ["train"]  # which has all of them by now
        answers = self.given or own_answers(dataset, [parts[one] for one in trained if one in parts])
        if inference_of(self.arch, run, answers is not None) == "generate":
            return
        if answers is None:
            raise UserError(
                f"{where}: there are no answers to rank; give run.answer_list (a JSON list, or one text a line), or the training "
                "split of grit_vqa, whose answers are ranked then."
            )
        people = self._people_of(dataset) or {}
        truths = dataset.answers if hasattr(dataset, "answers") else [question.answers for question in people.values()]
        check_answers(answers, truths, where, run.num_ans_candidates)
        self.ranked[id(dataset)] = answers

    def build_model(self, cfg: Any) -> nn.Module:
        model = super().build_model(cfg)
        if not self.run.evaluate and not isinstance(model, AlbefVqaMafa | Blip2OptMafa | AlbefVQA | BlipVQA):
            raise UserError(
                f"run.task is {self.run.task}, which trains on answers, but {cfg.model_cfg.arch} does not read them; allowed: "
                "blip2_opt_mafa, albef_vqa_mafa, albef_vqa, blip_vqa, or run.evaluate: true."
            )
        return model

    def step_output(self, model: nn.Module, samples: dict[str, Any]) -> dict[str, Any]:
        """The loss of the answers, each after its question in ``run.prompt``."""
        return model({**samples, "prompt": self.run.prompt})

    def evaluation(self, model: Any, data_loader: Any, cuda_enabled: bool = True, **kwargs: Any) -> dict[str, Any] | None:
        """What was ``answered``, by row, and the ``dataset``; None except on rank 0."""
        settings = self._inference(data_loader.dataset)
        made: dict[Hashable, Answered] = {}
        for samples in batches(data_loader, "answers", cuda_enabled):
            # The model may put its prompt in the question's place.
            questions = list(samples["text_input"])
            answers = model.predict_answers(samples=samples, **settings)
            ids, rows = map(as_id, samples["question_id"]), rows_of(samples, len(questions))
            truths = self.truths(data_loader.dataset, samples)
            for number, row, question, answer, truth in zip(ids, rows, questions, answers, truths, strict=True):
                answer = self.lemmatized(answer.strip()) if self.lemmatized else answer.strip()
                made[number if row is None else row] = Answered(number, question, answer, truth)
        joined = joined_on_rank_0(made)
        return None if joined is None else {"answered": joined, "dataset": data_loader.dataset}

    def _inference(self, dataset: Any) -> dict[str, Any]:
        """How the model is to answer, in the words of LAVIS's models."""
        if (answers := self.ranked.get(id(dataset))) is not None:
            candidates = self.run.num_ans_candidates or min(CANDIDATES, len(answers))
            return {"inference_method": "rank", "answer_list": answers, "num_ans_candidates": candidates}
        return {"inference_method": "generate", **{name: getattr(self.run, name) for name in OF_GENERATING}}

    def truths(self, dataset: Any, samples: dict[str, Any]) -> list[list[str]]:
        """The right answers to each question of the batch; empty lists where the data set has none."""
        if hasattr(dataset, "answers"):
            return [dataset.answers[int(row)] for row in samples["index"]]
        return [list(answers or []) for answers in samples.get(DIRECT, [None] * len(samples["question_id"]))]

    def after_evaluation(self, val_result: dict[str, Any], split_name: str, epoch: Any, **kwargs: Any) -> dict[str, float] | None:
        """Writes ``result/<split>_vqa_result.json`` and logs some examples.

        Returns:
            ``accuracy``, with VQAv2 also by type of answer, and ``agg_metrics``, the same. None where no right answers are known.
        """
        answered: list[Answered] = list(val_result["answered"].values())
        write_result(f"{split_name}_vqa_result", [{"question_id": a.question_id, "answer": a.answer} for a in answered])
        for example in answered[:EXAMPLES]:
            truth = f" (right: {', '.join(dict.fromkeys(example.truth))})" if example.truth else ""
            logger.info("%s: %s -> %s%s", split_name, example.question, example.answer, truth)
        metrics = self.metrics(answered, val_result["dataset"])
        if metrics is None:
            logger.info("%s has no right answers: no accuracy.", split_name)
            return None
        return {**metrics, "agg_metrics": metrics["accuracy"]}

    def metrics(self, answered: list[Answered], dataset: Any) -> dict[str, float] | None:
        people = self._people_of(dataset)
        if people is not None:
            return official_accuracy({a.question_id: a.answer for a in answered}, known_ids([a.question_id for a in answered], people))
        known = [a for a in answered if a.truth]
        if known and len(known) < len(answered):
            logger.warning(
                "%d of %d questions have no right answers: the accuracy is of the others.", len(answered) - len(known), len(answered)
            )
        direct = not hasattr(dataset, "answers")
        return {"accuracy": accuracy([a.answer for a in known], [a.truth for a in known], not direct)} if known else None

    def _people_of(self, dataset: Any, where: str = "") -> dict[int | str, Question] | None:
        """The official annotations of a data set of LAVIS's, which must know all its questions; None where it has none."""
        path = getattr(dataset, "coco_fmt_anno_file", None)
        if path is None:
            return None
        if path not in self.people:
            self.people[path] = read_people(path)
            asked = [row["question_id"] for row in getattr(dataset, "annotation", [])]
            check_known(asked, known_ids(asked, self.people[path]), f"{where}: the annotations of {path}")
        return self.people[path]


def _has_answers(dataset: Any) -> bool:
    """Whether its samples are as LAVIS's VQA sets have them for training."""
    try:
        return {"answers", "weights"} <= dataset[0].keys()
    except OSError:  # training replaces an image that cannot be read
        return isinstance(dataset, VQADataset | ImageQuestions)


class MafaGqaTask(MafaVqaTask):
    """GQA: an answer is right if it equals the one right answer, both normalised as for VQA. Other data sets are scored as they are."""

    def truths(self, dataset: Any, samples: dict[str, Any]) -> list[list[str]]:
        if "answer" not in samples or hasattr(dataset, "answers"):
            return super().truths(dataset, samples)
        return [[] if answer is None else [answer] for answer in samples["answer"]]
