"""The tables of a run's end, for the terminal and for the report: base / SFT / PPO, and runs side by side."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import rich.markup
import rich.table

from llmjax.analysis import efficiency, units
from llmjax.analysis.runs import STAGES, Run

MODELS = {"base": "Base", "sft": "SFT", "ppo": "PPO"}


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


def final_grid(rows: Sequence[dict[str, Any]]) -> Grid:
    """The final table from the rows of the PPO stage's result (`model`, `gold`, `gold_stderr`, `correct`, ...).

    Units: gold in points (mean ± standard error), correct and instruction_following as fractions shown in %, KL in
    nats per sequence.
    """
    def cells(row: dict[str, Any]) -> tuple[str, ...]:
        return (
            MODELS.get(row["model"], row["model"]),
            units.with_error(row.get("gold"), row.get("gold_stderr")),
            units.percent(row.get("correct")),
            units.percent(row.get("instruction_following")),
            units.number(row.get("kl")),
        )

    columns = ("Model", "Gold score (points, ± SE)", "Correct", "Follows instructions", "KL from SFT (nats/sequence)")
    return Grid("Held-out prompts", columns, tuple(("", cells(row)) for row in rows))


def study_grid(runs: Sequence[Run]) -> Grid:
    """Runs side by side, stage by stage, one column a run; a row that no run has is left out."""
    rows = [
        (STAGES[stage], (label, *texts))
        for stage, label, texts in _study_rows(runs)
        if any(text != units.MISSING for text in texts)
    ]
    return Grid("Side by side", ("", *(run.name for run in runs)), tuple(rows))


def _study_rows(runs: Sequence[Run]) -> list[tuple[str, str, list[str]]]:
    def each(stage: str, label: str, function) -> tuple[str, str, list[str]]:
        return stage, label, [function(run) for run in runs]

    def metric(stage: str, name: str, text=units.number):
        return lambda run: text(run.final(stage, name))

    def gold(model: str):
        return lambda run: units.with_error(
            run.final_rows().get(model, {}).get("gold"), run.final_rows().get(model, {}).get("gold_stderr")
        )

    def cost(stage: str) -> list[tuple[str, str, list[str]]]:
        return [
            each(stage, "Tokens", lambda run: units.count(run.total("tokens", stage))),
            each(stage, "Throughput (tokens/s)", lambda run: units.count(run.throughput(stage))),
            each(stage, "Time", lambda run: units.seconds(run.total("seconds", stage))),
        ]

    return [
        each("pretrain", "Parameters, active per token", metric("pretrain", "num_active_params", units.count)),
        each("pretrain", "Parameters, all", metric("pretrain", "num_params", units.count)),
        each("pretrain", "Held-out bits per byte", metric("pretrain", "bits_per_byte")),
        each("pretrain", "5-gram baseline, bits per byte", metric("pretrain", "ngram5_bits_per_byte")),
        *cost("pretrain"),
        each("pretrain", "Training FLOPs", metric("pretrain", "train_flops", units.count)),
        *_sparse_rows(runs),
        each("sft", "Held-out loss (nats/token)", metric("sft", "loss")),
        each("sft", "Follows instructions, before", metric("sft", "instruction_following_before", units.percent)),
        each("sft", "Follows instructions, after", metric("sft", "instruction_following_after", units.percent)),
        *cost("sft"),
        each("reward", "Held-out accuracy", metric("reward", "accuracy", units.percent)),
        each("reward", "Noise ceiling", metric("reward", "noise_ceiling", units.percent)),
        each("reward", "Accuracy / ceiling", lambda run: units.percent(ceiling_share(run))),
        *cost("reward"),
        each("ppo", "Gold score, SFT (points, ± SE)", gold("sft")),
        each("ppo", "Gold score, PPO (points, ± SE)", gold("ppo")),
        each("ppo", "Gain over SFT (standard errors)", lambda run: units.number(gain_in_errors(run))),
        each("ppo", "KL from SFT (nats/sequence)", lambda run: units.number(run.final_rows().get("ppo", {}).get("kl"))),
        *cost("ppo"),
    ]


def _sparse_rows(runs: Sequence[Run]) -> list[tuple[str, str, list[str]]]:
    """What experts bring for their FLOPs and how evenly they are used, if any run has them."""
    if not any(run.is_sparse() for run in runs):
        return []
    columns = {
        "Loss at equal FLOPs (nats/token)": map(units.number, efficiency.losses_at_equal_flops(runs)),
        "Efficiency leverage (x dense)": map(units.number, efficiency.leverages(runs)),
        "Busiest expert (load, x uniform)": (units.number(busiest_load(run)) for run in runs),
        "Router entropy (nats)": (units.number(run.last("pretrain", "moe/entropy")) for run in runs),
        "Choices dropped": (units.percent(run.last("pretrain", "moe/dropped")) for run in runs),
        "Dead experts": (units.count(run.last("pretrain", "moe/dead_experts")) for run in runs),
    }
    return [("pretrain", label, list(texts)) for label, texts in columns.items()]


def busiest_load(run: Run) -> float | None:
    """Load of the busiest expert of any layer as a multiple of the uniform load, mean of the last tenth of the steps."""
    loads = run.mean_loads()
    return max(max(row) for row in loads) if loads else None


def ceiling_share(run: Run) -> float | None:
    """Accuracy of the reward model as a fraction of what noisy labels allow; None if either is missing."""
    accuracy, ceiling = run.final("reward", "accuracy"), run.final("reward", "noise_ceiling")
    return accuracy / ceiling if accuracy is not None and ceiling else None


def gain_in_errors(run: Run) -> float | None:
    """(gold of PPO - gold of SFT) / sqrt(SE_ppo^2 + SE_sft^2): the gain in standard errors of a difference."""
    sft, ppo = run.final_rows().get("sft", {}), run.final_rows().get("ppo", {})
    values = [row.get(key) for row in (sft, ppo) for key in ("gold", "gold_stderr")]
    if any(value is None for value in values) or not (values[1] or values[3]):
        return None
    return (values[2] - values[0]) / (values[1] ** 2 + values[3] ** 2) ** 0.5


def to_rich(grid: Grid) -> rich.table.Table:
    """The grid for a terminal."""
    table = rich.table.Table(title=grid.caption, title_justify="left", header_style="bold")
    for index, column in enumerate(grid.columns):
        table.add_column(rich.markup.escape(column), justify="right" if index else "left", overflow="fold")
    for group, rows in grid.groups():
        if group:
            table.add_section()
            table.add_row(f"[bold]{rich.markup.escape(group)}[/bold]")
        for cells in rows:
            table.add_row(*(rich.markup.escape(cell) for cell in cells))
    return table


def final_table(rows: Sequence[dict[str, Any]]) -> rich.table.Table:
    """`final_grid` for a terminal."""
    return to_rich(final_grid(rows))


def study_table(runs: Sequence[Run]) -> rich.table.Table:
    """`study_grid` for a terminal."""
    return to_rich(study_grid(runs))
