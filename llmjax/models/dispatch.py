"""Experts on their tokens, without dropping any: y[t] = sum_c weights[t, c] * FFN_{expert_ids[t, c]}(x[t]).

FFN(x) = act(x gate, x up) down, where act is one of `layers.activation`; x may be wider than the output.

Two forms of one function, tested equal to `expert_ffn_loop`:

* blocks: tokens are sorted by expert, and each expert walks over its rows in blocks of decreasing size inside while
  loops, so the work is that of the chosen experts and no more, with static shapes; few experts with few rows each begin
  with one block outside of the loops (`first`). A custom VJP keeps both directions free of scatters. This is the form for
  CPU, where `lax.ragged_dot` is a masked product over all experts.
* ragged: `lax.ragged_dot`, native on TPU.

An expert id equal to the number of experts marks a row that no local expert serves (padding, or an expert that lives on
another device); it contributes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from llmjax.models.layers import activation
from llmjax.typing import Array, Float, Int

Activation = Callable[[Array, Array], Array]
_silu = activation("silu", 0.0)
MAX_UNROLLED = 16  # experts that may have a block of their own in the compiled program


def expert_ffn(
    x_TD: Float[Array, "T D"],
    expert_ids_TC: Int[Array, "T C"],
    weights_TC: Float[Array, "T C"],
    gate_EDF: Float[Array, "E D F"],
    up_EDF: Float[Array, "E D F"],
    down_EFD: Float[Array, "E F D"],
    act: Activation = _silu,
) -> Float[Array, "T D"]:
    """Gated experts applied to their tokens and summed with their gate weights; dropless, in the backend's best form."""
    num_experts = gate_EDF.shape[0]
    weights_TC = weights_TC.astype(x_TD.dtype)
    experts = tuple(w.astype(x_TD.dtype) for w in (gate_EDF, up_EDF, down_EFD))
    if jax.default_backend() == "tpu":
        return expert_ffn_ragged(x_TD, expert_ids_TC, weights_TC, *experts, act)
    sizes, first = block_sizes(expert_ids_TC.size // num_experts, num_experts)
    return expert_ffn_blocks(x_TD, expert_ids_TC, weights_TC, *experts, sizes, first, act)


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


def block_sizes(rows_per_expert: int, num_experts: int) -> tuple[tuple[int, ...], int]:
    """`sizes`, largest first, and `first` of `expert_ffn_blocks` for the mean number of rows of an expert."""
    if num_experts <= MAX_UNROLLED and 64 <= rows_per_expert <= 2048:
        return (64,), rows_per_expert - rows_per_expert % 32
    if rows_per_expert >= 512:
        return (512, 64), 0
    return ((512, 128, 32) if rows_per_expert >= 64 else (64, 16, 4)), 0


def _sort_by_expert(expert_ids_TC: Array, num_experts: int) -> tuple[Array, Array, Array]:
    """order [T*C]: flat choices sorted by expert, stable; inverse: its inverse; counts [E]: rows of each expert."""
    flat = expert_ids_TC.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    inverse = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)
    counts_E = jnp.bincount(flat, length=num_experts + 1)[:num_experts]
    return order, inverse, counts_E


def expert_ffn_blocks(x_TD, expert_ids_TC, weights_TC, gate_EDF, up_EDF, down_EFD, sizes, first=0, act=_silu):
    """The same by blocks of `sizes` rows (static, decreasing); shapes as in `expert_ffn`.

    With `first`, every expert begins with one block of `first` rows outside of all loops, needed or not: XLA runs these
    side by side on the cores of a CPU, but what stands in a while loop one after the other.
    """
    weights_TC = jnp.where(expert_ids_TC < gate_EDF.shape[0], weights_TC, 0)  # an overhanging block writes their rows
    return _blocks(x_TD, expert_ids_TC, weights_TC, gate_EDF, up_EDF, down_EFD, sizes, first, act)


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _blocks(x_TD, expert_ids_TC, weights_TC, *experts_and_form):
    return _blocks_forward(x_TD, expert_ids_TC, weights_TC, *experts_and_form, save=False)[0]


