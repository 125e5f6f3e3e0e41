"""The sparse feed-forward layer: router, balancing losses, statistics, experts over the mesh.

Conventions, fixed here once: f_e is the fraction of all choices that went to expert e (sums to 1 over experts), P_e the mean
router probability; both over the real tokens of the global batch, never over padding, and per layer. The load-balancing
loss is E * sum_e f_e P_e, which is 1 at perfect balance and E at collapse with top_k=1. Sigmoid scores count as probabilities
once divided by their sum. Groups that were not chosen are out of the choice (-inf). Everything of the router is float32.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from llmjax import sharding
from llmjax.models.config import ModelConfig, MoEConfig
from llmjax.models.dispatch import expert_ffn
from llmjax.models.layers import Mlp, activation, gated_mlp, mlp_spec, residual_scale
from llmjax.models.linear import Weight, full_weight
from llmjax.models.spec import ParamSpec
from llmjax.typing import Array, Float, Int


@struct.dataclass
class Moe:
    """router [D, E]; experts' weights gate, up [E, D, F], down [E, F, D]. The rest only where the family has it:

    router_bias, selection_bias [E]; shared: weights of the experts that every token passes; gate_bias, up_bias [E, F],
    down_bias [E, D].
    """

    router: Array
    gate: Weight
    up: Weight
    down: Weight
    router_bias: Array | None = None
    selection_bias: Array | None = None
    shared: Mlp | None = None
    gate_bias: Array | None = None
    up_bias: Array | None = None
    down_bias: Array | None = None


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
    moe = cfg.moe
    d, f, e = cfg.embed_dim, moe.mlp_dim, moe.num_experts
    into = ParamSpec((e, d, f), ("expert", "embed", "mlp"), std=d**-0.5)
    router_bias = ParamSpec((e,), (None,), constant=0.0)
    hidden_bias = ParamSpec((e, f), ("expert", "mlp"), constant=0.0) if moe.expert_bias else None
    return Moe(
        # Not sharded: every device routes its own tokens.
        router=ParamSpec((d, e), (None, None), std=d**-0.5),
        gate=into,
        up=into,
        down=ParamSpec((e, f, d), ("expert", "mlp", "embed"), std=f**-0.5 * residual_scale(cfg)),
        router_bias=router_bias if moe.router_bias else None,
        selection_bias=router_bias if moe.selection_bias else None,
        shared=mlp_spec(cfg, moe.shared_mlp_dim) if moe.shared_mlp_dim else None,
        gate_bias=hidden_bias,
        up_bias=hidden_bias,
        down_bias=ParamSpec((e, d), ("expert", "embed"), constant=0.0) if moe.expert_bias else None,
    )


def top_k_route(
    logits_BTE: Float[Array, "B T E"], cfg: MoEConfig, selection_bias_E: Float[Array, "E"] | None = None
) -> tuple[Int[Array, "B T C"], Float[Array, "B T C"], Float[Array, "B T E"]]:
    """The top_k experts of each token by score (Shazeer et al. 2017, arXiv:1701.06538; options: see `MoEConfig`).

    Returns expert ids (ties go to the lower id), gate weights (summing to routed_scaling when `cfg.renormalize`) and
    probabilities. The selection bias takes part in the choice alone: it gets no gradient and changes no weight.
    """
    if cfg.scoring == "softmax":
        probs_BTE = scores_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    else:
        scores_BTE = jax.nn.sigmoid(logits_BTE)
        probs_BTE = scores_BTE / jnp.sum(scores_BTE, axis=-1, keepdims=True)
    if selection_bias_E is None and cfg.num_groups == 1:
        weights_BTC, ids_BTC = jax.lax.top_k(scores_BTE, cfg.top_k)
    else:
        _, ids_BTC = jax.lax.top_k(jax.lax.stop_gradient(_choice(scores_BTE, cfg, selection_bias_E)), cfg.top_k)
        weights_BTC = jnp.take_along_axis(scores_BTE, ids_BTC, axis=-1)
    if cfg.renormalize:
        weights_BTC = weights_BTC / jnp.sum(weights_BTC, axis=-1, keepdims=True)
    if cfg.routed_scaling != 1.0:
        weights_BTC = weights_BTC * cfg.routed_scaling
    return ids_BTC, weights_BTC, probs_BTE


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
    w: Moe, x_BTD: Float[Array, "B T D"], segment_ids_BT: Int[Array, "B T"], cfg: ModelConfig
) -> tuple[Float[Array, "B T D"], RouterStats]:
    """Routes each token and returns the gate-weighted sum of its experts, dropless, with the router's statistics.

    Tokens of segment 0 are padding: they reach no routed expert and no statistic.
    """
    moe, act = cfg.moe, activation(cfg.activation, cfg.activation_limit)
    valid_BT = segment_ids_BT > 0
    logits_BTE = sharding.einsum("BTD,DE->BTE", x_BTD.astype(jnp.float32), w.router)
    if w.router_bias is not None:
        logits_BTE = logits_BTE + w.router_bias
    ids_BTC, weights_BTC, probs_BTE = top_k_route(logits_BTE, moe, w.selection_bias)
    stats = router_stats(logits_BTE, probs_BTE, ids_BTC, valid_BT)
    ids_BTC = jnp.where(valid_BT[..., None], ids_BTC, moe.num_experts)
    biases = () if w.gate_bias is None else (w.gate_bias, w.up_bias, w.down_bias)
    run = sharding.local(
        partial(_local_experts, act=act),
        ["BTD", "BTC", "BTC", "EDF", "EDF", "EFD", *(["EF", "EF", "ED"] if biases else [])],
        "BTD",
    )
    # An update of an expert is added to its weight: it costs less than one product of its tokens.
    gate_EDF, up_EDF = (full_weight(m, "EDF", num_leading=1, num_in=1) for m in (w.gate, w.up))
    down_EFD = full_weight(w.down, "EFD", num_leading=1, num_in=1)
    y_BTD = run(x_BTD, ids_BTC, weights_BTC, gate_EDF, up_EDF, down_EFD, *biases)
    if w.shared is not None:
        y_BTD = y_BTD + gated_mlp(w.shared, x_BTD, act)
    return y_BTD, stats


def _local_experts(x_BTD, ids_BTC, weights_BTC, gate_EDF, up_EDF, down_EFD, *biases, act):
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
    x_TD, ids_TC, weights_TC = (a.reshape(b * t, -1) for a in (x_BTD, ids_BTC, weights_BTC))
    if biases:  # those of the hidden layer as one more input, which is 1
        gate_bias, up_bias, down_bias = biases
        gate_EDF, up_EDF = (
            jnp.concatenate([w, bias[:, None, :]], axis=1) for w, bias in ((gate_EDF, gate_bias), (up_EDF, up_bias))
        )
        x_TD = jnp.concatenate([x_TD, jnp.ones_like(x_TD[:, :1])], axis=1)
    y_TD = expert_ffn(x_TD, ids_TC, weights_TC, gate_EDF, up_EDF, down_EFD, act)
    tensor_size = sharding.axis_size("tensor")
    if biases:
        chosen_TE = jnp.sum(jnp.where(ids_TC[..., None] == jnp.arange(experts_here), weights_TC[..., None], 0), axis=1)
        y_TD = y_TD + (chosen_TE @ (down_bias / tensor_size)).astype(y_TD.dtype)
    y_BTD = y_TD.reshape(b, t, d)
    if tensor_size > 1:
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
