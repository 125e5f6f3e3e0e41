"""Layers that exchange tokens by ragged all-to-all. XLA:CPU has none: a stand-in of the same meaning takes its place."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from llmjax import sharding
from llmjax.models import expert_parallel
from llmjax.models.config import MoEConfig
from llmjax.models.moe import moe_layer, moe_spec
from llmjax.models.routers import route
from llmjax.models.spec import shardings
from llmjax.sharding import MeshConfig

T = 6


def stand_in(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What `lax.ragged_all_to_all` documents, by gathering everything everywhere."""
    del recv_sizes
    me, rows = jax.lax.axis_index(axis_name), jnp.arange(operand.shape[0])
    gathered = (jax.lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets))
    for one, start, size, to in zip(*gathered, strict=True):
        mine = (rows >= start[me]) & (rows < start[me] + size[me])
        output = output.at[jnp.where(mine, rows - start[me] + to[me], output.shape[0])].set(one, mode="drop")
    return output


def config(num_experts=8, top_k=2, factor=0.0):
    moe = MoEConfig(
        num_experts, top_k, 4, renormalize=False, router_bias=True, expert_parallel="all_to_all", exchange_factor=factor
    )
    return dataclasses.replace(tiny.SPARSE, moe=moe)


def inputs():
    segments = np.ones((8, T), np.int32)
    segments[1, 4:] = 0
    return np.random.default_rng(0).normal(size=(8, T, tiny.SPARSE.embed_dim)).astype(np.float32), segments


def layer(cfg, mesh):
    """(w, x, segments) -> ((sum of squares, (y, fraction dropped)), gradients of w and x)."""

    def loss(w, x, segments):
        y, stats = moe_layer(w, x, segments, cfg)
        return jnp.sum(jnp.square(y)), (y, stats.dropped)

    grads = tiny.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))

    def run(w, x, segments):
        with sharding.use_mesh(mesh):
            batch = sharding.put_batch({"x": x, "segments": segments}, mesh)
            w = w if mesh is None else jax.device_put(w, shardings(moe_spec(cfg), mesh))
            return jax.device_get(grads(w, batch["x"], batch["segments"]))

    return run


@pytest.fixture
def ragged(monkeypatch):
    monkeypatch.setattr(expert_parallel, "padded_exchange", expert_parallel.ragged_exchange)
    monkeypatch.setattr(expert_parallel, "ragged_all_to_all", stand_in)


@pytest.mark.parametrize("mesh", [dict(expert=8), dict(fsdp=2, expert=2, tensor=2)], ids=str)
@pytest.mark.parametrize("num_experts, top_k", [(8, 1), (8, 2), (64, 8)])
def test_invariant_24_a_ragged_exchange_gives_what_one_device_gives(ragged, num_experts, top_k, mesh):
    cfg = config(num_experts, top_k)
    one, many = layer(cfg, None), layer(cfg, sharding.make_mesh(MeshConfig(**mesh)))
    w, (x, segments) = tiny.draw(moe_spec(cfg)), inputs()
    for push in (0.0, 2.0, 60.0):  # loads as they come; uneven; all tokens to the same
        w = w.replace(router_bias=-push * jnp.arange(num_experts) / num_experts)
        tiny.assert_trees_close(many(w, x, segments), one(w, x, segments), 1e-5)


def test_invariant_24_what_does_not_fit_is_counted_and_the_rest_is_right(ragged):
    cfg = config(factor=0.5)
    w, (x, segments) = tiny.draw(moe_spec(cfg)), inputs()
    (_, (y, fraction)), _ = layer(cfg, sharding.make_mesh(MeshConfig(expert=8)))(w, x, segments)
    routing = route(x @ w.router + w.router_bias, cfg.moe)
    room, used, want, dropped = 2 * T // 2, np.zeros(8, int), np.zeros_like(x), 0
    for row, t in np.ndindex(segments.shape):  # device by device: what earlier ones send comes first
        for e, weight in zip(np.asarray(routing.ids[row, t]), routing.weights[row, t]):
            if segments[row, t]:
                used[e] += 1
                dropped += used[e] > room
                hidden = jax.nn.silu(x[row, t] @ w.gate[e]) * (x[row, t] @ w.up[e])
                want[row, t] += weight * (hidden @ w.down[e]) * (used[e] <= room)
    assert 0 < dropped == round(float(fraction) * 2 * int(np.sum(segments)))
    np.testing.assert_allclose(y, want, atol=1e-5)


@pytest.mark.skipif(jax.default_backend() == "cpu", reason="XLA:CPU has no ragged-all-to-all")
def test_invariant_24_the_real_exchange():
    cfg, (x, segments) = config(), inputs()
    w = tiny.draw(moe_spec(cfg))
    many = layer(cfg, sharding.make_mesh(MeshConfig(expert=8)))
    tiny.assert_trees_close(many(w, x, segments), layer(cfg, None)(w, x, segments), 1e-5)
