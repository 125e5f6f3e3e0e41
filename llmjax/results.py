"""What a stage has to say when it is done: numbers with units, pictures, samples, tables. The terminal, the report and studies
are drawn from this and know no stage. Beside that what is known of the run itself: how it was started, what its data hold.

Plain data, kept as STAGE/result.json and run.json; imports no jax.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Literal

from llmjax.config import from_dict, to_dict
from llmjax.errors import UserError
from llmjax.files import read_json, write_json_atomic

RUN_FILE = "run.json"
# What a completed stage leaves in its folder: this summary, what its model is, parameters, low-rank updates that are in them.
RESULT_FILE, MODEL_FILE, PARAMS, ADAPTER = "result.json", "model.json", "params", "adapter"
# What each line of metrics.jsonl has beside its numbers: the stage, its step, and "train" or "eval".
ROW = {"stage": str, "step": int, "kind": str}
# The history of the config of a run, and what each line has: before which step of which stage it was changed, and how.
CHANGES_FILE = "config_changes.jsonl"
CHANGE = {"stage": str, "step": int, "changes": list}


@dataclass(frozen=True)
class Metric:
    """One number.

    name: its key in result.json. value: in `unit`, but for "%", which shows a fraction. label: the words for people; without
    one it is kept for programs and shown nowhere. unit: see `llmjax.units.text`. error: standard error, in the same unit.
    baseline: what to compare it with, by name and value. headline: whether it stands at the top of the report.
    """

    name: str
    value: float
    label: str = ""
    unit: str = ""
    error: float | None = None
    baseline: tuple[str, float] | None = None
    headline: bool = False


@dataclass(frozen=True)
class Curve:
    """A metric of metrics.jsonl over the steps. kind: of its rows, "train" or "eval". label: needed beside another curve."""

    metric: str
    kind: Literal["train", "eval"] = "train"
    label: str = ""


@dataclass(frozen=True)
class Panel:
    """One pair of axes. unit: of the y axis; "% ..." shows fractions as per cent. lines: (label, value) to compare with."""

    unit: str
    curves: tuple[Curve, ...]
    lines: tuple[tuple[str, float], ...] = ()
    from_zero: bool = False


@dataclass(frozen=True)
class Figure:
    """Panels under one another over the steps. A study lays the curves of its runs over one another where `compare` is true."""

    title: str
    panels: tuple[Panel, ...]
    caption: str = ""
    compare: bool = True


@dataclass(frozen=True)
class Bars:
    """Values side by side, (label, value); a study shows those of all runs."""

    title: str
    unit: str
    bars: tuple[tuple[str, float], ...]
    caption: str = ""


@dataclass(frozen=True)
class HeatMap:
    """Metrics named `metric`/row/column, mean of the last tenth of the rows that have them, times the number of columns: 1
    where all are equal."""

    title: str
    metric: str
    kind: Literal["train", "eval"]
    row: str
    column: str
    caption: str = ""


@dataclass(frozen=True)
class Sample:
    """What a model wrote. continues: whether the answer goes on from the prompt in one text, or is a turn of its own."""

    prompt: str
    answer: str
    note: str = ""
    continues: bool = False


@dataclass(frozen=True)
class Table:
    """columns: (key, label, unit). rows: {"name": first cell, key: value, key + "_stderr": standard error}; None is unknown."""

    caption: str
    columns: tuple[tuple[str, str, str], ...]
    rows: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Summary:
    """A completed stage, as its result.json holds it.

    title, lead: heading and sentence of its section in the report. steps: of the optimizer. seconds: of training. tokens: that
    it was trained on.
    """

    stage: str
    title: str = ""
    lead: str = ""
    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    metrics: tuple[Metric, ...] = ()
    figures: tuple[Figure | Bars | HeatMap, ...] = ()
    samples: tuple[Sample, ...] = ()
    tables: tuple[Table, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)

    def metric(self, name: str) -> float | None:
        """The value of a metric, None if there is none of this name."""
        return next((metric.value for metric in self.metrics if metric.name == name), None)


@dataclass(frozen=True)
class Start:
    """One start of a run.

    date: ISO 8601. command: as it was typed. commit: of the git repository that the experiment's file lies in, with "-dirty"
    where its files had changed since; "" outside of one. device: in words. versions: of what it was computed with, by name.
    """

    date: str
    command: str = ""
    commit: str = ""
    device: str = ""
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """One source of the data that a stage is trained on.

    name: in a mixture, else "". kind: of its records ("documents", "prompts", ...). records, tokens: to train on. num_bytes:
    UTF-8 bytes of documents, 0 where they were not counted. held_out: records that are not trained on. truncated, dropped:
    records that were cut to length, and left out. note: where they are from.
    """

    name: str
    kind: str
    records: int
    tokens: int = 0
    num_bytes: int = 0
    held_out: int = 0
    truncated: int = 0
    dropped: int = 0
    note: str = ""


@dataclass(frozen=True)
class About:
    """What run.json holds. vocab_size: of the tokenizer (0: not known). data: of each stage."""

    starts: tuple[Start, ...] = ()
    vocab_size: int = 0
    data: dict[str, tuple[Source, ...]] = field(default_factory=dict)


def write_about(workdir: str | os.PathLike, about: About) -> None:
    """Writes `workdir`/run.json."""
    write_json_atomic(os.path.join(workdir, RUN_FILE), to_dict(about))


def read_about(workdir: str | os.PathLike) -> About:
    """What `write_about` wrote; of a run without it nothing is known. Raises UserError for a broken file."""
    path = os.path.join(workdir, RUN_FILE)
    if not os.path.exists(path):
        return About()
    try:
        return from_dict(About, read_json(path))
    except (AttributeError, TypeError, UserError) as error:
        raise UserError(f"{path}: not what is known of a run ({error}); restore the file or remove it") from error


def write_summary(folder: str | os.PathLike, summary: Summary) -> None:
    """Writes `folder`/result.json. Its presence says that the stage is complete: write it last.

    The values of the metrics stand by themselves under "metrics", what is said about them under "about".
    """
    data = to_dict(summary)
    data["metrics"] = {metric.name: float(metric.value) for metric in summary.metrics}
    data["about"] = {metric.name: _said(metric) for metric in summary.metrics}
    write_json_atomic(os.path.join(folder, RESULT_FILE), data)


def _said(metric: Metric) -> dict[str, Any]:
    """The fields of a metric that say something, but for its name and value."""
    said = {name: value for name, value in to_dict(metric).items() if name not in ("name", "value")}
    return {name: value for name, value in said.items() if value is not None and value is not False and value != ""}


def read_summary(folder: str | os.PathLike) -> Summary | None:
    """What `write_summary` wrote, or None if the stage is not complete. Raises UserError for a broken file."""
    path = os.path.join(folder, RESULT_FILE)
    if not os.path.exists(path):
        return None
    data = read_json(path)
    try:
        about = data.pop("about", {})
        metrics = [{"name": name, "value": value} | about.get(name, {}) for name, value in data.pop("metrics", {}).items()]
        return from_dict(Summary, data | {"metrics": metrics})
    except (AttributeError, TypeError, UserError) as error:
        raise UserError(f"{path}: not the result of a stage ({error}); restore the file or run the stage again") from error
