"""The sparse feed-forward layer: router, balancing losses, statistics, experts over the mesh.

Conventions, fixed here and in `models.routers` once: f_e is the fraction of all choices that went to expert e (sums to 1 over
experts), P_e the mean router probability; both over the real tokens of the global batch, never over padding, and per layer.
The load-balancing loss is E * sum_e f_e P_e, which is 1 at perfect balance and E at collapse with top_k=1; its gradient goes
through P alone. The selection bias moves once after each optimizer step, by the loads of that step.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from llmjax import sharding
from llmjax.models.config import ModelConfig, MoEConfig
from llmjax.models.expert_parallel import exchanged_experts, gathered_experts, slot_experts
from llmjax.models.layers import Mlp, activation, gated_mlp, mlp_spec, residual_scale
from llmjax.models.linear import Weight, full_weight
from llmjax.models.routers import Routing, Slots, capacity_slots, expert_choice, jitter, noisy_logits, route
from llmjax.models.spec import param
from llmjax.typing import Array, Float, Int, PRNGKeyArray

STORED = ["=EDF", "=EDF", "=EFD"]  # how the matrices of the experts come into `sharding.local`


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

    load_balance: loss, 1 at balance; sequence_balance: the same within sequences. z_loss: mean squared log-partition.
    load: fraction of choices per expert, before any is dropped. entropy: mean entropy of the router's distribution, nats
    (at most ln E). logit_norm: root mean square router logit. dropped: fraction of the choices that were not served.
    routes: [B, T, C] int32, the experts of each token, which another pass can replay.
    """

    load_balance: Array
    sequence_balance: Array
    z_loss: Array
    load: Array
    entropy: Array
    logit_norm: Array
    dropped: Array
    routes: Array | None = None


def moe_spec(cfg: ModelConfig) -> Moe:
    """The `ParamSpec` of router and experts."""
    moe = cfg.experts
    d, f, e = cfg.embed_dim, moe.mlp_dim, moe.num_experts
    into = param((e, d, f), ("expert", "embed", "mlp"), std=d**-0.5)
    router_bias = param((e,), (None,), constant=0.0)
    hidden_bias = param((e, f), ("expert", "mlp"), constant=0.0) if moe.expert_bias else None
    return Moe(
        # Not sharded: every device routes its own tokens.
        router=param((d, e), (None, None), std=d**-0.5),
        gate=into,
        up=into,
        down=param((e, f, d), ("expert", "mlp", "embed"), std=f**-0.5 * residual_scale(cfg)),
        router_bias=router_bias if moe.router_bias else None,
        selection_bias=router_bias if moe.selection_bias else None,
        shared=mlp_spec(cfg, moe.shared_mlp_dim) if moe.shared_mlp_dim else None,
        gate_bias=hidden_bias,
        up_bias=hidden_bias,
        down_bias=param((e, d), ("expert", "embed"), constant=0.0) if moe.expert_bias else None,
    )


def router_stats(
    logits_BTE: Array, probs_BTE: Array, chosen_BTE: Array, valid_BT: Array, dropped_BT: Array | float = 0.0
) -> RouterStats:
    """Losses and statistics over the tokens where `valid_BT` holds (bool); see the module's conventions.

    chosen: whether a token goes, or would go if there were room, to an expert. dropped: its choices that were not served.
    """
    num_experts = logits_BTE.shape[-1]
    weight_BT = valid_BT.astype(jnp.float32)
    num_tokens = jnp.maximum(jnp.sum(weight_BT), 1.0)

    def mean(x_BT):
        return jnp.sum(x_BT * weight_BT) / num_tokens

    chosen_BTE = jax.lax.stop_gradient(chosen_BTE) * weight_BT[..., None]
    num_choices = jnp.maximum(jnp.sum(chosen_BTE), 1.0)
    load_E = jnp.sum(chosen_BTE, axis=(0, 1)) / num_choices
    prob_E = jnp.sum(probs_BTE * weight_BT[..., None], axis=(0, 1)) / num_tokens
    log_partition_BT = jax.nn.logsumexp(logits_BTE, axis=-1)
    entropy_BT = jnp.sum(jax.scipy.special.entr(jax.lax.stop_gradient(probs_BTE)), axis=-1)
    square_BT = jnp.mean(jnp.square(jax.lax.stop_gradient(logits_BTE)), axis=-1)
    return RouterStats(
        load_balance=num_experts * jnp.sum(load_E * prob_E),
        sequence_balance=_sequence_balance(probs_BTE, chosen_BTE, weight_BT),
        z_loss=mean(jnp.square(log_partition_BT)),
        load=load_E,
        entropy=mean(entropy_BT),
        logit_norm=jnp.sqrt(mean(square_BT)),
        dropped=jnp.sum(dropped_BT * weight_BT) / num_choices,
    )


