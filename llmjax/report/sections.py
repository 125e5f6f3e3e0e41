"""The contents of a report, stage by stage: numbers with units, figures, samples. Pure functions of what a run left."""

import dataclasses
import json
from collections.abc import Sequence

from llmjax import units
from llmjax.config import fingerprint
from llmjax.report import efficiency, tables
from llmjax.report.plots import Bar, Reference, Series, bar_plot, heat_map, line_plot
from llmjax.report.plots import Panel as PlotPanel
from llmjax.report.read import Run
from llmjax.results import Bars, Curve, Figure, HeatMap, Metric, Panel, Sample


@dataclasses.dataclass(frozen=True)
class Card:
    """A headline number: `label`, the `value` with its `unit`, and what to compare it with."""

    label: str
    value: str
    unit: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A drawn figure: `svg` is trusted markup from `plots`; the rest is text."""

    title: str
    svg: str
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Section:
    """One stage: a sentence, facts (label, value with unit), figures, samples; aside: figures for who looks for a fault."""

    name: str
    title: str
    lead: str
    facts: tuple[tuple[str, str], ...] = ()
    figures: tuple[Picture, ...] = ()
    samples: tuple[Sample, ...] = ()
    aside: tuple[Picture, ...] = ()


@dataclasses.dataclass(frozen=True)
class Detail:
    """What is folded away at the end of the page: a table, facts (label, value), a text."""

    title: str
    grid: tables.Grid | None = None
    facts: tuple[tuple[str, str], ...] = ()
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Page:
    """A whole report. `status`: of a run that goes on. `stages` are (label, what is missing, "" for nothing), `links` (text,
    relative address)."""

    title: str
    subtitle: str
    status: str
    stages: tuple[tuple[str, str], ...]
    cards: tuple[Card, ...]
    grids: tuple[tables.Grid, ...]
    sections: tuple[Section, ...]
    details: tuple[Detail, ...]
    next_steps: tuple[tuple[str, str], ...]
    links: tuple[tuple[str, str], ...] = ()


def subtitle(run: Run) -> str:
    """Name, totals and fingerprint of a run in one line."""
    done = run.summaries.values()
    parts = [
        run.name,
        units.with_unit(units.seconds(sum(s.seconds for s in done) if done else None), "in all"),
        units.with_unit(units.count(sum(s.tokens for s in done) if done else None), "tokens"),
        f"config {fingerprint(run.config)}" if run.config is not None else units.MISSING,
        f"{len(run.broken)} broken lines of metrics.jsonl left out" if run.broken else units.MISSING,
    ]
    return " · ".join(part for part in parts if part != units.MISSING)


# ---- headline ---------------------------------------------------------------------------------------------------


def cards(run: Run) -> tuple[Card, ...]:
    """The headline numbers of the stages that are there, and the time of all of them."""
    found = [_card(run.title(stage), m) for stage in run.stages for m in _headlines(run, stage)]
    if run.summaries:
        found.append(Card("Time, all stages", units.seconds(sum(s.seconds for s in run.summaries.values())), ""))
    return tuple(found)


def _headlines(run: Run, stage: str) -> list[Metric]:
    return [m for m in run.summaries[stage].metrics if m.headline and m.label] if stage in run.summaries else []


def _card(title: str, metric: Metric) -> Card:
    value, unit = units.text(metric.value, metric.unit, metric.error), ""
    for mark in (" ±", " %", f" {metric.unit}"):
        head, found, rest = value.partition(mark)
        if found and mark.strip():
            value, unit = head, (found + rest).strip()
            break
    label = metric.label if metric.label[1:2].isupper() else f"{metric.label[:1].lower()}{metric.label[1:]}"
    return Card(f"{title}: {label}", value, unit, _comparison(metric))


def _comparison(metric: Metric) -> str:
    """What the value is against its baseline: the difference for shares, in per cent for what is positive."""
    if metric.baseline is None:
        return ""
    name, value = metric.baseline
    shown = f"{name} {units.text(value, metric.unit)}"
    if metric.unit.startswith("%"):
        return f"{shown}: {100 * (metric.value - value):+.0f} points"
    if value <= 0:
        return f"{shown}: {metric.value - value:+.3g}"
    change = metric.value / value - 1
    return f"{shown}: {abs(100 * change):.0f} % {'lower' if change < 0 else 'higher'}"


def study_cards(runs: Sequence[Run]) -> tuple[Card, ...]:
    """For each run the first headline of its last complete stage that has one."""
    found = []
    for run in runs:
        headlines = [(stage, m) for stage in reversed(run.stages) for m in _headlines(run, stage)[:1]]
        if headlines:
            card = _card(run.title(headlines[0][0]), headlines[0][1])
            found.append(dataclasses.replace(card, label=f"{run.name}: {card.label}"))
    return tuple(found)


# ---- stages of one run ------------------------------------------------------------------------------------------


def run_sections(run: Run) -> tuple[Section, ...]:
    """One section for each stage that has a result or any metric."""
    made = []
    for stage in run.stages:
        summary = run.summaries.get(stage)
        if summary is None and not any(key[0] == stage for key in run.metrics):
            continue
        figures = summary.figures if summary else (BEGUN,)
        drawn, aside = (
            tuple(p for i, figure in enumerate(some) for p in _draw([run], stage, figure, f"{stage}-{name}{i}"))
            for name, some in (("", figures), ("aside", ASIDE))
        )
        made.append(Section(
            stage, run.title(stage), summary.lead if summary else "Has begun and is not complete.", _facts(run, stage),
            drawn, summary.samples if summary else (), aside,
        ))  # fmt: skip
    return tuple(made)


BEGUN = Figure("Loss", (Panel("loss", (Curve("loss", label="training"), Curve("loss", "eval", "held out"))),))
"""What is drawn of a stage that has not said yet what to draw."""

ASIDE = (
    Figure("Learning rate", (Panel("learning rate", (Curve("learning_rate"),), from_zero=True),)),
    Figure("Gradient norm", (Panel("global norm, before clipping", (Curve("grad_norm"),), from_zero=True),)),
)
"""What is drawn of every stage for who looks for a fault."""


def _facts(run: Run, stage: str) -> tuple[tuple[str, str], ...]:
    summary = run.summaries.get(stage)
    metrics = [metric for metric in (summary.metrics if summary else ()) if metric.label]
    final = [(m.label, units.text(m.value, m.unit, m.error)) for m in metrics]
    named = {"before", *(m.label.casefold() for m in metrics)}
    final += [
        (m.baseline[0], units.text(m.baseline[1], m.unit)) for m in metrics
        if m.baseline and m.baseline[0].casefold() not in named
    ]  # fmt: skip
    newest = run.metrics.get((stage, "train"), [{}])[-1].get("step")
    cost = [
        ("Optimizer steps", units.count(summary.steps if summary else newest)),
        ("Tokens", units.count(summary.tokens if summary else None)),
        *((f"Data seen: {name}" if name else "Data seen", units.with_unit(units.number(value), "epochs"))
          for name, value in run.epochs(stage).items()),
        ("Throughput", units.with_unit(units.count(run.throughput(stage)), "tokens/s")),
        ("MFU", units.percent(run.mfu(stage))),
        ("Peak memory of a device", units.size(run.last(stage, "peak_memory"))),
        ("Time", units.seconds(summary.seconds if summary else None)),
    ]  # fmt: skip
    return tuple(fact for fact in final + cost if fact[1] != units.MISSING)


def _draw(runs: Sequence[Run], stage: str, figure: Figure | Bars | HeatMap, name: str) -> list[Picture]:
    """The figure of one run, or nothing where it left no numbers for it."""
    if isinstance(figure, HeatMap):
        return _draw_heat_map(runs[0], stage, figure, name)
    if isinstance(figure, Bars):
        bars = tuple(Bar(label, _scale(figure.unit) * value, faint=i < len(figure.bars) - 1)
                     for i, (label, value) in enumerate(figure.bars))  # fmt: skip
        return [Picture(figure.title, bar_plot(name, bars, figure.unit), figure.caption)]
    panels = []
    for color, panel in enumerate(figure.panels):
        drawn = []
        for number, curve in enumerate(panel.curves):
            steps, values = runs[0].curve(stage, curve.kind, curve.metric)
            if steps and not (panel.from_zero and not any(values)):
                drawn.append(_series(curve.label, curve, panel, steps, values, color + number))
        if drawn:
            panels.append(_panel(panel, drawn))
    return [Picture(figure.title, line_plot(name, tuple(panels)), figure.caption)] if panels else []


def _scale(unit: str) -> float:
    return 100.0 if unit.startswith("%") else 1.0


def _series(label: str, curve: Curve, panel: Panel, steps: Sequence[float], values: Sequence[float], color: int) -> Series:
    scaled = tuple(_scale(panel.unit) * value for value in values)
    return Series(label, tuple(steps), scaled, color, "dots" if curve.kind == "eval" else "raw")


def _panel(panel: Panel, series: Sequence[Series]) -> PlotPanel:
    lines = tuple(Reference(label, _scale(panel.unit) * value) for label, value in panel.lines)
    return PlotPanel(panel.unit, tuple(series), lines, panel.from_zero)


def _draw_heat_map(run: Run, stage: str, figure: HeatMap, name: str) -> list[Picture]:
    found = run.tables_of(stage, figure.metric, figure.kind)
    tail = found[-max(1, len(found) // 10) :]
    if not tail:
        return []
    mean = tuple(
        tuple(len(row) * sum(table[i][j] for table in tail) / len(tail) for j in range(len(row)))
        for i, row in enumerate(tail[-1])
    )
    strongest = max(2.0, max(max(row) for row in mean))
    return [Picture(figure.title, heat_map(name, mean, figure.row, figure.column, strongest), figure.caption)]


# ---- several runs -----------------------------------------------------------------------------------------------


def study_sections(runs: Sequence[Run]) -> tuple[Section, ...]:
    """One section for each stage that any run has, with the runs' curves over one another."""
    made = []
    for stage in tables.all_stages(runs):
        done = [run for run in runs if stage in run.summaries]
        if not done and not any(key[0] == stage for run in runs for key in run.metrics):
            continue
        figures: dict[str, Figure | Bars] = {}
        for run in done:
            for figure in run.summaries[stage].figures:
                if isinstance(figure, Bars) or (isinstance(figure, Figure) and figure.compare):
                    figures.setdefault(figure.title, figure)
        drawn = [p for i, one in enumerate(figures.values() or (BEGUN,)) for p in _overlaid(runs, stage, one, f"{stage}-{i}")]
        drawn += _flops_picture(runs, stage)
        lead = done[0].summaries[stage].lead if done else ""
        made.append(Section(stage, done[0].title(stage) if done else stage, lead, figures=tuple(drawn)))
    return tuple(made)


