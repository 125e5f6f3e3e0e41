"""The ragged exchange on chosen routes: value and gradients, also of what is left when some is dropped.

XLA:CPU has no ragged all-to-all: a stand-in of the same meaning takes its place, which also checks that sizes and offsets fit.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from llmjax import sharding
from llmjax.models import expert_parallel
from llmjax.models.layers import activation
from llmjax.sharding import MeshConfig

B, T, D, F = 8, 6, 16, 4
MESHES = {
    "expert8": dict(expert=8),
    "expert4-data2": dict(expert=4, data=2),
    "fsdp2-expert2-tensor2": dict(fsdp=2, expert=2, tensor=2),
}
EVERY_KIND = "fsdp2-expert2-tensor2"
SILU = activation("silu", 0.0)
WRONG = -1000  # in place of the result where the arguments contradict each other


def gathered_ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`jax.lax.ragged_all_to_all`: every device sees everything and picks what is sent to it."""
    shared = (jax.lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets))
    operand_SN, from_SP, sizes_SP, to_SP = shared
    me, row_M = jax.lax.axis_index(axis_name), jnp.arange(output.shape[0])
    consistent = jnp.all(sizes_SP[:, me] == recv_sizes)
    for operand_N, start, size, to in zip(operand_SN, from_SP[:, me], sizes_SP[:, me], to_SP[:, me]):
        consistent &= (start >= 0) & (start + size <= operand.shape[0])
        consistent &= (to >= 0) & (to + size <= output.shape[0])
        sent_M = (row_M >= to) & (row_M < to + size)
        rows = operand_N.at[row_M - to + start].get(mode="clip")
        output = jnp.where(sent_M.reshape(-1, *[1] * (output.ndim - 1)), rows, output)
    return jnp.where(consistent, output, WRONG)


@pytest.fixture
def calls(monkeypatch):
    """Takes the ragged form with the stand-in above; a list of the sizes of its receive buffers."""
    sizes = []

    def stand_in(operand, output, *args, axis_name):
        sizes.append(output.shape[0])
        return gathered_ragged_all_to_all(operand, output, *args, axis_name=axis_name)

    monkeypatch.setattr(expert_parallel, "ragged_all_to_all", stand_in)
    monkeypatch.setattr(expert_parallel, "padded_exchange", expert_parallel.ragged_exchange)
    return sizes


