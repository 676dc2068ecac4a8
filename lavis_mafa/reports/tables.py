"""The tables of a page: settings, what each run came to, evaluations, Con-D against the truth."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lavis_mafa.config.schema import MODEL_BLOCKS, RUN_BLOCKS, typed_block
from lavis_mafa.errors import UserError
from lavis_mafa.reports.gallery import VERDICTS, Candidate
from lavis_mafa.reports.run_files import Run, last_epoch

SHOWN = (
    "model.arch",
    "model.model_type",
    "model.ecm.enabled",
    "model.ecm.threshold",
    "model.ecm.ambiguous_from",
    "model.ecm.use_in",
    "model.discriminator.arch",
    "model.discriminator.checkpoint",
    "model.itc.smoothing",
    "model.itm.negatives",
    "run.grit.enabled",
    "run.grit.queue_size",
    "run.grit.search_space",
    "run.batch_size_train",
    "run.max_epoch",
    "run.init_lr",
    "run.precision",
    "run.seed",
)
NOISE = ("run.output_dir", "run.dist_url", "run.rank", "run.gpu", "run.dist_backend")  # differ without meaning anything
ITC = "itc_"  # before the figures of ITC's cosine alone
SIDES = {"tr": "TR", "txt": "TR", "ir": "IR", "img": "IR"}
ENDINGS = {"r_precision": "R-Precision", "map_at_r": "mAP@R", "r_mean": "mean", "r1": "R@1", "r5": "R@5", "r10": "R@10"}
NAMES = {"bleu_1": "BLEU-1", "bleu_2": "BLEU-2", "bleu_3": "BLEU-3", "bleu_4": "BLEU-4", "cider": "CIDEr", "rouge_l": "ROUGE-L"}
NAMES |= {"meteor": "METEOR", "spice": "SPICE", "accuracy": "answers right", "agg_metrics": "mean recall"}


@dataclass
class Table:
    """``best`` holds the (row, column) of every column's largest value, where several rows have one."""

    head: list[str]
    rows: list[list[str]]
    caption: str
    best: set[tuple[int, int]] = field(default_factory=set)


def full_settings(config: DictConfig) -> dict[str, Any]:
    """Dotted key -> value of the model, run and data blocks; our own blocks with their defaults."""
    found: dict[str, Any] = {}
    for block, known in (("model", MODEL_BLOCKS), ("run", RUN_BLOCKS), ("datasets", {})):
        values = config.get(block)
        if not isinstance(values, DictConfig):
            continue
        plain = OmegaConf.to_container(values)
        if values.get("arch" if block == "model" else "task") in known:
            try:
                plain = asdict(typed_block(block, values))
            except UserError:
                pass  # settings of another version are shown as they were written
        _flatten(block, plain, found)
    return found


def settings_table(runs: list[Run]) -> Table:
    """The settings that tell what was done, and all in which the runs differ."""
    of_runs = [full_settings(run.config) for run in runs]
    keys = list(dict.fromkeys(key for settings in of_runs for key in settings))
    differ = {k for k in keys if len({repr(s.get(k)) for s in of_runs}) > 1 and k not in NOISE}
    data = [k for k in keys if k.startswith("datasets.") and ".build_info." in k]
    shown = [k for k in (*SHOWN, *data) if k in keys]
    shown += [k for k in keys if k in differ and k not in shown]
    rows = [[key, *(_value(s.get(key)) for s in of_runs)] for key in shown]
    table = Table(["setting", *(run.name for run in runs)], rows, "Settings, defaults included")
    if len(runs) > 1:
        table.best = {(r, c) for r, key in enumerate(shown) if key in differ for c in range(len(runs) + 1)}
    return table


def summary_table(runs: list[Run]) -> Table:
    """What each run came to: its size, its last losses, and what Con-D made of the hardest negatives."""
    losses = {"loss": "loss", "loss_itc": "ITC", "loss_itm": "ITM", "loss_mlm": "MLM", "loss_lm": "LM"}
    shares = {"new_positive_share": "new positives", "ambiguous_share": "ambiguous", "false_negative_share": "false negatives"}
    shares |= {"con_d_precision": "Con-D precision, all sightings", "con_d_recall": "Con-D recall, all sightings"}
    ends = [last_epoch(run.metrics) for run in runs]
    shown = [name for name in (*losses, *shares) if any(name in end for end in ends)]
    head = ["run", "model", "epochs", "samples", *((losses | shares)[name] for name in shown)]
    rows = []
    for run, end in zip(runs, ends, strict=True):
        epochs = f"{run.metrics[-1]['epoch'] + 1}" if run.metrics else "–"
        samples = f"{run.metrics[-1]['samples_seen']:,}" if run.metrics else "–"
        model = str(OmegaConf.select(run.config, "model.arch") or "–")
        rows.append([run.name, model, epochs, samples, *(figure(end.get(n), n in shares) for n in shown)])
    return Table(head, rows, "Averages over the last epoch; shares are of the hardest negatives")


