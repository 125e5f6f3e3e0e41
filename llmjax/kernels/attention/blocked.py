"""Causal attention over a whole sequence, forward and backward, in the form that is fast on CPU.

Each of four query blocks meets only the keys up to its end, which leaves out 3/8 of the scores. Heads are folded into the
batch, and every product, also those of the backward pass, is a batched matrix product of operands that lie as it reads
them: the narrow operand ([T, H]) is transposed beforehand, never the wide one ([T, S]).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from llmjax.kernels.attention.mask import MASKED, attention_mask
from llmjax.typing import Array

NUM_QUERY_BLOCKS = 4


def blocked_attention(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, segment_ids_BT: Array, scale: float, window: int | Array | None = None
) -> Array:
    """softmax(scale * q k^T) v over the keys of the same segment that are not later and less than `window` slots back.

    Returns [B, T, N, width of v]. Scores and softmax in float32. Differentiable once, in q, k and v.
    """
    b, t, n, h = q_BTNH.shape
    group = n // k_BSKH.shape[2]
    q_XTH = _fold_heads(q_BTNH * jnp.asarray(scale, q_BTNH.dtype))
    k_XHS = jnp.repeat(k_BSKH, group, axis=2).transpose(0, 2, 3, 1).reshape(b * n, h, t)
    v_XSH = _fold_heads(jnp.repeat(v_BSKH, group, axis=2))
    static = window if window is None or isinstance(window, int) else -1  # -1: it is traced
    y_XTH = _attend(q_XTH, k_XHS, v_XSH, segment_ids_BT, window if static == -1 else None, static)
    return y_XTH.reshape(b, n, t, -1).transpose(0, 2, 1, 3)


def _fold_heads(x_BTNH: Array) -> Array:
    b, t, n, h = x_BTNH.shape
    return x_BTNH.transpose(0, 2, 1, 3).reshape(b * n, t, h)


_product = partial(jax.lax.dot_general, dimension_numbers=(((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q_XTH, k_XHS, v_XSH, segment_ids_BT, traced_window, static_window):
    return _attend_fwd(q_XTH, k_XHS, v_XSH, segment_ids_BT, traced_window, static_window)[0]


def _attend_fwd(q_XTH, k_XHS, v_XSH, segment_ids_BT, traced_window, static_window):
    """X = batch x heads. Keeps the weights of the softmax, [X, T / 4, S] for each query block, for the backward pass."""
    window = traced_window if static_window == -1 else static_window
    outputs, weights = [], []
    for start, end in _query_blocks(q_XTH.shape[1]):
        slots = jnp.arange(end)
        mask_BTS = attention_mask(segment_ids_BT[:, start:end], segment_ids_BT[:, :end], slots[start:], slots, window)
        scores = _product(q_XTH[:, start:end], k_XHS[:, :, :end])
        by_head = scores.reshape(mask_BTS.shape[0], -1, *mask_BTS.shape[1:])
        probs = jax.nn.softmax(jnp.where(mask_BTS[:, None], by_head, MASKED), axis=-1)
        weights.append(probs.reshape(scores.shape).astype(v_XSH.dtype))
        outputs.append(_product(weights[-1], v_XSH[:, :end]).astype(v_XSH.dtype))
    y_XTH = jnp.concatenate(outputs, axis=1)
    return y_XTH, (q_XTH, k_XHS, v_XSH, y_XTH, weights)


def _attend_bwd(static_window, residuals, dy_XTH):
    """Masked scores have weight 0, so their gradient is 0 without another look at the mask."""
    q_XTH, k_XHS, v_XSH, y_XTH, weights = residuals
    dtype = dy_XTH.dtype
    # The softmax's sum over keys of weight * dweight is y . dy (Dao et al. 2022, arXiv:2205.14135, appendix B.2, eq. 4).
    delta_XT1 = jnp.sum(dy_XTH.astype(jnp.float32) * y_XTH.astype(jnp.float32), axis=-1, keepdims=True)
    q_XHT, dy_XHT, v_XHS, k_XSH = (x.swapaxes(1, 2) for x in (q_XTH, dy_XTH, v_XSH, k_XHS))
    dq = []
    dk_XHS, dv_XHS = jnp.zeros(k_XHS.shape, jnp.float32), jnp.zeros(v_XHS.shape, jnp.float32)
    for (start, end), w in zip(_query_blocks(q_XTH.shape[1]), weights, strict=True):
        dw = _product(dy_XTH[:, start:end], v_XHS[:, :, :end])
        dscores = (w * (dw - delta_XT1[:, start:end])).astype(dtype)
        dq.append(_product(dscores, k_XSH[:, :end]))
        dk_XHS = dk_XHS.at[:, :, :end].add(_product(q_XHT[:, :, start:end], dscores))
        dv_XHS = dv_XHS.at[:, :, :end].add(_product(dy_XHT[:, :, start:end], w))
    dq_XTH = jnp.concatenate(dq, axis=1)
    return dq_XTH.astype(dtype), dk_XHS.astype(dtype), dv_XHS.swapaxes(1, 2).astype(dtype), None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _query_blocks(length: int) -> list[tuple[int, int]]:
    """(start, end) of each block; one block when the length does not divide."""
    block = length // NUM_QUERY_BLOCKS if length % NUM_QUERY_BLOCKS == 0 else length
    return [(start, start + block) for start in range(0, length, block)]
