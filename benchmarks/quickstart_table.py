"""What the quickstart claims, on several seeds, dense and sparse: each claim with its figure and interval.

    python benchmarks/quickstart_table.py --workdir=runs/table                makes the runs that are missing, then the table
    python benchmarks/quickstart_table.py --workdir=runs/table --check        exit status 1 if a claim is missed
    python benchmarks/quickstart_table.py --workdir=runs/table --markdown     the table of README.md

Runs are experiments/quickstart.py:dense and :moe, one after another, some ten minutes each on two slow cores; one that was cut
off goes on. --variants=full,full_moe: with the rows that take longer, and four answers to each question.
Figures are means over seeds. The questions are the same for all seeds, so the error of a mean over seeds is not taken to be
smaller than that of one run.
"""

import json
import pathlib
import subprocess
import sys

from absl import app, flags

WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart-table", "where the runs lie")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "seeds")
VARIANTS = flags.DEFINE_list("variants", ["dense", "moe"], "variants of experiments/quickstart.py")
CHECK = flags.DEFINE_bool("check", False, "exit with 1 if a claim is missed")
MARKDOWN = flags.DEFINE_bool("markdown", False, "print the table of each variant in Markdown")

COLUMNS = (
    ("correct", "Correct", 100), ("difference", "to SFT", 100), ("greedy", "Greedy", 100), ("greedy_difference", "to SFT", 100),
    ("gold", "Gold", 1), ("kl", "KL, nats", 1),
)  # fmt: skip


def run(variant: str, seed: str) -> pathlib.Path:
    """The finished run of a variant and a seed, made or completed if need be."""
    folder = pathlib.Path(WORKDIR.value) / f"{variant}-{seed}"
    if not (folder / "table" / "result.json").exists():
        config = pathlib.Path(__file__).parents[1] / "experiments" / "quickstart.py"
        command = [sys.executable, "-m", "llmjax", f"--config={config}:{variant}", f"--config.seed={seed}"]
        command.append("--config.table.draws=4")  # answers to each question: halves the errors
        subprocess.run([*command, f"--workdir={folder}"], check=True, stdout=sys.stderr)
    return folder


def result(folder: pathlib.Path, stage: str) -> dict:
    """What a stage came to."""
    return json.loads((folder / stage / "result.json").read_text(encoding="utf-8"))


def rows(folder: pathlib.Path) -> dict[str, dict]:
    """The rows of the table of a run, by name."""
    return {row["name"]: row for row in result(folder, "table")["tables"][0]["rows"]}


def claims(variant: str, seed: str, folder: pathlib.Path) -> list[tuple[bool, str]]:
    """(whether it holds, what is claimed and what was found), of one run."""
    table, reward = rows(folder), result(folder, "reward")
    metrics, about = reward["metrics"], reward["about"]
    kept = result(folder, "table")["metrics"]["knowledge_kept"]
    seen, new = metrics["edit_accuracy"], metrics["new_prompts_edit_accuracy"]
    error = about["new_prompts_edit_accuracy"]["error"]
    ppo, bot = table["ppo"], table["template bot"]
    gain = ppo["difference"] / ppo["difference_stderr"]
    lost = ppo["greedy_difference"] / max(ppo["greedy_difference_stderr"], 1e-9)
    log = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [row for row in map(json.loads, log) if row["stage"] == "ppo" and "explained_variance" in row]
    explained = min(row["explained_variance"] for row in steps if row["step"] >= 3)
    found = [
        (bot["gold"] < 0.3, f"a template bot scores below 0.3: gold {bot['gold']:.3f}"),
        (kept >= 0.9, f"SFT keeps 90 % of what base knows: {kept:.1%}"),
        (seen >= 0.7, f"the reward model puts right above wrong, facts of training prompts, 70 %: {seen:.1%}"),
        (new > 0.5 + 2 * error, f"and facts that it never saw ranked, beyond two errors of chance: {new:.1%} +- {error:.1%}"),
        (gain > 3, f"PPO raises sampled correct by three errors: {ppo['difference']:+.1%}, {gain:.1f} errors"),
        (lost >= -1, f"and lowers greedy correct by no more than one: {ppo['greedy_difference']:+.1%}, {lost:+.1f} errors"),
        (explained > 0, f"the critic explains variance from step 3 on: at least {explained:.0%}"),
    ]
    return [(holds, f"{variant} seed {seed}: {text}") for holds, text in found]


def mean_row(name: str, tables: list[dict[str, dict]]) -> list[str]:
    """The cells of a row: means over seeds, with the mean of the errors."""
    cells = [name]
    for key, _, scale in COLUMNS:
        values = [(table[name][key], table[name].get(f"{key}_stderr") or 0.0) for table in tables if key in table[name]]
        if not values:
            cells.append("–")
            continue
        value, error = (sum(column) / len(values) * scale for column in zip(*values))
        digits = 1 if scale == 100 else 2
        sign = "+" if "difference" in key else ""
        shown = f"{value:{sign}.{digits}f}"
        cells.append(shown if error < 10**-digits / 2 else f"{shown} ± {error:.{digits}f}")
    return cells


def main(argv: list[str]) -> None:
    del argv
    missed = 0
    for variant in VARIANTS.value:
        folders = {seed: run(variant, seed) for seed in SEEDS.value}
        tables = [rows(folder) for folder in folders.values()]
        caption = result(next(iter(folders.values())), "table")["tables"][0]["caption"]
        print(f"\n{variant}, seeds {', '.join(folders)}. {caption}\n")
        lines = [["", *(label for _, label, _ in COLUMNS)], *(mean_row(name, tables) for name in tables[0])]
        if MARKDOWN.value:
            lines.insert(1, ["---"] + ["--:"] * len(COLUMNS))
            print("\n".join(f"| {' | '.join(line)} |" for line in lines))
        else:
            widths = [max(map(len, column)) for column in zip(*lines)]
            print("\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines))
        print()
        for seed, folder in folders.items():
            for holds, text in claims(variant, seed, folder):
                missed += not holds
                print(f"{'holds ' if holds else 'MISSED'}  {text}")
    if CHECK.value and missed:
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
