"""Token after token with a key/value cache: prefill, one step, and the whole loop in one compiled function.

Weights are taken as `Params`, or as `unstacked` lays them out for decoding, which saves laying them out again. Experts drop
nothing, whatever capacity they are trained with.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from llmjax import sharding
from llmjax.generation.sampling import SamplingConfig, sample
from llmjax.models.cache import LayerCache, init_cache
from llmjax.models.config import ModelConfig
from llmjax.models.transformer import Params, cached_hidden_states, for_decoding, logits, unstacked
from llmjax.typing import Array, Int

PREFILL_TOKENS = 1024  # of each prompt at a time


@struct.dataclass
class DecodeState:
    """cache: of all layers. logits [B, V]: of the next token. position [B]: of the next token."""

    cache: tuple[LayerCache, ...]
    logits: Array
    position: Array


@struct.dataclass
class Generation:
    """tokens [B, R] int32 (padding after the token that ended it), log_probs [B, R] of each under the distribution it was
    sampled from, mask [B, R] float32: 1 up to and including that token, ended [B]: whether the row ended itself.
    """

    tokens: Array
    log_probs: Array
    mask: Array
    ended: Array


def prefill(params: Params, prompt_BT: Array, segment_ids_BT: Array, cfg: ModelConfig, size: int) -> DecodeState:
    """Runs prompts, padded on the left (segment 0), into a fresh cache of `size` slots; long ones PREFILL_TOKENS at a time, so
    that memory does not grow with them beyond the cache."""
    b, length = prompt_BT.shape
    positions_BT = jnp.maximum(jnp.cumsum(segment_ids_BT, axis=1) - 1, 0)
    whole, cache = (prompt_BT, positions_BT, segment_ids_BT), init_cache(cfg, b, size)
    pieces = length // PREFILL_TOKENS
    if pieces < 2 or not isinstance(prompt_BT, jax.core.Tracer):  # outside of `jax.jit` a scan would compile each length
        return _append(params, *whole, cache, cfg)
    first = length - (pieces - 1) * PREFILL_TOKENS  # whatever does not divide goes with the first piece

    def piece(state: DecodeState, part: tuple[Array, Array, Array]) -> tuple[DecodeState, None]:
        tokens_BT, positions_BT, segment_ids_BT = part
        return _append(params, tokens_BT, positions_BT, segment_ids_BT, state.cache, cfg), None

    def cut(x_BT):
        return x_BT[:, first:].reshape(b, pieces - 1, PREFILL_TOKENS).swapaxes(0, 1)

    state = _append(params, prompt_BT[:, :first], positions_BT[:, :first], segment_ids_BT[:, :first], cache, cfg)
    return jax.lax.scan(piece, state, tuple(cut(x_BT) for x_BT in whole))[0]


def decode_step(params: Params, state: DecodeState, tokens_B: Array, cfg: ModelConfig) -> DecodeState:
    """Appends one token to every row. Outside of `jax.jit` the old state is used up."""
    ones_B1 = jnp.ones((tokens_B.shape[0], 1), jnp.int32)
    return _append(params, tokens_B[:, None], state.position[:, None], ones_B1, state.cache, cfg)


def _append(params: Params, tokens_BT, positions_BT, segment_ids_BT, cache, cfg: ModelConfig) -> DecodeState:
    x_BTD, cache, _ = cached_hidden_states(
        params, tokens_BT, cfg, positions_BT=positions_BT, segment_ids_BT=segment_ids_BT, cache=cache
    )
    outside: Any = params.replace(blocks=None, dense_blocks=None, mtp=None)  # type: ignore
    return DecodeState(cache, *_after(outside, x_BTD, positions_BT, cfg))


@partial(jax.jit, static_argnames="cfg")
def _after(params: Params, x_BTD: Array, positions_BT: Array, cfg: ModelConfig) -> tuple[Array, Array]:
    """Logits and position of the next token."""
    return logits(params, x_BTD[:, -1:], cfg)[:, 0], positions_BT[:, -1] + 1


@partial(jax.jit, static_argnames=("cfg", "sampling", "stop_ids", "pad_id"))
def generate(
    params: Params,
    prompt_BT: Int[Array, "B T"],
    segment_ids_BT: Int[Array, "B T"],
    keys_B: Array,
    *,
    cfg: ModelConfig,
    sampling: SamplingConfig,
    stop_ids: tuple[int, ...],
    pad_id: int,
) -> Generation:
    """Answers every prompt until one of `stop_ids` or `sampling.max_new_tokens`.

    Token t of row b is drawn with fold_in(keys_B[b], t): a row's answer depends on its own prompt and key, not on its
    neighbours. The loop stops when every row has ended.
    """
    b, prompt_length = prompt_BT.shape
    new = sampling.max_new_tokens
    params = for_decoding(params, cfg)
    state = prefill(params, prompt_BT, segment_ids_BT, cfg, prompt_length + new)
    tokens_BR = sharding.constrain(jnp.full((b, new), pad_id, jnp.int32), "B.")
    floats_BR = sharding.constrain(jnp.zeros((b, new), jnp.float32), "B.")
    ended_B = sharding.constrain(jnp.zeros((b,), bool), "B")

    def unfinished(loop):
        t, _, _, _, _, ended_B = loop
        return (t < new) & ~jnp.all(ended_B)

    def step(loop):
        t, state, tokens_BR, log_probs_BR, mask_BR, ended_B = loop
        keys = sharding.constrain(jax.vmap(jax.random.fold_in, (0, None))(keys_B, t), "B")
        drawn_B, log_prob_B = sample(sharding.constrain(state.logits, "B."), keys, sampling)
        token_B = jnp.where(ended_B, pad_id, drawn_B)
        live_B = (~ended_B).astype(jnp.float32)
        at = jnp.arange(new) == t
        tokens_BR = jnp.where(at, token_B[:, None], tokens_BR)
        log_probs_BR = jnp.where(at, (log_prob_B * live_B)[:, None], log_probs_BR)
        mask_BR = jnp.where(at, live_B[:, None], mask_BR)
        state = decode_step(params, state, token_B, cfg)
        return t + 1, state, tokens_BR, log_probs_BR, mask_BR, ended_B | _among(drawn_B, stop_ids)

    start = (jnp.zeros((), jnp.int32), state, tokens_BR, floats_BR, floats_BR, ended_B)
    _, _, tokens_BR, log_probs_BR, mask_BR, ended_B = jax.lax.while_loop(unfinished, step, start)
    return Generation(tokens_BR, log_probs_BR, mask_BR, ended_B)


def _among(tokens_B: Array, ids: tuple[int, ...]) -> Array:
    found_B = jnp.zeros(tokens_B.shape, bool)
    for one in ids:
        found_B |= tokens_B == one
    return found_B


def padded_length(prompt: list[int]) -> int:
    """Tokens of a prompt with its padding: a power of two, at least 16."""
    return 1 << max(len(prompt) - 1, 15).bit_length()


def stream(
    params: Params, prompt: list[int], key: Array, *, cfg: ModelConfig, sampling: SamplingConfig, stop_ids: tuple[int, ...]
) -> Iterator[int]:
    """Yields the tokens of one answer as they are made, without the one of `stop_ids` that ends it.

    The prompt is padded on the left to `padded_length`, so that a growing dialogue compiles a handful of shapes only; a shape
    compiles one layer, whatever the depth.
    """
    length, params = padded_length(prompt), unstacked(params, cfg)
    pad = length - len(prompt)
    tokens_BT = jnp.asarray([[0] * pad + prompt], jnp.int32)
    segment_ids_BT = jnp.asarray([[0] * pad + [1] * len(prompt)], jnp.int32)
    state = prefill(params, tokens_BT, segment_ids_BT, cfg, length + sampling.max_new_tokens)
    for t in range(sampling.max_new_tokens):
        token_B, _ = _sample(state.logits, jax.random.fold_in(key, t)[None], sampling)
        token = int(token_B[0])
        if token in stop_ids:
            return
        yield token
        if t + 1 < sampling.max_new_tokens:
            state = decode_step(params, state, token_B, cfg)


_sample = jax.jit(sample, static_argnums=2)
