"""What a run left in its workdir, read back: metrics.jsonl, <stage>/result.json, config.json; any may be absent."""

import collections
import dataclasses
import json
import os
import pathlib
import statistics
from typing import Any

from llmjax import files
from llmjax.errors import UserError

STAGES = {"pretrain": "Pre-training", "sft": "SFT", "reward": "Reward model", "ppo": "PPO"}


@dataclasses.dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: what it is called beside others ("dense", "moe").
        workdir: its folder.
        metrics: (stage, "train" | "eval") -> records {"step": int, name: float}, by step, one a step.
        results: stage -> the contents of its result.json, for the stages that are complete.
        config: the resolved experiment as JSON values, or None.
    """

    name: str
    workdir: pathlib.Path
    metrics: dict[tuple[str, str], list[dict[str, Any]]]
    results: dict[str, dict[str, Any]]
    config: dict[str, Any] | None

    def curve(self, stage: str, kind: str, name: str) -> tuple[list[float], list[float]]:
        """(steps, values) of one metric; both empty if it was never written."""
        points = [(r["step"], r[name]) for r in self.metrics.get((stage, kind), []) if _is_number(r.get(name))]
        return [float(step) for step, _ in points], [float(value) for _, value in points]

    def final(self, stage: str, name: str) -> float | None:
        """The stage's final value of a metric: that of its result.json, else the last evaluation."""
        value = self.results.get(stage, {}).get("metrics", {}).get(name)
        if _is_number(value):
            return float(value)
        values = self.curve(stage, "eval", name)[1]
        return values[-1] if values else None

    def throughput(self, stage: str) -> float | None:
        """tokens/s: the median over training steps (so without compilation and evaluation), else over the stage."""
        values = self.curve(stage, "train", "tokens_per_second")[1]
        if values:
            return statistics.median(values)
        tokens, seconds = self.total("tokens", stage), self.total("seconds", stage)
        return tokens / seconds if tokens and seconds else None

    def total(self, key: str, *stages: str) -> float | None:
        """Sum of a top-level number of result.json ("seconds", "tokens", "steps") over stages (default all)."""
        values = [result.get(key) for stage, result in self.results.items() if not stages or stage in stages]
        values = [value for value in values if _is_number(value)]
        return sum(values) if values else None

    def last(self, stage: str, name: str) -> float | None:
        """The value of a training metric at the stage's last step that has it."""
        values = self.curve(stage, "train", name)[1]
        return values[-1] if values else None

    def is_sparse(self) -> bool | None:
        """Whether tokens use only a part of the parameters; None before pre-training is complete."""
        size, active = self.final("pretrain", "num_params"), self.final("pretrain", "num_active_params")
        return None if size is None or active is None else active != size

    def final_rows(self) -> dict[str, dict[str, Any]]:
        """"base" | "sft" | "ppo" -> its row of the final table; empty before PPO is complete."""
        return {row["model"]: row for row in self.results.get("ppo", {}).get("table", [])}

    def expert_loads(self) -> tuple[list[float], list[list[list[float]]]]:
        """(steps, loads [step][layer][expert]) of the first stage that wrote them, as multiples of a uniform load."""
        for stage in STAGES:
            records = [r for r in self.metrics.get((stage, "train"), []) if _load_keys(r)]
            if records:
                return [float(r["step"]) for r in records], [_loads(record) for record in records]
        return [], []

    def mean_loads(self) -> list[list[float]]:
        """[layer][expert] loads, as multiples of a uniform load: mean of the last tenth of the steps; empty without experts."""
        _, loads = self.expert_loads()
        tail = loads[-max(1, len(loads) // 10):]
        return [
            [sum(load[i][j] for load in tail) / len(tail) for j in range(len(row))] for i, row in enumerate(tail[-1])
        ] if tail else []


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _load_keys(record: dict[str, Any]) -> list[str]:
    return [key for key in record if key.startswith("moe/load/")]


def _loads(record: dict[str, Any]) -> list[list[float]]:
    layers = collections.defaultdict(dict)
    for key in _load_keys(record):
        layer, expert = key.split("/")[2:]
        layers[int(layer)][int(expert)] = float(record[key])
    return [[row[expert] * len(row) for expert in sorted(row)] for _, row in sorted(layers.items())]


def read_run(workdir: str | os.PathLike, name: str = "") -> Run:
    """Reads a workdir.

    Raises:
        UserError: no such folder, or a file in it that is not JSON (with its line).
    """
    workdir = pathlib.Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"workdir={workdir}: no such folder; run an experiment into it first")
    config = workdir / "config.json"
    results = {stage: workdir / stage / "result.json" for stage in STAGES}
    return Run(
        name=name or workdir.name,
        workdir=workdir,
        metrics=read_metrics(workdir / "metrics.jsonl"),
        results={stage: files.read_json(path) for stage, path in results.items() if path.exists()},
        config=files.read_json(config) if config.exists() else None,
    )


def read_metrics(path: pathlib.Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(stage, kind) -> records by step. A resumed run repeats steps: the last record of a step counts.

    An unfinished last line (the run was killed while it wrote) is left out; any other broken line is a UserError.
    """
    if not path.exists():
        return {}
    by_step = collections.defaultdict(dict)
    lines = files.read_text(path).split("\n")
    for index, line in enumerate(lines[:-1]):  # what follows the last newline is empty or unfinished
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            key = (record["stage"], record["kind"])
            step = int(record["step"])
        except (ValueError, KeyError, TypeError) as error:
            problem = "not a JSON object with stage, kind and step"
            raise UserError(f"{path}:{index + 1}: {problem}; remove the line") from error
        by_step[key].setdefault(step, {}).update(record)
    return {key: [steps[step] for step in sorted(steps)] for key, steps in by_step.items()}
