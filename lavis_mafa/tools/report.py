"""The page about one or more runs: one HTML file that needs no network and no other file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from omegaconf import DictConfig, OmegaConf

from lavis_mafa import __version__
from lavis_mafa.config.read import flat, plain
from lavis_mafa.config.schema import MODEL_BLOCKS, RUN_BLOCKS, typed_block
from lavis_mafa.errors import UserError
from lavis_mafa.files import write_text
from lavis_mafa.tools import curves
from lavis_mafa.tools.count import capital
from lavis_mafa.tools.findings import count_section, mine_section, own_plot
from lavis_mafa.tools.gallery import VERDICTS, Candidate, distinct_candidates, gallery_data, rows_of_all
from lavis_mafa.tools.render import Table, number, render
from lavis_mafa.tools.run_files import COUNTED, MINED, Run, last_epoch, open_runs
from lavis_mafa.tools.significance import ITC, METRICS, half_widths

AT_MOST = 5000  # connections in the gallery
SHOWN = """
    model.arch model.model_type model.ecm.enabled model.ecm.threshold model.ecm.ambiguous_from model.ecm.use_in
    model.discriminator.arch model.discriminator.checkpoint model.itc.smoothing model.itm.negatives
    run.grit.enabled run.grit.queue_size run.grit.search_space
    run.batch_size_train run.max_epoch run.init_lr run.precision run.seed
""".split()
ABOUT = """
    judge margin cfg_path options con_d given miner images data samples seed same_image same_text correction settings
""".split()  # of what count-false-negatives and mine tell, what was asked for
NOISE = ("run.output_dir", "run.dist_url", "run.rank", "run.gpu", "run.dist_backend")  # differ without meaning anything
LOSSES = {"loss": "loss", "loss_itc": "ITC", "loss_itm": "ITM", "loss_mlm": "MLM", "loss_lm": "LM"}
SHARES = {
    "new_positive_share": "new positives",
    "ambiguous_share": "ambiguous",
    "false_negative_share": "false negatives",
    "con_d_precision": "Con-D precision",
    "con_d_recall": "Con-D recall",
}
SIDES = {"tr": "TR", "txt": "TR", "ir": "IR", "img": "IR"}
ENDINGS = {**METRICS, "r_mean": "mean"}
NAMES = {"bleu_1": "BLEU-1", "bleu_2": "BLEU-2", "bleu_3": "BLEU-3", "bleu_4": "BLEU-4", "cider": "CIDEr", "rouge_l": "ROUGE-L"}
NAMES |= {"meteor": "METEOR", "spice": "SPICE", "accuracy": "right", "agg_metrics": "mean recall"}


def report_page(runs: list[Run], at_most: int, template: str = "report.html", **values: Any) -> tuple[str, dict[str, Any]]:
    """The page, and the data of its gallery.

    Args:
        at_most: so many connections go into the gallery.
        template: a file of the folder ``page`` that extends ``report.html``. values: what else is in it.
    """
    data = rows_of_all(runs)
    candidates = [
        [] if run.connections is None else distinct_candidates(number, run.connections, rows)
        for number, (run, rows) in enumerate(zip(runs, data, strict=True))
    ]
    gallery = gallery_data(runs, data, candidates, at_most)
    trained = [run for run in runs if run.mined is None and run.counted is None]
    main, less = curves.curves({run.name: run.metrics for run in runs if run.metrics}, smoothing_notes(runs))
    judges = {run.judge for run, found in zip(runs, candidates, strict=True) if found}
    page = render(
        template,
        runs=runs,
        summary=summary_table(trained),
        counted=[count_section(run.name, run.counted, place) for place, run in enumerate(runs) if run.counted is not None],
        mined=[mine_section(run.name, run.mined) for run in runs if run.mined is not None],
        judge=judges.pop() if len(judges) == 1 else None,
        settings=settings_table(runs),
        files=dict(map(_file, runs)),
        legend=curves.legend([run.name for run in runs if run.metrics]),
        curves=main,
        more_curves=less,
        histograms=[plot for place, run in enumerate(runs) if candidates[place] for plot in score_plots(run, place, candidates[place])],
        evaluations=evaluation_tables(trained),
        truth=truth_table(runs, candidates),
        gallery=gallery,
        version=__version__,
        **values,
    )
    return page, gallery


def write_report(folders: Sequence[Path], output: Path, at_most: int = AT_MOST) -> tuple[list[Run], dict[str, Any]]:
    """Write the page about runs to ``output``; returns them, and the data of its gallery. Raises UserError: it cannot be written."""
    if not folders:
        raise UserError("no run is given.")
    if output.is_dir():
        raise UserError(f"--output: {output} is a folder; give a file, such as {output / 'report.html'}.")
    runs = open_runs(list(folders))
    page, gallery = report_page(runs, at_most, pictures=pictures_of(runs, output))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, page)
    except OSError as error:
        raise UserError(f"--output: cannot write {output}: {error.strerror}.") from error
    return runs, gallery


def write_run_page(folder: Path) -> Path:
    """``report.html`` in a run's own folder."""
    page = folder / "report.html"
    write_report([folder], page)
    return page


