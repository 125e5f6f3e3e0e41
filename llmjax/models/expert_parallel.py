"""Experts spread over the mesh axis `expert`: three ways for tokens to meet them, on local arrays (inside `sharding.local`).

The batch is split over the same axis, so each device begins and ends with its own tokens. The hidden width of the experts may
be split over `tensor`; their partial sums are added.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from llmjax import sharding
from llmjax.models.dispatch import expert_ffn, expert_ffn_slots
from llmjax.typing import Array


def gathered_experts(x_BTD, ids_BTC, weights_BTC, gate_EDF, up_EDF, down_EFD, *biases, act):
    """By all-gather: see the tokens of all expert shards, serve the experts that are here, reduce-scatter."""
    experts_here = gate_EDF.shape[0]
    x_BTD, ids_BTC, weights_BTC = (_all_gather(a) for a in (x_BTD, ids_BTC, weights_BTC))
    ids_BTC = ids_BTC - _first_expert(experts_here)
    ids_BTC = jnp.where((ids_BTC >= 0) & (ids_BTC < experts_here), ids_BTC, experts_here)
    b, t, d = x_BTD.shape
    x_TD, ids_TC, weights_TC = (a.reshape(b * t, -1) for a in (x_BTD, ids_BTC, weights_BTC))
    if biases:  # those of the hidden layer as one more input, which is 1
        gate_bias, up_bias, down_bias = biases
        gate_EDF, up_EDF = (
            jnp.concatenate([w, bias[:, None, :]], axis=1) for w, bias in ((gate_EDF, gate_bias), (up_EDF, up_bias))
        )
        x_TD = jnp.concatenate([x_TD, jnp.ones_like(x_TD[:, :1])], axis=1)
    expected = ids_TC.size // sharding.axis_size("expert")
    y_TD = expert_ffn(x_TD, ids_TC, weights_TC, gate_EDF, up_EDF, down_EFD, act, expected)
    if biases:
        chosen_TE = jnp.sum(jnp.where(ids_TC[..., None] == jnp.arange(experts_here), weights_TC[..., None], 0), axis=1)
        y_TD = y_TD + (chosen_TE @ (down_bias / sharding.axis_size("tensor"))).astype(y_TD.dtype)
    return _reduce_scatter(_add_tensor_parts(y_TD.reshape(b, t, d)))


def slot_experts(x_BTD, tokens_BES, weights_BES, gate_EDF, up_EDF, down_EFD, *, act):
    """The same for experts with a fixed number of places."""
    here = gate_EDF.shape[0]
    x_BTD, tokens_BES, weights_BES = (_all_gather(a) for a in (x_BTD, tokens_BES, weights_BES))
    own = (jax.lax.dynamic_slice_in_dim(a, _first_expert(here), here, axis=1) for a in (tokens_BES, weights_BES))
    return _reduce_scatter(_add_tensor_parts(expert_ffn_slots(x_BTD, *own, gate_EDF, up_EDF, down_EFD, act)))


def exchanged_experts(x_BTD, ids_BTC, weights_BTC, gate_EDF, up_EDF, down_EFD, *, act, factor: float):
    """By all-to-all: each token travels to the devices of its experts and back. Returns y and, [B, T], dropped choices.

    A device has room for R rows for each other one: all that could come (factor 0), or `factor` times an even share. XLA's
    ragged form of the exchange would need no room for the worst case; XLA:CPU has none.
    """
    shards, here = sharding.axis_size("expert"), gate_EDF.shape[0]
    b, t, d = x_BTD.shape
    rows, choices = b * t, ids_BTC.shape[-1]
    room = rows * min(choices, here)
    if factor:
        room = min(room, math.ceil(factor * rows * choices / shards))
    flat = ids_BTC.reshape(-1)
    owner = flat // here  # `shards` for a choice that goes nowhere
    order = jnp.argsort(owner, stable=True)
    counts = jnp.bincount(owner, length=shards + 1)
    starts = jnp.cumsum(counts) - counts
    place = jnp.zeros_like(order).at[order].set(jnp.arange(order.size)) - starts[owner]
    fits = (owner < shards) & (place < room)
    # Room r of shard p holds choice order[starts[p] + r].
    wanted = starts[:shards, None] + jnp.arange(room)
    used = jnp.arange(room) < counts[:shards, None]
    sent = order[jnp.minimum(wanted, order.size - 1)]
    x_PRD = jnp.where(used[..., None], x_BTD.reshape(rows, d)[sent // choices], 0)
    ids_PR = jnp.where(used, flat[sent] % here, here)
    x_PRD, ids_PR = (_all_to_all(a) for a in (x_PRD, ids_PR))
    ones = jnp.ones((shards * room, 1), weights_BTC.dtype)
    y_MD = expert_ffn(x_PRD.reshape(-1, d), ids_PR.reshape(-1, 1), ones, gate_EDF, up_EDF, down_EFD, act, rows * choices)
    y_PRD = _all_to_all(_add_tensor_parts(y_MD).reshape(shards, room, d))
    at = jnp.minimum(owner, shards - 1) * room + jnp.minimum(place, room - 1)
    y_MCD = jnp.where(fits[:, None], y_PRD.reshape(-1, d)[at], 0).reshape(rows, choices, d)
    y_MD = jnp.sum(y_MCD * weights_BTC.reshape(rows, choices, 1).astype(y_MCD.dtype), axis=1)
    dropped = ((owner < shards) & ~fits).reshape(b, t, choices)
    return y_MD.reshape(b, t, d), jnp.sum(dropped, axis=-1)


def _first_expert(experts_here: int) -> Array | int:
    return jax.lax.axis_index("expert") * experts_here if sharding.axis_size("expert") > 1 else 0


def _all_gather(x: Array) -> Array:
    return jax.lax.all_gather(x, "expert", axis=0, tiled=True) if sharding.axis_size("expert") > 1 else x


def _reduce_scatter(y: Array) -> Array:
    if sharding.axis_size("expert") == 1:
        return y
    return jax.lax.psum_scatter(y, "expert", scatter_dimension=0, tiled=True)


def _all_to_all(x: Array) -> Array:
    if sharding.axis_size("expert") == 1:
        return x
    return jax.lax.all_to_all(x, "expert", split_axis=0, concat_axis=0, tiled=True)


def _add_tensor_parts(y: Array) -> Array:
    return jax.lax.psum(y, "tensor") if sharding.axis_size("tensor") > 1 else y
