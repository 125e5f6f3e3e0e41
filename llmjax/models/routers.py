"""Which experts a token goes to, and with what weight: small pure functions of the router's logits.

Conventions, fixed here once. Scores are softmax(logits) or sigmoid(logits) over all experts; the top_k are chosen by score plus
selection bias, ties to the lower id; the weights are the chosen scores without the bias, divided by their sum if `renormalize`
(which is the softmax over the chosen logits), times `routed_scaling`. Groups that were not chosen are out of the choice (-inf).
Sigmoid scores count as probabilities once divided by their sum. Everything is float32.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import struct

from llmjax.models.config import MoEConfig
from llmjax.typing import Array, Float, Int, PRNGKeyArray

_KNUTH = 2654435761  # of multiplicative hashing


@struct.dataclass
class Routing:
    """ids [B, T, C] int32: the experts of each token; weights [B, T, C] and probs [B, T, E] float32."""

    ids: Array
    weights: Array
    probs: Array


@struct.dataclass
class Slots:
    """A fixed number of places in each expert, filled from one sequence; in place of `Routing` where experts have a capacity.

    tokens [B, E, S] int32: the place in the sequence, T if the slot is empty; weights [B, E, S] float32, 0 if empty.
    """

    tokens: Array
    weights: Array


def route(
    logits_BTE: Float[Array, "B T E"],
    cfg: MoEConfig,
    *,
    selection_bias_E: Float[Array, "E"] | None = None,
    tokens_BT: Int[Array, "B T"] | None = None,
    routes_BTC: Int[Array, "B T C"] | None = None,
) -> Routing:
    """The routing of `cfg.router`, for routers in which the token chooses.

    tokens: ids of the vocabulary, for the hash. routes: experts recorded in an earlier pass, taken instead of a choice; the
    weights still come from these logits, so the router keeps its gradient.
    """
    scores_BTE, probs_BTE = _scores(logits_BTE, cfg)
    if routes_BTC is not None:
        ids_BTC = routes_BTC
    elif cfg.router == "hash":
        ids_BTC = _hash(tokens_BT, cfg)
    elif selection_bias_E is None and cfg.num_groups == 1:
        ids_BTC = jax.lax.top_k(jax.lax.stop_gradient(scores_BTE), cfg.top_k)[1]
    else:
        ids_BTC = jax.lax.top_k(jax.lax.stop_gradient(_choice(scores_BTE, cfg, selection_bias_E)), cfg.top_k)[1]
    if cfg.router == "hash":
        weights_BTC = jnp.full(ids_BTC.shape, 1.0 / cfg.top_k)
    else:
        weights_BTC = jnp.take_along_axis(scores_BTE, ids_BTC, axis=-1)
        if cfg.renormalize:
            weights_BTC = _shares(weights_BTC)
    return Routing(ids_BTC, weights_BTC * cfg.routed_scaling if cfg.routed_scaling != 1.0 else weights_BTC, probs_BTE)


def _scores(logits_BTE, cfg: MoEConfig):
    """(scores, probabilities that sum to 1)."""
    if cfg.scoring == "softmax":
        probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
        return probs_BTE, probs_BTE
    scores_BTE = jax.nn.sigmoid(logits_BTE)
    return scores_BTE, _shares(scores_BTE)


def _shares(scores: Array) -> Array:
    """Scores divided by their sum over the last axis; all 0, with finite gradients, where sigmoids have underflowed.

    DeepSeek-V3's code adds 1e-20; 1e-18 is the same to float32, and its square can still be divided by.
    """
    return scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-18)


def _choice(scores_BTE, cfg: MoEConfig, selection_bias_E):
    """What the experts are chosen by: scores with their bias, -inf in the groups that a token does not reach."""
    choice = scores_BTE if selection_bias_E is None else scores_BTE + selection_bias_E
    if cfg.num_groups == 1:
        return choice
    grouped = choice.reshape(*choice.shape[:-1], cfg.num_groups, -1)
    best = 1 if selection_bias_E is None else min(2, grouped.shape[-1])
    worth = jnp.sum(jax.lax.top_k(grouped, best)[0], axis=-1)
    _, groups = jax.lax.top_k(worth, cfg.top_k_groups)
    reached = jnp.any(groups[..., None] == jnp.arange(cfg.num_groups), axis=-2)
    return jnp.where(reached[..., None], grouped, -jnp.inf).reshape(choice.shape)


def _hash(tokens_BT, cfg: MoEConfig) -> Array:
    """Experts by the token's id alone: a hash and the top_k - 1 behind it (Roller et al. 2021, arXiv:2106.04426)."""
    first = (tokens_BT.astype(jnp.uint32) * jnp.uint32(_KNUTH) >> 16) % cfg.num_experts
    return ((first[..., None] + jnp.arange(cfg.top_k, dtype=jnp.uint32)) % cfg.num_experts).astype(jnp.int32)


