"""Attention: equal to its definition, causal, blind to padding and to packed neighbours."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from llmjax.config import validate
from llmjax.errors import UserError
from llmjax.kernels.attention.blocked import blocked_attention
from llmjax.kernels.attention.chunked import chunked_attention
from llmjax.kernels.attention.mask import attention_mask
from llmjax.kernels.attention.plain import plain_attention
from llmjax.kernels.attention.splash import splash_attention

both = pytest.mark.parametrize("cfg", tiny.MODELS.values(), ids=tiny.MODELS.keys())


def attention_by_loops(q, k, v, segments):
    """The definition in float64: one query, one head, one visible key after another."""
    b, t, n, h = q.shape
    group = n // k.shape[2]
    y = np.zeros(q.shape)
    for i in range(b):
        for head in range(n):
            for query in range(t):
                seen = [s for s in range(query + 1) if segments[i, s] == segments[i, query]]
                scores = np.array([q[i, query, head] @ k[i, s, head // group] for s in seen]) / np.sqrt(h)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                y[i, query, head] = sum(w * v[i, s, head // group] for w, s in zip(weights, seen))
    return y


@pytest.mark.parametrize("length, heads, kv_heads", [(1, 4, 2), (7, 4, 2), (8, 4, 2), (8, 4, 4), (12, 3, 1)])
def test_all_forms_equal_the_loop(length, heads, kv_heads):
    rng = np.random.default_rng(length)
    q = rng.normal(size=(2, length, heads, 6)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, length, kv_heads, 6)).astype(np.float32)
    segments = np.array([[1] * length, ([1] * 3 + [2] * 4 + [0] * 5)[:length]])
    causal = np.tril(np.ones((length, length), bool))
    mask = causal & (segments[:, :, None] == segments[:, None, :])
    expected = attention_by_loops(q.astype(np.float64), k.astype(np.float64), v.astype(np.float64), segments)
    np.testing.assert_allclose(jax.jit(plain_attention)(q, k, v, mask, 6**-0.5), expected, atol=2e-6)
    np.testing.assert_allclose(jax.jit(blocked_attention)(q, k, v, segments, 6**-0.5), expected, atol=2e-6)
    np.testing.assert_allclose(chunked_attention(q, k, v, segments, segments, 0, 6**-0.5, chunk=3), expected, atol=2e-6)


def test_gradients_of_both_forms_are_equal():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 8, 4, 6)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, 8, 2, 6)).astype(np.float32)
    out = rng.normal(size=q.shape).astype(np.float32)
    segments = np.array([[1] * 8, [1, 1, 1, 2, 2, 2, 0, 0]])
    mask = np.tril(np.ones((8, 8), bool)) & (segments[:, :, None] == segments[:, None, :])
    plain = tiny.value_and_grads(lambda q, k, v: jnp.sum(out * plain_attention(q, k, v, mask, 0.4)), q, k, v)
    blocked = tiny.value_and_grads(lambda q, k, v: jnp.sum(out * blocked_attention(q, k, v, segments, 0.4)), q, k, v)
    tiny.assert_trees_close(blocked, plain, 1e-5)


def packed(rng, length, starts):
    """Segments of three sequences: documents from `starts` on, and padding behind the last of them."""
    ids = np.zeros((3, length), np.int32)
    for row in ids:
        for number, start in enumerate(starts, 1):
            row[start:] = number
        row[rng.integers(starts[-1] + 1, length + 1) :] = 0
    return ids


# Documents are longer than a window and than a chunk, so that each bound decides something.
CHUNKED = {
    "causal": dict(),
    "lengths that do not divide": dict(length=61),
    "window": dict(window=9),
    "window of one chunk": dict(window=8),
    "soft-cap": dict(softcap=1.5),
    "sinks": dict(sinks=True),
    "everything": dict(window=11, softcap=1.5, sinks=True, length=59),
    "one kv head": dict(kv_heads=1),
    "no groups": dict(kv_heads=4),
    "narrow values": dict(v_dim=3),
    "a cache": dict(start=17, length=13),
    "a cache and a window": dict(start=21, length=13, window=6, sinks=True),
    "one query": dict(start=40, length=1),
}


def sides(window=None, softcap=0.0, sinks=False, length=64, kv_heads=2, v_dim=6, start=0, chunk=8, wrong=None):
    """(value, gradients) by the plain form and by the chunked one; wrong: a change of the chunked one's arguments."""
    rng = np.random.default_rng(length)
    slots = length if not start else 64
    segments = packed(rng, slots, (0, 20, 45) if slots > 45 else (0,))
    q = rng.normal(size=(3, length, 4, 6)).astype(np.float32)
    k, v = (rng.normal(size=(3, slots, kv_heads, width)).astype(np.float32) for width in (6, v_dim))
    sinks_N = rng.normal(size=4).astype(np.float32) if sinks else None
    out = rng.normal(size=(3, length, 4, v_dim)).astype(np.float32)
    own = segments[:, start : start + length]
    mask = attention_mask(own, segments, start + jnp.arange(length), jnp.arange(slots), window)
    arguments = dict(q_segments_BT=own, k_segments_BS=segments, start=start, scale=0.4, window=window, softcap=softcap)
    arguments |= {} if wrong is None else wrong(arguments)

    def plain(q, k, v, sinks_N):
        return jnp.sum(out * plain_attention(q, k, v, mask, 0.4, softcap, sinks_N))

    def chunked(q, k, v, sinks_N):
        return jnp.sum(out * chunked_attention(q, k, v, sinks_N=sinks_N, chunk=chunk, **arguments))

    return [tiny.value_and_grads(fn, q, k, v, sinks_N) for fn in (plain, chunked)]