def pictures_of(runs: list[Run], page: Path) -> dict[str, str]:
    """Name -> link from ``page`` of what ``lavis-mafa analyse pictures --output RUN/pictures`` left in the runs' folders."""
    found = {f"{run.name}/{path.parent.name}": path for run in runs for path in sorted(run.folder.glob("*/pictures.html"))}
    return {name: quote(os.path.relpath(path.resolve(), page.parent.resolve())) for name, path in found.items()}


def score_plots(run: Run, place: int, candidates: list[Candidate]) -> list[curves.Plot]:
    """A judge's scores with the thresholds; of what was mined also against the own pairs' scores. ``place``: of the run on the page."""
    settings, plots = _all_settings(run), []
    limits = settings.get("model.ecm.threshold", 0.8), settings.get("model.ecm.ambiguous_from", 0.5)
    if run.mined is not None:
        limits = (settings["mine.threshold"],) * 2
    if "mine.guide_margin" not in settings:  # a guide has a limit of its own for each anchor
        scores = [(c.probability, c.true) for c in candidates]
        plots.append(curves.score_histogram(run.name, place, scores, *limits, judge=capital(run.judge)))
    if run.mined is not None and run.connections is not None:
        plots.append(own_plot(run.name, run.mined, run.connections, candidates, place))
    return plots


def smoothing_notes(runs: list[Run]) -> dict[str, str]:
    """Why the losses of runs with smoothed targets are higher (MAFA eq. 5): a floor that no model can get below."""
    floors: dict[str, list[str]] = {}
    for run in runs:
        settings = _all_settings(run)
        alpha, batch = settings.get("model.itc.smoothing"), settings.get("run.batch_size_train")
        if alpha and batch and any("loss_itc" in record for record in run.metrics):
            floor = smoothed_floor(alpha, batch)
            floors.setdefault(f"smoothed by {alpha:g} over {batch:,} pairs: about {floor:.2f}", []).append(run.name)
    if not floors:
        return {}
    found = "; ".join(f"{', '.join(names)}: {words}" if len(runs) > 1 else words for words, names in floors.items())
    note = f"Smoothed targets have a floor that a perfect model reaches ({found}), so losses under other smoothing do not compare."
    return {"loss_itc": note, "loss": "Smoothed targets lift the ITC loss, which is part of this: see there."}


def smoothed_floor(alpha: float, candidates: int) -> float:
    """The least ITC loss against one match among K ``candidates``, smoothed by ``alpha``: the entropy of the target.

    Example:
        >>> smoothed_floor(0.0, 64), round(smoothed_floor(1.0, 64), 4) == round(math.log(64), 4)
        (0.0, True)
    """
    of_other = alpha / candidates
    of_own = 1 - alpha + of_other
    return -sum(count * p * math.log(p) for count, p in ((1, of_own), (candidates - 1, of_other)) if p) or 0.0


def _file(run: Run) -> tuple[str, str]:
    """What a run was told, as it is in its folder: a title and the text."""
    for name, results in ((MINED, run.mined), (COUNTED, run.counted)):
        if results is not None:
            return f"{run.name}: {name}", json.dumps(results, indent=2, ensure_ascii=False)
    return f"{run.name}: config.yaml", OmegaConf.to_yaml(run.config)


# --- tables -------------------------------------------------------------------------------------------------------------


