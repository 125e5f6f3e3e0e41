"""An experiment with a stage, a data format, a reward, a ranker and an algorithm of its own, which the library does not know.

    llmjax --config=tests/e2e/own_house.py --config.pretrain.data.path='notes/*.txt' --config.drill.data.path=cards.jsonl ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from llmjax.data.loader import mix_batches
from llmjax.data.records import Completion, Dialogue, Message, Prompt, user
from llmjax.data.sources import Dialogues, Prompts, Text
from llmjax.data.tokenizer import TokenizerConfig
from llmjax.generation.sampling import SamplingConfig
from llmjax.models.config import ModelConfig
from llmjax.objectives.lm import lm_loss
from llmjax.objectives.policy import Scored, log_ratio, masked_mean
from llmjax.results import Curve, Figure, Metric, Panel
from llmjax.rl.algorithms import Algorithm
from llmjax.rl.rollout import Rollout
from llmjax.stages.base import Context, Input, Preview, Result, Stage
from llmjax.stages.candidates import RankedAnswers
from llmjax.stages.datasets import dialogue_rows
from llmjax.stages.experiment import Evaluation, Experiment
from llmjax.stages.pretrain import Pretrain, window_examples
from llmjax.stages.reward import ModelReward, RewardModel
from llmjax.stages.rl import RL
from llmjax.stages.tuning import Tuned
from llmjax.tasks.base import Ranker
from llmjax.training.optimizer import OptimizerConfig
from llmjax.training.program import Program, language_batch
from llmjax.typing import Array


def flashcard(record: dict[str, Any]) -> Dialogue | None:
    """A format: {"front", "back"}; a card without a back is left out."""
    if not record["back"]:
        return None
    return Dialogue((*user(record["front"]), Message("assistant", record["back"])))


def card_prompt(record: dict[str, Any]) -> Prompt:
    """The front of a card, with its back for rewards to look at."""
    return Prompt("", user(record["front"]), {"back": record["back"]})


def vowels(prompt: Prompt, completion: Completion) -> float:
    """A reward: the share of vowels in the answer, and a bonus for the card's own words."""
    text = completion.text.lower()
    share = sum(c in "aeiou" for c in text) / max(len(text), 1)
    return share + 0.1 * any(word in text for word in prompt.fields["back"].lower().split())


@dataclass(frozen=True)
class ShortestFirst(Ranker):
    """A ranker: fewer characters are better."""

    def rank(self, prompt: Prompt, completions: Sequence[Completion], rng: np.random.Generator) -> Sequence[int]:
        lengths = [len(completion.text) for completion in completions]
        return [sum(other < length for other in lengths) for length in lengths]


@dataclass(frozen=True)
class Reinforce(Algorithm):
    """An algorithm: score minus the mean of the batch, on every token (Williams 1992)."""

    weight: float = 1.0

    def advantages(self, rollout: Rollout) -> tuple[dict[str, Array], dict[str, Array]]:
        centred = rollout.scores - jnp.mean(rollout.scores)
        return {"advantages": centred[:, None] * rollout.mask}, {"score_spread": jnp.std(rollout.scores)}

    def loss(self, new: Scored, batch: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        ratio = jnp.exp(log_ratio(new.log_probs, batch["old_log_probs"], batch["mask"]))
        loss = -self.weight * masked_mean(batch["advantages"] * ratio, batch["mask"])
        return loss, {"reinforce_loss": loss}


@dataclass(frozen=True)
class Drill(Stage):
    """A stage: dialogues with a loss that also keeps the hidden confidence low."""

    data: Dialogues
    init: str = "pretrain"
    steps: int = 6
    damping: float = 0.1

    title: ClassVar[str] = "Flashcard drill"
    lead: ClassVar[str] = "A stage that only this experiment knows."

    def inputs(self) -> tuple[Input, ...]:
        return (Input("init", self.init),)

    def prepare(self, context: Context) -> None:
        dialogue_rows(context, self.data, 32)

    def preview(self, context: Context) -> Preview:
        parts = dialogue_rows(context, self.data, 32)
        return Preview(window_examples(parts), parts.notes)

    def programs(self, context: Context) -> dict[str, Program]:
        def loss(params, batch, key):
            value, metrics = lm_loss(params, batch, key, context.model)
            damped = self.damping * jnp.mean(jnp.square(params.embed))
            return value + damped, metrics | {"damping": damped}

        update = Tuned(context, self.init, None).program(
            loss, OptimizerConfig(learning_rate=1e-3), self.steps, language_batch(4, 32, context.mesh), tokens=128, length=32
        )
        return {"update": update}

    def run(self, context: Context) -> Result:
        batches = mix_batches(dialogue_rows(context, self.data, 32).train, batch_size=4, seed=context.seed)
        trained = context.fit(
            self.programs(context)["update"], lambda: context.load_lm(self.init), batches, self.steps,
            shown=[("damping", "damping {:.4f}")],
        )  # fmt: skip
        size = float(jnp.sqrt(jnp.mean(jnp.square(trained.params.embed))))
        return trained.result(
            metrics=[
                Metric("embedding_size", size, "Size of the embeddings", "rms", baseline=("at the start", 0.02), headline=True)
            ],
            figures=[Figure("Damping of the drill", (Panel("loss", (Curve("damping"),)),))],
        )


def get_config() -> Experiment:
    sampling, cards = SamplingConfig(max_new_tokens=8), Prompts(format=card_prompt)
    return Experiment(
        name="own-house",
        tokenizer=TokenizerConfig(vocab_size=300),
        model=ModelConfig(num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24),
        stages={
            "pretrain": Pretrain(data=Text(), steps=4, batch_size=4, length=32, eval_every=2, eval_batches=2),
            "drill": Drill(data=Dialogues(format=flashcard)),
            "judge": RewardModel(
                data=RankedAnswers("drill", cards, ShortestFirst(), k=3, num_prompts=8, num_eval_prompts=2, prompt_length=24,
                                   batch_size=8, sampling=sampling),
                init="drill", batch_size=4, length=32,
            ),
            "climb": RL(
                data=cards, rewards={"vowels": vowels, "short": ModelReward("judge")}, weights={"short": 0.5}, policy="drill",
                algorithm=Reinforce(), steps=4, batch_size=8, epochs=1, minibatches=2, prompt_length=24, max_new_tokens=8,
            ),
        },
        evaluation=Evaluation(num_prompts=4, batch_size=4, num_samples=2, prompt_length=24, sampling=sampling),
    )  # fmt: skip
