"""``mafa_vqa`` and ``mafa_gqa``: answering questions about images."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

from lavis_mafa.common.lemmatizing import load_lemmatizer
from lavis_mafa.common.vqa_accuracy import accuracy, official_accuracy
from lavis_mafa.tasks.generating import as_id, batches, joined_on_rank_0, write_result
from lavis_mafa.tasks.mafa_task import MafaTask

logger = logging.getLogger(__name__)

EXAMPLES = 3


class Answered(NamedTuple):
    """A question, the model's answer, and the true answers where they are known."""

    question: str
    answer: str
    truth: list[str]


class MafaVqaTask(MafaTask):
    """Generates an answer for each question of a split, writes them down, and scores them where the right answers are known.

    VQAv2 and OK-VQA (LAVIS's ``coco_vqa``, ``ok_vqa``) get the official accuracy, overall and by type of answer; a data set with
    ``answers`` that of ``vqa_accuracy.accuracy``.

    Raises:
        UserError: at construction, ``run.lemmatize`` without spaCy's English model.
    """

    evaluates = ("image", "text_input", "question_id")

    def __init__(self, run: Any) -> None:
        super().__init__(run)
        # Now, so that a missing model is found before hours of generating.
        self.lemmatized = load_lemmatizer("run.lemmatize") if run.lemmatize else None

    def evaluation(self, model: Any, data_loader: Any, cuda_enabled: bool = True, **kwargs: Any) -> dict[str, Any] | None:
        """What was ``answered``, by question id, and the ``dataset``; None except on rank 0."""
        run = self.run
        made: dict[int | str, Answered] = {}
        for samples in batches(data_loader, "answers", cuda_enabled):
            # The model may put its prompt in the question's place.
            questions = list(samples["text_input"])
            answers = model.predict_answers(
                samples=samples,
                num_beams=run.num_beams,
                max_len=run.max_len,
                min_len=run.min_len,
                length_penalty=run.length_penalty,
                prompt=run.prompt,
                inference_method="generate",
            )
            truths = self.truths(data_loader.dataset, samples)
            for number, question, answer, truth in zip(samples["question_id"], questions, answers, truths, strict=True):
                answer = answer.strip()
                made[as_id(number)] = Answered(question, self.lemmatized(answer) if self.lemmatized else answer, truth)
        joined = joined_on_rank_0(made)
        return None if joined is None else {"answered": joined, "dataset": data_loader.dataset}

    def truths(self, dataset: Any, samples: dict[str, Any]) -> list[list[str]]:
        """The right answers to each question of the batch; empty lists where the data set has none."""
        if hasattr(dataset, "answers"):
            return [dataset.answers[int(row)] for row in samples["index"]]
        return [[] for _ in samples["question_id"]]

    def after_evaluation(self, val_result: dict[str, Any], split_name: str, epoch: Any, **kwargs: Any) -> dict[str, float] | None:
        """Writes ``result/<split>_vqa_result.json`` and logs some examples.

        Returns:
            ``accuracy``, with VQAv2 also by type of answer, and ``agg_metrics``, the same. None where no right answers are known.
        """
        answered: dict[int | str, Answered] = val_result["answered"]
        write_result(f"{split_name}_vqa_result", [{"question_id": number, "answer": a.answer} for number, a in answered.items()])
        for example in list(answered.values())[:EXAMPLES]:
            truth = f" (right: {', '.join(dict.fromkeys(example.truth))})" if example.truth else ""
            logger.info("%s: %s -> %s%s", split_name, example.question, example.answer, truth)
        figures = self.figures(answered, val_result["dataset"])
        if figures is None:
            logger.info("%s has no right answers: no accuracy.", split_name)
            return None
        return {**figures, "agg_metrics": figures["accuracy"]}

    def figures(self, answered: dict[int | str, Answered], dataset: Any) -> dict[str, float] | None:
        """The accuracies, or None."""
        if getattr(dataset, "coco_fmt_anno_file", None) is not None:
            predictions = {int(number): a.answer for number, a in answered.items()}
            return official_accuracy(predictions, dataset.coco_fmt_anno_file, dataset.coco_fmt_qust_file)
        if not all(a.truth for a in answered.values()):
            return None
        return {"accuracy": accuracy([a.answer for a in answered.values()], [a.truth for a in answered.values()])}


class MafaGqaTask(MafaVqaTask):
    """GQA: an answer is right if it equals the one right answer, both normalised as for VQA."""

    def truths(self, dataset: Any, samples: dict[str, Any]) -> list[list[str]]:
        return [[] if answer is None else [answer] for answer in samples["answer"]]
