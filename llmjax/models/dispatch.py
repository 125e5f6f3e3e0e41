"""Experts on their tokens, without dropping any: y[t] = sum_c weights[t, c] * FFN_{expert_ids[t, c]}(x[t]).

FFN(x) = act(x gate, x up) down, where act is one of `layers.activation`; x may be wider than the output.

Two forms of one function, tested equal to `expert_ffn_loop`:

* blocks: each expert's first rows (`lead`, about its even share) go through batched products of all experts at once, which
  read weights and write gradients in place; the rows behind them, few unless the load is skewed, follow in loops over
  blocks of static sizes. A custom VJP gathers in both directions. This is the form for CPU, where `lax.ragged_dot` is a
  masked product over all experts, and for GPU, where jax 0.10 makes it one too.
* ragged: `lax.ragged_dot`, native on TPU.

An expert id equal to the number of experts marks a row that no local expert serves (padding, or an expert that lives on
another device); it contributes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from llmjax import sharding
from llmjax.models.layers import activation
from llmjax.typing import Array, Float, Int

Activation = Callable[[Array, Array], Array]
_silu = activation("silu", 0.0)


def expert_ffn(
    x_TD: Float[Array, "T D"],
    expert_ids_TC: Int[Array, "T C"],
    weights_TC: Float[Array, "T C"],
    gate_EDF: Float[Array, "E D F"],
    up_EDF: Float[Array, "E D F"],
    down_EFD: Float[Array, "E F D"],
    act: Activation = _silu,
    expected_rows: int | None = None,
) -> Float[Array, "T D"]:
    """Gated experts applied to their tokens and summed with their gate weights; dropless, in the backend's best form.

    expected_rows: how many of the T * C choices may be expected to be served here, for the best form only; default all.
    """
    num_experts = gate_EDF.shape[0]
    weights_TC = weights_TC.astype(x_TD.dtype)
    gate_EDF, up_EDF, down_EFD = (w.astype(x_TD.dtype) for w in (gate_EDF, up_EDF, down_EFD))
    if sharding.platform() == "tpu":
        return expert_ffn_ragged(x_TD, expert_ids_TC, weights_TC, gate_EDF, up_EDF, down_EFD, act)
    form = block_form(expected_rows or expert_ids_TC.size, num_experts)
    return expert_ffn_blocks(x_TD, expert_ids_TC, weights_TC, gate_EDF, up_EDF, down_EFD, *form, act)


def expert_ffn_loop(x_TD, expert_ids_TC, weights_TC, gate_EDF, up_EDF, down_EFD, act=_silu):
    """The definition, as a loop over experts that each see every token: the reference for tests."""
    y_TD = jnp.zeros((x_TD.shape[0], down_EFD.shape[2]), x_TD.dtype)
    for e in range(gate_EDF.shape[0]):
        weight_T = jnp.sum(jnp.where(expert_ids_TC == e, weights_TC, 0), axis=1)
        hidden_TF = act(x_TD @ gate_EDF[e], x_TD @ up_EDF[e])
        y_TD += weight_T[:, None] * (hidden_TF @ down_EFD[e])
    return y_TD


def expert_ffn_ragged(x_TD, expert_ids_TC, weights_TC, gate_EDF, up_EDF, down_EFD, act=_silu):
    """The same by `lax.ragged_dot` over tokens sorted by expert."""
    num_experts = gate_EDF.shape[0]
    order, inverse, counts_E = _sort_by_expert(expert_ids_TC, num_experts)
    x = x_TD[order // expert_ids_TC.shape[1]]
    hidden = act(jax.lax.ragged_dot(x, gate_EDF, counts_E), jax.lax.ragged_dot(x, up_EDF, counts_E))
    y = jax.lax.ragged_dot(hidden, down_EFD, counts_E)
    served = jnp.arange(y.shape[0]) < jnp.sum(counts_E)  # rows behind the groups are not initialised on every backend
    y_TCD = jnp.where(served[:, None], y, 0)[inverse].reshape(*expert_ids_TC.shape, -1)
    return jnp.sum(y_TCD * weights_TC[..., None], axis=1)


def expert_ffn_slots(
    x_BTD: Float[Array, "B T D"],
    tokens_BES: Int[Array, "B E S"],
    weights_BES: Float[Array, "B E S"],
    gate_EDF: Float[Array, "E D F"],
    up_EDF: Float[Array, "E D F"],
    down_EFD: Float[Array, "E F D"],
    act: Activation = _silu,
) -> Float[Array, "B T D"]:
    """Gated experts with S places for tokens of each sequence; a place that holds T is empty."""
    b, t, d = x_BTD.shape
    num_experts, slots = tokens_BES.shape[1:]
    dtype = x_BTD.dtype
    row = jnp.arange(b)[:, None, None]
    x_BESD = x_BTD.at[row, tokens_BES].get(mode="fill", fill_value=0)
    x_EMD = x_BESD.swapaxes(0, 1).reshape(num_experts, b * slots, d)
    gate, up, down = (w.astype(dtype) for w in (gate_EDF, up_EDF, down_EFD))
    y_EMD = jnp.matmul(act(jnp.matmul(x_EMD, gate), jnp.matmul(x_EMD, up)), down)
    y_BESD = y_EMD.reshape(num_experts, b, slots, -1).swapaxes(0, 1) * weights_BES[..., None].astype(dtype)
    return jnp.zeros((b, t, y_BESD.shape[-1]), dtype).at[row, tokens_BES].add(y_BESD, mode="drop")


def block_form(num_rows: int, num_experts: int) -> tuple[int, tuple[int, ...]]:
    """`lead` and `sizes` of `expert_ffn_blocks` for so many rows, over all experts; by measurement on CPU."""
    mean = num_rows / num_experts
    if mean < 8:  # as in decoding: most experts have nothing to do, and their weights should not even be read
        return 0, (64, 16, 4)
    spare = min(mean / 8, 16)  # fewer mean more blocks, each of which reads its weights again
    return 8 * math.ceil((mean + spare) / 8), (128, 32) if mean >= 256 else (64, 16)


def _sort_by_expert(expert_ids_TC: Array, num_experts: int) -> tuple[Array, Array, Array]:
    """order [T*C]: flat choices sorted by expert, stable; inverse: its inverse; counts [E]: rows of each expert."""
    flat = expert_ids_TC.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    inverse = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)
    counts_E = jnp.bincount(flat, length=num_experts + 1)[:num_experts]
    return order, inverse, counts_E


@struct.dataclass
class Plan:
    """Where the choices of all tokens go. A choice is named by its flat index in [T * C]; T * C stands for none.

    order [T * C]: choices sorted by expert, stable; starts, ends [E]: each expert's part of it. leading [E, S]: the first S
    of each part; place [T, C]: a choice's row among E * S leading ones, beyond them if it is not one.
    """

    order: Array
    starts: Array
    ends: Array
    leading: Array
    place: Array


def _plan(expert_ids_TC: Array, num_experts: int, lead: int) -> Plan:
    order, inverse, counts_E = _sort_by_expert(expert_ids_TC, num_experts)
    ends_E = jnp.cumsum(counts_E)
    starts_E = ends_E - counts_E
    leading_ES = _choices_at(order, starts_E[:, None] + jnp.arange(lead), ends_E[:, None])
    rank = inverse - jnp.append(starts_E, 0)[expert_ids_TC.reshape(-1)]
    is_leading = (rank < lead) & (expert_ids_TC.reshape(-1) < num_experts)
    place = jnp.where(is_leading, expert_ids_TC.reshape(-1) * lead + rank, num_experts * lead)
    return Plan(order, starts_E, ends_E, leading_ES, place.reshape(expert_ids_TC.shape))


def _choices_at(order: Array, where: Array, end: Array) -> Array:
    """The choices at these places of the sorted list, none from `end` on."""
    return jnp.where(where < end, order.at[where].get(mode="clip"), order.size)


def _take(x: Array, rows: Array) -> Array:
    """Rows of x; zeros for those that do not exist."""
    return x.at[rows].get(mode="fill", fill_value=0)


def _by_choice(x_ESD: Array, plan: Plan) -> list[Array]:
    """[T, D] for each choice: its leading row, zeros if it has none. XLA:CPU fuses the sum of such gathers."""
    rows = x_ESD.reshape(-1, x_ESD.shape[-1])
    return [_take(rows, place_T) for place_T in plan.place.T]


def _for_each_block(plan: Plan, lead: int, sizes: tuple[int, ...], body, carry):
    """carry = body(expert, choices [size], carry) over all that is behind the leading rows, in blocks of `sizes`."""
    begin_E = jnp.minimum(plan.starts + lead, plan.ends)
    for size in sizes:
        left_E = plan.ends - begin_E
        blocks_E = left_E // size if size != sizes[-1] else -(-left_E // size)
        until_E = jnp.cumsum(blocks_E)

        def step(n, carry, size=size, begin_E=begin_E, blocks_E=blocks_E, until_E=until_E):
            e = jnp.searchsorted(until_E, n, side="right")
            where = begin_E[e] + (n - until_E[e] + blocks_E[e]) * size + jnp.arange(size)
            return body(e, _choices_at(plan.order, where, plan.ends[e]), carry)

        carry = jax.lax.fori_loop(0, until_E[-1], step, carry)
        begin_E = begin_E + blocks_E * size
    return carry


def _up_products(x_ESD: Array, *weights_EDF: Array) -> list[Array]:
    """x @ w for each of the weights."""
    if x_ESD.shape[0] < 32 or sharding.platform() != "cpu":
        return [jnp.matmul(x_ESD, w) for w in weights_EDF]
    # With many experts YNNPACK is slow; XLA:CPU leaves a product whose left side is transposed to Eigen.
    x_EDS = jax.lax.optimization_barrier(x_ESD.swapaxes(1, 2))
    return [jnp.einsum("eds,edf->esf", x_EDS, w) for w in weights_EDF]


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def expert_ffn_blocks(x_TD, expert_ids_TC, weights_TC, gate_EDF, up_EDF, down_EFD, lead, sizes, act=_silu):
    """The same by batched products of the first `lead` rows of all experts and loops over the rest in blocks of `sizes` rows
    (static, decreasing); other shapes as in `expert_ffn`."""
    return _blocks_fwd(x_TD, expert_ids_TC, weights_TC, gate_EDF, up_EDF, down_EFD, lead, sizes, act)[0]


def _blocks_fwd(x_TD, expert_ids_TC, weights_TC, gate_EDF, up_EDF, down_EFD, lead, sizes, act):
    choices = expert_ids_TC.shape[1]
    plan = _plan(expert_ids_TC, gate_EDF.shape[0], lead)
    y_TD, saved = jnp.zeros((x_TD.shape[0], down_EFD.shape[2]), x_TD.dtype), None
    if lead:
        x_ESD = _take(x_TD, plan.leading // choices)
        g_ESF, u_ESF = _up_products(x_ESD, gate_EDF, up_EDF)
        y_ESD = jnp.matmul(act(g_ESF, u_ESF), down_EFD)
        saved = g_ESF, u_ESF, y_ESD
        y_TD = sum(y_TD * weight_T[:, None] for y_TD, weight_T in zip(_by_choice(y_ESD, plan), weights_TC.T))

    def block(e, chosen, y_TD):
        tokens, weight = chosen // choices, _take(weights_TC.reshape(-1), chosen)
        x = _take(x_TD, tokens)
        y = act(x @ gate_EDF[e], x @ up_EDF[e]) @ down_EFD[e]
        return y_TD.at[tokens].add(y * weight[:, None], mode="drop")

    y_TD = _for_each_block(plan, lead, sizes, block, y_TD)
    return y_TD, (x_TD, weights_TC, gate_EDF, up_EDF, down_EFD, plan, saved)


def _blocks_bwd(lead, sizes, act, residuals, dy_TD):
    x_TD, weights_TC, gate_EDF, up_EDF, down_EFD, plan, saved = residuals
    choices, experts = weights_TC.shape[1], (gate_EDF, up_EDF, down_EFD)
    flat_weights = weights_TC.reshape(-1)
    dweights = jnp.zeros_like(flat_weights)
    if lead:
        g_ESF, u_ESF, y_ESD = saved
        x_ESD, dy_ESD = (_take(a, plan.leading // choices) for a in (x_TD, dy_TD))
        dweights = jnp.stack([jnp.sum(dy_TD * y_TD, axis=-1) for y_TD in _by_choice(y_ESD, plan)], axis=1).reshape(-1)
        dy_ESD = dy_ESD * _take(flat_weights, plan.leading)[..., None]
        hidden_ESF, act_vjp = jax.vjp(act, g_ESF, u_ESF)
        dg_ESF, du_ESF = act_vjp(jnp.einsum("esd,efd->esf", dy_ESD, down_EFD))
        dx_ESD = jnp.einsum("esf,edf->esd", dg_ESF, gate_EDF) + jnp.einsum("esf,edf->esd", du_ESF, up_EDF)
        dx_TD = sum(_by_choice(dx_ESD, plan))
        pairs = (x_ESD, dg_ESF), (x_ESD, du_ESF), (hidden_ESF, dy_ESD)
        dexperts = [jnp.einsum("esa,esb->eab", a, b) for a, b in pairs]
    else:
        dx_TD, dexperts = jnp.zeros_like(x_TD), [jnp.zeros_like(w) for w in experts]

    def block(e, chosen, carry):
        dx_TD, dweights, *dexperts = carry
        gate, up, down = (w[e] for w in experts)
        tokens = chosen // choices
        x, dy = _take(x_TD, tokens), _take(dy_TD, tokens)
        hidden, act_vjp = jax.vjp(act, x @ gate, x @ up)
        dhidden = dy @ down.T
        dweight = jnp.sum(hidden * dhidden, axis=-1)
        weight = _take(flat_weights, chosen)[:, None]
        dg, du = act_vjp(dhidden * weight)
        dy = dy * weight
        dx_TD = dx_TD.at[tokens].add(dg @ gate.T + du @ up.T, mode="drop")
        more = x.T @ dg, x.T @ du, hidden.T @ dy
        dexperts = [all_.at[e].add(one) for all_, one in zip(dexperts, more)]
        return dx_TD, dweights.at[chosen].set(dweight, mode="drop"), *dexperts

    dx_TD, dweights, *dexperts = _for_each_block(plan, lead, sizes, block, (dx_TD, dweights, *dexperts))
    return dx_TD, None, dweights.reshape(weights_TC.shape), *dexperts


expert_ffn_blocks.defvjp(_blocks_fwd, _blocks_bwd)
