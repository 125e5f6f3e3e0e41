"""Attention: equal to its definition, causal, blind to padding and to packed neighbours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from llmjax.models.attention import dot_product_attention
from llmjax.models.blocked_attention import blocked_attention

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
def test_both_forms_equal_the_loop(length, heads, kv_heads):
    rng = np.random.default_rng(length)
    q = rng.normal(size=(2, length, heads, 6)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, length, kv_heads, 6)).astype(np.float32)
    segments = np.array([[1] * length, ([1] * 3 + [2] * 4 + [0] * 5)[:length]])
    causal = np.tril(np.ones((length, length), bool))
    mask = causal & (segments[:, :, None] == segments[:, None, :])
    expected = attention_by_loops(q.astype(np.float64), k.astype(np.float64), v.astype(np.float64), segments)
    np.testing.assert_allclose(jax.jit(dot_product_attention)(q, k, v, mask, 6**-0.5), expected, atol=2e-6)
    np.testing.assert_allclose(jax.jit(blocked_attention)(q, k, v, segments, 6**-0.5), expected, atol=2e-6)


def test_gradients_of_both_forms_are_equal():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 8, 4, 6)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, 8, 2, 6)).astype(np.float32)
    out = rng.normal(size=q.shape).astype(np.float32)
    segments = np.array([[1] * 8, [1, 1, 1, 2, 2, 2, 0, 0]])
    mask = np.tril(np.ones((8, 8), bool)) & (segments[:, :, None] == segments[:, None, :])
    plain = tiny.value_and_grads(lambda q, k, v: jnp.sum(out * dot_product_attention(q, k, v, mask, 0.4)), q, k, v)
    blocked = tiny.value_and_grads(lambda q, k, v: jnp.sum(out * blocked_attention(q, k, v, segments, 0.4)), q, k, v)
    tiny.assert_trees_close(blocked, plain, 1e-5)


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