def _sequence_balance(probs_BTE, chosen_BTE, weight_BT) -> Array:
    """The load-balancing loss of each sequence, averaged over those that hold a token."""
    tokens_B1 = jnp.sum(weight_BT, axis=1, keepdims=True)
    load_BE = jnp.sum(chosen_BTE, axis=1)
    load_BE = load_BE / jnp.maximum(jnp.sum(load_BE, axis=1, keepdims=True), 1.0)
    prob_BE = jnp.sum(probs_BTE * weight_BT[..., None], axis=1) / jnp.maximum(tokens_B1, 1.0)
    each_B = probs_BTE.shape[-1] * jnp.sum(load_BE * prob_BE, axis=1)
    return jnp.sum(each_B) / jnp.maximum(jnp.sum(tokens_B1 > 0), 1.0)


def moe_layer(
    w: Moe,
    x_BTD: Float[Array, "B T D"],
    segment_ids_BT: Int[Array, "B T"],
    cfg: ModelConfig,
    *,
    tokens_BT: Int[Array, "B T"] | None = None,
    routes_BTC: Int[Array, "B T C"] | None = None,
    key: PRNGKeyArray | None = None,
    stored: bool = True,
) -> tuple[Float[Array, "B T D"], RouterStats]:
    """Routes each token and returns the gate-weighted sum of its experts, with the router's statistics.

    Tokens of segment 0 are padding: they reach no routed expert, no statistic and no place in an expert. tokens: ids of the
    vocabulary, for hash routing. routes: to replay. key: of the router's noise in training, None for none. stored: on a mesh
    the experts lie as parameters do; else they were gathered before (`for_decoding`).
    """
    moe, act = cfg.experts, activation(cfg.activation, cfg.activation_limit)
    valid_BT = segment_ids_BT > 0
    logits_BTE = router_logits(w, x_BTD, moe, key)
    # An update of an expert is added to its weight: it costs less than one product of its tokens.
    experts = [full_weight(m, "EDF", num_leading=1, num_in=1) for m in (w.gate, w.up)]
    experts.append(full_weight(w.down, "EFD", num_leading=1, num_in=1))
    experts = [sharding.cast_to_send(m, x_BTD.dtype) for m in experts]
    dropped_BT: Array | float = 0.0
    if moe.router == "expert_choice":
        slots, probs_BTE = expert_choice(logits_BTE, moe, valid_BT)
        routes_BTC = jnp.zeros((*valid_BT.shape, 0), jnp.int32)
        chosen_BTE = _chosen_by_experts(slots, valid_BT.shape[1])
        y_BTD = _run_slots(slots, x_BTD, experts, act)
    else:
        routing = route(
            logits_BTE, moe, selection_bias_E=w.selection_bias, tokens_BT=tokens_BT, routes_BTC=routes_BTC
        )
        probs_BTE, routes_BTC = routing.probs, routing.ids
        chosen_BTE = jnp.sum(routing.ids[..., None] == jnp.arange(moe.num_experts), axis=2).astype(jnp.float32)
        if moe.capacity_factor:
            y_BTD, dropped_BT = _run_with_capacity(routing, x_BTD, experts, valid_BT, moe, act)
        else:
            y_BTD, dropped_BT = _run_dropless(w, routing, x_BTD, experts, valid_BT, moe, act, stored)
    stats = router_stats(logits_BTE, probs_BTE, chosen_BTE, valid_BT, dropped_BT)
    if w.shared is not None:
        y_BTD = y_BTD + gated_mlp(w.shared, x_BTD, act)
    return y_BTD, dataclasses.replace(stats, routes=routes_BTC)


def router_logits(w: Moe, x_BTD: Array, moe: MoEConfig, key: PRNGKeyArray | None = None) -> Float[Array, "B T E"]:
    """float32 logits of the router; with a key, with the noise of training."""
    jitter_key, noise_key = (None, None) if key is None else jax.random.split(key)
    x_BTD = x_BTD.astype(jnp.float32)
    if moe.router_jitter and jitter_key is not None:
        x_BTD = jitter(x_BTD, moe, jitter_key)
    logits_BTE = sharding.einsum("BTD,DE->BTE", x_BTD, w.router, precision=jax.lax.Precision.HIGHEST)
    if w.router_bias is not None:
        logits_BTE = logits_BTE + w.router_bias
    return noisy_logits(logits_BTE, moe, noise_key) if moe.router_noise and noise_key is not None else logits_BTE


