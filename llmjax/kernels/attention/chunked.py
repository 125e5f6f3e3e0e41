"""Attention in bounded memory, for every backend: no array grows with queries times keys, forward or backward.

Chunk after chunk of queries meets chunk after chunk of the keys it can see, with a running maximum and sum of the softmax
(Rabe & Staats 2021, arXiv:2112.05682; Dao et al. 2022, arXiv:2205.14135, algorithms 1 and 4). The backward pass makes the
weights again from the logarithm of that sum. Chunks of keys that lie behind a chunk of queries, or before its window, are not
visited.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llmjax.kernels.attention.mask import MASKED, attention_mask
from llmjax.typing import Array

CHUNK = 512


class _Plan(NamedTuple):
    """What is static: chunk sizes, factor on the scores, soft-cap (0 for none)."""

    q_chunk: int
    k_chunk: int
    scale: float
    softcap: float


def chunked_attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    q_segments_BT: Array,
    k_segments_BS: Array,
    start: int | Array,
    scale: float,
    window: int | Array | None = None,
    softcap: float = 0.0,
    sinks_N: Array | None = None,
    chunk: int = CHUNK,
) -> Array:
    """`plain_attention` of queries in the slots from `start` on to keys in the slots from 0 on, under `attention_mask`.

    Returns [B, T, N, width of v]. Differentiable once, in q, k, v and sinks. chunk: queries, and keys, at a time.
    """
    b, t, n, _ = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    plan = _Plan(min(chunk, t), min(chunk, k_BSKH.shape[1]), scale, softcap)
    q, q_segments = (_padded(x, plan.q_chunk) for x in (q_BTNH, q_segments_BT))
    k, v, k_segments = (_padded(x, plan.k_chunk) for x in (k_BSKH, v_BSKH, k_segments_BS))
    q = q.reshape(b, q.shape[1], kv_heads, n // kv_heads, -1).transpose(0, 2, 3, 1, 4)
    sinks = None if sinks_N is None else sinks_N.astype(jnp.float32).reshape(kv_heads, n // kv_heads)
    window = q.shape[3] + k.shape[1] if window is None else window
    where = q_segments, k_segments, jnp.asarray(start), jnp.asarray(window)
    y = _attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), sinks, where, plan)
    return y.transpose(0, 3, 1, 2, 4).reshape(b, q.shape[3], n, -1)[:, :t]


def _padded(x_BT: Array, chunk: int) -> Array:
    """Whole chunks. What is added is in segment 0, behind everything, so that only what is added to the queries sees it."""
    return jnp.pad(x_BT, [(0, 0), (0, -x_BT.shape[1] % chunk)] + [(0, 0)] * (x_BT.ndim - 2))


def _chunk(x: Array, i, size: int, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)


def _seen(where, i, plan: _Plan, num_k: int) -> tuple[Array, Array]:
    """First and end of the chunks of keys that some query of chunk i may see."""
    *_, start, window = where
    first_q, last_q = start + i * plan.q_chunk, start + (i + 1) * plan.q_chunk - 1
    first = jnp.maximum(first_q - window + 1, 0) // plan.k_chunk
    return jnp.minimum(first, num_k - 1), jnp.minimum(last_q // plan.k_chunk + 1, num_k)


def _scores(q, k, i, j, where, plan: _Plan) -> tuple[Array, Array]:
    """Scores [B, K, G, q, k] of chunk i of the queries with chunk j of the keys, capped and not yet masked, and the mask."""
    q_segments, k_segments, start, window = where
    slots = start + i * plan.q_chunk + jnp.arange(plan.q_chunk), j * plan.k_chunk + jnp.arange(plan.k_chunk)
    segments = _chunk(q_segments, i, plan.q_chunk, 1), _chunk(k_segments, j, plan.k_chunk, 1)
    mask = attention_mask(*segments, *slots, window)[:, None, None]
    scores = plan.scale * jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32)
    return (plan.softcap * jnp.tanh(scores / plan.softcap) if plan.softcap else scores), mask


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q, k, v, sinks, where, plan: _Plan):
    return _attend_fwd(q, k, v, sinks, where, plan)[0]


def _attend_fwd(q, k, v, sinks, where, plan: _Plan):
    """q [B, K, G, T, H]; k, v [B, K, S, H]. Keeps the output and the log of each softmax's sum [B, K, G, T]."""
    num_k = k.shape[2] // plan.k_chunk

    def one_chunk(i):
        q_i = _chunk(q, i, plan.q_chunk, 3)

        def meet(j, carried):
            top, total, y = carried
            scores, mask = _scores(q_i, _chunk(k, j, plan.k_chunk, 2), i, j, where, plan)
            scores = jnp.where(mask, scores, MASKED)
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
            weights = jnp.where(mask, jnp.exp(scores - new_top[..., None]), 0.0)
            shrunk = jnp.exp(top - new_top)
            v_j = _chunk(v, j, plan.k_chunk, 2)
            more = jnp.einsum("bkgts,bksh->bkgth", weights.astype(v.dtype), v_j, preferred_element_type=jnp.float32)
            return new_top, total * shrunk + jnp.sum(weights, axis=-1), y * shrunk[..., None] + more

        shape = q_i.shape[:-1]
        if sinks is None:
            nothing = jnp.full(shape, MASKED, jnp.float32), jnp.zeros(shape, jnp.float32)
        else:
            nothing = jnp.broadcast_to(sinks[:, :, None], shape), jnp.ones(shape, jnp.float32)
        first, end = _seen(where, i, plan, num_k)
        top, total, y = jax.lax.fori_loop(first, end, meet, (*nothing, jnp.zeros((*shape, v.shape[-1]), jnp.float32)))
        total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)  # a query of padding may see nothing
        return (y / total[..., None]).astype(q.dtype), top + jnp.log(total)

    y, log_sum = jax.lax.map(one_chunk, jnp.arange(q.shape[3] // plan.q_chunk))
    y, log_sum = (jnp.moveaxis(x, 0, 3).reshape(*q.shape[:4], *x.shape[5:]) for x in (y, log_sum))
    return y, (q, k, v, sinks, where, y, log_sum)


def _attend_bwd(plan: _Plan, residuals, dy):
    q, k, v, sinks, where, y, log_sum = residuals
    num_k = k.shape[2] // plan.k_chunk
    # The softmax's sum over keys of weight * dweight is y . dy (Dao et al. 2022, appendix B.2, eq. 4).
    delta = jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), axis=-1)

    def one_chunk(carried, i):
        q_i, dy_i, delta_i, log_sum_i = (_chunk(x, i, plan.q_chunk, 3) for x in (q, dy, delta, log_sum))

        def meet(j, carried):
            dk, dv, dq_i = carried
            k_j, v_j = (_chunk(x, j, plan.k_chunk, 2) for x in (k, v))
            scores, mask = _scores(q_i, k_j, i, j, where, plan)
            weights = jnp.where(mask, jnp.exp(scores - log_sum_i[..., None]), 0.0)
            dv_j = jnp.einsum("bkgts,bkgth->bksh", weights.astype(v.dtype), dy_i, preferred_element_type=jnp.float32)
            dweights = jnp.einsum("bkgth,bksh->bkgts", dy_i, v_j, preferred_element_type=jnp.float32)
            dscores = weights * (dweights - delta_i[..., None])
            if plan.softcap:
                dscores = dscores * (1 - jnp.square(scores / plan.softcap))
            dscores = (plan.scale * dscores).astype(q.dtype)
            dq_i = dq_i + jnp.einsum("bkgts,bksh->bkgth", dscores, k_j, preferred_element_type=jnp.float32)
            dk_j = jnp.einsum("bkgts,bkgth->bksh", dscores, q_i, preferred_element_type=jnp.float32)
            return _added(dk, dk_j, j, plan), _added(dv, dv_j, j, plan), dq_i

        first, end = _seen(where, i, plan, num_k)
        dk, dv, dq_i = jax.lax.fori_loop(first, end, meet, (*carried, jnp.zeros(q_i.shape, jnp.float32)))
        return (dk, dv), dq_i.astype(q.dtype)

    nothing: Any = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(one_chunk, nothing, jnp.arange(q.shape[3] // plan.q_chunk))
    dq = jnp.moveaxis(dq, 0, 3).reshape(q.shape)
    dsinks = None
    if sinks is not None:  # a sink has weight and no value
        dsinks = -jnp.sum(jnp.exp(sinks[:, :, None] - log_sum) * delta, axis=(0, 3))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), dsinks, None


def _added(total: Array, part: Array, j, plan: _Plan) -> Array:
    """Adds to chunk j of the keys."""
    old = _chunk(total, j, plan.k_chunk, 2)
    return jax.lax.dynamic_update_slice_in_dim(total, old + part, j * plan.k_chunk, 2)


_attend.defvjp(_attend_fwd, _attend_bwd)
