"""The sparse feed-forward layer: router, balancing losses, statistics, experts over the mesh.

Conventions, fixed here once: f_e is the fraction of all choices that went to expert e (sums to 1 over experts), P_e the mean
router probability; both over the real tokens of the global batch, never over padding, and per layer. The load-balancing
loss is E * sum_e f_e P_e, which is 1 at perfect balance and E at collapse with top_k=1. Everything of the router is float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from llmjax import sharding
from llmjax.models.config import ModelConfig, MoEConfig
from llmjax.models.dispatch import expert_ffn
from llmjax.models.layers import residual_scale
from llmjax.models.spec import ParamSpec
from llmjax.typing import Array, Float, Int


@struct.dataclass
class Moe:
    """router [D, E]; experts' SwiGLU weights gate, up [E, D, F], down [E, F, D]."""

    router: Array
    gate: Array
    up: Array
    down: Array


@struct.dataclass
class RouterStats:
    """What a router did to one batch; every field is a float32 scalar but load [E]; stacked over layers by the model.

    load_balance: loss, 1 at balance. z_loss: mean squared log-partition. load: fraction of choices per expert.
    entropy: mean entropy of the router's distribution, nats (at most ln E). logit_norm: root mean square router logit.
    """

    load_balance: Array
    z_loss: Array
    load: Array
    entropy: Array
    logit_norm: Array


def moe_spec(cfg: ModelConfig) -> Moe:
    """The `ParamSpec` of router and experts."""
    d, f, e = cfg.embed_dim, cfg.moe.mlp_dim, cfg.moe.num_experts
    into = ParamSpec((e, d, f), ("expert", "embed", "mlp"), std=d**-0.5)
    return Moe(
        # Not sharded: every device routes its own tokens.
        router=ParamSpec((d, e), (None, None), std=d**-0.5),
        gate=into,
        up=into,
        down=ParamSpec((e, f, d), ("expert", "mlp", "embed"), std=f**-0.5 * residual_scale(cfg)),
    )


def top_k_route(
    logits_BTE: Float[Array, "B T E"], cfg: MoEConfig
) -> tuple[Int[Array, "B T C"], Float[Array, "B T C"], Float[Array, "B T E"]]:
    """Softmax, then the top_k experts of each token (Shazeer et al. 2017, arXiv:1701.06538; Mixtral arXiv:2401.04088).

    Returns expert ids (ties go to the lower id), gate weights (summing to 1 when `cfg.renormalize`) and probabilities.
    """
    probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    weights_BTC, ids_BTC = jax.lax.top_k(probs_BTE, cfg.top_k)
    if cfg.renormalize:
        weights_BTC = weights_BTC / jnp.sum(weights_BTC, axis=-1, keepdims=True)
    return ids_BTC, weights_BTC, probs_BTE


def router_stats(logits_BTE: Array, probs_BTE: Array, ids_BTC: Array, valid_BT: Array) -> RouterStats:
    """Losses and statistics over the tokens where `valid_BT` holds (bool); see the module's conventions."""
    num_experts = logits_BTE.shape[-1]
    weight_BT = valid_BT.astype(jnp.float32)
    num_tokens = jnp.maximum(jnp.sum(weight_BT), 1.0)

    def mean(x_BT):
        return jnp.sum(x_BT * weight_BT) / num_tokens

    chosen_BTE = jnp.sum(ids_BTC[..., None] == jnp.arange(num_experts), axis=2).astype(jnp.float32)
    load_E = jnp.sum(chosen_BTE * weight_BT[..., None], axis=(0, 1)) / (num_tokens * ids_BTC.shape[-1])
    prob_E = jnp.sum(probs_BTE * weight_BT[..., None], axis=(0, 1)) / num_tokens
    log_partition_BT = jax.nn.logsumexp(logits_BTE, axis=-1)
    entropy_BT = log_partition_BT - jnp.sum(probs_BTE * logits_BTE, axis=-1)
    return RouterStats(
        load_balance=num_experts * jnp.sum(jax.lax.stop_gradient(load_E) * prob_E),
        z_loss=mean(jnp.square(log_partition_BT)),
        load=load_E,
        entropy=mean(entropy_BT),
        logit_norm=jnp.sqrt(mean(jnp.mean(jnp.square(logits_BTE), axis=-1))),
    )