@pytest.mark.parametrize("case", CHUNKED.values(), ids=CHUNKED.keys())
def test_chunks_equal_the_plain_form_in_value_and_gradients(case):
    plain, chunked = sides(**case)
    tiny.assert_trees_close(chunked, plain, 2e-5)


@pytest.mark.parametrize("wrong", [
    lambda a: {"k_segments_BS": np.ones_like(a["k_segments_BS"]), "q_segments_BT": np.ones_like(a["q_segments_BT"])},
    lambda a: {"window": a["window"] - 1},
    lambda a: {"window": a["window"] + 1},
    lambda a: {"softcap": 0.0},
    lambda a: {"scale": 1.0},
    lambda a: {"start": 1},
], ids=["segments", "window - 1", "window + 1", "soft-cap", "scale", "start"])  # fmt: skip
def test_a_wrong_form_is_noticed(wrong):
    plain, chunked = sides(window=11, softcap=1.5, sinks=True, wrong=wrong)
    for ours, theirs in zip(jax.tree.leaves(chunked), jax.tree.leaves(plain)):
        assert np.abs(np.asarray(ours) - theirs).max() > 1e-3


def test_memory_of_chunks_does_not_grow_with_the_square_of_the_length():
    def scores(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        fn = jax.grad(lambda q, k, v, ids: jnp.sum(chunked_attention(q, k, v, ids, ids, 0, 0.4)), argnums=(0, 1, 2))
        return jax.jit(fn).lower(x, x, x, ids).compile().memory_analysis().temp_size_in_bytes

    assert scores(8192) < 4 * 1.1 * scores(2048)


def test_a_form_that_does_not_serve_the_model_is_refused():
    cfg = next(iter(tiny.MODELS.values()))
    with pytest.raises(UserError, match="attention_kernel=blocked does not know attention_softcap=5.0; take auto"):
        validate(dataclasses.replace(cfg, attention_kernel="blocked", attention_softcap=5.0))
    for kernel in ("blocked", "splash"):
        with pytest.raises(UserError, match=f"attention_kernel={kernel} does not know attention_sinks"):
            validate(dataclasses.replace(cfg, attention_kernel=kernel, attention_sinks=True))
    with pytest.raises(UserError, match="attention_kernel=splash runs on TPUs, not on cpu"):
        tiny.logits(tiny.language_model(cfg), tiny.tokens(cfg, 2, 12), dataclasses.replace(cfg, attention_kernel="splash"))


@pytest.mark.slow
@pytest.mark.parametrize("case", [
    dict(), dict(window=60, softcap=1.5, kv_heads=1), dict(v_dim=3, kv_heads=4),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("wrong", [False, True])
def test_splash_equals_the_plain_form_in_value_and_gradients(case, wrong):
    """Interpreted; documents longer than the windows; negative control: a window off by one, or no segments."""
    window, softcap, kv_heads, v_dim = (case.get(k, d) for k, d in dict(window=None, softcap=0.0, kv_heads=2, v_dim=6).items())
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 256, n, h)).astype(np.float32) for n, h in ((4, 6), (kv_heads, 6), (kv_heads, v_dim)))
    out = rng.normal(size=(2, 256, 4, v_dim)).astype(np.float32)
    segments = packed(rng, 256, (0, 110))[:2]
    mask = attention_mask(segments, segments, jnp.arange(256), jnp.arange(256), window)
    plain = tiny.value_and_grads(lambda *x: jnp.sum(out * plain_attention(*x, mask, 0.4, softcap)), q, k, v)
    own = np.ones_like(segments) if wrong and window is None else segments
    own_window = window - 1 if wrong and window else window

    def kernel(*x):
        return jnp.sum(out * splash_attention(*x, own, 0.4, own_window, softcap, interpret=True))

    found = tiny.value_and_grads(kernel, q, k, v)
    apart = max(float(np.abs(np.asarray(a) - b).max()) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(plain)))
    assert apart > 1e-2 if wrong else apart < 1e-4


