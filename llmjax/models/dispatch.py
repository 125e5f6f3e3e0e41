"""Experts on their tokens, without dropping any: y[t] = sum_c weights[t, c] * FFN_{expert_ids[t, c]}(x[t]).

Two forms of one function, tested equal to `expert_ffn_loop`:

* blocks: tokens are sorted by expert, and each expert walks over its rows in blocks of decreasing size inside while
  loops, so the work is that of the chosen experts and no more, with static shapes. A custom VJP keeps both directions free
  of scatters. This is the form for CPU, where `lax.ragged_dot` is a masked product over all experts.
* ragged: `lax.ragged_dot`, native on TPU.

An expert id equal to the number of experts marks a row that no local expert serves (padding, or an expert that lives on
another device); it contributes nothing.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from llmjax.typing import Array, Float, Int


def expert_ffn(
    x_TD: Float[Array, "T D"],
    expert_ids_TC: Int[Array, "T C"],
    weights_TC: Float[Array, "T C"],
    gate_EDF: Float[Array, "E D F"],
    up_EDF: Float[Array, "E D F"],
    down_EFD: Float[Array, "E F D"],
) -> Float[Array, "T D"]:
    """SwiGLU experts applied to their tokens and summed with their gate weights; dropless, in the backend's best form."""
    num_experts = gate_EDF.shape[0]
    weights_TC = weights_TC.astype(x_TD.dtype)
    experts = tuple(w.astype(x_TD.dtype) for w in (gate_EDF, up_EDF, down_EFD))
    if jax.default_backend() == "tpu":
        return expert_ffn_ragged(x_TD, expert_ids_TC, weights_TC, *experts)
    sizes = block_sizes(expert_ids_TC.size // num_experts)
    return expert_ffn_blocks(x_TD, expert_ids_TC, weights_TC, *experts, sizes)


def expert_ffn_loop(x_TD, expert_ids_TC, weights_TC, gate_EDF, up_EDF, down_EFD):
    """The definition, as a loop over experts that each see every token: the reference for tests."""
    y_TD = jnp.zeros_like(x_TD)
    for e in range(gate_EDF.shape[0]):
        weight_T = jnp.sum(jnp.where(expert_ids_TC == e, weights_TC, 0), axis=1)
        hidden_TF = jax.nn.silu(x_TD @ gate_EDF[e]) * (x_TD @ up_EDF[e])
        y_TD += weight_T[:, None] * (hidden_TF @ down_EFD[e])
    return y_TD


def expert_ffn_ragged(x_TD, expert_ids_TC, weights_TC, gate_EDF, up_EDF, down_EFD):
    """The same by `lax.ragged_dot` over tokens sorted by expert."""
    num_experts = gate_EDF.shape[0]
    order, inverse, counts_E = _sort_by_expert(expert_ids_TC, num_experts)
    x = x_TD[order // expert_ids_TC.shape[1]]
    hidden = jax.nn.silu(jax.lax.ragged_dot(x, gate_EDF, counts_E)) * jax.lax.ragged_dot(x, up_EDF, counts_E)
    y = jax.lax.ragged_dot(hidden, down_EFD, counts_E)
    served = jnp.arange(y.shape[0]) < jnp.sum(counts_E)  # rows behind the groups are not initialised on every backend
    y_TCD = jnp.where(served[:, None], y, 0)[inverse].reshape(*expert_ids_TC.shape, -1)
    return jnp.sum(y_TCD * weights_TC[..., None], axis=1)


def block_sizes(rows_per_expert: int) -> tuple[int, ...]:
    """Row counts of the blocks an expert walks through, largest first, for the mean number of rows of an expert."""
    if rows_per_expert >= 512:
        return (512, 64)
    if rows_per_expert >= 64:
        return (512, 128, 32)
    return (64, 16, 4)


def _sort_by_expert(expert_ids_TC: Array, num_experts: int) -> tuple[Array, Array, Array]:
    """order [T*C]: flat choices sorted by expert, stable; inverse: its inverse; counts [E]: rows of each expert."""
    flat = expert_ids_TC.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    inverse = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)
    counts_E = jnp.bincount(flat, length=num_experts + 1)[:num_experts]
    return order, inverse, counts_E


def expert_ffn_blocks(x_TD, expert_ids_TC, weights_TC, gate_EDF, up_EDF, down_EFD, sizes):
    """The same by blocks of `sizes` rows (static, decreasing); shapes as in `expert_ffn`."""
    weights_TC = jnp.where(expert_ids_TC < gate_EDF.shape[0], weights_TC, 0)  # an overhanging block writes their rows
    return _blocks(x_TD, expert_ids_TC, weights_TC, gate_EDF, up_EDF, down_EFD, sizes)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _blocks(x_TD, expert_ids_TC, weights_TC, gate_EDF, up_EDF, down_EFD, sizes):
    y_TD, _ = _blocks_forward(x_TD, expert_ids_TC, weights_TC, gate_EDF, up_EDF, down_EFD, sizes, save=False)
    return y_TD


def _rows(x, pos, size):
    return jax.lax.dynamic_slice_in_dim(x, pos, size, axis=0)


def _put_rows(x, rows, pos):
    return jax.lax.dynamic_update_slice_in_dim(x, rows, pos, axis=0)


def _walk(start, end, sizes, block, carry):
    """Calls carry = block(size, pos, carry) over rows start..end: as many large blocks as fit, then smaller ones.

    The last block may reach beyond `end`; what it writes there is overwritten by the next expert, which comes later.
    """
    state = (start, carry)
    for size in sizes:
        need = 1 if size == sizes[-1] else size

        def more(state, need=need):
            return end - state[0] >= need

        def step(state, size=size):
            return state[0] + size, block(size, *state)

        state = jax.lax.while_loop(more, step, state)
    return state[1]


def _blocks_forward(x_TD, expert_ids_TC, weights_TC, gate_EDF, up_EDF, down_EFD, sizes, save):
    num_experts, d, f = gate_EDF.shape
    choices = expert_ids_TC.shape[1]
    order, inverse, counts_E = _sort_by_expert(expert_ids_TC, num_experts)
    ends_E = jnp.cumsum(counts_E)
    rows = order.size + sizes[0]  # the last block of the last expert may overhang
    x = jnp.zeros((rows, d), x_TD.dtype).at[: order.size].set(x_TD[order // choices])
    y = jnp.zeros((rows, d), x_TD.dtype)
    hidden = tuple(jnp.zeros((rows, f), x_TD.dtype) for _ in range(2)) if save else ()

    def expert(e, carry):
        gate, up, down = gate_EDF[e], up_EDF[e], down_EFD[e]

        def block(size, pos, carry):
            y, hidden = carry
            x_block = _rows(x, pos, size)
            g, u = x_block @ gate, x_block @ up
            y = _put_rows(y, (jax.nn.silu(g) * u) @ down, pos)
            return y, tuple(_put_rows(buffer, rows, pos) for buffer, rows in zip(hidden, (g, u)))

        return _walk(ends_E[e] - counts_E[e], ends_E[e], sizes, block, carry)

    y, hidden = jax.lax.fori_loop(0, num_experts, expert, (y, hidden))
    y_TCD = y[inverse].reshape(*expert_ids_TC.shape, d)
    return jnp.sum(y_TCD * weights_TC[..., None], axis=1), (x, y, hidden, order, inverse, counts_E, ends_E)


def _blocks_fwd(x_TD, expert_ids_TC, weights_TC, gate_EDF, up_EDF, down_EFD, sizes):
    y_TD, saved = _blocks_forward(x_TD, expert_ids_TC, weights_TC, gate_EDF, up_EDF, down_EFD, sizes, save=True)
    return y_TD, (saved, weights_TC, gate_EDF, up_EDF, down_EFD)


def _blocks_bwd(sizes, residuals, dy_TD):
    (x, y, (g_rows, u_rows), order, inverse, counts_E, ends_E), weights_TC, gate_EDF, up_EDF, down_EFD = residuals
    num_experts, d, f = gate_EDF.shape
    t, choices = weights_TC.shape
    dweights_TC = jnp.einsum("td,tcd->tc", dy_TD, y[inverse].reshape(t, choices, d))
    dy = jnp.zeros_like(y).at[: order.size].set(dy_TD[order // choices] * weights_TC.reshape(-1)[order][:, None])

    def expert(e, carry):
        dx, dgate_EDF, dup_EDF, ddown_EFD = carry
        gate, up, down = gate_EDF[e], up_EDF[e], down_EFD[e]

        def block(size, pos, carry):
            dx, dgate, dup, ddown = carry
            own = (pos + jnp.arange(size) < ends_E[e])[:, None]
            dy_block = jnp.where(own, _rows(dy, pos, size), 0)
            x_block, g, u = (_rows(buffer, pos, size) for buffer in (x, g_rows, u_rows))
            sigmoid = jax.nn.sigmoid(g)
            silu = g * sigmoid
            dhidden = dy_block @ down.T
            dg = dhidden * u * (sigmoid + silu * (1 - sigmoid))
            du = dhidden * silu
            dx = _put_rows(dx, dg @ gate.T + du @ up.T, pos)
            return dx, dgate + x_block.T @ dg, dup + x_block.T @ du, ddown + (silu * u).T @ dy_block

        zeros = (jnp.zeros((d, f), x.dtype), jnp.zeros((d, f), x.dtype), jnp.zeros((f, d), x.dtype))
        dx, *grads = _walk(ends_E[e] - counts_E[e], ends_E[e], sizes, block, (dx, *zeros))
        stacked = (dgate_EDF, dup_EDF, ddown_EFD)
        return dx, *(jax.lax.dynamic_update_index_in_dim(all_, one, e, 0) for all_, one in zip(stacked, grads))

    start = (jnp.zeros_like(x), jnp.zeros_like(gate_EDF), jnp.zeros_like(up_EDF), jnp.zeros_like(down_EFD))
    dx, *dexperts = jax.lax.fori_loop(0, num_experts, expert, start)
    dx_TD = jnp.sum(dx[inverse].reshape(t, choices, d), axis=1)
    return dx_TD, None, dweights_TC, *dexperts


_blocks.defvjp(_blocks_fwd, _blocks_bwd)