def settings_table(runs: list[Run]) -> Table:
    """The settings that tell what was done, and all in which the runs differ."""
    of_runs = [_all_settings(run) for run in runs]
    keys = list(dict.fromkeys(key for settings in of_runs for key in settings))
    differ = [k for k in keys if len({repr(s.get(k)) for s in of_runs}) > 1 and k not in NOISE]
    data = [k for k in keys if (k.startswith("datasets.") and ".build_info." in k) or k.startswith(("mine.", "count."))]
    shown = list(dict.fromkeys([*(k for k in SHOWN if k in keys), *data, *differ]))
    rows = [[key, *(_setting(s.get(key)) for s in of_runs)] for key in shown]
    best = {(shown.index(key), column) for key in differ for column in range(len(runs) + 1)}
    return Table(["setting", *(run.name for run in runs)], rows, "Settings, defaults included", best if len(runs) > 1 else set())


def summary_table(runs: list[Run]) -> Table:
    """What each run came to: its size, its last losses, and what Con-D made of the hardest negatives."""
    ends = [last_epoch(run.metrics) for run in runs]
    shown = [name for name in (*LOSSES, *SHARES) if any(name in end for end in ends)]
    rows = []
    for run, end in zip(runs, ends, strict=True):
        size = [f"{run.metrics[-1]['epoch'] + 1}", f"{run.metrics[-1]['samples_seen']:,}"] if run.metrics else ["–", "–"]
        model = str(OmegaConf.select(run.config, "model.arch") or "–")
        rows.append([run.name, model, *size, *(number(end.get(n), n in SHARES) for n in shown)])
    head = ["run", "model", "epochs", "samples", *((LOSSES | SHARES)[name] for name in shown)]
    return Table(head, rows, "Averages over the last epoch; shares are of the hardest negatives, Con-D's over every sighting of a pair")


def evaluation_tables(runs: list[Run]) -> dict[str, list[Table]]:
    """Split -> tables of all runs: retrieval, and separately captions or answers where some run has them."""
    tables: dict[str, list[Table]] = {}
    for split in dict.fromkeys(split for run in runs for split in run.evaluations):
        found = {run.name: run.evaluations.get(split, {}) for run in runs}
        names = list(dict.fromkeys(n for v in found.values() for n, x in v.items() if isinstance(x, int | float)))
        names = [n for n in names if n not in ("epoch", "agg_metrics") and not n.startswith(ITC)]
        retrieval = [n for n in names if n.split("_")[0] in SIDES or n == "r_mean"]
        others = "Labels" if any(n.startswith("accuracy_") for n in names) else "Captions and answers"
        others = "Grounding" if "without_box" in names else others
        for title, columns in (("Retrieval", retrieval), (others, [n for n in names if n not in retrieval])):
            if columns:
                of_title = {run: values for run, values in found.items() if title == "Retrieval" or any(n in values for n in columns)}
                half = {run.name: half_widths(run.folder, split) for run in runs} if columns == retrieval else {}
                caption = f"{title} on {split}, in per cent"
                caption += "; ± is half of the 95 % interval over queries (bootstrap)" if any(half.values()) else ""
                tables.setdefault(split, []).append(evaluation_table(caption, columns, of_title, half))
    return tables


def evaluation_table(
    caption: str, columns: list[str], found: dict[str, dict[str, Any]], half: dict[str, dict[str, float]] | None = None
) -> Table:
    """``columns`` of each run's evaluation, the best of each column marked, with what comes after ± where it is known.

    Below a run that was ranked by its matching head stands what ITC's cosine alone gives; these rows have a best of their own.
    """
    lines = [(run, not place, line) for run, values in found.items() for place, line in enumerate(by_score(values))]
    own = {key: name for key, name in (("epoch", "epoch"), ("rank_by", "ranked by")) if any(key in line for _, _, line in lines)}

    def cell(run: str, first: bool, line: dict[str, Any], name: str) -> str:
        spread = (half or {}).get(run, {}).get(name if first else f"{ITC}{name}")
        return number(line.get(name), digits=1) + ("" if spread is None else f" ± {number(spread, digits=1)}")

    rows = []
    for run, first, line in lines:
        rows.append([run, *(str(line.get(key, "–")) for key in own), *(cell(run, first, line, name) for name in columns)])
    table = Table(["run", *own.values(), *map(_metric, columns)], rows, caption)
    for place, name in enumerate(columns, start=1 + len(own)):
        for kind in (True, False):
            values = {row: line[name] for row, (_, first, line) in enumerate(lines) if first == kind and name in line}
            if len(values) > 1:
                table.best |= {(row, place) for row, value in values.items() if value == max(values.values())}
    return table