def _run_dropless(w: Moe, routing: Routing, x_BTD, experts, valid_BT, moe: MoEConfig, act, stored: bool):
    ids_BTC = jnp.where(valid_BT[..., None], routing.ids, moe.num_experts)
    tokens, matrices = ["BTD", "BTC", "BTC"], STORED if stored else [letters.removeprefix("=") for letters in STORED]
    if moe.expert_parallel == "all_to_all" and sharding.mesh_axis_size("expert") > 1:
        exchange = partial(exchanged_experts, act=act, factor=moe.exchange_factor)
        return sharding.local(exchange, [*tokens, *matrices], ["BTD", "BT"])(x_BTD, ids_BTC, routing.weights, *experts)
    biases = () if w.gate_bias is None else (w.gate_bias, w.up_bias, w.down_bias)
    letters = [*tokens, *matrices, *(["EF", "EF", "ED"] if biases else [])]
    run = sharding.local(partial(gathered_experts, act=act), letters, "BTD")
    return run(x_BTD, ids_BTC, routing.weights, *experts, *biases), 0.0


def _run_with_capacity(routing: Routing, x_BTD, experts, valid_BT, moe: MoEConfig, act):
    def fill(ids, weights, valid):
        slots, dropped = capacity_slots(ids, weights, moe, valid)
        return slots.tokens, slots.weights, dropped

    fill = sharding.local(fill, ["BTC", "BTC", "BT"], ["B..", "B..", "BT"])
    tokens_BES, weights_BES, dropped_BT = fill(routing.ids, routing.weights, valid_BT)
    return _run_slots(Slots(tokens_BES, weights_BES), x_BTD, experts, act), dropped_BT


def _run_slots(slots: Slots, x_BTD, experts, act):
    run = sharding.local(partial(slot_experts, act=act), ["BTD", "B..", "B..", *STORED], "BTD")
    return run(x_BTD, slots.tokens, slots.weights, *experts)


def _chosen_by_experts(slots: Slots, length: int) -> Array:
    """[B, T, E]: 1 where an expert has taken a token."""
    taken_BETS = slots.tokens[:, :, None, :] == jnp.arange(length)[:, None]
    return jnp.any(taken_BETS, axis=-1).swapaxes(1, 2).astype(jnp.float32)


def router_loss(stats: RouterStats, cfg: MoEConfig) -> Array:
    """Weighted balancing and z losses, averaged over layers: a scalar in nats to add to the training loss."""
    loss = cfg.load_balance_coef * jnp.mean(stats.load_balance) + cfg.z_loss_coef * jnp.mean(stats.z_loss)
    if cfg.sequence_balance_coef:
        loss += cfg.sequence_balance_coef * jnp.mean(stats.sequence_balance)
    return loss


def updated_selection_bias(bias_LE: Array, load_LE: Array, cfg: MoEConfig) -> Array:
    """The bias after one step: b + bias_update_rate * sign(mean load - load), layer by layer (arXiv:2408.15664, algorithm 1).

    load: fractions of the choices of the whole batch. Called once for an optimizer step, outside of every gradient.
    """
    return bias_LE + cfg.bias_update_rate * jnp.sign(1.0 / cfg.num_experts - load_LE)


def router_metrics(stats: RouterStats) -> dict[str, Array]:
    """For the metrics: scalars over all layers, the same by layer [L] ("moe/layer/..."), and the load of each expert [L, E].

    `stats` stacked over layers [L, ...]. max_load: load of the busiest expert as a multiple of the uniform load;
    dead_experts: how many got no token; the rest as in `RouterStats`.
    """
    by_layer = {
        "load_balance": stats.load_balance,
        "z_loss": stats.z_loss,
        "entropy": stats.entropy,
        "logit_norm": stats.logit_norm,
        "dropped": stats.dropped,
        "max_load": jnp.max(stats.load, axis=-1) * stats.load.shape[-1],
        "dead_experts": jnp.sum(stats.load == 0, axis=-1).astype(jnp.float32),
    }
    over_all = {"max_load": jnp.max, "dead_experts": jnp.sum}
    scalars = {f"moe/{name}": over_all.get(name, jnp.mean)(values) for name, values in by_layer.items()}
    return scalars | {f"moe/layer/{name}": values for name, values in by_layer.items()} | {"moe/load": stats.load}
