"""Which form of attention runs: by name, or the best that serves the model on the platform; asked here alone."""

from __future__ import annotations

import jax.numpy as jnp

from llmjax import sharding
from llmjax.errors import UserError
from llmjax.kernels import AttentionKernel
from llmjax.kernels.attention.blocked import blocked_attention
from llmjax.kernels.attention.chunked import CHUNK, chunked_attention
from llmjax.kernels.attention.mask import attention_mask
from llmjax.kernels.attention.plain import plain_attention
from llmjax.typing import Array

SPLASH_LENGTH = 128  # the kernel reads so many tokens at a time
LONGEST_ON_CPU = 2048  # the blocked form, a third faster, keeps all weights of the softmax: too many beyond so many keys


def attend(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    q_segments_BT: Array,
    k_segments_BS: Array,
    *,
    start: int | Array | None = None,
    scale: float,
    window: int | Array | None = None,
    softcap: float = 0.0,
    sinks_N: Array | None = None,
    kernel: AttentionKernel = "auto",
) -> Array:
    """softmax(scale q k^T) v under `attention_mask`: [B, T, N, width of v].

    start: None where a whole sequence attends to itself, else the slot of a cache in which the queries begin. window, softcap,
    sinks: as in `plain_attention` and `attention_mask`. kernel: a form by name, for whole sequences; a cache is met in the
    plain form, or in chunks where it is long and there are many queries.
    """
    length, slots = q_BTNH.shape[1], k_BSKH.shape[1]
    if isinstance(window, int) and window >= slots:
        window = None
    form = kernel
    if kernel == "auto" or start is not None:
        form = _best(length, slots, start is not None, window, softcap, sinks_N is not None)
    if form == "splash":
        static_window = _for_splash(length, window)
        from llmjax.kernels.attention.splash import splash_attention  # Pallas takes a second to import

        return splash_attention(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, scale, static_window, softcap)
    if form == "blocked":
        return blocked_attention(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, scale, window)
    begin = 0 if start is None else start
    if form == "chunked":
        segments = q_segments_BT, k_segments_BS
        return chunked_attention(q_BTNH, k_BSKH, v_BSKH, *segments, begin, scale, window, softcap, sinks_N)
    places = begin + jnp.arange(length), jnp.arange(slots)
    mask_BTS = attention_mask(q_segments_BT, k_segments_BS, *places, window)
    return plain_attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale, softcap, sinks_N)


def _for_splash(length: int, window: int | Array | None) -> int | None:
    """The window, if the kernel can serve it here."""
    if sharding.platform() != "tpu":
        raise UserError(f"attention_kernel=splash runs on TPUs, not on {sharding.platform()}; take auto")
    if length % SPLASH_LENGTH:
        raise UserError(f"attention_kernel=splash needs lengths that are multiples of {SPLASH_LENGTH}, not {length}; take auto")
    if window is not None and not isinstance(window, int):
        raise UserError("attention_kernel=splash needs one window for all layers, or layer_loop=unroll; take auto")
    return window


def _best(length: int, slots: int, cached: bool, window: int | Array | None, softcap: float, sinks: bool) -> str:
    """The form that "auto" stands for."""
    if cached:
        return "chunked" if length > 1 and length * slots > CHUNK**2 else "plain"
    platform = sharding.platform()
    if platform == "cpu" and not softcap and not sinks and slots <= LONGEST_ON_CPU:
        return "blocked"
    if platform == "tpu" and not sinks and length % SPLASH_LENGTH == 0 and (window is None or isinstance(window, int)):
        return "splash"
    return "plain" if slots <= CHUNK else "chunked"
