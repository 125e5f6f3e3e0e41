"""From an experiment to a finished workdir: run what is not yet done, resume what was cut off, report."""

from __future__ import annotations

import os
from typing import Any, Callable

import jax
from rich.console import Console

from llmjax.analysis.report import write_report, write_study_report
from llmjax.analysis.runs import read_run
from llmjax.analysis.tables import final_table, study_table
from llmjax.config import diff, from_dict, to_dict, to_json
from llmjax.data.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.files import read_json, write_text_atomic
from llmjax.sharding import make_mesh, use_mesh
from llmjax.stages.config import Experiment, Study
from llmjax.stages.ppo import run_ppo
from llmjax.stages.prepare import load_tokenizer
from llmjax.stages.pretrain import run_pretrain
from llmjax.stages.reward import run_reward
from llmjax.stages.run import Run
from llmjax.stages.sft import run_sft
from llmjax.training.metrics import MetricsLog

STAGES: dict[str, Callable[[Run], None]] = {
    "pretrain": run_pretrain,
    "sft": run_sft,
    "reward": run_reward,
    "ppo": run_ppo,
}


def run_experiment(experiment: Experiment, workdir: str, spec: str) -> None:
    """Runs every stage of `experiment` that `workdir` does not yet hold complete, then writes report.html.

    spec: what --config was given, for the lines that say how to go on. Raises UserError, before anything is computed,
    when the workdir was made by another config.
    """
    verbose = jax.process_index() == 0
    mesh = make_mesh(experiment.mesh)
    _claim(experiment, workdir)
    if verbose:
        print(f"{experiment.name}: {', '.join(experiment.stages())} on {experiment.mesh.describe()} in {workdir}", flush=True)
    metrics = MetricsLog(os.path.join(workdir, "metrics.jsonl"), enabled=verbose)
    try:
        with use_mesh(mesh):
            tokenizer = load_tokenizer(experiment, workdir)
            run = Run(experiment, workdir, mesh, tokenizer, metrics, verbose)
            for stage in experiment.stages():
                if run.result(stage) is not None:
                    run.say(f"{stage:<9} complete already")
                    continue
                STAGES[stage](run)
    finally:
        metrics.close()
    if verbose:
        _conclude(experiment, workdir, spec)


def run_study(study: Study, workdir: str, spec: str) -> None:
    """Runs the experiments of a study, each in workdir/<name>, and sets them side by side."""
    for name, experiment in study.experiments.items():
        run_experiment(experiment, os.path.join(workdir, name), spec)
    if jax.process_index() == 0:
        Console().print(study_table([read_run(os.path.join(workdir, name), name) for name in study.experiments]))
        path = write_study_report(workdir, list(study.experiments), study.name)
        print(f"report    {path}")


def load_workdir(workdir: str) -> Experiment:
    """The experiment whose config.json lies in `workdir`."""
    path = os.path.join(workdir, "config.json")
    if not os.path.exists(path):
        raise UserError(f"--workdir={workdir}: no config.json there; give the --workdir of a finished run")
    return from_dict(Experiment, read_json(path))


def _claim(experiment: Experiment, workdir: str) -> None:
    """Writes the resolved config into an empty workdir, or checks that it is the one the workdir was made by."""
    path = os.path.join(workdir, "config.json")
    try:
        os.makedirs(workdir, exist_ok=True)
        os.listdir(workdir)
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot be used ({error.strerror}); choose a folder you may write to") from error
    if not os.access(workdir, os.W_OK | os.X_OK):
        raise UserError(f"--workdir={workdir}: cannot be written to; choose a folder you may write to")
    if not os.path.exists(path):
        if jax.process_index() == 0:
            write_text_atomic(path, to_json(experiment))
        return
    changes = [line for line in diff(from_dict(Experiment, read_json(path)), experiment) if not _harmless(line)]
    if changes:
        raise UserError(
            f"--workdir={workdir} was made by another config ({'; '.join(changes[:3])}"
            f"{' ...' if len(changes) > 3 else ''}); use another --workdir, or delete this one to start again"
        )


def _harmless(change: str) -> bool:
    """The mesh and the cadence of checkpoints may change between a crash and its resume."""
    return change.startswith(("mesh.", "checkpoint_seconds"))


def _conclude(experiment: Experiment, workdir: str, spec: str) -> None:
    result: dict[str, Any] = {}
    if experiment.ppo is not None:
        result = read_json(os.path.join(workdir, "ppo", "result.json"))
        Console().print(final_table(result["table"]))
    steps = [
        ("change one thing", f"llmjax --config={spec} --config.seed=1 --workdir={workdir.rstrip('/')}-seed1"),
        ("the same on 8 virtual devices",
         f"llmjax --config={spec} --config.mesh.fsdp=4 --config.mesh.data=2 --cpu_devices=8 --workdir={workdir.rstrip('/')}-mesh"),
    ]  # fmt: skip
    if experiment.sft is not None:
        steps.insert(0, ("chat with it", f"llmjax-chat --workdir={workdir}"))
    path = write_report(workdir, experiment.name, next_steps=steps)
    print(f"report    {path}")
    for text, command in steps:
        print(f"{text + ':':<31}{command}")


def open_run(workdir: str) -> Run:
    """A finished (or unfinished) run for reading, on one device: nothing is written."""
    experiment = load_workdir(workdir)
    tokenizer = Tokenizer.load(os.path.join(workdir, "tokenizer"))
    return Run(experiment, workdir, None, tokenizer, MetricsLog("", enabled=False))