def chosen(kind: str, experts: int, choices: int) -> np.ndarray:
    """Distinct experts of each token, [B, T, C]; `experts` stands for none."""
    rng = np.random.default_rng(experts + choices)
    scores = rng.gumbel(size=(B, T, experts))
    if kind == "uneven":
        scores += 3.0 * rng.normal(size=experts)
    if kind == "empty":  # every device but the last one, and half of the experts of that
        scores[..., : -max(choices, experts // 16)] = -np.inf
    ids = np.argsort(-scores, axis=-1)[..., :choices]
    if kind == "one":
        ids[..., 0], ids[..., 1:] = 3, experts
    ids[rng.random((B, T)) < 0.2] = experts
    return ids.astype(np.int32)


def arrays(experts: int, choices: int):
    rng = np.random.default_rng(0)
    shapes = (B, T, D), (B, T, choices), (experts, D, F), (experts, D, F), (experts, F, D)
    return [jnp.asarray(rng.normal(size=shape) * 0.5, jnp.float32) for shape in shapes]


def on_mesh(ids, args, mesh: str, factor: float = 0.0):
    """((sum of squares of y, dropped [B, T]), gradients of the arrays)."""
    exchange = partial(expert_parallel.exchanged_experts, act=SILU, factor=factor)
    mesh = sharding.make_mesh(MeshConfig(**MESHES[mesh]))

    def loss(x, weights, *experts):
        run = sharding.local(exchange, ["BTD", "BTC", "BTC", "EDF", "EDF", "EFD"], ["BTD", "BT"])
        y, dropped = run(x, ids, weights, *experts)
        return jnp.sum(jnp.square(y)), dropped

    with sharding.use_mesh(mesh):
        return jax.device_get(jax.jit(jax.value_and_grad(loss, argnums=range(5), has_aux=True))(*args))


def every_expert(ids, args):
    """The same from every expert on every token, and a weight of 0 where it was not chosen."""

    def loss(x, weights, gate, up, down):
        weights_BTE = jnp.einsum("btc,btce->bte", weights, jax.nn.one_hot(ids, gate.shape[0]))
        hidden = jax.nn.silu(jnp.einsum("btd,edf->btef", x, gate)) * jnp.einsum("btd,edf->btef", x, up)
        return jnp.sum(jnp.square(jnp.einsum("btef,efd,bte->btd", hidden, down, weights_BTE)))

    return jax.device_get(tiny.value_and_grads(loss, *args))


KINDS = ("even", "uneven", "empty", "one")
SIZES = ((8, 1), (8, 2), (8, 8), (64, 1), (64, 8))
QUICK_SIZES = [
    ((8, 2), "empty"), ((64, 8), "uneven"),
]  # fmt: skip
QUICK_ROOM = [("expert8", 0.25), (EVERY_KIND, 0.7)]


@pytest.mark.parametrize("size, kind", tiny.crossed(QUICK_SIZES, SIZES, KINDS))
def test_invariant_24_a_ragged_exchange_gives_what_one_device_gives(calls, size, kind):
    experts, choices = size
    mesh = "expert4-data2" if (experts, choices) == (8, 2) else "expert8"
    ids, args = chosen(kind, experts, choices), arrays(experts, choices)
    (value, dropped), grads = on_mesh(ids, args, mesh)
    want_value, want_grads = every_expert(ids, args)
    np.testing.assert_allclose(value, want_value, rtol=1e-5)
    tiny.assert_trees_close(grads, want_grads, 1e-5)
    assert calls and not np.any(dropped)


@pytest.mark.parametrize("mesh, factor", tiny.crossed(QUICK_ROOM, MESHES, (0.25, 0.7, 1.0, 100.0)))
def test_invariant_24_what_exceeds_the_room_is_dropped_and_counted(calls, mesh, factor):
    experts, choices = 16, 2
    ids, args = chosen("uneven", experts, choices), arrays(experts, choices)
    shards, tensor = MESHES[mesh]["expert"], MESHES[mesh].get("tensor", 1)
    rows = B // (8 // tensor) * T
    room = min(shards * rows * min(choices, experts // shards), math.ceil(factor * rows * choices))
    kept = ids.copy()
    for group in np.split(kept.reshape(-1), 8 // tensor // shards):  # of devices that exchange with each other, in order
        for p in range(shards):
            group[np.flatnonzero(group // (experts // shards) == p)[room:]] = experts
    (value, dropped), grads = on_mesh(ids, args, mesh, factor)
    want_value, want_grads = every_expert(kept, args)
    np.testing.assert_array_equal(dropped, np.sum(kept != ids, axis=-1))
    np.testing.assert_allclose(value, want_value, rtol=1e-5)
    tiny.assert_trees_close(grads, want_grads, 1e-5)
    assert (factor < 1) <= np.any(dropped) and room in calls and (factor < 100 or not np.any(dropped))


@pytest.mark.skipif(jax.default_backend() == "cpu", reason="XLA:CPU has no ragged-all-to-all")
def test_invariant_24_the_real_exchange():
    ids, args = chosen("uneven", 16, 2), arrays(16, 2)
    (value, dropped), grads = on_mesh(ids, args, "expert8")
    want_value, want_grads = every_expert(ids, args)
    np.testing.assert_allclose(value, want_value, rtol=1e-5)
    tiny.assert_trees_close(grads, want_grads, 1e-5)
    assert not np.any(dropped)
