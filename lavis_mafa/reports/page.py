"""The page about one or more runs: one HTML file that needs no network and no other file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from omegaconf import OmegaConf

from lavis_mafa import __version__
from lavis_mafa.errors import UserError
from lavis_mafa.reports import curves, tables
from lavis_mafa.reports.gallery import Candidate, distinct_candidates, gallery_data
from lavis_mafa.reports.run_files import Run
from lavis_mafa.reports.training_rows import TrainingRows, read_training_rows, working_directory

TEMPLATES = Path(__file__).parent


def report_page(runs: list[Run], at_most: int) -> tuple[str, dict[str, Any]]:
    """The page, and the data of its gallery.

    Args:
        runs: at least one.
        at_most: so many connections go into the gallery.
    """
    data = _training_rows(runs)
    candidates = [
        [] if run.connections is None else distinct_candidates(number, run.connections, rows)
        for number, (run, rows) in enumerate(zip(runs, data, strict=True))
    ]
    gallery = gallery_data(runs, data, candidates, at_most)
    main, less = curves.curves({run.name: run.metrics for run in runs if run.metrics})
    page = render(
        "report.html",
        runs=runs,
        summary=tables.summary_table(runs),
        settings=tables.settings_table(runs),
        yamls={run.name: OmegaConf.to_yaml(run.config) for run in runs},
        legend=curves.legend([run.name for run in runs if run.metrics]),
        curves=main,
        more_curves=less,
        histograms=[
            score_histogram(run, number, found) for number, (run, found) in enumerate(zip(runs, candidates, strict=True)) if found
        ],
        evaluations=tables.evaluation_tables(runs),
        truth=tables.truth_table(runs, candidates),
        gallery=gallery,
        version=__version__,
    )
    return page, gallery


def render(template: str, **values: Any) -> str:
    """A template of this folder; everything in it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES, encoding="utf-8"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(**values)


def write_page(path: Path, page: str) -> None:
    """Write the page; its folder is made.

    Raises:
        UserError: it cannot be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output: cannot write {path}: {error.strerror}.") from error


def _training_rows(runs: list[Run]) -> list[TrainingRows]:
    """Of each run; runs on the same data share them."""
    known: dict[str, TrainingRows] = {}
    found = []
    for run in runs:
        if run.connections is None:
            found.append(TrainingRows())
            continue
        infos = {str(k): b.get("build_info") for k, b in (run.config.get("datasets") or {}).items()}
        key = f"{working_directory(run.folder, run.config)} {infos}"
        if key not in known:
            known[key] = read_training_rows(run.folder, run.config)
        found.append(_checked(known[key], run))
    return found


def _checked(rows: TrainingRows, run: Run) -> TrainingRows:
    """The rows, if the run's indices fit them: other data have other captions, which would be shown as if they were right."""
    assert run.connections is not None
    highest = max((int(run.connections[name].to_numpy().max(initial=-1)) for name in ("image", "text")), default=-1)
    if rows.problem is None and highest >= len(rows):
        return TrainingRows(problem=f"The data have {len(rows)} rows now, but the run saw row {highest}: they changed since then.")
    return rows


def score_histogram(run: Run, number: int, found: list[Candidate]) -> curves.Plot:
    """How the scores of a run's candidates are spread; ``number`` tells its plot from other runs' in the page."""
    settings = tables.full_settings(run.config)
    threshold, ambiguous = settings.get("model.ecm.threshold", 0.8), settings.get("model.ecm.ambiguous_from", 0.5)
    return curves.score_histogram(run.name, number, [c.probability for c in found], [c.true for c in found], threshold, ambiguous)
