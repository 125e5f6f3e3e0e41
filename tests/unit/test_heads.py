"""The scalar head: an affine map of hidden states, read at the last real token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from llmjax.models.heads import last_token, scalar_model_spec, scalars
from llmjax.models.transformer import hidden_states

both = pytest.mark.parametrize("cfg", tiny.MODELS.values(), ids=tiny.MODELS.keys())


@both
def test_scalars_are_an_affine_map_of_hidden_states(cfg):
    params, text = tiny.scalar_model(cfg), tiny.tokens(cfg, 2, 6)
    params = params.replace(bias=jnp.asarray([0.3]))
    x, _, _ = jax.jit(lambda p, t: hidden_states(p, t, cfg))(params.backbone, text)
    got, _ = jax.jit(lambda p, t: scalars(p, t, cfg))(params, text)
    assert got.shape == (2, 6) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, (np.asarray(x) @ np.asarray(params.weight))[..., 0] + 0.3, atol=1e-5)


@both
def test_heads_and_routers_round_no_factor(cfg):
    cfg = dataclasses.replace(cfg, layer_loop="unroll", dtype="bfloat16")
    program = str(jax.make_jaxpr(lambda p, t: scalars(p, t, cfg))(tiny.scalar_model(cfg), tiny.tokens(cfg, 2, 6)))
    assert program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == 1 + sum(cfg.sparse_layers)


@pytest.mark.parametrize("segments, last", [([1, 1, 1, 1], 3), ([1, 1, 0, 0], 1), ([0, 0, 1, 1], 3), ([0, 1, 1, 0], 2)])
def test_last_token_is_the_last_that_is_not_padding(segments, last):
    values = jnp.asarray([[10.0, 11.0, 12.0, 13.0]])
    assert last_token(values, jnp.asarray([segments])) == 10.0 + last


def test_the_value_at_the_last_token_is_taken_exactly():
    values = jnp.asarray([[1e8, 0.75, -1e8], [-3e7, 1e9, 0.75]])
    got = last_token(values, jnp.asarray([[1, 1, 0], [1, 1, 1]]))
    np.testing.assert_array_equal(got, np.float32([0.75, 0.75]))


def test_initial_head():
    specs = scalar_model_spec(tiny.DENSE)
    assert specs.weight.std == (tiny.DENSE.embed_dim + 1) ** -0.5
    assert specs.bias.constant == 0 and specs.weight.dtype == specs.bias.dtype == jnp.float32