def _overlaid(runs: Sequence[Run], stage: str, figure: Figure | Bars, name: str) -> list[Picture]:
    """The curves of a figure, one picture each, with all runs in it; or the bars of all runs."""
    if isinstance(figure, Bars):
        return _overlaid_bars(runs, stage, figure, name)
    pictures = []
    for i, panel in enumerate(figure.panels):
        for j, curve in enumerate(panel.curves):
            found = [(color, run, *run.curve(stage, curve.kind, curve.metric)) for color, run in enumerate(runs)]
            series = [_series(run.name, curve, panel, steps, values, color) for color, run, steps, values in found if steps]
            if series and not (panel.from_zero and not any(value for *_, values in found for value in values)):
                several = len(figure.panels) > 1 or len(panel.curves) > 1
                title = f"{figure.title}: {curve.label or panel.unit}" if several else figure.title
                pictures.append(Picture(title, line_plot(f"{name}-{i}-{j}", (_panel(panel, series),))))
    return pictures


def _overlaid_bars(runs: Sequence[Run], stage: str, figure: Bars, name: str) -> list[Picture]:
    bars = []
    for color, run in enumerate(runs):
        own = [f for f in (run.summaries[stage].figures if stage in run.summaries else ())
               if isinstance(f, Bars) and f.title == figure.title]  # fmt: skip
        for i, (_, value) in enumerate(own[0].bars if own else ()):
            last = i == len(own[0].bars) - 1
            bars.append(Bar(run.name if last else "", _scale(figure.unit) * value, color, faint=not last))
    labels = ", ".join(label for label, _ in figure.bars)
    return [Picture(figure.title, bar_plot(name, tuple(bars), figure.unit), f"Of each run: {labels}.")] if bars else []