def moe_layer(
    w: Moe, x_BTD: Float[Array, "B T D"], segment_ids_BT: Int[Array, "B T"], cfg: MoEConfig
) -> tuple[Float[Array, "B T D"], RouterStats]:
    """Routes each token and returns the gate-weighted sum of its experts, dropless, with the router's statistics.

    Tokens of segment 0 are padding: they reach no expert and no statistic.
    """
    valid_BT = segment_ids_BT > 0
    logits_BTE = sharding.einsum("BTD,DE->BTE", x_BTD.astype(jnp.float32), w.router)
    ids_BTC, weights_BTC, probs_BTE = top_k_route(logits_BTE, cfg)
    stats = router_stats(logits_BTE, probs_BTE, ids_BTC, valid_BT)
    ids_BTC = jnp.where(valid_BT[..., None], ids_BTC, cfg.num_experts)
    run = sharding.local(_local_experts, ["BTD", "BTC", "BTC", "EDF", "EDF", "EFD"], "BTD")
    return run(x_BTD, ids_BTC, weights_BTC, w.gate, w.up, w.down), stats


def _local_experts(x_BTD, ids_BTC, weights_BTC, gate_EDF, up_EDF, down_EFD):
    """Expert parallelism by all-gather: see the tokens of all expert shards, serve the local experts, reduce-scatter.

    The hidden width may be split over `tensor`; its partial sums are added.
    """
    experts_here = gate_EDF.shape[0]
    parallel = sharding.axis_size("expert") > 1
    if parallel:
        x_BTD, ids_BTC, weights_BTC = (
            jax.lax.all_gather(a, "expert", axis=0, tiled=True) for a in (x_BTD, ids_BTC, weights_BTC)
        )
        ids_BTC = ids_BTC - jax.lax.axis_index("expert") * experts_here
        ids_BTC = jnp.where((ids_BTC >= 0) & (ids_BTC < experts_here), ids_BTC, experts_here)
    b, t, d = x_BTD.shape
    choices = ids_BTC.shape[-1]
    y_TD = expert_ffn(
        x_BTD.reshape(b * t, d), ids_BTC.reshape(b * t, choices), weights_BTC.reshape(b * t, choices),
        gate_EDF, up_EDF, down_EFD,
    )  # fmt: skip
    y_BTD = y_TD.reshape(b, t, d)
    if sharding.axis_size("tensor") > 1:
        y_BTD = jax.lax.psum(y_BTD, "tensor")
    if parallel:
        y_BTD = jax.lax.psum_scatter(y_BTD, "expert", scatter_dimension=0, tiled=True)
    return y_BTD


def router_loss(stats: RouterStats, cfg: MoEConfig) -> Array:
    """Weighted balancing and z losses, averaged over layers: a scalar in nats to add to the training loss."""
    return cfg.load_balance_coef * jnp.mean(stats.load_balance) + cfg.z_loss_coef * jnp.mean(stats.z_loss)


def router_metrics(stats: RouterStats) -> dict[str, Array]:
    """Scalars and per-expert loads for the metrics; `stats` stacked over layers [L, ...]."""
    num_layers, num_experts = stats.load.shape
    metrics = {
        "moe/load_balance": jnp.mean(stats.load_balance),
        "moe/z_loss": jnp.mean(stats.z_loss),
        "moe/entropy": jnp.mean(stats.entropy),
        "moe/logit_norm": jnp.mean(stats.logit_norm),
        "moe/max_load": jnp.max(stats.load) * num_experts,
        "moe/dead_experts": jnp.sum(stats.load == 0).astype(jnp.float32),
    }
    for layer in range(num_layers):
        for e in range(num_experts):
            metrics[f"moe/load/{layer}/{e}"] = stats.load[layer, e]
    return metrics
