"""Experts spread over the mesh axis `expert`: three ways for tokens to meet them, on local arrays (inside `sharding.local`).

The batch is split over the same axis, so each device begins and ends with its own tokens. The hidden width of the experts may
be split over `tensor`; their partial sums are added.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import ragged_all_to_all

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
        gate_bias, up_bias, _ = biases
        gate_EDF, up_EDF = (
            jnp.concatenate([w, bias[:, None, :]], axis=1) for w, bias in ((gate_EDF, gate_bias), (up_EDF, up_bias))
        )
        x_TD = jnp.concatenate([x_TD, jnp.ones_like(x_TD[:, :1])], axis=1)
    expected = ids_TC.size // sharding.axis_size("expert")
    y_TD = expert_ffn(x_TD, ids_TC, weights_TC, gate_EDF, up_EDF, down_EFD, act, expected)
    if biases:
        down_bias = biases[2]
        chosen_TE = jnp.sum(jnp.where(ids_TC[..., None] == jnp.arange(experts_here), weights_TC[..., None], 0), axis=1)
        y_TD = y_TD + (chosen_TE @ (down_bias / sharding.axis_size("tensor"))).astype(y_TD.dtype)
    return _reduce_scatter(_add_tensor_parts(y_TD.reshape(b, t, d)))


def slot_experts(x_BTD, tokens_BES, weights_BES, gate_EDF, up_EDF, down_EFD, *, act):
    """The same for experts with a fixed number of places."""
    here = gate_EDF.shape[0]
    x_BTD, tokens_BES, weights_BES = (_all_gather(a) for a in (x_BTD, tokens_BES, weights_BES))
    tokens_BES, weights_BES = (
        jax.lax.dynamic_slice_in_dim(a, _first_expert(here), here, axis=1) for a in (tokens_BES, weights_BES)
    )
    y_BTD = expert_ffn_slots(x_BTD, tokens_BES, weights_BES, gate_EDF, up_EDF, down_EFD, act)
    return _reduce_scatter(_add_tensor_parts(y_BTD))


def exchanged_experts(x_BTD, ids_BTC, weights_BTC, gate_EDF, up_EDF, down_EFD, *, act, factor: float):
    """By all-to-all: each token travels to the devices of its experts and back. Returns y and, [B, T], dropped choices.

    A device has room for all rows that could come (factor 0), or for `factor` times an even share. XLA's ragged exchange sends
    just the rows that there are; XLA:CPU has none, so there every pair of devices exchanges blocks of a fixed size.
    """
    exchange = padded_exchange if sharding.platform() == "cpu" else ragged_exchange
    shards, here = sharding.axis_size("expert"), gate_EDF.shape[0]
    b, t, d = x_BTD.shape
    rows, choices = b * t, ids_BTC.shape[-1]
    flat = ids_BTC.reshape(-1)
    owner = flat // here  # `shards` for a choice that goes nowhere
    order = jnp.argsort(owner, stable=True)
    inverse = jnp.zeros_like(order).at[order].set(jnp.arange(order.size))
    counts = jnp.bincount(owner, length=shards + 1)
    starts = jnp.cumsum(counts) - counts
    outbox = Outbox(x_BTD.reshape(rows, d)[order // choices], flat[order] % here, counts[:shards], starts[:shards])
    x_ND, ids_N, send_back, sent_P = exchange(outbox, rows * min(choices, here), factor, here)
    ones = jnp.ones((ids_N.size, 1), weights_BTC.dtype)
    y_ND = expert_ffn(x_ND, ids_N[:, None], ones, gate_EDF, up_EDF, down_EFD, act, rows * choices)
    y_MD = send_back(_add_tensor_parts(y_ND))[inverse]
    y_MCD = y_MD.reshape(rows, choices, d) * weights_BTC.reshape(rows, choices, 1).astype(y_MD.dtype)
    served = inverse - starts[owner] < jnp.append(sent_P, 0)[owner]
    dropped = ((owner < shards) & ~served).reshape(b, t, choices)
    return jnp.sum(jnp.where(served.reshape(rows, choices, 1), y_MCD, 0), axis=1).reshape(b, t, d), jnp.sum(dropped, axis=-1)


class Outbox(NamedTuple):
    """What a device has to send: x [M, D] and local expert ids [M] sorted by destination; counts, starts [P] of each's part."""

    x: Array
    ids: Array
    counts: Array
    starts: Array