def _lead(num_rows: int, num_experts: int, sizes: tuple[int, ...]) -> int:
    """Rows of the block with which every expert begins: its even share."""
    return max(sizes[-1], num_rows // num_experts)


def _rows(x, pos, size):
    return jax.lax.dynamic_slice_in_dim(x, pos, size, axis=0)


def _put_rows(x, rows, pos, end):
    """Writes `rows` at `pos`, those before `end` only; end=None: all, what comes later puts the rest right."""
    if end is not None:
        size = rows.shape[0]
        rows = jnp.where((pos + jnp.arange(size) < end)[:, None], rows, _rows(x, pos, size))
    return jax.lax.dynamic_update_slice_in_dim(x, rows, pos, axis=0)


def _walk(start, end, sizes, block, carry):
    """Calls carry = block(size, pos, carry) over rows start..end: as many large blocks as fit, then smaller ones.

    The last block may reach beyond `end`.
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


def _blocks_forward(x_TD, expert_ids_TC, weights_TC, gate_EDF, up_EDF, down_EFD, sizes, first, act, save):
    num_experts, f, d = down_EFD.shape
    choices = expert_ids_TC.shape[1]
    order, inverse, counts_E = _sort_by_expert(expert_ids_TC, num_experts)
    ends_E = jnp.cumsum(counts_E)
    starts_E = ends_E - counts_E
    lead = first or _lead(order.size, num_experts, sizes)
    rows = order.size + max(lead, sizes[0])  # the last block of the last expert may overhang
    x = jnp.zeros((rows, x_TD.shape[1]), x_TD.dtype).at[: order.size].set(x_TD[order // choices])
    y = jnp.zeros((rows, d), x_TD.dtype)
    hidden = tuple(jnp.zeros((rows, f), x_TD.dtype) for _ in range(2)) if save else ()

    def block_of(e, end):
        gate, up, down = gate_EDF[e], up_EDF[e], down_EFD[e]

        def block(size, pos, carry):
            y, hidden = carry
            x_block = _rows(x, pos, size)
            g, u = x_block @ gate, x_block @ up
            y = _put_rows(y, act(g, u) @ down, pos, end)
            return y, tuple(_put_rows(buffer, rows, pos, end) for buffer, rows in zip(hidden, (g, u)))

        return block

    def rest(e, carry):
        return _walk(starts_E[e] + first, ends_E[e], sizes, block_of(e, ends_E[e] if first else None), carry)

    carry = (y, hidden)
    for e in range(num_experts if first else 0):
        carry = block_of(e, None)(first, starts_E[e], carry)
    y, hidden = jax.lax.fori_loop(0, num_experts, rest, carry)
    y_TCD = y[inverse].reshape(*expert_ids_TC.shape, d)
    saved = (x, y, hidden, order, inverse, starts_E, ends_E)
    return jnp.sum(y_TCD * weights_TC[..., None], axis=1), saved


def _blocks_fwd(x_TD, expert_ids_TC, weights_TC, gate_EDF, up_EDF, down_EFD, sizes, first, act):
    experts = gate_EDF, up_EDF, down_EFD
    y_TD, saved = _blocks_forward(x_TD, expert_ids_TC, weights_TC, *experts, sizes, first, act, save=True)
    return y_TD, (saved, weights_TC, gate_EDF, up_EDF, down_EFD)


def _blocks_bwd(sizes, first, act, residuals, dy_TD):
    (x, y, (g_rows, u_rows), order, inverse, starts_E, ends_E), weights_TC, *experts = residuals
    gate_EDF, up_EDF, down_EFD = experts
    num_experts = gate_EDF.shape[0]
    t, choices = weights_TC.shape
    dweights_TC = jnp.einsum("td,tcd->tc", dy_TD, y[inverse].reshape(t, choices, -1))
    dy = jnp.zeros_like(y).at[: order.size].set(dy_TD[order // choices] * weights_TC.reshape(-1)[order][:, None])

    def products_of(e, end):
        gate, up, down = gate_EDF[e], up_EDF[e], down_EFD[e]

        def products(size, pos, dx):
            """dx with the block's rows, and what the block adds to the gradients of the expert."""
            own = (pos + jnp.arange(size) < ends_E[e])[:, None]
            dy_block = jnp.where(own, _rows(dy, pos, size), 0)
            x_block, g, u = (_rows(buffer, pos, size) for buffer in (x, g_rows, u_rows))
            hidden, act_vjp = jax.vjp(act, g, u)
            dg, du = act_vjp(dy_block @ down.T)
            dx = _put_rows(dx, dg @ gate.T + du @ up.T, pos, end)
            return dx, (x_block.T @ dg, x_block.T @ du, hidden.T @ dy_block)

        def accumulate(size, pos, carry):
            dx, *grads = carry
            dx, more = products(size, pos, dx)
            return dx, *(grad + new for grad, new in zip(grads, more))

        return products, accumulate

    # Every expert begins with a block whose products are its gradients, so that no sum starts from zeros in memory.
    dx, lead = jnp.zeros_like(x), first or _lead(order.size, num_experts, sizes)
    if first:
        grads = []
        for e in range(num_experts):
            products, _ = products_of(e, None)
            dx, own = products(first, starts_E[e], dx)
            grads.append(own)
        dexperts = tuple(jnp.stack(one) for one in zip(*grads))
    else:
        dexperts = tuple(jnp.zeros_like(w) for w in experts)

    def rest(e, carry):
        dx, *stacked = carry
        products, accumulate = products_of(e, ends_E[e] if first else None)
        if first:
            own = tuple(all_[e] for all_ in stacked)
        else:
            dx, own = products(lead, starts_E[e], dx)
        dx, *grads = _walk(starts_E[e] + lead, ends_E[e], sizes, accumulate, (dx, *own))
        return dx, *(jax.lax.dynamic_update_index_in_dim(all_, one, e, 0) for all_, one in zip(stacked, grads))

    dx, *dexperts = jax.lax.fori_loop(0, num_experts, rest, (dx, *dexperts))
    dx_TD = jnp.sum(dx[inverse].reshape(t, choices, -1), axis=1)
    return dx_TD, None, dweights_TC, *dexperts


_blocks.defvjp(_blocks_fwd, _blocks_bwd)