def noisy_logits(logits_BTE: Array, cfg: MoEConfig, key: PRNGKeyArray) -> Array:
    """Logits plus normal noise of deviation `router_noise` / E (noisy top-k as in Riquelme et al. 2021, arXiv:2106.05974)."""
    noise = jax.random.normal(key, logits_BTE.shape, logits_BTE.dtype)
    return logits_BTE + cfg.router_noise / cfg.num_experts * noise


def jitter(x_BTD: Array, cfg: MoEConfig, key: PRNGKeyArray) -> Array:
    """The router's input times uniform noise between 1 - eps and 1 + eps (Fedus et al. 2021, arXiv:2101.03961, table 6)."""
    eps = cfg.router_jitter
    return x_BTD * jax.random.uniform(key, x_BTD.shape, x_BTD.dtype, 1 - eps, 1 + eps)


def expert_choice(logits_BTE: Float[Array, "B T E"], cfg: MoEConfig, valid_BT: Array) -> tuple[Slots, Array]:
    """Each expert takes its best tokens of each sequence: top_k * T / E of them (Zhou et al. 2022, arXiv:2202.09368, eq. 1-2).

    Returns the slots and probs [B, T, E]. A token may get any number of experts, and its fate depends on later tokens, so
    such a model cannot decode. Weights are the scores, which nothing renormalizes.
    """
    length = logits_BTE.shape[1]
    scores_BTE, probs_BTE = _scores(logits_BTE, cfg)
    wanted_BET = jnp.where(valid_BT[:, None, :], scores_BTE.swapaxes(1, 2), -1.0)
    weights_BES, tokens_BES = jax.lax.top_k(wanted_BET, min(length, slots_per_expert(length, cfg)))
    taken = weights_BES >= 0
    return Slots(jnp.where(taken, tokens_BES, length), jnp.where(taken, weights_BES, 0.0) * cfg.routed_scaling), probs_BTE


def slots_per_expert(length: int, cfg: MoEConfig) -> int:
    """ceil(capacity_factor * top_k * T / E) for a sequence of T tokens; expert choice has a factor of 1 unless told."""
    return max(1, math.ceil((cfg.capacity_factor or 1.0) * cfg.top_k * length / cfg.num_experts))


def capacity_slots(
    ids_BTC: Int[Array, "B T C"], weights_BTC: Float[Array, "B T C"], cfg: MoEConfig, valid_BT: Array
) -> tuple[Slots, Array]:
    """Slots for a routing in which an expert takes at most `slots_per_expert` tokens of a sequence; and the number of dropped
    choices of each token, [B, T].

    All first choices come before all second choices, and earlier tokens before later ones (Lepikhin et al. 2020,
    arXiv:2006.16668, algorithm 1). Padding takes no place. A dropped choice adds nothing to its token.
    """
    b, length, choices = ids_BTC.shape
    size = slots_per_expert(length, cfg)
    by_choice = jnp.where(valid_BT[..., None], ids_BTC, cfg.num_experts).swapaxes(1, 2).reshape(b, -1)
    wanted = by_choice[..., None] == jnp.arange(cfg.num_experts)
    place = jnp.sum(jnp.where(wanted, jnp.cumsum(wanted, axis=1) - 1, 0), axis=-1)
    served = (by_choice < cfg.num_experts) & (place < size)
    token = jnp.broadcast_to(jnp.arange(choices * length) % length, by_choice.shape)
    weights = weights_BTC.swapaxes(1, 2).reshape(b, -1)
    row = jnp.arange(b)[:, None]
    expert = jnp.where(served, by_choice, cfg.num_experts)  # out of range: not written
    empty = jnp.full((b, cfg.num_experts, size), length, token.dtype)
    tokens_BES = empty.at[row, expert, place].set(token, mode="drop")
    weights_BES = jnp.zeros(empty.shape, weights.dtype).at[row, expert, place].set(weights, mode="drop")
    dropped = (by_choice < cfg.num_experts) & ~served
    return Slots(tokens_BES, weights_BES), jnp.sum(dropped.reshape(b, choices, length), axis=1)
