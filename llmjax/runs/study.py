"""Several experiments, run one after another and set side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import jax
from rich.console import Console

from llmjax.report.read import read_run
from llmjax.report.render import write_study_report
from llmjax.report.tables import study_table
from llmjax.results import Start
from llmjax.runs.pipeline import check, complete, conclude, read_data, with_own_model
from llmjax.runs.start import this_start
from llmjax.runs.workdir import in_use
from llmjax.stages.experiment import Study
from llmjax.training.sinks import check_sinks


def run_study(
    study: Study, workdir: str, allow_config_change: bool = False, log_to: Sequence[str] = (), start: Start | None = None
) -> None:
    """Runs the experiments of a study, each in workdir/NAME, and sets them side by side. All are checked first.

    allow_config_change, log_to, start: as for `llmjax.runs.pipeline.run_experiment`.
    """
    check_sinks(log_to)
    runs = {name: os.path.join(workdir, name) for name in study.experiments}
    study = replace(study, experiments={name: with_own_model(one) for name, one in study.experiments.items()})
    for name, experiment in study.experiments.items():
        check(experiment, runs[name], allow_config_change)
    opened = {name: read_data(experiment, runs[name]) for name, experiment in study.experiments.items()}
    with in_use(workdir):
        for name, experiment in study.experiments.items():
            with in_use(runs[name]):
                complete(experiment, runs[name], opened.pop(name), start or this_start(""), log_to)
                if jax.process_index() == 0:
                    conclude(experiment, runs[name])
        if jax.process_index() == 0:
            show_study(workdir, list(study.experiments), study.name)


def show_study(workdir: str, names: Sequence[str], title: str) -> None:
    """Prints the runs workdir/NAME side by side, and writes workdir/report.html."""
    Console().print(study_table([read_run(os.path.join(workdir, name), name) for name in names]))
    print(f"report    {write_study_report(workdir, list(names), title)}")
