"""llmjax --config=experiments/quickstart.py --workdir=runs/quickstart: runs an experiment file, or resumes it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence

from absl import flags

from llmjax import runtime
from llmjax.commands.base import call, parse_flags
from llmjax.config import apply_overrides, load_experiment, split_overrides, to_json, validate
from llmjax.errors import UserError
from llmjax.training.stopping import ending_at_once, heeded

USAGE = """llmjax runs an experiment file: pre-training, SFT, reward model, PPO, whatever stages it holds; what is complete
in the workdir is not run again, what was cut off goes on.

  llmjax --config=experiments/quickstart.py --workdir=runs/quickstart
  llmjax --config=experiments/quickstart.py:moe --config.ppo.algorithm.kl_coef=0.1 --workdir=runs/moe
  llmjax --config=experiments/sft_dialogues.py:models/Qwen3-0.6B --config.sft.data.path='chats/*.jsonl' --preview
"""


def define_flags() -> flags.FlagValues:
    """The flags of llmjax, with their defaults."""
    values = flags.FlagValues()
    flags.DEFINE_string(
        "config", None, "experiment file, with an argument after a colon; --config.a.b=value overrides a field",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string("workdir", None, "folder of this run: checkpoints, metrics, report", flag_values=values)
    flags.DEFINE_integer(
        "cpu_devices", 0, "split the CPU into this many virtual devices, which wait for one another for up to an hour",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_bool("print_config", False, "print the resolved config and stop", flag_values=values)
    flags.DEFINE_bool(
        "preview", False, "print the first examples of each stage as tokens, with what carries loss, and stop",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_bool(
        "allow_config_change", False, "go on in a workdir that was made by a config which computes something else; the change "
        "is written down there and in the report", flag_values=values,
    )  # fmt: skip
    flags.DEFINE_list("log_to", [], "where the metrics are shown beside the report: tensorboard, wandb", flag_values=values)
    flags.DEFINE_bool("help", False, "show this help", flag_values=values)
    return values


def run(argv: Sequence[str]) -> None:
    """The program, without the handling of errors."""
    with ending_at_once():
        program = _chosen(argv)
        with heeded(say=lambda text: print(text, file=sys.stderr, flush=True)):
            program()


def _chosen(argv: Sequence[str]) -> Callable[[], None]:
    """What the command line asks for, checked and with what it needs loaded."""
    typed = shlex.join(["llmjax", *argv[1:]])
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
        return lambda: print(to_json(config), end="")
    from llmjax.runs.pipeline import run_experiment
    from llmjax.runs.preview import preview
    from llmjax.runs.start import this_start
    from llmjax.runs.study import run_study
    from llmjax.stages.experiment import Study

    if values.preview:

        def show() -> None:
            for experiment in config.experiments.values() if isinstance(config, Study) else (config,):
                preview(experiment, values.workdir)

        return show
    if not values.workdir:
        raise UserError("--workdir is missing; give a folder for this run, e.g. --workdir=runs/quickstart")
    options = values.allow_config_change, values.log_to, this_start(typed, values.config)
    if isinstance(config, Study):
        return lambda: run_study(config, values.workdir, *options)
    changes = [f"--config.{path}={raw}" for path, raw in overrides]
    command = shlex.join(["llmjax", f"--config={values.config}", *changes])
    return lambda: run_experiment(config, values.workdir, command, *options)


def main() -> None:
    """The console command llmjax."""
    call(run, sys.argv, interrupted="stopped; the same command goes on from the last checkpoint")


if __name__ == "__main__":
    main()
