"""Pre-training: text by self-supervision, to a base model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import numpy as np

from llmjax.config import NonNegativeInt, PositiveInt
from llmjax.data.base import Data, First, check_kind
from llmjax.data.loader import held_out_batches, mix_batches, spread
from llmjax.data.packing import Rows
from llmjax.data.records import Prompt
from llmjax.evals.answers import answer_prompts
from llmjax.evals.language import RoutingChange, bits_per_byte, held_out, language_metrics
from llmjax.evals.ngram import ngram_nats
from llmjax.generation.sampling import SamplingConfig
from llmjax.models.spec import init_params
from llmjax.models.stats import active_params, total_params, train_flops_per_token
from llmjax.models.transformer import transformer_spec, with_mean_rows
from llmjax.objectives.lm import lm_loss
from llmjax.results import Curve, Figure, Metric, Panel, Sample
from llmjax.stages.base import Context, Input, Preview, Result, Stage, check_split
from llmjax.stages.datasets import Parts, text_rows
from llmjax.stages.tuning import balancing, expert_figures, loss_figure, speed_figure
from llmjax.training.loop import Hook
from llmjax.training.optimizer import OptimizerConfig
from llmjax.training.program import Program, TrainProgram, language_batch, train_program

NGRAM_ORDER = 5
PROMPT_TOKENS, CONTINUATION_TOKENS = 12, 48


@dataclass(frozen=True)
class Pretrain(Stage):
    """Next-token prediction on packed documents.

    data: the documents. init: "" starts from random weights, "hf:FOLDER" from a model in Hugging Face format, the name of an
    earlier stage from what that made (mid-training). steps: of batch_size windows of `length` tokens. eval_every: steps
    between two held-out losses, of eval_batches batches evenly spread over the held-out text, the same each time; 0 for all.
    ngram_tokens: a 5-gram model is fitted to so many tokens of the training text, to compare with; 0 for none.
    """

    data: Data
    init: str = ""
    steps: PositiveInt = 300
    batch_size: PositiveInt = 32
    length: PositiveInt = 128
    eval_every: PositiveInt = 100
    eval_batches: NonNegativeInt = 64
    ngram_tokens: NonNegativeInt = 5_000_000
    optimizer: OptimizerConfig = OptimizerConfig()

    title: ClassVar[str] = "Pre-training"
    lead: ClassVar[str] = "Next-token prediction on text, measured on text that was held out."
    chats: ClassVar[bool] = False

    def inputs(self) -> tuple[Input, ...]:
        return (Input("init", self.init),) if self.init else ()

    def check(self, experiment, name) -> None:
        check_kind(f"{name}.data", self.data, str)
        check_split(experiment, name, "batch_size", self.batch_size)

    def prepare(self, context: Context) -> None:
        mix_batches(self._rows(context).train, batch_size=self.batch_size, seed=context.seed)

    def _rows(self, context: Context) -> Parts:
        return text_rows(context, self.data, self.length)

    def preview(self, context: Context) -> Preview:
        parts = text_rows(context, First(self.data, 100), self.length)
        return Preview(window_examples(parts), parts.notes)

    def programs(self, context: Context) -> dict[str, Program]:
        return {"update": self._update(context)}

    def _update(self, context: Context) -> TrainProgram:
        model = context.model
        return train_program(
            lambda params, batch, key: lm_loss(params, batch, key, model), transformer_spec(model), self.optimizer, self.steps,
            language_batch(self.batch_size, self.length, context.mesh), context.mesh,
            tokens=self.batch_size * self.length, flops_per_token=train_flops_per_token(model, self.length),
            after=balancing(model),
        )  # fmt: skip

    def run(self, context: Context) -> Result:
        """Trains on packed documents; reports held-out loss beside a 5-gram model of the same text.

        At the end of a training from random weights the embeddings of control tokens, which no document holds, become the mean
        of all others: SFT starts from there, and the base model can be asked in the chat form.
        """
        model, parts = context.model, self._rows(context)
        batches = mix_batches(parts.train, batch_size=self.batch_size, seed=context.seed)
        held = HeldOutText(context, parts, self.batch_size, self.eval_batches)
        routing_change = RoutingChange(model, context.mesh)

        def evaluate(step, state):
            return held.metrics(state.params) | routing_change(state.params, held.first_batch)

        trained = context.fit(
            self._update(context), lambda: self._start(context), batches, self.steps,
            hooks=[Hook(self.eval_every, evaluate)],
        )  # fmt: skip
        params = trained.params if self.init else jax.jit(with_mean_rows, static_argnums=1)(trained.params, _unmet(context))
        metrics = [*held.described(held.metrics(params)), *self._costs(context, trained.tokens)]
        decodes = model.moe is None or model.moe.router != "expert_choice"
        baseline = self._baseline(context, parts, held)
        lines = () if baseline is None else ((baseline.label, baseline.value),)
        if baseline is not None:
            metrics = [m if m.name != "bits_per_byte" else _compared(m, baseline) for m in metrics] + [baseline]
        bits = Panel("bits per byte", (Curve("bits_per_byte", "eval"),), lines)
        caption = "Lower is better; dashed: a 5-gram model of the training text." if lines else "Lower is better."
        return trained.result(
            params=params, metrics=metrics,
            figures=[
                Figure("Held-out text", (bits,), caption), loss_figure("nats per token"), speed_figure(), *expert_figures(model)
            ],
            samples=continuations(context, params, held.rows) if decodes else (),
        )  # fmt: skip

    def _start(self, context: Context) -> Any:
        if self.init:
            return context.load_lm(self.init)
        return init_params(transformer_spec(context.model), context.key("init"), context.mesh)

    def _costs(self, context: Context, tokens: int) -> list[Metric]:
        model, flops = context.model, train_flops_per_token(context.model, self.length)
        return [
            Metric("num_params", total_params(model), "Parameters", "parameters"),
            Metric("num_active_params", active_params(model), "Active per token", "parameters"),
            Metric("train_flops", tokens * flops, "Training FLOPs", "FLOPs"),
            Metric("train_flops_per_token", flops),
        ]

    def _baseline(self, context: Context, parts: Parts, held: HeldOutText) -> Metric | None:
        """Bits per byte of a 5-gram model on the held-out text, fitted to a sample of the training text."""
        if not self.ngram_tokens:
            return None
        windows = max(1, self.ngram_tokens // self.length // len(parts.train))
        train = [s for rows, _ in parts.train.values() for s in _streams(context, rows, windows, self.batch_size)]
        sample = held.streams()
        nats, _ = ngram_nats(train, sample, order=NGRAM_ORDER, vocab_size=context.model.vocab_size)
        token_bytes = context.tokenizer.token_bytes()
        value = bits_per_byte(nats, sum(int(token_bytes[stream].sum()) for stream in sample))
        seen = sum(len(stream) for stream in train)
        total = sum(len(rows) * self.length for rows, _ in parts.train.values())
        share = "" if seen > 0.99 * (total - self.length) else f" of {seen / 1e6:.1f} M tokens"
        return Metric("ngram5_bits_per_byte", value, f"5-gram baseline{share}", "bits/byte")


def _compared(metric: Metric, baseline: Metric) -> Metric:
    return Metric(metric.name, metric.value, metric.label, metric.unit, metric.error, (baseline.label, baseline.value), True)


class HeldOutText:
    """The held-out text of a stage: at most `max_batches` batches of it, evenly spread, the same at every evaluation."""

    def __init__(self, context: Context, parts: Parts, batch_size: int, max_batches: int):
        self._context, self._batch_size = context, batch_size
        self._sources: Mapping[str, Rows] = next(iter(parts.held_out.values()))
        self._weights = {name: weight for name, (_, weight) in parts.train.items()}
        self._max_batches = -(-max_batches // len(self._sources)) if max_batches else 0
        self._token_bytes = context.tokenizer.token_bytes()

    @property
    def rows(self) -> Rows:
        """Of the first source."""
        return next(iter(self._sources.values()))

    @property
    def first_batch(self) -> Mapping[str, np.ndarray]:
        return next(held_out_batches(self.rows, self._batch_size, self._max_batches))

    def metrics(self, params: Any) -> dict[str, float]:
        """loss, perplexity and bits_per_byte: of each source, and in a mixture of all together by their weights."""
        found = {name: self._of(params, rows) for name, rows in self._sources.items()}
        if len(found) == 1:
            return language_metrics(*next(iter(found.values())))
        named = {
            f"{key}/{name}": value for name, totals in found.items() for key, value in language_metrics(*totals).items()
        }
        whole = sum(self._weights.values())
        share = {name: self._weights[name] / whole / max(totals[1], 1) for name, totals in found.items()}
        nats, num_bytes = (sum(share[name] * totals[i] for name, totals in found.items()) for i in (0, 2))
        return language_metrics(nats, 1, num_bytes) | named

    def _of(self, params: Any, rows: Rows) -> tuple[float, int, int]:
        """Nats, tokens and bytes of a source."""
        nats, tokens, num_bytes = 0.0, 0, 0
        for batch in held_out_batches(rows, self._batch_size, self._max_batches):
            more_nats, more_tokens = held_out(params, [batch], self._context.model, self._context.mesh)
            nats, tokens = nats + more_nats, tokens + more_tokens
            num_bytes += int((self._token_bytes[batch["targets"]] * batch["loss_mask"]).sum())
        return nats, tokens, num_bytes

    def described(self, values: Mapping[str, float]) -> list[Metric]:
        """The numbers of `metrics` with their words and units."""
        words = {"bits_per_byte": ("Held-out text", "bits/byte"), "loss": ("Held-out loss", "nats/token")}
        made = []
        for name, value in values.items():
            key, _, source = name.partition("/")
            label, unit = words.get(key, ("", ""))
            label = f"{label}: {source}" if source and label else label
            made.append(Metric(name, value, label, unit, headline=name in HEADLINES))
        return sorted(made, key=lambda metric: metric.name not in HEADLINES)

    def streams(self) -> list[np.ndarray]:
        """The documents that are evaluated, as `_streams` gives them."""
        most = self._max_batches * self._batch_size
        return [s for rows in self._sources.values() for s in _streams(self._context, rows, most, self._batch_size)]


def _unmet(context: Context) -> tuple[int, ...]:
    """The control tokens that no document holds: those of the chat template."""
    tokenizer = context.tokenizer
    return tuple(sorted(tokenizer.special_ids - {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}))


HEADLINES = ("bits_per_byte",)


def _streams(context: Context, rows: Rows, most: int, batch_size: int) -> list[np.ndarray]:
    """The documents in at most `most` evenly spread windows (0: all), each with its end: what a model of them must predict."""
    end, found = context.tokenizer.eos_id, []
    chosen = spread(len(rows), most)
    for start in range(0, len(chosen), batch_size):
        batch = rows[chosen[start : start + batch_size]]
        found += [targets[mask > 0] for targets, mask in zip(batch["targets"], batch["loss_mask"])]
    if len(chosen) == len(rows):  # what stands in neighbouring windows goes on
        found = [np.concatenate(found)]
    return [part for targets in found for part in np.split(targets, np.flatnonzero(targets == end) + 1) if part.size]


def window_examples(parts: Parts, count: int = 2) -> list[tuple[str, list[int], list[int]]]:
    """The first windows of each source: (which, tokens, loss mask)."""
    examples = []
    for name, (rows, _) in parts.train.items():
        for number in range(min(count, len(rows))):
            row = {key: value[0] for key, value in rows[np.array([number])].items()}
            real = int((row["segment_ids"] > 0).sum())
            tokens, mask = [], []
            for at in range(real):
                if not at or row["inputs"][at] != row["targets"][at - 1]:  # what a segment begins with is no target
                    tokens, mask = [*tokens, int(row["inputs"][at])], [*mask, 0]
                tokens, mask = [*tokens, int(row["targets"][at])], [*mask, int(row["loss_mask"][at])]
            segments = int(row["segment_ids"].max())
            where = f"{name} window {number + 1}, {real} tokens in {segments} segment{'s' if segments > 1 else ''}"
            examples.append((where.strip(), tokens, mask))
    return examples


def continuations(context: Context, params: Any, rows: Rows) -> list[Sample]:
    """A base model goes on from the first words of held-out windows (temperature 0.8)."""
    evaluation, tokenizer = context.experiment.evaluation, context.tokenizer
    held = rows[np.linspace(0, len(rows) - 1, evaluation.num_samples).astype(int)]
    tokens, segments = (held[name][:, :PROMPT_TOKENS] for name in ("inputs", "segment_ids"))
    # The sample begins with the newest document of the window's beginning.
    prompts = [row[own == own[-1]].tolist() for row, own in zip(tokens, segments)]
    answers = answer_prompts(
        params, [Prompt("", ())] * len(prompts), prompts, jax.random.split(context.key("continuations"), len(prompts)),
        cfg=context.model, sampling=SamplingConfig(max_new_tokens=CONTINUATION_TOKENS, temperature=0.8), tokenizer=tokenizer,
        stop_ids=(tokenizer.eos_id,), length=PROMPT_TOKENS, batch_size=context.experiment.mesh.rows(len(prompts)),
        mesh=context.mesh,
    )  # fmt: skip
    written = [tokenizer.decode(list(one.tokens), skip_special=True).rstrip() for one in answers.completions]
    starts = [tokenizer.decode(prompt, skip_special=True) for prompt in prompts]
    return [Sample(start, text, continues=True) for start, text in zip(starts, written)]
