"""Algorithms of reinforcement learning as records over one rollout and one learner.

A record says how advantages come from scores, which loss the policy takes, whether there is a critic, and how many answers a
prompt gets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import jax.numpy as jnp

from llmjax.config import Fraction, NonNegativeFloat, PositiveFloat, Range
from llmjax.objectives.policy import (
    Scored,
    clipped_surrogate,
    clipped_value_loss,
    log_ratio,
    masked_mean,
    ratio_metrics,
)
from llmjax.rl.advantages import gae, group_advantages, kl_rewards, whiten
from llmjax.rl.rollout import Rollout
from llmjax.typing import Array

Metrics = dict[str, Any]


class Algorithm:
    """An algorithm. Subclasses are frozen dataclasses; what they do is traced, so it must be made of JAX operations.

    needs_critic: whether a value network is trained beside the policy. A field `group_size`, where there is one, is the
    number of answers to each prompt of a step; they stand next to one another in a rollout.
    """

    needs_critic: ClassVar[bool] = False

    @property
    def answers_per_prompt(self) -> int:
        """Its `group_size`, 1 where it has none."""
        return getattr(self, "group_size", 1)

    def advantages(self, rollout: Rollout) -> tuple[dict[str, Array], Metrics]:
        """What `loss` will find in its batch beside the rollout's own arrays, each [B, ...], and metrics."""
        raise TypeError(f"{type(self).__name__} has no advantages(rollout)")

    def loss(self, new: Scored, batch: dict[str, Array]) -> tuple[Array, Metrics]:
        """The loss of a minibatch, a scalar, and metrics.

        new: what the networks say now. batch: mask, old_log_probs, ref_log_probs, old_values (with a critic) [B, R] float32,
        and what `advantages` has added.
        """
        raise TypeError(f"{type(self).__name__} has no loss(new, batch)")


@dataclass(frozen=True)
class PPO(Algorithm):
    """Proximal policy optimisation with a critic (Schulman et al. 2017, arXiv:1707.06347), as in Ouyang et al. 2022
    (arXiv:2203.02155): the penalty for leaving the reference is part of each token's reward.

    kl_coef: reward per nat of KL. gamma, gae_lambda: of generalised advantage estimation (arXiv:1506.02438). clip_ratio: how
    far the ratio of a token counts. value_clip: how far a value may move in one rollout. vf_coef: weight of the value loss.
    """

    kl_coef: NonNegativeFloat = 0.05
    gamma: Fraction = 1.0
    gae_lambda: Fraction = 0.95
    clip_ratio: PositiveFloat = 0.2
    value_clip: PositiveFloat = 0.2
    vf_coef: NonNegativeFloat = 0.5
    needs_critic: ClassVar[bool] = True

    def advantages(self, rollout: Rollout) -> tuple[dict[str, Array], Metrics]:
        mask_BR, values_BR = rollout.mask, _of_critic(rollout.values)
        rewards_BR = kl_rewards(rollout.scores, rollout.log_probs, rollout.ref_log_probs, mask_BR, self.kl_coef)
        advantages_BR, returns_BR = gae(rewards_BR, values_BR, mask_BR, self.gamma, self.gae_lambda)
        residual = masked_mean(jnp.square(returns_BR - values_BR), mask_BR)
        variance = masked_mean(jnp.square(returns_BR - masked_mean(returns_BR, mask_BR)), mask_BR)
        made = {"advantages": whiten(advantages_BR, mask_BR), "returns": returns_BR}
        return made, {"explained_variance": 1.0 - residual / jnp.maximum(variance, 1e-8)}

    def loss(self, new: Scored, batch: dict[str, Array]) -> tuple[Array, Metrics]:
        mask_BR = batch["mask"]
        log_ratio_BR = log_ratio(new.log_probs, batch["old_log_probs"], mask_BR)
        policy_loss = masked_mean(
            clipped_surrogate(log_ratio_BR, batch["advantages"], self.clip_ratio, self.clip_ratio), mask_BR
        )
        errors_BR = clipped_value_loss(_of_critic(new.values), batch["old_values"], batch["returns"], self.value_clip)
        value_loss = masked_mean(errors_BR, mask_BR)
        metrics = {"policy_loss": policy_loss, "value_loss": value_loss}
        metrics |= ratio_metrics(log_ratio_BR, mask_BR, self.clip_ratio, self.clip_ratio)
        return policy_loss + self.vf_coef * value_loss, metrics


def _of_critic(values: Array | None) -> Array:
    """The critic's values, which an algorithm that needs one is given."""
    if values is None:
        raise ValueError("no values: the algorithm says needs_critic=False")
    return values


@dataclass(frozen=True)
class GRPO(Algorithm):
    """Group-relative policy optimisation (DeepSeekMath, arXiv:2402.03300): answers to one prompt are compared with one another,
    so no critic is needed. The loss is the mean over the tokens of the batch (DAPO, arXiv:2503.14476, eq. 8).

    group_size: answers to a prompt. scale: divide by the group's standard deviation. clip_low, clip_high: how far the ratio
    of a token counts, downwards and upwards. kl_coef: weight of 0.5 (log pi - log reference)^2 in the loss, the estimator
    whose gradient is that of KL(pi || reference) at the first update, token by token. The mean of a group holds the answer
    itself: without `scale` advantages are (group_size - 1) / group_size of those against the others.
    """

    group_size: Annotated[int, Range(least=2)] = 8
    scale: bool = True
    clip_low: PositiveFloat = 0.2
    clip_high: PositiveFloat = 0.2
    kl_coef: NonNegativeFloat = 0.0

    def advantages(self, rollout: Rollout) -> tuple[dict[str, Array], Metrics]:
        advantages_B = group_advantages(rollout.scores, self.group_size, self.scale)
        alike = jnp.max(jnp.abs(advantages_B).reshape(-1, self.group_size), axis=1) == 0
        made = {"advantages": advantages_B[:, None] * rollout.mask}
        return made, {"equal_groups": jnp.mean(alike.astype(jnp.float32))}

    def loss(self, new: Scored, batch: dict[str, Array]) -> tuple[Array, Metrics]:
        mask_BR = batch["mask"]
        log_ratio_BR = log_ratio(new.log_probs, batch["old_log_probs"], mask_BR)
        loss = masked_mean(clipped_surrogate(log_ratio_BR, batch["advantages"], self.clip_low, self.clip_high), mask_BR)
        metrics = {"policy_loss": loss} | ratio_metrics(log_ratio_BR, mask_BR, self.clip_low, self.clip_high)
        if not self.kl_coef:
            return loss, metrics
        kl = masked_mean(0.5 * jnp.square(new.log_probs - batch["ref_log_probs"]), mask_BR)
        return loss + self.kl_coef * kl, metrics | {"kl_loss": kl}
