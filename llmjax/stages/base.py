"""What a stage is, what it is given, what it hands on.

A stage is a frozen dataclass: its fields are its config. A new one is one class in one file, here or in an experiment's;
nothing needs to know of it but the experiment that names it.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from llmjax.config import fingerprint, is_config, to_dict
from llmjax.data.base import Data, Splits, read_once
from llmjax.data.loader import Batches, BatchSource
from llmjax.data.tokenizer import Tokenizer
from llmjax.errors import UserError
from llmjax.evals.answers import Answers
from llmjax.interop import hf_folder
from llmjax.models.config import ModelConfig
from llmjax.models.lora import LoRAConfig
from llmjax.models.spec import abstract_params
from llmjax.models.transformer import Params, transformer_spec
from llmjax.results import PARAMS, Bars, Figure, HeatMap, Metric, Sample, Source, Table, read_summary
from llmjax.sharding import check_batch
from llmjax.training import checkpoint
from llmjax.training.checkpoint import Checkpoints
from llmjax.training.loop import Hook, Loop, StepFn, train
from llmjax.training.metrics import MetricsLog
from llmjax.training.program import Program, TrainProgram
from llmjax.training.rng import key_for

if TYPE_CHECKING:
    from llmjax.stages.experiment import Experiment

HF = "hf:"


class Input(NamedTuple):
    """A model that a stage starts from. field: of the stage's config that names it. source: an earlier stage, or "hf:FOLDER"
    for a language model in Hugging Face format. makes: the kind of model that it must be."""

    field: str
    source: str
    makes: Literal["language", "scalar"] = "language"


@dataclass(frozen=True)
class Result:
    """What a stage hands on.

    params: of the model that it made, None for a stage that makes nothing. steps, seconds, tokens: of training. length: of the
    texts that it was trained on, in tokens (0: not known). adapter: low-rank updates that are merged in params, with their
    config. The rest is for people: see `llmjax.results`.
    """

    params: Any
    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    metrics: Sequence[Metric] = ()
    figures: Sequence[Figure | Bars | HeatMap] = ()
    samples: Sequence[Sample] = ()
    tables: Sequence[Table] = ()
    length: int = 0
    adapter: tuple[Params, LoRAConfig] | None = None


@dataclass(frozen=True)
class Preview:
    """What a stage will learn from. examples: (note, token ids, loss mask). notes: formats, counts of what is left out."""

    examples: Sequence[tuple[str, Sequence[int], Sequence[int]]]
    notes: Sequence[str] = ()


class Stage:
    """One stage of a model's life. Subclasses are frozen dataclasses.

    title, lead: heading and sentence in the report. makes: a "language" model, a "scalar" one that gives numbers, or "nothing"
    but a result. chats: whether a language model that it makes has learnt to answer.
    """

    title: ClassVar[str] = ""
    lead: ClassVar[str] = ""
    makes: ClassVar[Literal["language", "scalar", "nothing"]] = "language"
    chats: ClassVar[bool] = True

    def inputs(self) -> tuple[Input, ...]:
        """The models that it starts from or reads."""
        return ()

    def check(self, experiment: Experiment, name: str) -> None:
        """Raises UserError for what cannot work in this experiment, before anything is read or compiled."""

    def prepare(self, context: Context) -> None:
        """Reads, tokenises and caches its data, before the first stage trains. Raises UserError for what is wrong with it."""

    def preview(self, context: Context) -> Preview:
        """The first examples as the model will see them."""
        raise UserError(f"{context.name}: {type(self).__name__} has nothing to preview")

    def programs(self, context: Context) -> dict[str, Program]:
        """What it is going to compile, from shapes alone: no weights, no data."""
        return {}

    def run(self, context: Context) -> Result:
        """Trains, from the newest checkpoint if there is one, and measures."""
        raise TypeError(f"{type(self).__name__} has no run(context)")


class StageReward:
    """A reward that needs the run: a stage's model, the device. Subclasses are frozen dataclasses."""

    def inputs(self) -> tuple[Input, ...]:
        """The stages whose models it needs."""
        return ()

    def open(self, context: Context) -> Callable[[Answers], np.ndarray]:
        """A function from answers to their scores [N]."""
        raise TypeError(f"{type(self).__name__} has no open(context)")