def evaluation_tables(runs: list[Run]) -> dict[str, list[Table]]:
    """Split -> tables of all runs: retrieval, and separately captions or answers where some run has them."""
    tables: dict[str, list[Table]] = {}
    for split in dict.fromkeys(split for run in runs for split in run.evaluations):
        found = {run.name: run.evaluations.get(split, {}) for run in runs}
        names = list(dict.fromkeys(n for v in found.values() for n, x in v.items() if isinstance(x, int | float)))
        names = [n for n in names if n not in ("epoch", "agg_metrics") and not n.startswith(ITC)]
        retrieval = [n for n in names if n.split("_")[0] in SIDES or n == "r_mean"]
        for title, columns in (("Retrieval", retrieval), ("Captions and answers", [n for n in names if n not in retrieval])):
            if columns:
                of_title = {run: values for run, values in found.items() if title == "Retrieval" or any(n in values for n in columns)}
                tables.setdefault(split, []).append(evaluation_table(f"{title} on {split}, in per cent", columns, of_title))
    return tables


def truth_table(runs: list[Run], candidates: list[list[Candidate]]) -> Table | None:
    """Con-D's verdicts against the truth: over the distinct recorded pairs, and over all their sightings; None where none is known.

    The two differ, since GRIT brings the same pairs together again, and most often those that do match.
    """
    rows = []
    for run, found in zip(runs, candidates, strict=True):
        truth = {(c.image, c.text): c.true for c in found if c.true is not None}
        if not truth or run.connections is None:
            continue
        columns = (run.connections[name].to_pylist() for name in ("image", "text", "verdict"))
        sightings = [
            (truth[image, text], verdict == VERDICTS[2])
            for image, text, verdict in zip(*columns, strict=True)
            if (image, text) in truth
        ]
        once = [(c.true is True, c.verdict == 2) for c in found if c.true is not None]
        for name, judged in (("each pair once", once), ("every sighting", sightings)):
            matching, positive = sum(true for true, _ in judged), sum(said for _, said in judged)
            both = sum(true and said for true, said in judged)
            counts = [f"{len(judged):,}", _share(matching, len(judged)), f"{positive:,}"]
            rows.append([run.name, name, *counts, _share(both, positive), _share(both, matching)])
    head = ["run", "counted", "pairs", "truly match", "judged positive", "precision", "recall"]
    caption = (
        "Recorded verdicts of all epochs; the summary has every verdict of the last epoch, by sighting. "
        "A precision equal to “truly match” is what guessing would reach"
    )
    return Table(head, rows, caption) if rows else None


def evaluation_table(caption: str, columns: list[str], found: dict[str, dict[str, Any]]) -> Table:
    """``columns`` of each run's evaluation, the best of each column marked.

    Below a run that was ranked by its matching head stands what ITC's cosine alone gives; these rows have a best of their own.
    """
    lines = [(run, line) for run, values in found.items() for line in by_score(values)]
    own = [key for key in ("epoch", "rank_by") if any(key in line for _, line in lines)]
    rows = [
        [run, *(str(line.get(key, "–")) for key in own), *(figure(line.get(name), digits=1) for name in columns)] for run, line in lines
    ]
    names = {"epoch": "epoch", "rank_by": "ranked by"}
    table = Table(["run", *(names[key] for key in own), *map(_metric, columns)], rows, caption)
    first = [run != before for (run, _), before in zip(lines, [None, *(run for run, _ in lines)], strict=False)]
    for place, name in enumerate(columns, start=1 + len(own)):
        for kind in (True, False):
            values = {row: line[name] for row, (_, line) in enumerate(lines) if first[row] == kind and name in line}
            if len(values) > 1:
                table.best |= {(row, place) for row, value in values.items() if value == max(values.values())}
    return table


def by_score(values: dict[str, Any]) -> list[dict[str, Any]]:
    """An evaluation, and where it was ranked by another score that of ITC's cosine alone, under the same names."""
    alone = {name.removeprefix(ITC): value for name, value in values.items() if name.startswith(ITC)}
    if not alone or values.get("rank_by") == "itc":
        return [values]
    return [values, {**({"epoch": values["epoch"]} if "epoch" in values else {}), "rank_by": "itc", **alone}]


def _flatten(prefix: str, value: Any, into: dict[str, Any]) -> None:
    if isinstance(value, dict) and value:
        for key, below in value.items():
            _flatten(f"{prefix}.{key}", below, into)
    else:
        into[prefix] = value


def _value(value: Any) -> str:
    words = {True: "yes", False: "no", None: "–"}
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "–"
    return words[value] if value is None or isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def figure(value: float | None, share: bool = False, digits: int = 3) -> str:
    """A number for a cell; a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.1%}" if share else f"{value:.{digits}f}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "–"


def _metric(name: str) -> str:
    side, _, ending = name.partition("_")
    if side in SIDES:
        return f"{SIDES[side]} {ENDINGS.get(ending, ending.replace('_', ' '))}"
    return NAMES.get(name, ENDINGS.get(name, name.replace("_", " ")))
