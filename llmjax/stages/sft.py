"""Supervised fine-tuning: dialogues, to a model that follows instructions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from llmjax.config import Fraction, PositiveInt
from llmjax.data.base import Data, check_kind
from llmjax.data.loader import held_out_batches, mix_batches
from llmjax.data.packing import Rows
from llmjax.data.records import Dialogue
from llmjax.errors import UserError
from llmjax.evals.language import held_out
from llmjax.models.lora import LoRAConfig, lora_spec
from llmjax.objectives.lm import lm_loss
from llmjax.results import Bars, Metric
from llmjax.stages.answers import Asked
from llmjax.stages.base import Context, Input, Preview, Result, Stage, check_decodes, check_split
from llmjax.stages.datasets import Parts, dialogue_rows, text_rows
from llmjax.stages.pretrain import window_examples
from llmjax.stages.tuning import Tuned, expert_figures, loss_figure, speed_figure
from llmjax.training.loop import Hook
from llmjax.training.optimizer import OptimizerConfig
from llmjax.training.program import Program, TrainProgram, language_batch


@dataclass(frozen=True)
class SFT(Stage):
    """Supervised fine-tuning on dialogues, packed; loss on the assistant's tokens and their end of turn only.

    data: the dialogues. init: an earlier stage, or "hf:FOLDER" for a model in Hugging Face format. lora: train low-rank
    updates only; what the stage hands on is the merged model, with the updates beside it. steps: of batch_size windows of
    `length` tokens; longer dialogues are cut, and that is counted. text: documents that are mixed in so that what the model
    knows is kept, every token of them carrying loss; text_fraction: their share of the windows (pre-training gradients beside
    those of the task: Ouyang et al. 2022, arXiv:2203.02155, section 3.5, there in PPO). eval_every: steps between two held-out
    losses, of eval_batches batches evenly spread over the held-out dialogues.
    """

    data: Data
    init: str = "pretrain"
    lora: LoRAConfig | None = None
    text: Data | None = None
    text_fraction: Fraction = 0.5
    steps: PositiveInt = 100
    batch_size: PositiveInt = 32
    length: PositiveInt = 128
    eval_every: PositiveInt = 50
    eval_batches: PositiveInt = 16
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-4)

    def validate(self) -> None:
        if self.text is not None and not 0 < self.text_fraction < 1:
            raise UserError(f"text_fraction={self.text_fraction}: a share between 0 and 1; for no text leave `text` out")

    title: ClassVar[str] = "SFT"
    lead: ClassVar[str] = "Supervised fine-tuning on dialogues; only the assistant's words and its end of turn carry loss."

    def inputs(self) -> tuple[Input, ...]:
        return (Input("init", self.init),)

    def check(self, experiment, name) -> None:
        check_kind(f"{name}.data", self.data, Dialogue)
        if self.text is not None:
            check_kind(f"{name}.text", self.text, str)
        check_split(experiment, name, "batch_size", self.batch_size)
        check_decodes(experiment, name)
        if self.lora is not None:
            lora_spec(experiment.model, self.lora)

    def prepare(self, context: Context) -> None:
        mix_batches(self._rows(context).train, batch_size=self.batch_size, seed=context.seed)
        Asked(context, self.data)

    def _rows(self, context: Context) -> Parts:
        """The dialogues' rows, and in training those of the text."""
        parts = dialogue_rows(context, self.data, self.length)
        if self.text is None:
            return parts
        text = text_rows(context, self.text, self.length).train
        train = _share(parts.train, 1 - self.text_fraction) | _share(text, self.text_fraction, "text")
        return replace(parts, train=train)

    def preview(self, context: Context) -> Preview:
        parts = self._rows(context)
        return Preview(window_examples(parts), parts.notes)

    def programs(self, context: Context) -> dict[str, Program]:
        return {"update": self._update(context)}

    def _update(self, context: Context) -> TrainProgram:
        model = context.model
        return Tuned(context, self.init, self.lora).program(
            lambda params, batch, key: lm_loss(params, batch, key, model), self.optimizer, self.steps,
            language_batch(self.batch_size, self.length, context.mesh),
            tokens=self.batch_size * self.length, length=self.length,
        )  # fmt: skip

    def run(self, context: Context) -> Result:
        """Fine-tunes the `init` model; answers to held-out prompts are scored before and after."""
        model, parts, tuned = context.model, self._rows(context), Tuned(context, self.init, self.lora)
        batches = mix_batches(parts.train, batch_size=self.batch_size, seed=context.seed)
        base = context.load_lm(self.init) if self.lora else None
        sources = next(iter(parts.held_out.values()))

        def loss(params) -> float:
            rows = [batch for one in sources.values() for batch in held_out_batches(one, self.batch_size, self.eval_batches)]
            nats, tokens = held_out(params, rows, model, context.mesh)
            return nats / max(tokens, 1)

        def evaluate(step, state):
            return {"loss": loss(tuned.language_model(state.params, base))}

        trained = context.fit(
            self._update(context), tuned.start, batches, self.steps,
            frozen=() if base is None else (base,), hooks=[Hook(self.eval_every, evaluate)],
        )  # fmt: skip
        final, adapter = tuned.final(trained.params, base)
        start = context.load_lm(self.init) if base is None else base
        asked = Asked(context, self.data)
        answers = asked.of(final)
        before = asked.of(start) if asked.scores else None
        metrics = [Metric("loss", loss(final), "Held-out loss", "nats/token", baseline=("before", loss(start)))]
        scored = asked.metrics(answers, before)
        bars = [
            Bars(m.label, "% of held-out prompts", (("before SFT", m.baseline[1]), ("after SFT", m.value)))
            for m in scored if m.unit == "%" and m.baseline is not None
        ]  # fmt: skip
        return trained.result(
            params=final, adapter=adapter, metrics=[*metrics, *scored, *tuned.metrics(), *parts.metrics],
            figures=[loss_figure("nats per answer token"), *bars, speed_figure(), *expert_figures(model)],
            samples=asked.samples(answers),
        )  # fmt: skip


def _share(parts: Mapping[str, tuple[Rows, float]], share: float, name: str = "") -> dict[str, tuple[Rows, float]]:
    """The same rows under names that begin with `name`, their weights a `share` of 1 together."""
    whole = sum(weight for _, weight in parts.values())
    return {f"{name}/{key}".strip("/"): (rows, share * weight / whole) for key, (rows, weight) in parts.items()}
