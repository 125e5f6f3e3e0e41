"""report.html: what a run did, in one self-contained file that opens offline, on a phone, in light or dark.

`write_report` shows one run, `write_study_report` several side by side. Either works after any subset of the stages.
The pages' contents are plain dataclasses (`Page`, `Section`, ...), filled by `llmjax.report.sections`; the template
only lays them out.
"""

import datetime
import importlib.resources
import os
import pathlib
import shlex
from collections.abc import Sequence

from llmjax import files
from llmjax.report import sections, tables
from llmjax.report.read import Run, read_run
from llmjax.report.sections import Page

_TEMPLATE = "report.html.jinja"


def write_report(
    workdir: str | os.PathLike, title: str, next_steps: Sequence[tuple[str, str]] | None = None, going: bool = False
) -> pathlib.Path:
    """Writes `workdir`/report.html from metrics.jsonl, <stage>/result.json, run.json and config.json; any may be absent.

    Args:
        workdir: the run's folder.
        title: heading of the page.
        next_steps: (what it does, shell command) pairs for "How to go on"; None: those that suit what is there.
        going: the run goes on; the page says so.

    Returns:
        The path of the report.

    Raises:
        UserError: the folder is missing or holds a broken file (file and line).
    """
    run = read_run(workdir)
    page = Page(
        title=title,
        subtitle=sections.subtitle(run),
        status=_status(run) if going else "",
        stages=tuple((run.title(stage), _state(run, stage, going)) for stage in run.stages),
        cards=sections.cards(run),
        grids=tuple(tables.table_grid(table) for stage in run.stages for table in run.tables(stage)),
        sections=sections.run_sections(run),
        details=sections.details([run]),
        next_steps=tuple(next_steps) if next_steps is not None else _next_steps(run),
    )
    return _write(page, run.workdir)


def write_study_report(
    workdir: str | os.PathLike, names: Sequence[str], title: str = "Side by side",
    next_steps: Sequence[tuple[str, str]] | None = None,
) -> pathlib.Path:
    """Writes `workdir`/report.html with the runs `workdir`/`name` side by side, stage by stage, curves overlaid.

    Args:
        workdir: the study's folder.
        names: its runs, in the order of the columns.
        title: heading of the page.
        next_steps: as for `write_report`.

    Returns:
        The path of the report.

    Raises:
        UserError: a run's folder is missing or holds a broken file (file and line).
    """
    workdir = pathlib.Path(workdir)
    runs = [read_run(workdir / name, name) for name in names]
    page = Page(
        title=title,
        subtitle=f"{len(runs)} runs: {', '.join(names)}",
        status="",
        stages=tuple(
            (stage, "not yet" if any(stage in run.stages and stage not in run.summaries for run in runs) else "")
            for stage in tables.all_stages(runs)
        ),
        cards=sections.study_cards(runs),
        grids=(tables.study_grid(runs),),
        sections=sections.study_sections(runs),
        details=sections.details(runs),
        next_steps=tuple(next_steps) if next_steps is not None else tuple(
            step for run in runs for step in _next_steps(run)[:1]
        ),
        links=tuple((f"Report of {name}", f"{name}/report.html") for name in names
                    if (workdir / name / "report.html").exists()),
    )
    return _write(page, workdir)


def _state(run: Run, stage: str, going: bool) -> str:
    """What keeps a stage from being complete; "" for nothing."""
    if stage in run.summaries:
        return ""
    return "under way" if going and run.under_way is not None and run.under_way[0] == stage else "not yet"


def _status(run: Run) -> str:
    now = datetime.datetime.now().astimezone().isoformat(" ", "minutes")
    where = "" if run.under_way is None else f", {run.under_way[0]} after step {run.under_way[1]:,}"
    return f"Still going on: as of {now}{where}. This page is written anew after each stage, and at evaluations within it."


def _next_steps(run: Run) -> tuple[tuple[str, str], ...]:
    folder = shlex.quote(str(run.workdir))
    chat = [(f"Talk to the result in {run.workdir.name}", f"llmjax-chat --workdir={folder}")] if run.summaries else []
    missing = [stage for stage in run.stages if stage not in run.summaries]
    again = [(f"Finish what is open ({', '.join(missing)}): the same command again goes on where it stopped",
              f"llmjax --config=FILE.py --workdir={folder}")] if missing else []  # fmt: skip
    change = ("Change one thing and compare: any field below can be set by its dotted name, in a new folder",
              "llmjax --config=FILE.py --config.FIELD.FIELD=VALUE --workdir=NEW_FOLDER")  # fmt: skip
    return (*chat, *again, change, ("Work with every number behind the curves", f"head {folder}/metrics.jsonl"))


def render(page: Page) -> str:
    """The page as HTML text; everything in it but the figures is escaped."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = importlib.resources.files("llmjax.report").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(source).render(page=page)


def _write(page: Page, workdir: pathlib.Path) -> pathlib.Path:
    path = workdir / "report.html"
    files.write_text_atomic(path, render(page))
    return path
