"""The reward model: from ranked answers to a scalar that stands for people's preference; and that scalar as a reward."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.config import NonNegativeInt, PositiveInt
from llmjax.data.base import Data, check_kind
from llmjax.data.loader import make_batches, spread
from llmjax.data.packing import right_pad
from llmjax.data.records import Ranking
from llmjax.evals.answers import Answers
from llmjax.evals.rankings import edit_accuracy, pair_accuracy, pair_accuracy_error
from llmjax.generation.score import reward_of
from llmjax.models.heads import ScalarModel, add_head, scalar_model_spec
from llmjax.models.stats import train_flops_per_token
from llmjax.objectives.reward import pairwise_ranking_loss, reward_loss
from llmjax.results import Curve, Figure, Metric, Panel
from llmjax.sharding import put_batch
from llmjax.stages.base import (
    Context,
    Input,
    Preview,
    Result,
    Stage,
    StageReward,
    as_metrics,
    check_split,
)
from llmjax.stages.datasets import RankingRows, prepare_rankings, ranking_rows
from llmjax.stages.tuning import expert_figures, loss_figure, speed_figure
from llmjax.training.loop import Hook
from llmjax.training.optimizer import OptimizerConfig
from llmjax.training.program import Program, TrainProgram, abstract_batch, train_program

SCORE_ROWS = 128  # answers scored at a time
NORMALISED = 512  # rankings whose answers set mean and deviation of the rewards


@dataclass(frozen=True)
class RewardModel(Stage):
    """A reward model trained on rankings: the loss is over all pairs of a ranking, with one forward pass per answer.

    data: the rankings, people's or those of `RankedAnswers`. init: the language model that becomes its body. epochs: passes
    over the rankings. batch_size: rankings a step. length: tokens of prompt and answer; longer answers are left out, and
    counted. eval_every: steps between two held-out accuracies, on at most eval_rankings rankings; 0 for at the end only.
    """

    data: Data
    init: str = "sft"
    epochs: PositiveInt = 1
    batch_size: PositiveInt = 16
    length: PositiveInt = 256
    eval_every: NonNegativeInt = 0
    eval_rankings: PositiveInt = 256
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-4)

    title: ClassVar[str] = "Reward model"
    lead: ClassVar[str] = "A reward model learns from ranked answers which of two is preferred."
    makes: ClassVar = "scalar"

    def inputs(self) -> tuple[Input, ...]:
        return (Input("init", self.init), *self.data.inputs())

    def check(self, experiment, name) -> None:
        check_kind(f"{name}.data", self.data, Ranking)
        check_split(experiment, name, "batch_size", self.batch_size)

    def prepare(self, context: Context) -> None:
        prepare_rankings(context, self.data, self.length, self.batch_size)

    def preview(self, context: Context) -> Preview:
        return ranking_preview(context, self.data, self.length)

    def update(self, context: Context, k: int = 4, steps: int = 1000) -> TrainProgram:
        """k, steps: answers of a ranking and number of steps, which follow from the data."""
        model, rows = context.model, self.batch_size
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("tokens", "segment_ids"), (rows, k, self.length))
        return train_program(
            lambda params, batch, key: reward_loss(params, batch, key, model), scalar_model_spec(model), self.optimizer,
            steps, abstract_batch(shapes | {"ranks": (rows, k)}, context.mesh), context.mesh,
            tokens=rows * k * self.length, flops_per_token=train_flops_per_token(model, self.length),
        )  # fmt: skip

    def programs(self, context: Context) -> dict[str, Program]:
        return {"update": self.update(context, getattr(self.data, "k", 4))}

    def run(self, context: Context) -> Result:
        """Trains on the rankings; held-out accuracy is compared with what the noise in them allows, where that is known.

        At the end the head is shifted and scaled so that the rewards of the training answers (a sample of NORMALISED rankings)
        have mean 0 and standard deviation 1 (Ziegler et al. 2019, section 2.1); rankings do not change.
        """
        rows, _ = ranking_rows(context, self.data, self.length)
        train = rows["train"]
        steps = max(1, self.epochs * (len(train) // self.batch_size))
        batches = make_batches(_Inputs(train), batch_size=self.batch_size, seed=context.seed)
        held_out = {name: part for name, part in rows.items() if name != "train"}
        first = next(iter(held_out.values()))

        def evaluate(step, state):
            chosen = np.arange(min(len(first), self.eval_rankings))
            rewards = score_all(context, state.params, first, chosen)
            loss, accuracy = pairwise_ranking_loss(jnp.asarray(rewards), jnp.asarray(first.ranks[chosen]))
            return {"loss": float(loss), "accuracy": float(accuracy)}

        trained = context.fit(
            self.update(context, train.k, steps), lambda: self._start(context), batches, steps,
            hooks=[Hook(self.eval_every, evaluate)] if self.eval_every else [], shown=[("accuracy", "accuracy {:.1%}")],
        )  # fmt: skip
        chosen = spread(len(train), NORMALISED)
        there = score_all(context, trained.params, train, chosen)[train.ranks[chosen] >= 0]
        params = normalised(trained.params, float(there.mean()), float(there.std()))
        metrics: list[Metric] = []
        for number, (name, part) in enumerate(held_out.items()):
            metrics += agreement(context, params, part, "" if number == 0 else f"{name}_", "" if number == 0 else f": {name}")
        ceiling = next((m.value for m in metrics if m.name == "noise_ceiling"), None)
        lines = (("chance", 0.5), *((("noise ceiling", ceiling),) if ceiling is not None else ()))
        accuracy = Panel("% of pairs", (Curve("accuracy", label="training"), Curve("accuracy", "eval", "held out")), lines)
        return trained.result(
            params=params, metrics=metrics,
            figures=[
                Figure("Ranking accuracy", (accuracy,), "Equal rewards count half. No model of what people meant can agree "
                       "with noisy people more often than the ceiling."),
                loss_figure("nats per pair", bool(self.eval_every)), speed_figure(), *expert_figures(context.model),
            ],
        )  # fmt: skip

    def _start(self, context: Context) -> ScalarModel:
        """The `init` model as backbone, a fresh head."""
        return add_head(context.load_lm(self.init), context.model, context.key("init"), context.mesh)


class _Inputs:
    """Rankings without the loss mask, which their loss does not look at."""

    def __init__(self, rows: RankingRows):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, chosen: np.ndarray) -> dict[str, np.ndarray]:
        batch = self._rows[chosen]
        return {name: batch[name] for name in ("tokens", "segment_ids", "ranks")}


def ranking_preview(context: Context, data: Data, length: int, count: int = 2) -> Preview:
    """The first rankings as the model will see them, each answer with its rank."""
    if data.from_model:
        return Preview((), (f"{type(data).__name__}: the answers are written when {data.inputs()[0].source} is complete",))
    rows, notes = ranking_rows(context, data, length)
    train, examples = rows["train"], []
    for number in range(min(count, len(train))):
        row = {name: value[0] for name, value in train[np.array([number])].items()}
        for answer in np.argsort(row["ranks"], kind="stable"):
            if row["ranks"][answer] >= 0:
                real = row["segment_ids"][answer] > 0
                where = f"ranking {number + 1}, rank {row['ranks'][answer]}"
                examples.append((where, row["tokens"][answer][real].tolist(), row["loss_mask"][answer][real].tolist()))
    return Preview(examples, [f"{len(train):,} rankings of up to {train.k} answers to train on", *notes])


def agreement(context: Context, params: ScalarModel, rows: RankingRows, prefix: str, which: str) -> list[Metric]:
    """Accuracy on rankings, with its error clustered by the prompts' groups; where it is known what they were made of, the
    ceiling that their noise leaves, how far accuracy has come from chance to it, and the accuracy against what they were made
    of; where answers were edited, how often the better of two that differ in the edit alone is put above. What is not defined
    is left out."""
    rewards = score_all(context, params, rows)
    loss, _ = pairwise_ranking_loss(jnp.asarray(rewards), jnp.asarray(rows.ranks))
    accuracy, error = pair_accuracy(rewards, rows.ranks), pair_accuracy_error(rewards, rows.ranks, rows.groups)
    metrics = [Metric(f"{prefix}loss", float(loss), f"Held-out loss{which}", "nats/pair")]
    error_or_none = error if math.isfinite(error) else None
    if np.isnan(rows.scores).all():
        baseline: tuple[str, float] | None = ("chance", 0.5)
        more: list[Metric] = []
    else:
        ceiling = pair_accuracy(rows.scores, rows.ranks)
        baseline = (f"noise ceiling{which}", ceiling)
        more = [
            Metric(f"{prefix}noise_ceiling", ceiling, f"Noise ceiling{which}", "%"),
            Metric(f"{prefix}accuracy_of_possible", _way_up(accuracy, ceiling), f"From chance to ceiling{which}", "%"),
            *as_metrics({f"{prefix}gold_accuracy": pair_accuracy(rewards, -rows.scores)}),
        ]
        edited, edited_error = edit_accuracy(rewards, rows.scores, rows.edited_from, rows.groups)
        more.append(Metric(
            f"{prefix}edit_accuracy", edited, f"The better of two that differ in one thing{which}", "%",
            edited_error if math.isfinite(edited_error) else None, ("chance", 0.5), headline=not prefix,
        ))  # fmt: skip
    label = f"Held-out accuracy{which}"
    named = Metric(f"{prefix}accuracy", accuracy, label, "% of pairs", error_or_none, baseline, headline=not prefix)
    return [metric for metric in (*metrics, named, *more) if math.isfinite(metric.value)]


def _way_up(accuracy: float, ceiling: float) -> float:
    """How far from chance to the ceiling an accuracy is; NaN where the ceiling is chance."""
    return (accuracy - 0.5) / (ceiling - 0.5) if ceiling > 0.5 else math.nan


def score_all(context: Context, params: ScalarModel, rows: RankingRows, chosen: np.ndarray | None = None) -> np.ndarray:
    """Rewards [N, K] of all answers of the chosen rankings (default all), scored some at a time."""
    chosen = np.arange(len(rows)) if chosen is None else chosen
    most = max(1, context.experiment.mesh.rows(SCORE_ROWS) // rows.k) * context.experiment.mesh.batch_shards
    found = []
    for start in range(0, len(chosen), most):
        part = chosen[np.minimum(np.arange(start, start + most), len(chosen) - 1)]
        arrays = {name: rows[part][name].reshape(most * rows.k, -1) for name in ("tokens", "segment_ids")}
        batch = put_batch(arrays, context.mesh)
        scores = _score(params, batch["tokens"], batch["segment_ids"], cfg=context.model)
        found.append(np.asarray(scores).reshape(most, rows.k))
    return np.concatenate(found)[: len(chosen)]


@partial(jax.jit, static_argnames="cfg")
def _score(params, tokens_BT, segment_ids_BT, cfg):
    return reward_of(params, tokens_BT, segment_ids_BT, cfg)[0]


def normalised(params: ScalarModel, mean: float, std: float) -> ScalarModel:
    """The same ranking with rewards (r - mean) / std."""
    gain = 1.0 / max(std, 1e-6)
    return ScalarModel(params.backbone, params.weight * gain, (params.bias - mean) * gain)


@dataclass(frozen=True)
class ModelReward(StageReward):
    """The score that the reward model of a stage gives, in its normalised units, as a reward for RL. stage: its name."""

    stage: str

    def inputs(self) -> tuple[Input, ...]:
        return (Input("rewards", self.stage, "scalar"),)

    def open(self, context: Context) -> Callable[[Answers], np.ndarray]:
        """A function from answers to their scores [N]; tokens are scored as they were sampled."""
        params: Any = context.load(self.stage, scalar_model_spec(context.model))

        def score(answers: Answers) -> np.ndarray:
            texts = [[*p, *c.tokens] for p, c in zip(answers.prompt_tokens, answers.completions, strict=True)]
            longest = max(map(len, texts))
            length = 1 << max(longest - 1, 15).bit_length()  # a handful of shapes only
            rows = context.experiment.mesh.rows(len(texts))
            texts += [texts[-1]] * (rows - len(texts))
            tokens, segment_ids = right_pad(texts, length, context.tokenizer.pad_id)
            batch = put_batch({"tokens": tokens, "segment_ids": segment_ids}, context.mesh)
            scores = np.asarray(_score(params, batch["tokens"], batch["segment_ids"], cfg=context.model))
            return scores[: len(answers.completions)]

        return score
