"""A rollout: prompts, the answers that the policy gave, and what networks and rewards say of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from llmjax.generation.decode import Generation
from llmjax.generation.score import join_response, response_log_probs, response_values
from llmjax.models.config import ModelConfig
from llmjax.models.transformer import Params
from llmjax.objectives.policy import ActorCritic
from llmjax.sharding import constrain
from llmjax.typing import Array


@struct.dataclass
class Rollout:
    """B answers of up to R tokens behind prompts of up to P.

    tokens, segment_ids, positions: [B, P + R] int32, prompt (padded on the left) and answer. mask: [B, R] float32, 1 up to and
    including the token that ended the answer. scores: [B] float32, what the answers are worth. log_probs, ref_log_probs,
    values: [B, R] float32, of policy, reference and critic (None without one), 0 outside the mask.
    """

    tokens: Array
    segment_ids: Array
    positions: Array
    mask: Array
    scores: Array
    log_probs: Array
    ref_log_probs: Array
    values: Array | None

    def batch(self) -> dict[str, Array]:
        """The arrays that a loss takes, each [B, ...]."""
        arrays = {name: getattr(self, name) for name in ("tokens", "segment_ids", "positions", "mask", "ref_log_probs")}
        arrays |= {"old_log_probs": self.log_probs}
        return arrays if self.values is None else arrays | {"old_values": self.values}


def score_rollout(
    params: ActorCritic,
    reference: Params,
    prompt_BT: Array,
    segment_ids_BT: Array,
    generation: Generation,
    scores_B: Array,
    cfg: ModelConfig,
    temperature: float,
) -> tuple[Rollout, dict[str, Array]]:
    """The rollout of a generation with its scores, and metrics.

    temperature: that of sampling, which all log-probabilities are of. sampler_gap: the largest difference between the
    log-probabilities of sampling with a cache and of the full forward pass.
    """
    batch = join_response(prompt_BT, segment_ids_BT, generation)
    mask_BR = batch["mask"]
    log_probs_BR, _, _ = response_log_probs(params.policy, batch, cfg, temperature)
    ref_log_probs_BR, _, _ = response_log_probs(reference, batch, cfg, temperature)
    values_BR = None if params.critic is None else response_values(params.critic, batch, cfg)[0] * mask_BR
    rollout = Rollout(
        scores=scores_B, log_probs=log_probs_BR * mask_BR, ref_log_probs=ref_log_probs_BR * mask_BR, values=values_BR, **batch
    )
    metrics = {
        "kl": jnp.mean(jnp.sum((log_probs_BR - ref_log_probs_BR) * mask_BR, axis=1)),
        "response_length": jnp.mean(jnp.sum(mask_BR, axis=1)),
        "ended": jnp.mean(generation.ended.astype(jnp.float32)),
        "sampler_gap": jnp.max(jnp.abs(log_probs_BR - generation.log_probs) * mask_BR),
    }
    return rollout, metrics


def minibatches(batch: dict[str, Array], key: jax.Array, num_minibatches: int) -> dict[str, Array]:
    """The rows in a fresh random order, cut into minibatches: [B, ...] -> [M, B / M, ...]; every row exactly once."""
    rows = batch["tokens"].shape[0]
    order = jax.random.permutation(key, rows)

    def cut(x: Array) -> Array:
        whole = constrain(x, "." * x.ndim)  # a rollout is small
        parts = whole[order].reshape(num_minibatches, rows // num_minibatches, *x.shape[1:])
        return constrain(parts, ".B" + "." * (x.ndim - 1))

    return jax.tree.map(cut, batch)