@pytest.mark.parametrize("kernel", ["plain", "blocked", "chunked"])
def test_every_form_by_name_gives_the_same_logits(kernel):
    cfg = next(iter(tiny.MODELS.values()))
    params, text = tiny.language_model(cfg), tiny.tokens(cfg, 2, 12)
    own = dataclasses.replace(cfg, attention_kernel=kernel)
    np.testing.assert_allclose(tiny.logits(params, text, own), tiny.logits(params, text, cfg), atol=1e-5)


@both
def test_a_packed_segment_equals_the_segment_alone(cfg):
    params = tiny.language_model(cfg)
    first, second = tiny.tokens(cfg, 2, 6, seed=1), tiny.tokens(cfg, 2, 6, seed=2)
    packed = tiny.logits(
        params,
        np.concatenate([first, second], axis=1),
        cfg,
        positions=[[*range(6), *range(6)]] * 2,
        segments=[[1] * 6 + [2] * 6] * 2,
    )
    np.testing.assert_allclose(packed[:, :6], tiny.logits(params, first, cfg), atol=1e-5)
    np.testing.assert_allclose(packed[:, 6:], tiny.logits(params, second, cfg), atol=1e-5)


@both
@pytest.mark.parametrize("left, right", [(0, 6), (6, 0), (2, 4)])
def test_padding_changes_nothing_of_real_tokens(cfg, left, right):
    params, text = tiny.language_model(cfg), tiny.tokens(cfg, 2, 6)
    padded = np.pad(text, ((0, 0), (left, right)), constant_values=7)
    got = tiny.logits(params, padded, cfg, segments=[[0] * left + [1] * 6 + [0] * right] * 2)
    np.testing.assert_allclose(got[:, left : left + 6], tiny.logits(params, text, cfg), atol=1e-5)


@both
def test_a_later_token_changes_no_earlier_logits(cfg):
    params, text = tiny.language_model(cfg), tiny.tokens(cfg, 2, 12)
    before = tiny.logits(params, text, cfg)
    for place in range(12):
        changed = text.copy()
        changed[:, place] = (changed[:, place] + 1) % cfg.vocab_size
        after = tiny.logits(params, changed, cfg)
        np.testing.assert_array_equal(after[:, :place], before[:, :place])
        assert np.all(np.max(np.abs(after[:, place:] - before[:, place:]), axis=-1) > 1e-4), place
