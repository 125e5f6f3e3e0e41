"""What an experiment file returns: one model's life, or several to compare."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from llmjax.config import NonNegativeInt, PositiveFloat, PositiveInt, children
from llmjax.data.base import Data, check_kind
from llmjax.data.records import Prompt
from llmjax.data.tokenizer import TokenizerConfig
from llmjax.errors import UserError
from llmjax.generation.sampling import SamplingConfig
from llmjax.models.config import ModelConfig
from llmjax.sharding import MeshConfig, check_batch
from llmjax.stages.base import HF, Stage
from llmjax.tasks.base import Reward

S = TypeVar("S", bound=Stage)


@dataclass(frozen=True)
class Evaluation:
    """Answers to held-out prompts, scored by functions: after SFT, preference and RL stages, beside the models that these
    started from.

    prompts: whose held-out split is asked; None for the prompts of a stage's own held-out data. scores: by name; what they
    return, True and False shown as a share, is reported with its standard error. num_prompts: that many, drawn once for all
    stages. batch_size: answers at a time. num_samples: answers that are shown. prompt_length: longer prompts are left out.
    """

    prompts: Data | None = None
    scores: dict[str, Reward] = field(default_factory=dict)
    num_prompts: PositiveInt = 256
    batch_size: PositiveInt = 64
    num_samples: PositiveInt = 4
    prompt_length: PositiveInt = 256
    sampling: SamplingConfig = SamplingConfig(max_new_tokens=128)

    def validate(self) -> None:
        if self.prompts is not None:
            check_kind("prompts", self.prompts, Prompt)


@dataclass(frozen=True)
class Experiment:
    """One model's life.

    stages: by name, in the order in which they run. model: its shape; that of a Hugging Face folder where a stage starts from
    one. tokenizer: as it is trained, where none is given by such a folder. seed: the root of all randomness.
    checkpoint_seconds: between two saves of a stage. checkpoint_digests: a checkpoint is written with the SHA-256 of its files
    and checked when it is read, and so are prepared data; false for huge ones, whose sizes alone are checked. date: what a
    chat template is told of the day by strftime_now, "2026-01-31"; "" tells it the day on which it is rendered.
    """

    name: str
    seed: NonNegativeInt = 0
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    stages: dict[str, Stage] = field(default_factory=dict)
    evaluation: Evaluation = Evaluation()
    checkpoint_seconds: PositiveFloat = 30.0
    checkpoint_digests: bool = True
    date: str = ""

    def validate(self) -> None:
        if not self.stages:
            raise UserError("no stage: give at least one")
        for name in self.stages:
            if not name.replace("_", "").replace("-", "").isalnum() or name in RESERVED:
                raise UserError(
                    f"stages: {name!r} is no name for a stage; use letters, digits, - and _, but not {' or '.join(RESERVED)}"
                )
        self._validate_links()
        self._validate_date()
        if len(self.hf_folders) > 1:
            raise UserError(f"one experiment has one model, but its stages start from {' and '.join(self.hf_folders)}")
        check_batch("evaluation.batch_size", self.evaluation.batch_size, self.mesh)
        if self.model.moe is not None and self.model.moe.num_experts % self.mesh.expert:
            raise UserError(
                f"mesh.expert={self.mesh.expert} does not divide model.moe.num_experts={self.model.moe.num_experts}"
            )
        if self.model.moe is not None and not self.hf_folders:
            self.model.moe.check_router_learns("model.moe: ")
        for name, stage in self.stages.items():
            stage.check(self, name)
        if not self.hf_folders:
            self._validate_own_model()

    def _validate_own_model(self) -> None:
        if self.text is None:
            raise UserError("no stage has text to train a tokenizer on; start from hf:FOLDER, or with pre-training")
        check_vocabulary(self.model, self.tokenizer.size)
        if (rope := self.model.rope_scaling) is not None:
            check_lengths(self, int(rope.factor * rope.original_length), "model.rope_scaling.factor * original_length")

    def _validate_date(self) -> None:
        try:
            datetime.date.fromisoformat(self.date or "2000-01-01")
        except ValueError as error:
            raise UserError(f"date={self.date!r} is no day; write it as 2026-01-31") from error

    def _validate_links(self) -> None:
        earlier: dict[str, Stage] = {}
        for name, stage in self.stages.items():
            for link in stage.inputs():
                where = f"{name}.{link.field}={link.source!r}"
                if link.source.startswith(HF) and link.makes == "language":
                    continue
                if link.source not in earlier:
                    there = ", ".join(earlier) or "none"
                    fix = f"name one, or leave {name} out, too"
                    raise UserError(f"{where} is not an earlier stage of this experiment; there is {there}; {fix}")
                if earlier[link.source].makes != link.makes:
                    raise UserError(f"{where} makes a {earlier[link.source].makes} model; a {link.makes} model is needed")
            earlier[name] = stage

    @property
    def hf_folders(self) -> list[str]:
        """The Hugging Face folders that stages start from."""
        sources = [link.source for stage in self.stages.values() for link in stage.inputs()]
        return list(dict.fromkeys(source.removeprefix(HF) for source in sources if source.startswith(HF)))

    @property
    def text(self) -> Data | None:
        """The documents of the first stage that has some: what a tokenizer is trained on."""
        return next((data for data in all_data(self) if data.kind is str), None)

    def with_stage(self, name: str, /, **fields: Any) -> Experiment:
        """The experiment with some fields of a stage changed."""
        stage: Any = self.stages[name]
        return dataclasses.replace(self, stages=self.stages | {name: dataclasses.replace(stage, **fields)})

    def stage(self, name: str, kind: type[S]) -> S:
        """The stage of this name. Raises UserError if it is of another class than `kind`."""
        stage = self.stages[name]
        if not isinstance(stage, kind):
            raise UserError(f"stage {name!r} is a {type(stage).__name__}, not a {kind.__name__}")
        return stage

    def only(self, *names: str) -> Experiment:
        """The experiment with these stages alone."""
        return dataclasses.replace(self, stages={name: self.stages[name] for name in names})


def check_vocabulary(model: ModelConfig, tokens: int) -> None:
    """Raises UserError if a tokenizer has more `tokens` than the model has embeddings."""
    if 0 < model.vocab_size < tokens:
        size = f"model.vocab_size={model.vocab_size}"
        raise UserError(f"{size} is less than the tokenizer's {tokens} tokens; raise it, or 0 for as many as there are")


def check_lengths(experiment: Experiment, most: int, what: str) -> None:
    """Raises UserError if a stage or the evaluation asks for longer texts than the `most` tokens that the model is made for;
    what: says who names that number."""
    asks = any(stage.makes == "language" and stage.chats for stage in experiment.stages.values())
    for name, config in (experiment.stages | ({"evaluation": experiment.evaluation} if asks else {})).items():
        for where, tokens in _lengths(config, name):
            if tokens > most:
                raise UserError(f"{where}={tokens} is more than the {most} that the model is made for ({what}); lower it")


def _lengths(config: Any, where: str) -> Iterator[tuple[str, int]]:
    """The lengths of all texts below a config, in tokens, with their names: of windows, of prompts with their answers."""
    fields = dict(children(config))
    if isinstance(length := fields.get("length"), int):
        yield f"{where}.length", length
    if isinstance(prompt := fields.get("prompt_length"), int):
        answer = fields.get("max_new_tokens", getattr(fields.get("sampling"), "max_new_tokens", None))
        yield f"{where}.prompt_length{' + max_new_tokens' if answer else ''}", prompt + (answer or 0)
    for name, value in fields.items():
        yield from _lengths(value, f"{where}.{name}")


RESERVED = ("data", "tokenizer", "source")  # folders of a workdir beside those of stages


@dataclass(frozen=True)
class Study:
    """Several experiments that are run one after another and shown side by side."""

    name: str
    experiments: dict[str, Experiment] = field(default_factory=dict)

    shared = ("experiments",)  # an override of what the study does not have itself is one of all its experiments

    def validate(self) -> None:
        if not self.experiments:
            raise UserError("no experiment in this study")


def all_data(config: Any) -> Iterator[Data]:
    """Every source of data below a config."""
    for _, value in children(config):
        if isinstance(value, Data):
            yield value
        yield from all_data(value)
