"""Runs one experiment with several seeds, one after another on this machine, and sets them side by side.

    python -m launch.local --config=experiments/quickstart.py:moe --seeds=0,1,2 --workdir=runs/seeds-moe

Further --config.a.b=value flags are handed on. --dry_run prints the commands instead. Seed s runs in <workdir>/seed-s, where
it resumes as any run does.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence

from absl import flags

from llmjax.commands.base import call, parse_flags
from llmjax.config import split_overrides
from llmjax.errors import UserError


def define_flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string("config", None, "experiment file, with an argument after a colon", flag_values=values)
    flags.DEFINE_list("seeds", ["0", "1", "2"], "values of --config.seed", flag_values=values)
    flags.DEFINE_string("workdir", None, "folder of all runs", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "print the commands and stop", flag_values=values)
    flags.DEFINE_bool("help", False, "show this help", flag_values=values)
    return values


def commands(config: str, seeds: Sequence[str], workdir: str, overrides: Sequence[tuple[str, str]]) -> list[list[str]]:
    """One command line per seed."""
    given = [f"--config.{path}={value}" for path, value in overrides]
    return [
        [sys.executable, "-m", "llmjax", f"--config={config}", *given, f"--config.seed={seed}",
         f"--workdir={os.path.join(workdir, run_name(seed))}"]
        for seed in seeds
    ]  # fmt: skip


def run_name(seed: str) -> str:
    return f"seed-{seed}"


def run(argv: Sequence[str]) -> None:
    argv, overrides = split_overrides(list(argv))
    values = define_flags()
    parse_flags(argv, values, __doc__)
    for name in ("config", "workdir"):
        if not getattr(values, name):
            raise UserError(f"--{name} is missing; --help shows an example")
    for command in commands(values.config, values.seeds, values.workdir, overrides):
        print(shlex.join(command), flush=True)
        if not values.dry_run and (status := subprocess.run(command).returncode):
            raise UserError(f"that run ended with status {status}; mend it and type the same again to go on")
    if not values.dry_run:
        from llmjax.runs.study import show_study

        show_study(values.workdir, [run_name(seed) for seed in values.seeds], f"{values.config}, {len(values.seeds)} seeds")


if __name__ == "__main__":
    call(run, sys.argv)
