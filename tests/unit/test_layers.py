"""RMSNorm, RoPE and SwiGLU against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.models.layers import Mlp, activation, apply_rope, embed_tokens, gated_mlp, rms_norm, rope_table


def test_rms_norm():
    rng = np.random.default_rng(0)
    x, scale = rng.normal(size=(2, 3, 8)).astype(np.float32) * 5, rng.normal(size=8).astype(np.float32)
    expected = x / np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=-1, keepdims=True) + 1e-2) * scale
    np.testing.assert_allclose(rms_norm(x, scale, 1e-2), expected, rtol=1e-6)


def test_rms_norm_is_computed_in_float32():
    x = jnp.full((1, 1, 4), 300.0, jnp.float16)  # its square is no float16
    y = rms_norm(x, jnp.ones(4), 1e-6)
    assert y.dtype == jnp.float16
    np.testing.assert_allclose(y, 1.0, rtol=1e-3)


def test_rope_rotates_the_pairs_i_and_i_plus_half():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 0, 1, 900, 2]])
    frequency = 100.0 ** (-np.arange(4) * 2 / 8)
    turn = np.exp(1j * positions[:, :, None, None] * frequency)
    rotated = (x[..., :4] + 1j * x[..., 4:]) * turn
    got = apply_rope(x, rope_table(positions, 8, 100.0))
    np.testing.assert_allclose(got, np.concatenate([rotated.real, rotated.imag], axis=-1), atol=2e-4)
    np.testing.assert_allclose(got[0, 0], x[0, 0])  # position 0 turns nothing


def test_scores_of_rotated_queries_and_keys_depend_on_distance_only():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 1, 1, 16)).astype(np.float32)

    @jax.jit
    def score(query_at, key_at):
        q_turned = apply_rope(q, rope_table(query_at[None, None], 16, 10_000.0))
        return jnp.sum(q_turned * apply_rope(k, rope_table(key_at[None, None], 16, 10_000.0)))

    near = [float(score(jnp.asarray(i + 3), jnp.asarray(i))) for i in (0, 1, 10, 100)]
    np.testing.assert_allclose(near, near[0], atol=1e-4)
    far = [float(score(jnp.asarray(i), jnp.asarray(0))) for i in range(5)]
    assert np.ptp(far) > 0.1


def test_swiglu():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 4)).astype(np.float32)
    gate, up = rng.normal(size=(2, 4, 6)).astype(np.float32)
    down = rng.normal(size=(6, 4)).astype(np.float32)
    g = x @ gate
    expected = (g / (1 + np.exp(-g)) * (x @ up)) @ down
    np.testing.assert_allclose(gated_mlp(Mlp(gate, up, down), x, activation("silu", 0.0)), expected, atol=1e-5)


def test_embedding_takes_rows():
    table = jnp.arange(12.0).reshape(4, 3)
    got = embed_tokens(table, jnp.asarray([[2, 0]]), jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got.astype(jnp.float32), [[[6, 7, 8], [0, 1, 2]]])
