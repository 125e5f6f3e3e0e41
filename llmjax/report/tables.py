"""Tables for the terminal and for the report: those of a stage, and runs side by side."""

import dataclasses
from collections.abc import Sequence

import rich.box
import rich.markup
import rich.table

from llmjax import units
from llmjax.report import efficiency
from llmjax.report.read import Run
from llmjax.results import Metric, Table


@dataclasses.dataclass(frozen=True)
class Grid:
    """A table of texts: `rows` are (group, cells), one cell a column; a group is a heading over its rows."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]

    def groups(self) -> list[tuple[str, list[tuple[str, ...]]]]:
        """(group, its rows) in order."""
        grouped: dict[str, list[tuple[str, ...]]] = {}
        for group, cells in self.rows:
            grouped.setdefault(group, []).append(cells)
        return list(grouped.items())


def table_grid(table: Table) -> Grid:
    """A stage's table as texts; a unit stands in the head of the first of neighbouring columns that have it."""
    before = ("", *(unit for _, _, unit in table.columns))
    heads = tuple(
        f"{label} ({unit})" if unit and unit != last else label for (_, label, unit), last in zip(table.columns, before)
    )
    rows = tuple(
        ("", (row["name"], *(_bare(row.get(key), row.get(f"{key}_stderr"), unit) for key, _, unit in table.columns)))
        for row in table.rows
    )
    return Grid(table.caption, ("", *heads), rows)


def _bare(value: float | None, error: float | None, unit: str) -> str:
    return _cell(value, error, "%").removesuffix(" %") if unit.startswith("%") else units.with_error(value, error, digits=1)


def _cell(value: float | None, error: float | None, unit: str) -> str:
    return units.text(value, "%" if unit.startswith("%") else "", error)


def study_grid(runs: Sequence[Run]) -> Grid:
    """Runs side by side, stage by stage, one column a run; a row that no run has is left out."""
    rows = []
    for stage in all_stages(runs):
        title = next((run.title(stage) for run in runs if stage in run.summaries), stage)
        group = title if title.lower().startswith(stage.lower()) else f"{title} ({stage})"
        for label, texts in _study_rows(runs, stage):
            if any(text != units.MISSING for text in texts):
                rows.append((group, (label, *texts)))
    return Grid("Side by side", ("", *(run.name for run in runs)), tuple(rows))


def all_stages(runs: Sequence[Run]) -> list[str]:
    """The stages that any run has, in the order of the first that has them."""
    return list(dict.fromkeys(stage for run in runs for stage in run.stages))


def _study_rows(runs: Sequence[Run], stage: str) -> list[tuple[str, list[str]]]:
    summaries = [run.summaries.get(stage) for run in runs]
    labelled: dict[str, Metric] = {m.name: m for summary in summaries if summary for m in summary.metrics if m.label}
    rows = []
    for name, shown in labelled.items():
        found = [next((m for m in summary.metrics if m.name == name), None) if summary else None for summary in summaries]
        unit = f" ({shown.unit})" if shown.unit and shown.unit not in units.COUNTED and not shown.unit.startswith("%") else ""
        texts = [
            units.MISSING if m is None else units.count(m.value) if m.unit in units.COUNTED else _cell(m.value, m.error, m.unit)
            for m in found
        ]  # fmt: skip
        rows.append((f"{shown.label}{unit}", texts))
    return [
        *rows,
        *_sparse_rows(runs, stage),
        ("Tokens", [units.count(summary.tokens if summary else None) for summary in summaries]),
        ("Throughput (tokens/s)", [units.count(run.throughput(stage)) for run in runs]),
        ("Time", [units.seconds(summary.seconds if summary else None) for summary in summaries]),
    ]


def _sparse_rows(runs: Sequence[Run], stage: str) -> list[tuple[str, list[str]]]:
    """What experts bring for their FLOPs and how evenly they are used, if any run has some."""
    if not any(run.is_sparse(stage) for run in runs):
        return []
    columns = {
        "Loss at equal FLOPs (nats/token)": map(units.number, efficiency.losses_at_equal_flops(runs, stage)),
        "Efficiency leverage (x dense)": map(units.number, efficiency.leverages(runs, stage)),
        "Busiest expert (load, x uniform)": (units.number(run.last(stage, "moe/max_load")) for run in runs),
        "Router entropy (nats)": (units.number(run.last(stage, "moe/entropy")) for run in runs),
        "Choices dropped": (units.percent(run.last(stage, "moe/dropped")) for run in runs),
        "Dead experts": (units.count(run.last(stage, "moe/dead_experts")) for run in runs),
    }
    return [(label, list(texts)) for label, texts in columns.items()]


def to_rich(grid: Grid) -> rich.table.Table:
    """The grid for a terminal."""
    table = rich.table.Table(
        title=grid.caption, title_justify="left", header_style="bold", box=rich.box.SIMPLE_HEAD, padding=0, show_edge=False,
    )  # fmt: skip
    for index, column in enumerate(grid.columns):
        table.add_column(rich.markup.escape(column), justify="right" if index else "left", overflow="fold", no_wrap=not index)
    for group, rows in grid.groups():
        if group:
            table.add_section()
            table.add_row(f"[bold]{rich.markup.escape(group)}[/bold]")
        for cells in rows:
            table.add_row(*(rich.markup.escape(cell.replace(" ± ", "±")) for cell in cells))  # 80 columns are soon full
    return table


def study_table(runs: Sequence[Run]) -> rich.table.Table:
    """`study_grid` for a terminal."""
    return to_rich(study_grid(runs))
