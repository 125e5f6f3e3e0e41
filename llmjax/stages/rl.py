"""Reinforcement learning: a policy against rewards, by an algorithm of `llmjax.rl.algorithms`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from llmjax.config import NonNegativeInt, PositiveFloat, PositiveInt
from llmjax.data.base import Data, check_kind
from llmjax.data.loader import check_enough, make_batches
from llmjax.data.records import Prompt
from llmjax.errors import UserError
from llmjax.evals.answers import Answers, to_completions
from llmjax.generation.sampling import SamplingConfig
from llmjax.models.heads import add_head, scalar_model_spec
from llmjax.objectives.policy import ActorCritic
from llmjax.results import Bars, Curve, Figure, Panel
from llmjax.rl.algorithms import PPO, Algorithm
from llmjax.rl.learner import Learner
from llmjax.stages.answers import Asked
from llmjax.stages.base import (
    Context,
    Input,
    Preview,
    Result,
    Stage,
    StageReward,
    check_decodes,
    check_minibatches,
    check_split,
)
from llmjax.stages.datasets import PromptRows, PromptSet, prompt_sets
from llmjax.stages.tuning import expert_figures, speed_figure
from llmjax.tasks.base import Reward, score
from llmjax.training.optimizer import OptimizerConfig
from llmjax.training.program import Program
from llmjax.units import words

BatchReward = Callable[[Answers], np.ndarray]


@dataclass(frozen=True)
class RL(Stage):
    """Reinforcement learning of a language model on prompts.

    data: the prompts. rewards: by name; each a Python function reward(prompt, completion) -> number, a verifier of
    `llmjax.tasks.verify`, or `llmjax.stages.reward.ModelReward`. weights: of the rewards in their sum, 1 where left out.
    watch: scores that are logged and never trained on. policy: the stage, or "hf:FOLDER", that is trained and that KL is
    measured against. critic: a reward-model stage that the critic starts from; "" for the policy with a head of zeros.
    critic_warmup: first steps in which the critic alone learns, so that advantages are measured against values that mean
    something (0 for none). critic_rate: its learning rate as a multiple of the policy's, which starts from what it has learnt
    while the critic has most before it.
    algorithm: PPO, GRPO, or one of your own. A step: batch_size answers, group_size of the algorithm to a prompt, then
    `epochs` passes over them in `minibatches`. temperature: of sampling, and of every log-probability. missing_end_penalty:
    taken off the score of an answer that does not end itself. prompt_length: longer prompts are left out, and counted.
    """

    data: Data
    rewards: dict[str, Reward | StageReward]
    weights: dict[str, float] = field(default_factory=dict)
    watch: dict[str, Reward] = field(default_factory=dict)
    policy: str = "sft"
    critic: str = ""
    algorithm: Algorithm = PPO()
    steps: PositiveInt = 40
    batch_size: PositiveInt = 128
    epochs: PositiveInt = 2
    minibatches: PositiveInt = 2
    critic_warmup: NonNegativeInt = 0
    critic_rate: PositiveFloat = 1.0
    temperature: PositiveFloat = 1.0
    missing_end_penalty: float = 0.0
    prompt_length: PositiveInt = 128
    max_new_tokens: PositiveInt = 64
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-4, weight_decay=0.0, eps=1e-5)

    title: ClassVar[str] = "Reinforcement learning"
    lead: ClassVar[str] = (
        "The policy writes answers and moves towards those of higher reward, with a penalty for leaving the model it started "
        "from. What is watched is measured beside it and never trained on."
    )

    def validate(self) -> None:
        if not self.rewards:
            raise UserError("no reward; give at least one, such as rewards={'right': Number()}")
        for name in self.weights:
            if name not in self.rewards:
                raise UserError(f"weights: {name!r} is no reward; there is {', '.join(self.rewards)}")
        if self.batch_size % self.algorithm.answers_per_prompt:
            group = f"algorithm.group_size={self.algorithm.answers_per_prompt}"
            raise UserError(f"batch_size={self.batch_size} is not divisible by {group}")
        if self.batch_size % self.minibatches:
            raise UserError(f"batch_size={self.batch_size} cannot be cut into minibatches={self.minibatches} equal parts")
        if self.critic and not self.algorithm.needs_critic:
            raise UserError(f"critic={self.critic!r}: {type(self.algorithm).__name__} has no critic; leave it out")
        if self.critic_warmup and not self.algorithm.needs_critic:
            raise UserError(f"critic_warmup={self.critic_warmup}: {type(self.algorithm).__name__} has no critic; leave it out")
        if self.critic_warmup >= self.steps:
            raise UserError(f"critic_warmup={self.critic_warmup} of steps={self.steps}: the policy would never learn")

    def inputs(self) -> tuple[Input, ...]:
        models = [reward for reward in self.rewards.values() if isinstance(reward, StageReward)]
        critic = (Input("critic", self.critic, "scalar"),) if self.critic else ()
        return (Input("policy", self.policy), *critic, *(link for model in models for link in model.inputs()))

    def check(self, experiment, name) -> None:
        check_kind(f"{name}.data", self.data, Prompt)
        check_split(experiment, name, "batch_size", self.batch_size)
        check_minibatches(experiment, name, self.batch_size, self.minibatches, self.algorithm.answers_per_prompt)
        check_decodes(experiment, name)

    def prepare(self, context: Context) -> None:
        check_enough(len(self._prompts(context)), self.batch_size // self.algorithm.answers_per_prompt)
        Asked(context, self.data)

    def _prompts(self, context: Context) -> PromptSet:
        return prompt_sets(context, self.data, self.prompt_length)["train"]

    def preview(self, context: Context) -> Preview:
        prompts = self._prompts(context)
        first = [(prompts[i].id, prompts.tokens(i)) for i in range(min(3, len(prompts)))]
        examples = [(f"prompt {name}", tokens, [0] * len(tokens)) for name, tokens in first]
        fields = ", ".join(prompts[0].fields) or "none"
        return Preview(examples, [f"{len(prompts):,} prompts to train on; fields that a reward sees: {fields}"])

    def learner(self, context: Context) -> Learner:
        """The iteration, from shapes alone."""
        return Learner(
            context.model, context.mesh, self.algorithm, self.optimizer, SamplingConfig(self.max_new_tokens, self.temperature),
            self.steps, self.batch_size, self.epochs, self.minibatches, self.prompt_length,
            context.tokenizer.stop_ids, context.tokenizer.pad_id, self.critic_warmup, self.critic_rate,
        )  # fmt: skip

    def programs(self, context: Context) -> dict[str, Program]:
        return self.learner(context).programs()._asdict()

    def run(self, context: Context) -> Result:
        """Trains policy and critic, then asks the policy the held-out prompts, as it was and as it is."""
        learner, prompts = self.learner(context), self._prompts(context)
        programs, reference = learner.programs(), context.load_lm(self.policy)
        groups = self.algorithm.answers_per_prompt
        rows = PromptRows(prompts, self.prompt_length, context.tokenizer.pad_id, groups)
        batches = make_batches(rows, batch_size=self.batch_size // groups, seed=context.seed)
        watched = [(name, f"{name} {{:.3f}}") for name in self.watch]
        shown = [("reward", "on training prompts: reward {:+.2f}"), *watched, ("kl", "KL {:.2f} nats")]
        trained = context.fit(
            programs.update, lambda: ActorCritic(reference, self._critic(context, reference)), batches, self.steps,
            step_fn=learner.step_fn(programs, reference, self._scores(context, prompts)), shown=shown,
            tokens_per_step=self.batch_size * learner.length,
        )  # fmt: skip
        policy = trained.params.policy
        asked = Asked(context, self.data, {n: r for n, r in self.rewards.items() if not isinstance(r, StageReward)})
        answers, before = asked.of(policy, reference), asked.of(reference) if asked.scores else None
        metrics = [
            replace(metric, label=f"KL from {self.policy}", headline=True) if metric.name == "kl" else metric
            for metric in asked.metrics(answers, before)
        ]
        return trained.result(
            params=policy, metrics=metrics,
            figures=[*self._figures(context), *expert_figures(context.model)], samples=asked.samples(answers),
        )  # fmt: skip

    def _critic(self, context: Context, reference: Any) -> Any:
        """The first critic: a reward model (Stiennon et al. 2020, arXiv:2009.01325), else the policy with a head of zeros."""
        if not self.algorithm.needs_critic:
            return None
        if self.critic:
            return context.load(self.critic, scalar_model_spec(context.model))
        return add_head(reference, context.model, context.key("critic"), context.mesh, zero=True)

    def _scores(self, context: Context, prompts: PromptSet):
        """From a generation to the weighted sum of the rewards of each answer, and what is logged of them."""
        opened = {name: _opened(context, name, reward) for name, reward in {**self.rewards, **self.watch}.items()}

        def scores(batch: Mapping[str, Any], generation: Any) -> tuple[np.ndarray, dict[str, float]]:
            numbers = np.asarray(batch["prompt"])
            by_number = {int(n): (prompts[int(n)], prompts.tokens(int(n))) for n in np.unique(numbers)}
            asked, tokens = zip(*(by_number[int(n)] for n in numbers))
            answers = Answers(asked, tokens, to_completions(generation, context.tokenizer), np.zeros(len(numbers)))
            values = {name: one(answers) for name, one in opened.items()}
            total = sum(self.weights.get(name, 1.0) * values[name] for name in self.rewards)
            measured = {"reward": float(np.mean(total))} | {name: float(np.mean(values[name])) for name in self.watch}
            if len(self.rewards) > 1:
                measured |= {f"reward/{name}": float(np.mean(values[name])) for name in self.rewards}
            cut_off = np.array([not completion.ended for completion in answers.completions])
            return total - self.missing_end_penalty * cut_off, measured

        return scores

    def _figures(self, context: Context) -> list[Figure | Bars]:
        panels = [Panel("reward", (Curve("reward"),))]
        panels += [Panel(words(name), (Curve(name),)) for name in self.watch]
        caption = "What is watched is what the reward stands for. Reward up and that down is over-optimisation."
        caption = caption if self.watch else ""
        update = [Panel("% of tokens clipped", (Curve("clip_fraction"),))]
        if self.algorithm.needs_critic:
            update.append(Panel("% explained by critic", (Curve("explained_variance"),)))
        return [
            Figure("Reward", tuple(panels), caption),
            Figure(f"KL from {self.policy}", (Panel("nats per answer", (Curve("kl"),)),)),
            Figure("Update", tuple(update), "Share of tokens whose ratio is clipped" + (
                ", and share of the returns' variance that the critic explains." if self.algorithm.needs_critic else "."),
                compare=False),
            Figure("Length", (Panel("tokens per answer", (Curve("response_length"),)),), compare=False),
            speed_figure(),
        ]  # fmt: skip


def _opened(context: Context, name: str, reward: Reward | StageReward) -> BatchReward:
    if isinstance(reward, StageReward):
        return reward.open(context)
    return lambda answers: score(reward, answers.prompts, answers.completions, name)
