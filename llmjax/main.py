"""llmjax --config=experiments/quickstart.py --workdir=runs/quickstart: runs an experiment file, or resumes it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence

from absl import flags

from llmjax import runtime
from llmjax.config import apply_overrides, load_experiment, split_overrides, to_json, validate
from llmjax.errors import UserError

USAGE = """llmjax runs an experiment file: pre-training, SFT, reward model, PPO, whatever it holds; what is complete in
the workdir is not run again, what was cut off goes on.

  llmjax --config=experiments/quickstart.py --workdir=runs/quickstart
  llmjax --config=experiments/quickstart.py:moe --config.ppo.kl_coef=0.1 --workdir=runs/moe
"""


def define_flags() -> flags.FlagValues:
    """The flags of llmjax, with their defaults."""
    values = flags.FlagValues()
    flags.DEFINE_string(
        "config", None, "experiment file, with an argument after a colon; --config.a.b=value overrides a field",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string("workdir", None, "folder of this run: checkpoints, metrics, report", flag_values=values)
    flags.DEFINE_integer("cpu_devices", 0, "split the CPU into this many virtual devices", flag_values=values)
    flags.DEFINE_bool("print_config", False, "print the resolved config and stop", flag_values=values)
    flags.DEFINE_bool("help", False, "show this help", flag_values=values)
    return values


def parse_flags(argv: Sequence[str], values: flags.FlagValues, usage: str) -> None:
    """Parses argv into `values`; a wrong flag or a stray argument is a UserError; --help prints and exits with 0."""
    try:
        rest = values(list(argv))
    except flags.Error as error:
        raise UserError(f"{' '.join(str(error).split())}; --help lists the flags") from error
    if values.help:
        print(usage + values.get_help())
        sys.exit(0)
    if rest[1:]:
        raise UserError(f"unexpected argument {rest[1]!r}; flags are written --name=value, --help lists them")


def run(argv: Sequence[str]) -> None:
    """The program, without the handling of errors."""
    argv, overrides = split_overrides(list(argv))
    values = define_flags()
    parse_flags(argv, values, USAGE)
    if not values.config:
        raise UserError("--config is missing; give an experiment file, e.g. --config=experiments/quickstart.py")
    if values.cpu_devices:
        runtime.use_cpu_devices(values.cpu_devices)
    config = apply_overrides(load_experiment(values.config), overrides)
    validate(config)
    if values.print_config:
        print(to_json(config), end="")
        return
    if not values.workdir:
        raise UserError("--workdir is missing; give a folder for this run, e.g. --workdir=runs/quickstart")
    from llmjax.stages.config import Study
    from llmjax.stages.pipeline import run_experiment, run_study

    changes = [f"--config.{path}={raw}" for path, raw in overrides]
    command = shlex.join(["llmjax", f"--config={values.config}", *changes])
    if isinstance(config, Study):
        run_study(config, values.workdir, command)
    else:
        run_experiment(config, values.workdir, command)


def call(program, argv: Sequence[str], interrupted: str = "stopped") -> None:
    """Prepares the process, runs program(argv), and turns a UserError into one line on stderr and exit status 2.

    interrupted: what to say after Ctrl-C.
    """
    runtime.keep_freed_memory()
    runtime.quiet_libraries()
    try:
        program(argv)
    except UserError as error:
        print(f"{argv[0].rsplit('/', 1)[-1]}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has gone, as in `llmjax --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains as it ends
        sys.exit(1)


def main() -> None:
    """The console command llmjax."""
    call(run, sys.argv, interrupted="stopped; the same command goes on from the last checkpoint")


if __name__ == "__main__":
    main()
