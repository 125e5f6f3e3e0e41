"""From an experiment to a finished workdir: run what is not yet done, resume what was cut off, report."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
from rich.console import Console

from llmjax.analysis.report import write_report, write_study_report
from llmjax.analysis.runs import read_run
from llmjax.analysis.tables import final_table, study_table
from llmjax.config import diff, from_dict, to_json
from llmjax.data.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.files import read_json, write_text_atomic
from llmjax.interop.hf_folder import locate_tensors, read_config
from llmjax.interop.hf_tokenizer import read_tokenizer
from llmjax.models.lora import lora_spec
from llmjax.models.spec import shardings
from llmjax.models.transformer import transformer_spec
from llmjax.sharding import MeshConfig, make_mesh, use_mesh
from llmjax.stages.config import Experiment, Study
from llmjax.stages.ppo import run_ppo
from llmjax.stages.prepare import check_num_questions, check_prompt_length, corpus_of, load_tokenizer
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


def run_experiment(experiment: Experiment, workdir: str, command: str) -> None:
    """Runs every stage of `experiment` that `workdir` does not yet hold complete, then writes report.html.

    command: the command line without --workdir, for the lines that say how to go on. Raises UserError, before anything
    is written, when there are too few devices, when `workdir` cannot be used or was made by another config, and when
    the corpus cannot be read.
    """
    experiment = with_own_model(experiment)
    check(experiment, workdir)
    _complete(experiment, workdir)
    if jax.process_index() == 0:
        _conclude(experiment, workdir, [*_chat_step(experiment, workdir), *_variations(experiment, workdir, command)])


def run_study(study: Study, workdir: str, command: str) -> None:
    """Runs the experiments of a study, each in workdir/<name>, and sets them side by side. All are checked first."""
    runs = {name: os.path.join(workdir, name) for name in study.experiments}
    study = replace(study, experiments={name: with_own_model(one) for name, one in study.experiments.items()})
    for name, experiment in study.experiments.items():
        check(experiment, runs[name])
    for name, experiment in study.experiments.items():
        _complete(experiment, runs[name])
        if jax.process_index() == 0:
            _conclude(experiment, runs[name], _chat_step(experiment, runs[name]))
    if jax.process_index() == 0:
        Console().print(study_table([read_run(folder, name) for name, folder in runs.items()]))
        path = write_study_report(workdir, list(study.experiments), study.name)
        print(f"report    {path}")


def with_own_model(experiment: Experiment) -> Experiment:
    """The experiment with the model that its Hugging Face folder describes, if it starts from one; how it is computed
    (dtype, layer_loop, remat) stays as the experiment says. Raises UserError if the folder is not whole."""
    if experiment.hf_folder is None:
        return experiment
    folder, asked = experiment.hf_folder, experiment.model
    own, raw = read_config(folder)
    locate_tensors(folder, own, raw["model_type"])
    known = read_tokenizer(folder).vocab_size
    if known > own.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {known} tokens, but the model only vocab_size={own.vocab_size}")
    return replace(experiment, model=replace(own, dtype=asked.dtype, layer_loop=asked.layer_loop, remat=asked.remat))


def check(experiment: Experiment, workdir: str) -> None:
    """Raises UserError if `experiment` cannot start, or go on, in `workdir`. Writes nothing there."""
    # The vocabulary may not be known yet; this size divides, whatever the mesh.
    vocab_size = experiment.model.vocab_size or experiment.mesh.tensor
    shardings(transformer_spec(replace(experiment.model, vocab_size=vocab_size)), make_mesh(experiment.mesh))
    if experiment.sft is not None and experiment.sft.lora is not None:
        lora_spec(experiment.model, experiment.sft.lora)
    check_num_questions(experiment)
    _check_place(workdir)
    path = os.path.join(workdir, "config.json")
    if os.path.exists(path):
        _check_same_config(experiment, path, workdir)
    if experiment.data.source != "world" and not os.path.isdir(os.path.join(workdir, "tokenizer")):
        corpus_of(experiment, workdir)


def _complete(experiment: Experiment, workdir: str) -> None:
    verbose = jax.process_index() == 0
    mesh = make_mesh(experiment.mesh)
    if verbose:
        stages = ", ".join(experiment.stages())
        print(f"{experiment.name}: {stages} on {experiment.mesh.describe()} in {workdir}", flush=True)
        write_text_atomic(os.path.join(workdir, "config.json"), to_json(experiment))
    metrics = MetricsLog(os.path.join(workdir, "metrics.jsonl"), enabled=verbose)
    try:
        with use_mesh(mesh):
            tokenizer = load_tokenizer(experiment, workdir)
            run = Run(experiment, workdir, mesh, tokenizer, metrics, verbose)
            check_prompt_length(run)
            for stage in experiment.stages():
                if run.result(stage) is not None:
                    run.say(f"{stage:<9} complete already")
                    continue
                STAGES[stage](run)
    finally:
        metrics.close()


def load_workdir(workdir: str) -> Experiment:
    """The experiment whose config.json lies in `workdir`."""
    path = os.path.join(workdir, "config.json")
    if not os.path.exists(path):
        raise UserError(f"--workdir={workdir}: no config.json there; give the --workdir of a finished run")
    return from_dict(Experiment, read_json(path))


def _check_place(workdir: str) -> None:
    """Refuses a workdir that is not, or cannot become, a folder to write to."""
    place = os.path.abspath(workdir)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise UserError(f"--workdir={workdir}: {place} is a file, not a folder; choose a folder you may write to")
    if not os.access(place, os.R_OK | os.W_OK | os.X_OK):
        raise UserError(f"--workdir={workdir}: {place} cannot be written to; choose a folder you may write to")


def _check_same_config(experiment: Experiment, path: str, workdir: str) -> None:
    earlier = from_dict(Experiment, read_json(path))
    changes = [line for line in diff(earlier, experiment) if not _harmless(line, workdir)]
    if changes:
        raise UserError(
            f"--workdir={workdir} was made by another config ({'; '.join(changes[:3])}"
            f"{' ...' if len(changes) > 3 else ''}); use another --workdir, or delete this one to start again"
        )


def _harmless(change: str, workdir: str) -> bool:
    """The mesh, the cadence of checkpoints and the stages that have not begun may differ from one start to the next."""
    section = change.partition(":")[0].partition(".")[0]
    not_begun = section in STAGES and not os.path.exists(os.path.join(workdir, section))
    return not_begun or section in ("mesh", "checkpoint_seconds")


def _conclude(experiment: Experiment, workdir: str, steps: Sequence[tuple[str, str]]) -> None:
    """The final table, the report, and `steps`: (what it does, command) pairs that say how to go on."""
    if experiment.ppo is not None:
        result = read_json(os.path.join(workdir, "ppo", "result.json"))
        Console().print(final_table(result["table"]))
    path = write_report(workdir, experiment.name, next_steps=steps)
    print(f"report    {path}")
    for text, command in steps:
        print(f"{text + ':':<31}{command}")


def _chat_step(experiment: Experiment, workdir: str) -> list[tuple[str, str]]:
    return [("chat with it", f"llmjax-chat --workdir={shlex.quote(workdir)}")] if experiment.sft is not None else []


def _variations(experiment: Experiment, workdir: str, command: str) -> list[tuple[str, str]]:
    folder = workdir.rstrip("/")
    steps = [("change one thing", f"{command} --config.seed=1 --workdir={shlex.quote(folder + '-seed1')}")]
    eight = MeshConfig(data=2, fsdp=4)
    if experiment.mesh.size == 1 and _fits(experiment, eight):
        mesh = f"--config.mesh.fsdp={eight.fsdp} --config.mesh.data={eight.data} --cpu_devices={eight.size}"
        steps.append(("the same on 8 virtual devices", f"{command} {mesh} --workdir={shlex.quote(folder + '-mesh')}"))
    return steps


def _fits(experiment: Experiment, mesh: MeshConfig) -> bool:
    """Whether the batches of `experiment` can be split over `mesh`."""
    try:
        replace(experiment, mesh=mesh).validate()
    except UserError:
        return False
    return True


def open_run(workdir: str) -> Run:
    """A finished (or unfinished) run for reading, on one device: nothing is written."""
    experiment = load_workdir(workdir)
    tokenizer = Tokenizer.load(os.path.join(workdir, "tokenizer"))
    return Run(experiment, workdir, None, tokenizer, MetricsLog("", enabled=False))