@dataclass(frozen=True)
class Context:
    """An experiment in its working directory, as one of its stages sees it.

    name: of the stage. model: with the tokenizer's vocabulary. verbose: whether this process writes to the terminal.
    shown: what was already said, so that it is said once. opened: the data that were already read, by their config. whole:
    folders of prepared data that were found undamaged. sources: what stages are trained on. pause: called now and then while a
    stage trains, where it is between two steps.
    """

    experiment: Experiment
    name: str
    workdir: str
    mesh: Mesh | None
    model: ModelConfig
    tokenizer: Tokenizer
    metrics: MetricsLog
    verbose: bool = True
    shown: set[str] = field(default_factory=set)
    opened: dict[str, Splits] = field(default_factory=dict)
    sources: dict[str, tuple[Source, ...]] = field(default_factory=dict)
    pause: Callable[[], None] | None = None
    whole: set[str] = field(default_factory=set)

    def for_stage(self, name: str) -> Context:
        """The same for another stage."""
        return dataclasses.replace(self, name=name)

    @property
    def seed(self) -> int:
        return self.experiment.seed

    def path(self, *parts: str) -> str:
        """A place in the folder of this stage."""
        return os.path.join(self.workdir, self.name, *parts)

    def data_path(self, *parts: str) -> str:
        """A place among the data that all stages share."""
        return os.path.join(self.workdir, "data", *parts)

    def cache_path(self, kind: str, *what: Any) -> str:
        """A place for data made of `what` (configs, numbers, text) with this tokenizer, where only the same finds it again."""
        parts = [to_dict(part) if is_config(part) else part for part in (*what, self.tokenizer.fingerprint())]
        return self.data_path(f"{kind}-{fingerprint(parts)}")

    def read(self, data: Data) -> Splits:
        """The splits of a source of data, read and checked once; says what was found."""
        splits = read_once(data, self, self.opened)
        if splits.note:
            self.say(splits.note)
        return splits

    def found(self, data: Data, sources: Sequence[Source]) -> None:
        """Notes for the report what is in the data of this stage; data that it only asks about are passed over."""
        stage: Any = self.experiment.stages.get(self.name)
        if stage is not None and any(getattr(stage, one.name) == data for one in dataclasses.fields(stage)):
            self.sources.setdefault(self.name, tuple(sources))

    def key(self, *purpose: str | int) -> jax.Array:
        """The random key of a purpose of this stage."""
        return key_for(self.seed, self.name, *purpose)

    def say(self, text: str) -> None:
        """A line on the terminal, behind the stage's name; the same line once."""
        line = f"{self.name:<9} {text}"
        if self.verbose and line not in self.shown:
            self.shown.add(line)
            print(line, flush=True)

    def load_lm(self, source: str) -> Params:
        """The language model that stage `source` made, or that lies in Hugging Face format at "hf:FOLDER"."""
        if source.startswith(HF):
            folder = source.removeprefix(HF)
            return hf_folder.load_params(folder, self.model, hf_folder.read_config(folder)[1]["model_type"], self.mesh)
        return self.load(source, transformer_spec(self.model))

    def load(self, source: str, specs: Any) -> Any:
        """The parameters that stage `source` made, onto the mesh."""
        return checkpoint.load_params(os.path.join(self.workdir, source, PARAMS), abstract_params(specs, self.mesh))

    def is_complete(self, name: str) -> bool:
        """Whether a stage has come to its end."""
        return read_summary(os.path.join(self.workdir, name)) is not None

    def fit(
        self,
        program: TrainProgram,
        start: Callable[[], Any],
        batches: BatchSource,
        num_steps: int,
        *,
        step_fn: StepFn | None = None,
        frozen: Sequence[Any] = (),
        hooks: Sequence[Hook] = (),
        shown: Sequence[tuple[str, str]] = (),
        tokens_per_step: int = 0,
    ) -> Trained:
        """Runs THE loop for this stage.

        start: gives the first parameters; not called where a checkpoint is there. step_fn: several updates and more in one
        step, for `tokens_per_step` tokens; default: the program's update. frozen: what it sees beside. shown: metrics on the
        progress line.
        """
        began = time.monotonic()
        if program.note:
            self.say(program.note)
        checkpoints = Checkpoints(self.path("checkpoints"), digests=self.experiment.checkpoint_digests, say=self.say)
        tokens = tokens_per_step or program.tokens
        loop = Loop(
            stage=self.name, num_steps=num_steps, key=self.key("step"), mesh=self.mesh, metrics=self.metrics,
            checkpoints=checkpoints, checkpoint_seconds=self.experiment.checkpoint_seconds, tokens_per_step=tokens,
            flops_per_token=program.flops_per_token, hooks=hooks, shown=shown, verbose=self.verbose, pause=self.pause,
            passes=batches.passes if isinstance(batches, Batches) else {},
        )  # fmt: skip

        def update(state, batch, key):
            return program.fn(state, batch, key, *frozen)

        try:
            state = train(loop, lambda: program.init(start()), program.state, step_fn or update, batches)
        finally:
            checkpoints.close()
        return Trained(state.params, num_steps, time.monotonic() - began, num_steps * tokens, program.length)


@dataclass(frozen=True)
class Trained:
    """What training came to: the last parameters, steps, seconds of this process, tokens, and the length of a text."""

    params: Any
    steps: int
    seconds: float
    tokens: int
    length: int

    def result(self, **fields: Any) -> Result:
        """The result of a stage that hands on these parameters, if `fields` names no others."""
        own: dict[str, Any] = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        return Result(**own | fields)


def check_split(experiment: Experiment, name: str, field: str, batch_size: int) -> None:
    """Raises UserError if the mesh cannot split a batch of stage `name` evenly."""
    check_batch(f"{name}.{field}", batch_size, experiment.mesh)


def check_minibatches(experiment: Experiment, name: str, batch_size: int, minibatches: int, group: int) -> None:
    """Raises UserError if the mesh cannot split a minibatch of stage `name` evenly. group: batch_size is a multiple of it."""
    rows, mesh = batch_size // minibatches, experiment.mesh
    if rows % mesh.batch_shards:
        whole = math.lcm(minibatches * mesh.batch_shards, group)
        raise UserError(
            f"{name}: batch_size={batch_size} in minibatches={minibatches} is {rows} answers each, which the "
            f"{mesh.batch_shards} batch shards of the mesh ({mesh.describe()}) cannot share; use "
            f"{name}.batch_size={max(1, round(batch_size / whole)) * whole}, or other {name}.minibatches"
        )


def check_decodes(experiment: Experiment, name: str) -> None:
    """Raises UserError if the model cannot write."""
    moe = experiment.model.moe
    if moe is not None and moe.router == "expert_choice":
        raise UserError(f"model.moe.router=expert_choice cannot decode, which {name} must; leave {name} out")


def as_metrics(values: Mapping[str, float]) -> tuple[Metric, ...]:
    """Numbers that are kept and not shown."""
    return tuple(Metric(name, float(value)) for name, value in values.items())
