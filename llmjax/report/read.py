"""What a run left in its workdir, read back: metrics.jsonl, STAGE/result.json, run.json, config.json; any may be absent."""

import dataclasses
import os
import pathlib
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from llmjax import files
from llmjax.errors import UserError
from llmjax.results import CHANGE, CHANGES_FILE, RESULT_FILE, ROW, About, Summary, Table, read_about, read_summary


@dataclasses.dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: what it is called beside others ("dense", "moe").
        workdir: its folder.
        metrics: (stage, "train" | "eval") -> records {"step": int, name: float}, by step, one a step.
        summaries: stage -> what it came to, for the stages that are complete.
        config: the resolved experiment as JSON values, or None.
        about: how it was started, and what its data hold.
        changes: of the config since the run began, (stage, step that was the last before it, "sft.steps: 4 -> 9").
        broken: "PATH:LINE: ..." for each line of metrics.jsonl that is none and was left out.
    """

    name: str
    workdir: pathlib.Path
    metrics: dict[tuple[str, str], list[dict[str, Any]]]
    summaries: dict[str, Summary]
    config: dict[str, Any] | None
    about: About = About()
    changes: Sequence[tuple[str, int, str]] = ()
    broken: Sequence[str] = ()

    @property
    def stages(self) -> list[str]:
        """The stages of the experiment, in their order, then others that left something."""
        return list(dict.fromkeys([*self.planned, *(stage for stage, _ in self.metrics), *self.summaries]))

    @property
    def planned(self) -> list[str]:
        """The stages of the experiment, in their order."""
        return list((self.config or {}).get("stages", {}))

    @property
    def under_way(self) -> tuple[str, int] | None:
        """The stage that has begun and is not complete, and its newest step; the last of them if there are several."""
        begun = [(stage, rows[-1]["step"]) for (stage, kind), rows in self.metrics.items()
                 if kind == "train" and stage not in self.summaries]  # fmt: skip
        return max(begun, key=lambda one: self.stages.index(one[0]), default=None)

    def title(self, stage: str) -> str:
        """What people call a stage."""
        summary = self.summaries.get(stage)
        return summary.title if summary and summary.title else stage

    def tables(self, stage: str) -> Sequence[Table]:
        """The tables of a stage, empty before it is complete."""
        return self.summaries[stage].tables if stage in self.summaries else ()

    def curve(self, stage: str, kind: str, name: str) -> tuple[list[float], list[float]]:
        """(steps, values) of one metric; both empty if it was never written."""
        points = [(r["step"], r[name]) for r in self.metrics.get((stage, kind), []) if _is_number(r.get(name))]
        return [float(step) for step, _ in points], [float(value) for _, value in points]

    def final(self, stage: str, name: str) -> float | None:
        """The stage's final value of a metric: that of its result, else the last evaluation."""
        value = self.summaries[stage].metric(name) if stage in self.summaries else None
        values = self.curve(stage, "eval", name)[1]
        return value if value is not None else values[-1] if values else None

    def last(self, stage: str, name: str) -> float | None:
        """The value of a training metric at the stage's last step that has it."""
        values = self.curve(stage, "train", name)[1]
        return values[-1] if values else None

    def throughput(self, stage: str) -> float | None:
        """tokens/s: the median over training steps (so without compilation and evaluation), else over the stage."""
        values = self.curve(stage, "train", "tokens_per_second")[1]
        if values:
            return statistics.median(values)
        summary = self.summaries.get(stage)
        return summary.tokens / summary.seconds if summary and summary.seconds and summary.tokens else None

    def mfu(self, stage: str) -> float | None:
        """Model FLOPs utilisation, the median over training steps; None where the peak of the device is not known."""
        values = self.curve(stage, "train", "mfu")[1]
        return statistics.median(values) if values else None

    def epochs(self, stage: str) -> dict[str, float]:
        """How often a stage has gone through its data, by the name of the source ("" for the only one)."""
        rows = self.metrics.get((stage, "train"), [])
        names = [name for name in (rows[-1] if rows else ()) if name == "epoch" or name.startswith("epoch/")]
        return {name.removeprefix("epoch").removeprefix("/"): rows[-1][name] for name in names}

    def is_sparse(self, stage: str) -> bool | None:
        """Whether tokens use only a part of the parameters; None where that is not known."""
        size, active = self.final(stage, "num_params"), self.final(stage, "num_active_params")
        return None if size is None or active is None else active != size

    def tables_of(self, stage: str, metric: str, kind: str) -> list[list[list[float]]]:
        """Metrics named `metric`/row/column, [step][row][column], of the steps that have them."""
        records = [r for r in self.metrics.get((stage, kind), []) if any(key.startswith(f"{metric}/") for key in r)]
        return [_rows(record, f"{metric}/") for record in records]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _rows(record: dict[str, Any], prefix: str) -> list[list[float]]:
    rows = defaultdict(dict)
    for key, value in record.items():
        if key.startswith(prefix):
            row, column = key.removeprefix(prefix).split("/")
            rows[int(row)][int(column)] = float(value)
    return [[row[column] for column in sorted(row)] for _, row in sorted(rows.items())]


def read_run(workdir: str | os.PathLike, name: str = "") -> Run:
    """Reads a workdir.

    Raises:
        UserError: no such folder, or a result.json or config.json in it that is not JSON (with its line).
    """
    workdir = pathlib.Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"workdir={workdir}: no such folder; run an experiment into it first")
    config = workdir / "config.json"
    metrics, broken = read_metrics(workdir / "metrics.jsonl")
    rows, _ = files.read_json_lines(workdir / CHANGES_FILE, CHANGE)
    found = {path.parent.name: read_summary(path.parent) for path in sorted(workdir.glob(f"*/{RESULT_FILE}"))}
    return Run(
        name=name or workdir.name,
        workdir=workdir,
        metrics=metrics,
        summaries={stage: summary for stage, summary in found.items() if summary is not None},
        config=files.read_json(config) if config.exists() else None,
        about=read_about(workdir),
        changes=[(row["stage"], row["step"], line) for row in rows for line in row["changes"]],
        broken=broken,
    )


def read_metrics(path: pathlib.Path) -> tuple[dict[tuple[str, str], list[dict[str, Any]]], list[str]]:
    """(stage, kind) -> records by step, and what `Run.broken` holds. Of a step that was repeated the last record counts.

    An unfinished last line (the run was killed while it wrote) is left out in silence.
    """
    by_step = defaultdict(dict)
    rows, broken = files.read_json_lines(path, ROW)
    for row in rows:
        by_step[row["stage"], row["kind"]].setdefault(row["step"], {}).update(row)
    return {key: [steps[step] for step in sorted(steps)] for key, steps in by_step.items()}, broken
