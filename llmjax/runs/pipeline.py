"""From an experiment to a finished workdir: run what is not yet done, resume what was cut off, report."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import jax
from rich.console import Console

from llmjax.config import to_json, validate
from llmjax.data.base import Data, Splits, read_once
from llmjax.data.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.files import whole_folder, write_text_atomic
from llmjax.interop.hf_folder import beside, copy_beside, locate_tensors, read_config
from llmjax.interop.hf_tokenizer import PLAIN_TEMPLATE, read_tokenizer
from llmjax.models.spec import shardings
from llmjax.models.transformer import transformer_spec
from llmjax.report.read import read_run
from llmjax.report.render import write_report
from llmjax.report.tables import table_grid, to_rich
from llmjax.results import ADAPTER, PARAMS, Start, Summary, read_about, read_summary, write_about, write_summary
from llmjax.runs.models import trained_length, write_model_file
from llmjax.runs.start import this_start
from llmjax.runs.workdir import (
    CONFIG,
    SOURCE,
    TOKENIZER,
    check_workdir,
    config_changes,
    in_use,
    record_changes,
    with_prepared_data,
)
from llmjax.sharding import MeshConfig, make_mesh, use_mesh
from llmjax.stages.base import Context, Result
from llmjax.stages.experiment import Experiment, all_data, check_lengths, check_vocabulary
from llmjax.training import checkpoint
from llmjax.training.metrics import MetricsLog
from llmjax.training.sinks import check_sinks, open_sinks
from llmjax.units import text

VIRTUAL_MESHES = (MeshConfig(data=2, fsdp=4), MeshConfig(data=2, fsdp=2), MeshConfig(data=2))  # to try on one machine


REPORT_SECONDS, REPORT_SHARE = 60.0, 0.02  # between two reports within a stage at least; and of the time at most


def run_experiment(
    experiment: Experiment, workdir: str, command: str, allow_config_change: bool = False, log_to: Sequence[str] = (),
    start: Start | None = None,
) -> None:  # fmt: skip
    """Runs every stage of `experiment` that `workdir` does not yet hold complete; report.html is written again and again.

    command: the command line without --workdir, for the lines that say how to go on. allow_config_change: see `check_workdir`.
    log_to: names of `llmjax.training.sinks` that the metrics are given to too. start: for the report; None for that of a
    program which calls this. Raises UserError, before anything is written, when there are too few devices, when `workdir`
    cannot be used or was made by another config, and for data that cannot be read.
    """
    check_sinks(log_to)
    experiment = with_own_model(experiment)
    check(experiment, workdir, allow_config_change)
    opened = read_data(experiment, workdir)
    with in_use(workdir):
        complete(experiment, workdir, opened, start or this_start(command), log_to)
        if jax.process_index() == 0:
            conclude(experiment, workdir, _variations(experiment, workdir, command))


def with_own_model(experiment: Experiment) -> Experiment:
    """The experiment with the model that its Hugging Face folder describes, if it starts from one; how it is computed
    (dtype, layer_loop, remat) stays as the experiment says. Raises UserError if the folder is not whole."""
    if not experiment.hf_folders:
        return experiment
    (folder,), asked = experiment.hf_folders, experiment.model
    own, raw = read_config(folder)
    locate_tensors(folder, own, raw["model_type"])
    known = read_tokenizer(folder).vocab_size
    if known > own.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {known} tokens, but the model only vocab_size={own.vocab_size}")
    model = replace(own, dtype=asked.dtype, layer_loop=asked.layer_loop, remat=asked.remat)
    experiment = replace(experiment, model=model)
    validate(experiment)
    if trained := raw.get("max_position_embeddings"):
        check_lengths(experiment, trained, f"max_position_embeddings of {os.path.join(folder, 'config.json')}")
    return experiment


def check(experiment: Experiment, workdir: str, allow_config_change: bool = False) -> None:
    """Raises UserError if `experiment` cannot start, or go on, in `workdir`, whatever its data. Writes nothing."""
    # The vocabulary may not be known yet; this size divides, whatever the mesh.
    vocab_size = experiment.model.vocab_size or experiment.mesh.tensor
    shardings(transformer_spec(replace(experiment.model, vocab_size=vocab_size)), make_mesh(experiment.mesh))
    check_workdir(experiment, workdir, allow_config_change)


def _say(text: str) -> None:
    print(text, flush=True)


@dataclass(frozen=True)
class _Shelf:
    """The `Place` of data that are read before the run begins."""

    workdir: str
    seed: int
    opened: dict[str, Splits] = field(default_factory=dict)

    def data_path(self, *parts: str) -> str:
        return os.path.join(self.workdir, "data", *parts)

    def say(self, text: str) -> None:
        _say(text)

    def read(self, source: Data) -> Splits:
        """The splits of a source, read once."""
        return read_once(source, self, self.opened)


def read_data(experiment: Experiment, workdir: str) -> dict[str, Splits]:
    """Reads and checks every source of data of an experiment that begins; one that goes on reads what it needs.

    Returns the splits by the config of their source, as `Context.opened` holds them. Raises UserError, for the first record
    that is wrong, and leaves nothing in a workdir that is new.
    """
    shelf = _Shelf(workdir, experiment.seed)
    if os.path.isdir(os.path.join(workdir, TOKENIZER)):
        return shelf.opened
    new = _topmost_missing(workdir)
    try:
        for data in all_data(experiment):
            for source, _ in () if data.from_model else data.parts().values():
                shelf.read(source)
    except UserError:
        if new is not None:
            _take_back(workdir, new)
        raise
    return shelf.opened


def _topmost_missing(workdir: str) -> str | None:
    """The highest folder that would have to be made for `workdir`; None if all are there."""
    place, missing = os.path.abspath(workdir), None
    while not os.path.lexists(place):
        place, missing = os.path.dirname(place), place
    return missing


def _take_back(workdir: str, topmost: str) -> None:
    """Removes what reading has made in a new workdir, and its folders up to `topmost` that nobody else has filled since."""
    checkpoint.delete(os.path.join(workdir, "data"))
    place = os.path.abspath(workdir)
    while len(place) >= len(topmost) and not (os.path.isdir(place) and os.listdir(place)):
        if os.path.isdir(place):
            os.rmdir(place)
        place = os.path.dirname(place)


def open_context(
    experiment: Experiment, workdir: str, metrics: MetricsLog, verbose: bool = True, opened: dict[str, Splits] | None = None
) -> Context:
    """What the stages of an experiment share, its tokenizer made if it is not there yet. opened: see `read_data`."""
    place = _Shelf(workdir, experiment.seed, {} if opened is None else opened)
    tokenizer = _tokenizer(experiment, place)
    check_vocabulary(experiment.model, tokenizer.vocab_size)
    size = experiment.model.vocab_size or tokenizer.vocab_size
    model = replace(experiment.model, vocab_size=size)
    mesh = make_mesh(experiment.mesh)
    return Context(experiment, "", workdir, mesh, model, tokenizer, metrics, verbose, opened=place.opened)


def _tokenizer(experiment: Experiment, place: _Shelf) -> Tokenizer:
    """The tokenizer of a workdir. If there is none yet: that of the Hugging Face folder which the experiment starts from,
    else one trained on the training text of its first stage."""
    directory = os.path.join(place.workdir, TOKENIZER)
    if os.path.isdir(directory):
        return Tokenizer.load(directory)
    if experiment.hf_folders:
        tokenizer = read_tokenizer(experiment.hf_folders[0])
        keep_source(experiment.hf_folders[0], tokenizer, os.path.join(place.workdir, SOURCE))
    else:
        assert experiment.text is not None, "see Experiment.validate"
        tokenizer = Tokenizer.train(_documents(experiment, place), experiment.tokenizer)
    tokenizer = tokenizer.on(experiment.date) if experiment.date else tokenizer
    tokenizer.save(directory)
    return tokenizer


def keep_source(folder: str, tokenizer: Tokenizer, target: str) -> None:
    """Copies what belongs to a Hugging Face model beside its weights, for what is exported later; with the chat template,
    where it has none."""
    with whole_folder(target) as new:
        copy_beside(beside(folder), new)
        if tokenizer.chat_template == PLAIN_TEMPLATE:
            write_text_atomic(new / "chat_template.jinja", tokenizer.chat_template)


def _documents(experiment: Experiment, place: _Shelf) -> Iterator[str]:
    """The training documents of the text that a tokenizer is trained on, source after source."""
    assert experiment.text is not None
    for source, _ in experiment.text.parts().values():
        yield from place.read(source).train


def complete(
    experiment: Experiment, workdir: str, opened: dict[str, Splits], start: Start, log_to: Sequence[str] = ()
) -> None:
    """Prepares the data of all stages that are not complete, then runs these one after another, with a report of each."""
    verbose, changes = jax.process_index() == 0, config_changes(experiment, workdir)
    experiment = with_prepared_data(experiment, workdir)
    if verbose:
        stages = ", ".join(experiment.stages)
        print(f"{experiment.name}: {stages} on {experiment.mesh.describe()} in {workdir}", flush=True)
        if changes:
            _say(f"goes on with another config: {'; '.join(changes)}")
        record_changes(experiment, workdir, changes)
        write_text_atomic(os.path.join(workdir, CONFIG), to_json(experiment))
    metrics = MetricsLog(os.path.join(workdir, "metrics.jsonl"), verbose, _say, open_sinks(log_to, workdir) if verbose else ())
    try:
        with use_mesh(make_mesh(experiment.mesh)):
            shared = open_context(experiment, workdir, metrics, verbose, opened)
            report = _Report(shared, start)
            contexts = [replace(shared, name=name, pause=report.now_and_then) for name in experiment.stages]
            begun = [context for context in contexts if not context.is_complete(context.name)]
            for context in begun:
                experiment.stages[context.name].prepare(context)
            if begun:
                report.note()
            for context in contexts:
                if context.is_complete(context.name):
                    context.say("complete already")
                else:
                    began = time.monotonic()
                    _hand_on(context, experiment.stages[context.name].run(context))
                    context.say(f"complete in {time.monotonic() - began:.0f} s")
                    if verbose:
                        print(_told(context), end="", flush=True)
                    report.write()
    finally:
        metrics.close()


class _Report:
    """run.json and report.html of a run that goes on, by its first process."""

    def __init__(self, context: Context, start: Start):
        about = read_about(context.workdir)
        self._context = context
        self._about = replace(about, starts=(*about.starts, start), vocab_size=context.tokenizer.vocab_size)
        self._due = time.monotonic() + REPORT_SECONDS

    def note(self) -> None:
        """Writes run.json."""
        if self._context.verbose:
            write_about(self._context.workdir, replace(self._about, data=self._about.data | self._context.sources))

    def write(self) -> None:
        """Writes both, with the stages that are complete and the one that is under way."""
        if not self._context.verbose:
            return
        began = time.monotonic()
        self.note()
        write_report(self._context.workdir, self._context.experiment.name, next_steps=(), going=True)
        now = time.monotonic()
        self._due = now + max(REPORT_SECONDS, (now - began) / REPORT_SHARE)

    def now_and_then(self) -> None:
        """`write`, if it is time again."""
        if time.monotonic() >= self._due:
            self.write()


def _hand_on(context: Context, result: Result) -> None:
    """Keeps what a stage has made: the parameters first, last its result, which makes it complete. Checkpoints go then."""
    stage = context.experiment.stages[context.name]
    digests = context.experiment.checkpoint_digests
    if stage.makes != "nothing":
        checkpoint.save_params(context.path(PARAMS), result.params, digests)
    lora = None
    if result.adapter is not None:
        updates, lora = result.adapter
        checkpoint.save_params(context.path(ADAPTER), updates, digests)
    summary = Summary(
        context.name, stage.title or type(stage).__name__, stage.lead, result.steps, round(result.seconds, 1), result.tokens,
        tuple(result.metrics), tuple(result.figures), tuple(result.samples), tuple(result.tables),
    )  # fmt: skip
    if jax.process_index() == 0:
        hf_source = next(iter(context.experiment.hf_folders), None)
        if stage.makes != "nothing":
            before = [trained_length(context.workdir, link.source) for link in stage.inputs() if link.makes == "language"]
            length = max([result.length, *before])
            write_model_file(
                context.path(), stage.makes, context.model, hf_source, lora, chats=stage.chats, length=length
            )
        write_summary(context.path(), summary)
        checkpoint.delete(context.path("checkpoints"))


SAMPLE_CHARS = 160


def _told(context: Context) -> str:
    """The numbers of a complete stage that have words, and its samples, for a terminal."""
    summary = read_summary(context.path())
    assert summary is not None, "written by _hand_on"
    shown = [metric for metric in summary.metrics if metric.label]
    width = max((len(metric.label) for metric in shown), default=0)
    lines = []
    for metric in shown:
        line = f"    {metric.label:<{width}}  {text(metric.value, metric.unit, metric.error)}"
        if metric.baseline is not None:
            name, value = metric.baseline
            line += f"  ({name} {text(value, metric.unit)})"
        lines.append(line)
    for sample in summary.samples:
        prompt, answer = (" ".join(part.split()) for part in (sample.prompt, sample.answer))
        lines.append(f"    {prompt} -> {answer[:SAMPLE_CHARS]}{' ...' if len(answer) > SAMPLE_CHARS else ''}")
    return "".join(f"{line}\n" for line in lines)


def conclude(experiment: Experiment, workdir: str, steps: Sequence[tuple[str, str]] = ()) -> None:
    """Tables, report, and what to do next: to chat, or to let a base model go on, and `steps` (what it does, command)."""
    run = read_run(workdir)
    for stage in experiment.stages:
        for table in run.tables(stage):
            Console().print(to_rich(table_grid(table)))
    models = [stage for stage in experiment.stages.values() if stage.makes == "language"]
    if models:
        what = "chat with it" if models[-1].chats else "let it go on with a text"
        steps = [(what, f"llmjax-chat --workdir={shlex.quote(workdir)}"), *steps]
    path = write_report(workdir, experiment.name, next_steps=steps)
    print(f"report    {path}")
    for what, command in steps:
        print(f"{what + ':':<31}{command}")


def _variations(experiment: Experiment, workdir: str, command: str) -> list[tuple[str, str]]:
    folder = workdir.rstrip("/")
    steps = [("change one thing", f"{command} --config.seed=1 --workdir={shlex.quote(folder + '-seed1')}")]
    mesh = next((mesh for mesh in VIRTUAL_MESHES if experiment.mesh.size == 1 and _fits(experiment, mesh)), None)
    if mesh is not None:
        axes = " ".join(f"--config.mesh.{axis}={getattr(mesh, axis)}" for axis in ("fsdp", "data") if getattr(mesh, axis) > 1)
        flags = f"{axes} --cpu_devices={mesh.size} --workdir={shlex.quote(folder + '-mesh')}"
        steps.append((f"the same on {mesh.size} virtual devices", f"{command} {flags}"))
    return steps


def _fits(experiment: Experiment, mesh: MeshConfig) -> bool:
    """Whether the batches of `experiment` can be split over `mesh`."""
    try:
        validate(replace(experiment, mesh=mesh))
    except UserError:
        return False
    return True