def _flops_picture(runs: Sequence[Run], stage: str) -> list[Picture]:
    curves = [(run, *efficiency.flops_curve(run, stage)) for run in runs]
    series = tuple(Series(run.name, tuple(x), tuple(y), color, "dots") for color, (run, x, y) in enumerate(curves) if x)
    if not series:
        return []
    svg = line_plot(f"{stage}-flops", (PlotPanel("nats per token", series),), "training FLOPs (log scale)", log_x=True)
    return [Picture("Held-out loss by training FLOPs", svg,
                    "Where two curves are at one height, the left one is cheaper by the factor between them.")]  # fmt: skip


# ---- details ----------------------------------------------------------------------------------------------------


def details(runs: Sequence[Run]) -> tuple[Detail, ...]:
    """Data, starts, config and its changes of each run, under its name where there are several."""
    made = []
    for run in runs:
        which = f": {run.name}" if len(runs) > 1 else ""
        about, facts = run.about, ()
        grid = data_grid(run)
        if about.vocab_size:
            facts = (("Vocabulary of the tokenizer", units.text(about.vocab_size, "tokens")),)
        if grid or facts:
            made.append(Detail(f"Data and tokenizer{which}", grid, facts))
        if about.starts:
            lines = "\n".join(f"{start.date}  {start.command}" for start in about.starts)
            made.append(Detail(f"Command, device, versions{which}", None, _start_facts(run), lines))
        if run.config is not None:
            made.append(Detail(f"Resolved config{which}", text=json.dumps(run.config, indent=2, ensure_ascii=False)))
        if run.changes:
            lines = [f"after step {step:,} of {stage}: {line}" for stage, step, line in run.changes]
            made.append(Detail(f"Config changed since the run began{which}", text="\n".join(lines)))
    return tuple(made)


