"""Choosing tokens: the sets that top-k and nucleus keep, and how often each token comes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.config import validate
from llmjax.errors import UserError
from llmjax.generation.sampling import SamplingConfig, restrict, sample

draw = jax.jit(sample, static_argnames="cfg")
V = 12


def some_logits(rows: int = 6) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, V)).astype(np.float32) * 2


def softmax(logits):
    exps = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exps / exps.sum(axis=-1, keepdims=True)


def kept_by_numpy(logits, top_k, top_p):
    kept = np.zeros(logits.shape, bool)
    for row, values in enumerate(logits):
        order = np.argsort(-values)[: top_k or V]
        probs = softmax(values[order])
        total = 0.0
        for token, prob in zip(order, probs):
            if total >= top_p:
                break
            kept[row, token] = True
            total += prob
    return kept


@pytest.mark.parametrize("top_k", [0, 1, 3, V, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.01])
def test_kept_tokens(top_k, top_p):
    logits = some_logits()
    got = np.asarray(restrict(jnp.asarray(logits), top_k, top_p))
    kept = kept_by_numpy(logits, top_k, top_p)
    np.testing.assert_array_equal(np.isfinite(got), kept)
    np.testing.assert_array_equal(got[kept], logits[kept])


TIES = [(2, 1.0, [1, 2]), (3, 1.0, [1, 2, 3]), (0, 0.5, [1, 2]), (0, 0.51, [1, 2, 3]), (4, 0.2, [1]), (3, 0.6, [1, 2])]


@pytest.mark.parametrize("top_k, top_p, kept", TIES)
def test_of_equal_logits_no_more_are_kept_than_are_wanted(top_k, top_p, kept):
    logits = jnp.asarray([[-99.0, 1.0, 1.0, 1.0, 1.0, -99.0]] * 2)  # four equal ones of a quarter each
    assert [list(np.flatnonzero(np.isfinite(row))) for row in restrict(logits, top_k, top_p)] == [kept, kept]


def test_tokens_come_as_often_as_their_probability():
    logits, cfg = some_logits(1), SamplingConfig(temperature=0.7, top_k=6, top_p=0.9)
    rows = 20_000
    keys = jax.random.split(jax.random.key(0), rows)
    tokens, log_probs = draw(jnp.broadcast_to(logits, (rows, V)), keys, cfg=cfg)
    kept = kept_by_numpy(logits / 0.7, 6, 0.9)[0]
    expected = np.where(kept, np.exp(logits[0] / 0.7), 0)
    expected /= expected.sum()
    counts = np.bincount(tokens, minlength=V)
    assert counts[~kept].sum() == 0 and kept.sum() > 2
    np.testing.assert_allclose(counts / rows, expected, atol=4 * 0.5 / np.sqrt(rows))
    np.testing.assert_allclose(log_probs, np.log(expected[np.asarray(tokens)]), atol=1e-5)


def test_greedy_takes_the_likeliest_token_and_its_log_probability():
    logits = some_logits()
    keys = jax.random.split(jax.random.key(0), len(logits))
    tokens, log_probs = draw(jnp.asarray(logits), keys, cfg=SamplingConfig(temperature=0.0, top_k=1))
    np.testing.assert_array_equal(tokens, logits.argmax(axis=-1))
    np.testing.assert_allclose(log_probs, np.log(softmax(logits).max(axis=-1)), atol=1e-5)


def test_equal_keys_draw_equal_tokens_and_different_keys_do_not():
    logits = jnp.zeros((64, V))
    same = jnp.broadcast_to(jax.random.key(3), (64,))
    tokens, _ = draw(logits, same, cfg=SamplingConfig())
    assert len(np.unique(tokens)) == 1
    tokens, _ = draw(logits, jax.random.split(jax.random.key(3), 64), cfg=SamplingConfig())
    assert len(np.unique(tokens)) > V // 2


@pytest.mark.parametrize(
    "fields", [dict(max_new_tokens=0), dict(temperature=-1.0), dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.1)]
)
def test_impossible_settings_are_refused(fields):
    with pytest.raises(UserError, match=f"{next(iter(fields))}="):
        validate(SamplingConfig(**fields))
