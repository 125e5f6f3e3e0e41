"""One iteration of reinforcement learning: sample, score, update. What is in it of an algorithm comes from its record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llmjax.generation.decode import Generation, generate
from llmjax.generation.sampling import SamplingConfig
from llmjax.models.config import ModelConfig
from llmjax.models.moe import router_loss, router_metrics
from llmjax.models.spec import abstract_params
from llmjax.models.stats import train_flops_per_token
from llmjax.models.transformer import Params, transformer_spec
from llmjax.objectives.policy import ActorCritic, actor_critic_spec, masked_mean, scored
from llmjax.rl.algorithms import Algorithm
from llmjax.rl.rollout import Rollout, minibatches, score_rollout
from llmjax.sharding import put_batch
from llmjax.training.optimizer import OptimizerConfig
from llmjax.training.program import Program, TrainProgram, abstract_batch, train_program
from llmjax.training.rng import fold_purpose
from llmjax.training.state import TrainState
from llmjax.typing import Array

Scores = Callable[[Mapping[str, Any], Generation], tuple[np.ndarray, dict[str, float]]]
"""(batch of prompts, generation) -> score [B] of each answer, and metrics."""


def policy_loss(
    params: ActorCritic, batch: dict[str, Array], key: Any, cfg: ModelConfig, algorithm: Algorithm, temperature: float
) -> tuple[Array, dict[str, Any]]:
    """The algorithm's loss on a minibatch, plus the losses of the routers, and metrics. On the first minibatch of a rollout the
    ratio is 1: up to rounding in float32; in bfloat16 with experts a near tie of the router may fall otherwise in a batch of
    another shape, and ratios be off by some 7 %. key: unused, there is no dropout."""
    del key
    new, stats = scored(params, batch, cfg, temperature)
    loss, metrics = algorithm.loss(new, batch)
    metrics = {"loss": loss, "entropy": masked_mean(new.entropy, batch["mask"])} | metrics
    if stats[0] is None:
        return loss, metrics
    return loss + sum(router_loss(one, cfg.experts) for one in stats), metrics | router_metrics(stats[0])


class Programs(NamedTuple):
    """sample: answers to the prompts of a step. score: what the networks say of them. update: one minibatch."""

    sample: Program
    score: Program
    update: TrainProgram


@dataclass(frozen=True)
class Learner:
    """What does not change between iterations.

    batch_size: answers a step. epochs, minibatches: passes over them, and parts of a pass. critic_warmup: in so many first
    iterations the policy stays, so that only the critic learns; critic_rate: its learning rate, as a multiple of the
    policy's. sampling: of answers behind prompts of `prompt_length` tokens.
    """

    cfg: ModelConfig
    mesh: Mesh | None
    algorithm: Algorithm
    optimizer: OptimizerConfig
    sampling: SamplingConfig
    steps: int
    batch_size: int
    epochs: int
    minibatches: int
    prompt_length: int
    stop_ids: tuple[int, ...]
    pad_id: int
    critic_warmup: int = 0
    critic_rate: float = 1.0

    @property
    def length(self) -> int:
        """Tokens of a row, prompt and answer."""
        return self.prompt_length + self.sampling.max_new_tokens

    def programs(self) -> Programs:
        """What an iteration is made of, from shapes alone."""
        specs = actor_critic_spec(self.cfg, self.algorithm.needs_critic)
        params, reference = abstract_params(specs, self.mesh), abstract_params(transformer_spec(self.cfg), self.mesh)
        rows, new = self.batch_size, self.sampling.max_new_tokens
        prompts = abstract_batch(dict.fromkeys(("tokens", "segment_ids"), (rows, self.prompt_length)), self.mesh)
        keys = jax.eval_shape(lambda key: jax.random.split(key, rows), jax.eval_shape(jax.random.key, 0))
        keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=prompts["tokens"].sharding)
        prompt = prompts["tokens"], prompts["segment_ids"]
        sample = jax.jit(self._sample)
        floats = dict.fromkeys(("log_probs", "mask", "scores"), np.float32) | {"ended": np.bool_}
        made: Any = abstract_batch(
            {"tokens": (rows, new), "log_probs": (rows, new), "mask": (rows, new), "ended": (rows,), "scores": (rows,)},
            self.mesh, floats,
        )  # fmt: skip
        scores = made.pop("scores")
        score = jax.jit(self._score)
        forward = train_flops_per_token(self.cfg, self.length) / 3
        tokens = rows * self.length
        return Programs(
            Program(sample, (params.policy, *prompt, keys), tokens, forward),
            Program(score, (params, reference, *prompt, Generation(**made), scores), tokens, forward),
            self._update(specs),
        )

    def _update(self, specs: ActorCritic) -> TrainProgram:
        rows = self.batch_size // self.minibatches
        whole, answer = (rows, self.length), (rows, self.sampling.max_new_tokens)
        shapes = dict.fromkeys(("tokens", "segment_ids", "positions"), whole)
        floats = ["mask", "ref_log_probs", "old_log_probs", *self._added()]
        floats += ["old_values"] if self.algorithm.needs_critic else []
        batch = abstract_batch(shapes | dict.fromkeys(floats, answer), self.mesh, dict.fromkeys(floats, np.float32))
        return train_program(
            partial(policy_loss, cfg=self.cfg, algorithm=self.algorithm, temperature=self.sampling.temperature),
            specs, self.optimizer, self.steps * self.epochs * self.minibatches, batch, self.mesh,
            tokens=rows * self.length, flops_per_token=train_flops_per_token(self.cfg, self.length),
            rates=(1.0, self.critic_rate),
        )  # fmt: skip

    def _added(self) -> list[str]:
        """Names of what the algorithm adds to a batch."""
        shape: Any = jax.ShapeDtypeStruct((self.batch_size, self.sampling.max_new_tokens), np.float32)
        whole: Any = jax.ShapeDtypeStruct((self.batch_size, self.length), np.int32)
        values = shape if self.algorithm.needs_critic else None
        scores: Any = jax.ShapeDtypeStruct((self.batch_size,), np.float32)
        rollout = Rollout(whole, whole, whole, shape, scores, shape, shape, values)
        return list(jax.eval_shape(self.algorithm.advantages, rollout)[0])

    def _sample(self, policy: Params, prompt_BT: Array, segment_ids_BT: Array, keys_B: Array) -> Generation:
        return generate(
            policy, prompt_BT, segment_ids_BT, keys_B,
            cfg=self.cfg, sampling=self.sampling, stop_ids=self.stop_ids, pad_id=self.pad_id,
        )  # fmt: skip

    def _score(self, params: ActorCritic, reference: Params, prompt_BT, segment_ids_BT, generation: Generation, scores_B):
        rollout, metrics = score_rollout(
            params, reference, prompt_BT, segment_ids_BT, generation, scores_B, self.cfg, self.sampling.temperature
        )
        added, more = self.algorithm.advantages(rollout)
        return rollout.batch() | added, metrics | more

    def step_fn(self, programs: Programs, reference: Params, scores: Scores) -> Callable:
        """(state, prompts, key) -> (state, metrics): sample, score, and `epochs` x `minibatches` updates.

        `state.step` counts iterations, not updates.
        """
        sample, score, update = programs.sample.fn, programs.score.fn, programs.update.fn
        step_place: Any = programs.update.state.step.sharding
        keys_place = programs.sample.args[-1].sharding
        shuffle = jax.jit(minibatches, static_argnums=2)

        def step(state: TrainState, prompts: Mapping[str, Array], key: jax.Array):
            iteration = int(state.step)
            keys_B = jax.device_put(jax.random.split(fold_purpose(key, "sample"), self.batch_size), keys_place)
            prompt = prompts["tokens"], prompts["segment_ids"]
            generation = sample(state.params.policy, *prompt, keys_B)
            scores_B, measured = scores(prompts, generation)
            worth = put_batch({"scores": np.asarray(scores_B, np.float32)}, self.mesh)["scores"]
            batch, metrics = score(state.params, reference, *prompt, generation, worth)
            kept = None
            if iteration < self.critic_warmup:  # nothing for the policy to learn; what its routers' losses move is put back
                kept = jax.tree.map(jnp.copy, state.params.policy)
                batch |= {"advantages": jnp.zeros_like(batch["advantages"])}
            updates = []
            for epoch in range(self.epochs):
                shuffled = shuffle(batch, jax.random.fold_in(fold_purpose(key, "shuffle"), epoch), self.minibatches)
                for i in range(self.minibatches):
                    state, one = update(state, jax.tree.map(lambda x, i=i: x[i], shuffled), key)
                    updates.append(one)
            if kept is not None:
                state = replace(state, params=replace(state.params, policy=kept))
            state = replace(state, step=jax.device_put(jnp.int32(iteration + 1), step_place))
            means = {name: np.mean([np.asarray(m[name]) for m in updates], axis=0) for name in updates[0]}
            if "ratio_max" in means:
                means["ratio_max"] = max(float(m["ratio_max"]) for m in updates)
                means["first_ratio_max"] = float(updates[0]["ratio_max"])
            return state, metrics | means | measured

        return step