def padded_exchange(outbox: Outbox, most: int, factor: float, here: int):
    """Every pair of devices exchanges a block of rows. most: that one device may send to another; here: experts on a device.

    Returns the rows that arrive [N, D], their experts [N] (`here` for none), a function that sends results [N, D] back to
    where the rows came from [M, D], and how many of each part were sent [P].
    """
    x_MD, ids_M, counts_P, starts_P = outbox
    shards, size = counts_P.size, ids_M.size
    room = min(most, math.ceil(factor * size / shards)) if factor else most
    sent_PR = jnp.minimum(starts_P[:, None] + jnp.arange(room), size - 1)
    used_PR = jnp.arange(room) < counts_P[:, None]
    x_PRD = _all_to_all(jnp.where(used_PR[..., None], x_MD[sent_PR], 0))
    ids_PR = _all_to_all(jnp.where(used_PR, ids_M[sent_PR], here))

    def send_back(y_ND):
        y_PRD = _all_to_all(y_ND.reshape(shards, room, -1))
        part_M = jnp.searchsorted(starts_P, jnp.arange(size), side="right") - 1
        place_M = jnp.arange(size) - starts_P[part_M]
        return y_PRD[part_M, jnp.minimum(place_M, room - 1)]

    return x_PRD.reshape(shards * room, -1), ids_PR.reshape(-1), send_back, jnp.minimum(counts_P, room)


def ragged_exchange(outbox: Outbox, most: int, factor: float, here: int):
    """The same by `lax.ragged_all_to_all`: `factor` bounds what arrives at a device in all; earlier devices come first."""
    x_MD, ids_M, counts_P, starts_P = outbox
    shards, size = counts_P.size, ids_M.size
    room = min(shards * most, math.ceil(factor * size)) if factor else shards * most
    me = jax.lax.axis_index("expert")
    sizes_PP, starts_PP = (jax.lax.all_gather(a, "expert") for a in (counts_P, starts_P))  # [from, to]
    begin_PP = jnp.minimum(jnp.cumsum(sizes_PP, axis=0) - sizes_PP, room)  # where each part arrives
    sizes_PP = jnp.minimum(sizes_PP, room - begin_PP)
    there = starts_P, sizes_PP[me], begin_PP[me], sizes_PP[:, me]
    back = begin_PP[:, me], sizes_PP[:, me], starts_PP[:, me], sizes_PP[me]

    def send(x, like, plan):
        return ragged_all_to_all(x, like, *(a.astype(jnp.int32) for a in plan), axis_name="expert")

    x_ND = send(x_MD, jnp.zeros((room, x_MD.shape[1]), x_MD.dtype), there)
    ids_N = send(ids_M, jnp.full(room, here, ids_M.dtype), there)
    return x_ND, ids_N, lambda y_ND: send(y_ND, jnp.zeros((size, y_ND.shape[1]), y_ND.dtype), back), sizes_PP[me]


def _first_expert(experts_here: int) -> Array | int:
    return jax.lax.axis_index("expert") * experts_here if sharding.axis_size("expert") > 1 else 0


def _all_gather(x: Array) -> Array:
    return jax.lax.all_gather(x, "expert", axis=0, tiled=True) if sharding.axis_size("expert") > 1 else x


def _reduce_scatter(y: Array) -> Array:
    if sharding.axis_size("expert") == 1:
        return y
    return jax.lax.psum_scatter(y, "expert", scatter_dimension=0, tiled=True)


def _all_to_all(x: Array) -> Array:
    return jax.lax.all_to_all(x, "expert", split_axis=0, concat_axis=0, tiled=True)


def _add_tensor_parts(y: Array) -> Array:
    return jax.lax.psum(y, "tensor") if sharding.axis_size("tensor") > 1 else y
