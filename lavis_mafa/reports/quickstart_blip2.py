"""What the BLIP-2 quickstart found: mined connections against the truth, captions and answers of drawings it has not seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lavis_mafa.reports.run_files import last_epoch, read_evaluations, read_metrics
from lavis_mafa.reports.tables import by_score

SPLITS = {"val": "new drawings of known concepts", "test": "unknown concepts"}
EXAMPLES = 6


def collect_results(stage_1: Path, captions: Any, answers: Any) -> dict[str, Any]:
    """Everything that is shown, as it goes into ``results.json``.

    Args:
        stage_1: folder of the stage-1 run.
        captions: the finished runner of the captioning evaluation; answers: that of the question answering.
    """
    names = ("loss_itc", "loss_itm", "loss_lm", "new_positive_share", "false_negative_share", "con_d_precision", "con_d_recall")
    last = last_epoch(read_metrics(stage_1))
    return {
        "stage_1": {name: last[name] for name in names if name in last} | {"retrieval": read_evaluations(stage_1).get("val", {})},
        "captions": read_evaluations(captions.output_dir),
        "answers": read_evaluations(answers.output_dir),
        "examples": {split: _examples(captions, answers, split) for split in SPLITS},
    }


def format_results(results: dict[str, Any]) -> str:
    """The results as a text for the terminal."""
    stage_1 = results["stage_1"]
    lines = ["Stage 1, last epoch: " + "  ".join(f"{name} {value:.3f}" for name, value in stage_1.items() if isinstance(value, float))]
    lines += ["", f"{'':<36}{'BLEU-4':>8}{'CIDEr':>8}{'ROUGE-L':>9}{'answers right':>15}"]
    for split, name in SPLITS.items():
        caption, answer = results["captions"][split], results["answers"][split]
        figures = [caption.get(key) for key in ("bleu_4", "cider", "rouge_l")] + [answer.get("accuracy")]
        cells = ("-" if value is None else f"{value:.1f}" for value in figures)
        lines.append(f"{name:<36}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, (8, 8, 9, 15), strict=True)))
    retrieval = stage_1["retrieval"]
    lines += (
        ["", f"Retrieval of {SPLITS['val']} by stage 1 (per cent){'TR R@1':>21}{'IR R@1':>8}{'mean recall':>13}"] if retrieval else []
    )
    for values in by_score(retrieval) if retrieval else ():
        shown = f"{values['tr_r1']:8.1f}{values['ir_r1']:8.1f}{values['agg_metrics']:13.1f}"
        lines.append(f"  ranked by {values.get('rank_by', '-'):<59}{shown}")
    for split, name in SPLITS.items():
        lines += ["", f'{name}: caption | "what is this?" | right']
        lines += [f"  {e['caption']} | {e['answer']} | {', '.join(e['right'][:3])}" for e in results["examples"][split]]
    return "\n".join(lines)


def _examples(captions: Any, answers: Any, split: str) -> list[dict[str, Any]]:
    """The first few images of a split: their caption, the answer, and what would be right."""
    gallery, questions = captions.datasets[split], answers.datasets[split]
    written = {row["image"]: row["caption"] for row in _read(captions.output_dir, f"{split}_epoch*.json")}
    said = {row["question_id"]: row["answer"] for row in _read(answers.output_dir, f"{split}_vqa_result.json")}
    first = list(written)[:: max(1, len(written) // EXAMPLES)][:EXAMPLES]
    place = {path: number for number, path in enumerate(gallery.image)}
    by_path = {str(questions.vis_root / path): questions.question_ids[row] for row, path in enumerate(questions.image)}
    return [
        {
            "caption": written[image],
            "answer": said.get(by_path.get(image, -1), ""),
            "right": [gallery.raw_text[text] for text in gallery.img2txt[place[image]]],
        }
        for image in first
    ]


def _read(folder: Path, pattern: str) -> list[dict[str, Any]]:
    (path,) = (folder / "result").glob(pattern)
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return rows
