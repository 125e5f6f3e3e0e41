"""DPO: a policy that learns from rankings directly."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.config import NonNegativeInt, PositiveFloat, PositiveInt
from llmjax.data.base import Data, check_kind
from llmjax.data.loader import make_batches
from llmjax.data.records import Ranking
from llmjax.evals.rankings import pair_accuracy, pair_accuracy_error
from llmjax.models.lora import LoRAConfig, lora_spec
from llmjax.models.transformer import Params
from llmjax.objectives.preference import dpo_loss, implicit_rewards
from llmjax.objectives.reward import pairwise_ranking_loss
from llmjax.results import Curve, Figure, Metric, Panel
from llmjax.sharding import put_batch
from llmjax.stages.answers import Asked
from llmjax.stages.base import Context, Input, Preview, Result, Stage, check_decodes, check_split
from llmjax.stages.datasets import RankingRows, prepare_rankings, ranking_rows
from llmjax.stages.reward import ranking_preview
from llmjax.stages.tuning import Tuned, expert_figures, loss_figure, speed_figure
from llmjax.training.loop import Hook
from llmjax.training.optimizer import OptimizerConfig
from llmjax.training.program import Program, TrainProgram, abstract_batch


@dataclass(frozen=True)
class DPO(Stage):
    """Direct preference optimisation on rankings: pairs, or K answers with all their pairs (Rafailov et al. 2023).

    data: the rankings. init: the model that it starts from and is kept near to. lora: train low-rank updates only; the model
    that they are added to is then the reference, and is held once. beta: of the penalty; larger stays nearer. epochs: passes
    over the rankings. batch_size: rankings a step. length: tokens of prompt and answer; longer answers are left out, and
    counted. eval_every: steps between two held-out accuracies, on at most eval_rankings rankings; 0 for at the end only.
    """

    data: Data
    init: str = "sft"
    lora: LoRAConfig | None = None
    beta: PositiveFloat = 0.1
    epochs: PositiveInt = 1
    batch_size: PositiveInt = 16
    length: PositiveInt = 256
    eval_every: NonNegativeInt = 0
    eval_rankings: PositiveInt = 256
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-6)

    title: ClassVar[str] = "DPO"
    lead: ClassVar[str] = "The policy learns from ranked answers to make the better one likelier than the worse one."

    def inputs(self) -> tuple[Input, ...]:
        return (Input("init", self.init), *self.data.inputs())

    def check(self, experiment, name) -> None:
        check_kind(f"{name}.data", self.data, Ranking)
        check_split(experiment, name, "batch_size", self.batch_size)
        check_decodes(experiment, name)
        if self.lora is not None:
            lora_spec(experiment.model, self.lora)

    def prepare(self, context: Context) -> None:
        prepare_rankings(context, self.data, self.length, self.batch_size)
        Asked(context, self.data)

    def preview(self, context: Context) -> Preview:
        return ranking_preview(context, self.data, self.length)

    def update(self, context: Context, k: int = 4, steps: int = 1000) -> TrainProgram:
        """k, steps: answers of a ranking and number of steps, which follow from the data."""
        model, rows, beta = context.model, self.batch_size, self.beta
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("tokens", "segment_ids", "loss_mask"), (rows, k, self.length))
        return Tuned(context, self.init, self.lora).program(
            lambda params, batch, key, base: dpo_loss(params, base, batch, model, beta), self.optimizer, steps,
            abstract_batch(shapes | {"ranks": (rows, k)}, context.mesh),
            tokens=rows * k * self.length, length=self.length, with_base=True,
        )  # fmt: skip

    def programs(self, context: Context) -> dict[str, Program]:
        return {"update": self.update(context, getattr(self.data, "k", 4))}

    def run(self, context: Context) -> Result:
        """Trains on the rankings; then the policy and the model it started from answer the same held-out prompts."""
        rows, _ = ranking_rows(context, self.data, self.length)
        train, held_out = rows["train"], {name: part for name, part in rows.items() if name != "train"}
        steps = max(1, self.epochs * (len(train) // self.batch_size))
        batches = make_batches(train, batch_size=self.batch_size, seed=context.seed)
        tuned, base = Tuned(context, self.init, self.lora), context.load_lm(self.init)
        first = next(iter(held_out.values()))

        def evaluate(step, state):
            policy = tuned.language_model(state.params, base)
            return self._agreement(context, policy, base, first, self.eval_rankings)[0]

        trained = context.fit(
            self.update(context, train.k, steps), lambda: tuned.start(), batches, steps, frozen=(base,),
            hooks=[Hook(self.eval_every, evaluate)] if self.eval_every else [], shown=[("accuracy", "accuracy {:.1%}")],
        )  # fmt: skip
        final, adapter = tuned.final(trained.params, base)
        metrics, start = [], float(np.log(2))
        for number, (name, part) in enumerate(held_out.items()):
            prefix, which = ("", "") if number == 0 else (f"{name}_", f": {name}")
            found, error = self._agreement(context, final, base, part)
            metrics += [
                Metric(f"{prefix}loss", found["loss"], f"Held-out loss{which}", "nats/pair", None, ("at the start", start)),
                Metric(f"{prefix}accuracy", found["accuracy"], f"Held-out accuracy{which}", "% of pairs",
                       error if np.isfinite(error) else None, ("chance", 0.5), headline=number == 0),
            ]  # fmt: skip
        asked = Asked(context, self.data)
        answers = asked.of(final, base)
        scored = asked.metrics(answers, asked.of(base) if asked.scores else None)
        scored = [replace(m, label=f"KL from {self.init}", headline=True) if m.name == "kl" else m for m in scored]
        both = bool(self.eval_every)
        accuracy = (Curve("accuracy", label="training"), *((Curve("accuracy", "eval", "held out"),) if both else ()))
        rewards = (Curve("chosen_reward", label="best answers"), Curve("rejected_reward", label="worst answers"))
        return trained.result(
            params=final, adapter=adapter, metrics=[*metrics, *scored, *tuned.metrics()],
            figures=[
                Figure("Ranking accuracy", (Panel("% of pairs", accuracy, (("chance", 0.5),)),)),
                Figure("Implicit reward", (Panel("nats", rewards),),
                       "beta * (log-probability - that under the first model). Both may fall while their distance grows."),
                loss_figure("nats per pair", both), speed_figure(), *expert_figures(context.model),
            ],
            samples=asked.samples(answers),
        )  # fmt: skip

    def _agreement(
        self, context: Context, policy: Params, reference: Params, rows: RankingRows, most: int = 0
    ) -> tuple[dict[str, float], float]:
        """Loss and accuracy on the first `most` rankings (0 for all), and the standard error of the accuracy."""
        chosen = np.arange(min(most or len(rows), len(rows)))
        found = []
        for start in range(0, len(chosen), self.batch_size):
            part = np.minimum(np.arange(start, start + self.batch_size), len(chosen) - 1)
            batch = put_batch(rows[part], context.mesh)
            found.append(np.asarray(_rewards(policy, reference, batch, cfg=context.model, beta=self.beta)))
        rewards, ranks = np.concatenate(found)[: len(chosen)], rows.ranks[chosen]
        loss, _ = pairwise_ranking_loss(jnp.asarray(rewards), jnp.asarray(ranks))
        return {"loss": float(loss), "accuracy": pair_accuracy(rewards, ranks)}, pair_accuracy_error(rewards, ranks)


@partial(jax.jit, static_argnames=("cfg", "beta"))
def _rewards(policy: Any, reference: Any, batch, cfg, beta):
    return implicit_rewards(policy, reference, batch, cfg, beta)[0]