def _start_facts(run: Run) -> tuple[tuple[str, str], ...]:
    """Of the last start."""
    last = run.about.starts[-1]
    commit = [("Commit of the experiment", last.commit)] if last.commit else []
    return (("Device", last.device), *commit, *last.versions.items())


def data_grid(run: Run) -> tables.Grid | None:
    """What stages were trained on, one row a source; a column that would be empty is left out. None if nothing is known."""
    columns = ("Held out", "Text", "Tokens", "Bytes per token", "Cut to length", "Left out", "From")
    rows = []
    for stage in [stage for stage in run.stages if stage in run.about.data]:
        for source in run.about.data[stage]:
            per_token = source.num_bytes / source.tokens if source.num_bytes and source.tokens else None
            cells = (
                units.count(source.held_out or None), units.size(source.num_bytes or None), units.count(source.tokens or None),
                units.number(per_token), units.count(source.truncated or None), units.count(source.dropped or None),
                source.note or units.MISSING,
            )  # fmt: skip
            rows.append((run.title(stage), source.name, units.text(source.records, source.kind), cells))
    if not rows:
        return None
    kept = [i for i in range(len(columns)) if any(cells[i] != units.MISSING for *_, cells in rows)]
    heads = ("", "To train on", *(columns[i] for i in kept))
    lines = (
        (f"{title}: {name}" if name else title, records, *(cells[i] for i in kept)) for title, name, records, cells in rows
    )
    return tables.Grid("What was trained on", heads, tuple(("", line) for line in lines))