def by_score(values: dict[str, Any]) -> list[dict[str, Any]]:
    """An evaluation, and where it was ranked by another score that of ITC's cosine alone, under the same names."""
    alone = {name.removeprefix(ITC): value for name, value in values.items() if name.startswith(ITC)}
    if not alone or values.get("rank_by") == "itc":
        return [values]
    return [values, {**({"epoch": values["epoch"]} if "epoch" in values else {}), "rank_by": "itc", **alone}]


def truth_table(runs: list[Run], candidates: list[list[Candidate]]) -> Table | None:
    """Con-D's verdicts against the truth: of distinct recorded pairs, of all their sightings, and as the summary has it; None of none.

    They differ, since GRIT brings the same pairs together again, and most often those that do match.
    """
    rows = []
    for run, found in zip(runs, candidates, strict=True):
        truth = {(c.image, c.text): c.true for c in found if c.true is not None}
        if not truth or run.connections is None:
            continue
        judgements = {"each pair once": [(c.true is True, c.verdict == 2) for c in found if c.true is not None]}
        if run.mined is None:  # which sees each pair once
            columns = (run.connections[name].to_pylist() for name in ("image", "text", "verdict"))
            sightings = [(truth[i, t], verdict == VERDICTS[2]) for i, t, verdict in zip(*columns, strict=True) if (i, t) in truth]
            judgements["every sighting"] = sightings
        for name, judged in judgements.items():
            score = con_d_score(judged)
            shares = {key: number(score[key], share=True) for key in ("true_share", "precision", "recall")}
            counts = [f"{score['pairs']:,}", shares["true_share"], f"{score['positive']:,}"]
            rows.append([run.name, name, *counts, shares["precision"], shares["recall"]])
        if run.metrics and "con_d_precision" in (end := last_epoch(run.metrics)):
            of_last = (number(end.get(name), share=True) for name in ("con_d_precision", "con_d_recall"))
            rows.append([run.name, "every sighting, last epoch", "–", "–", "–", *of_last])
    head = ["run", "counted", "pairs", "truly match", "judged positive", "precision", "recall"]
    caption = "A precision equal to “truly match” is what guessing would reach"
    if any(run.connections is not None and run.mined is None for run in runs):
        caption = (
            "Recorded verdicts of all epochs; the summary has every verdict of the last one. A pair that matches is often seen again, "
            f"so that sightings and pairs differ. {caption}"
        )
    return Table(head, rows, caption) if rows else None


def con_d_score(judged: list[tuple[bool, bool]]) -> dict[str, Any]:
    """Counts and shares of pairs, given as (does it truly match, was it judged positive); a share of nothing is NaN.

    ``true_share`` of all pairs is the ``precision`` that guessing would reach.
    """
    true, positive = sum(true for true, _ in judged), sum(said for _, said in judged)
    both = sum(true and said for true, said in judged)
    shares = {"true_share": (true, len(judged)), "precision": (both, positive), "recall": (both, true)}
    counts = {"pairs": len(judged), "positive": positive}
    return counts | {name: part / whole if whole else math.nan for name, (part, whole) in shares.items()}


def _all_settings(run: Run) -> dict[str, Any]:
    """Dotted key -> value of the model, run and data blocks, our own with their defaults; of a result what was asked for."""
    for block, results in (("mine", run.mined), ("count", run.counted)):
        if results is not None:
            asked = flat({key: results[key] for key in ABOUT if key in results}, block)
            return {key.replace(".settings", ""): value for key, value in asked.items() if value not in (None, [])}
    found: dict[str, Any] = {}
    config = run.config
    for block, known in (("model", MODEL_BLOCKS), ("run", RUN_BLOCKS), ("datasets", {})):
        values = config.get(block)
        if not isinstance(values, DictConfig):
            continue
        written = plain(values)
        if values.get("arch" if block == "model" else "task") in known:
            try:
                written = asdict(typed_block(block, values))
            except UserError:
                pass  # settings of another version are shown as they were written
        found |= flat(written, block)
    return found


def _setting(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _metric(name: str) -> str:
    side, _, ending = name.partition("_")
    if side in SIDES:
        return f"{SIDES[side]} {ENDINGS.get(ending, ending.replace('_', ' '))}"
    return NAMES.get(name, ENDINGS.get(name, name.replace("_", " ")))
