"""The sparse layer: closed forms of its losses, and what it must be equal to."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from llmjax.config import validate
from llmjax.errors import UserError
from llmjax.models.config import MoEConfig
from llmjax.models.layers import Mlp
from llmjax.models.moe import Moe, moe_layer, moe_spec, router_loss, router_metrics, router_stats
from llmjax.models.routers import route

CFG = tiny.SPARSE.moe
E = CFG.num_experts
layer = jax.jit(moe_layer, static_argnames="cfg")


def layer_weights(seed: int = 0) -> Moe:
    return tiny.draw(moe_spec(tiny.SPARSE), seed)


def activations(rows: int = 3, length: int = 5, seed: int = 0):
    return np.random.default_rng(seed).normal(size=(rows, length, tiny.SPARSE.embed_dim)).astype(np.float32)


@partial(jax.jit, static_argnames="top_k")
def stats_of(logits, top_k: int = 2, valid=None):
    logits = jnp.asarray(logits, jnp.float32)
    routing = route(logits, MoEConfig(logits.shape[-1], top_k, renormalize=False))
    chosen = jnp.sum(jax.nn.one_hot(routing.ids, logits.shape[-1]), axis=2)
    return router_stats(logits, routing.probs, chosen, jnp.ones(logits.shape[:2], bool) if valid is None else valid)


# Routing


def test_renormalised_weights_sum_to_one_and_keep_their_proportions():
    logits = jnp.asarray(activations()[..., :E])
    routing = route(logits, CFG)
    ids, weights, probs = routing.ids, routing.weights, routing.probs
    np.testing.assert_allclose(jnp.sum(weights, axis=-1), 1.0, atol=1e-6)
    chosen = np.take_along_axis(np.asarray(probs), np.asarray(ids), axis=-1)
    np.testing.assert_allclose(weights[..., 0] / weights[..., 1], chosen[..., 0] / chosen[..., 1], rtol=1e-5)
    np.testing.assert_array_equal(ids, np.argsort(-np.asarray(logits), axis=-1)[..., :2])


def test_without_renormalisation_the_weights_are_the_probabilities():
    logits = jnp.asarray(activations()[..., :E])
    routing = route(logits, dataclasses.replace(CFG, renormalize=False))
    ids, weights = routing.ids, routing.weights
    softmax = np.exp(logits) / np.sum(np.exp(logits), axis=-1, keepdims=True)
    np.testing.assert_allclose(weights, np.take_along_axis(softmax, np.asarray(ids), axis=-1), rtol=1e-5)


def test_sigmoids_that_have_underflowed_weigh_nothing():
    cfg = MoEConfig(num_experts=4, top_k=2, scoring="sigmoid", renormalize=True)
    logits = jnp.full((1, 1, 4), -200.0)

    def total(logits):
        routing = route(logits, cfg)
        return jnp.sum(routing.weights) + jnp.sum(routing.probs)

    assert jax.value_and_grad(total)(logits)[0] == 0 and np.all(np.isfinite(jax.grad(total)(logits)))
    np.testing.assert_allclose(route(logits + 170, cfg).weights, 0.5, rtol=1e-4)  # e^-30: the 1e-18 is not seen


def test_ties_go_to_the_lower_expert():
    routing = route(jnp.zeros((1, 1, E)), CFG)
    ids, weights = routing.ids, routing.weights
    np.testing.assert_array_equal(ids, [[[0, 1]]])
    np.testing.assert_allclose(weights, 0.5)


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(num_experts=2, top_k=3), "top_k=3 must not exceed num_experts=2"),
        (dict(top_k=0), "top_k=0 must be positive"),
        (dict(mlp_dim=0), "mlp_dim=0"),
    ],
)
def test_impossible_routings_are_refused(fields, words):
    with pytest.raises(UserError, match=words):
        validate(MoEConfig(**fields))
    validate(MoEConfig(num_experts=2, top_k=1, renormalize=False))


# Losses and statistics


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_invariant_16_load_balance_is_one_when_tokens_and_probabilities_are_spread_evenly(top_k):
    base = 3.0 * (np.arange(E) < top_k)
    logits = np.stack([np.roll(base, shift) for shift in range(E)])[None]
    stats = stats_of(logits, top_k)
    np.testing.assert_allclose(stats.load, 1 / E, rtol=1e-6)
    np.testing.assert_allclose(stats.load_balance, 1.0, rtol=1e-6)


def test_invariant_16_load_balance_is_the_number_of_experts_at_collapse():
    logits = np.full((2, 3, E), -50.0)
    logits[..., 1] = 50.0
    stats = stats_of(logits, top_k=1)
    np.testing.assert_allclose(stats.load, [0, 1, 0, 0])
    np.testing.assert_allclose(stats.load_balance, E, rtol=1e-6)
    np.testing.assert_allclose(stats.entropy, 0.0, atol=1e-6)


def test_load_balance_is_experts_times_sum_of_fraction_times_probability():
    logits = activations()[..., :E]
    probs = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    chosen = np.argsort(-logits, axis=-1)[..., :2]
    fraction = np.bincount(chosen.ravel(), minlength=E) / chosen.size
    stats = stats_of(logits)
    np.testing.assert_allclose(stats.load, fraction, rtol=1e-6)
    np.testing.assert_allclose(stats.load_balance, E * np.sum(fraction * probs.mean(axis=(0, 1))), rtol=1e-5)
    np.testing.assert_allclose(stats.entropy, -np.mean(np.sum(probs * np.log(probs), axis=-1)), rtol=1e-5)
    np.testing.assert_allclose(stats.logit_norm, np.sqrt(np.mean(logits**2)), rtol=1e-5)


def test_invariant_16_load_balance_is_differentiated_through_the_probabilities_only():
    logits = jnp.asarray(activations()[..., :E])
    fraction = stats_of(logits).load

    def with_constant_fraction(logits):
        return E * jnp.sum(fraction * jnp.mean(jax.nn.softmax(logits), axis=(0, 1)))

    expected = jax.jit(jax.grad(with_constant_fraction))(logits)
    assert np.max(np.abs(expected)) > 1e-4
    np.testing.assert_allclose(jax.jit(jax.grad(lambda x: stats_of(x).load_balance))(logits), expected, atol=1e-8)


def test_invariant_17_z_loss():
    np.testing.assert_allclose(stats_of(np.zeros((1, 3, E))).z_loss, np.log(E) ** 2, rtol=1e-6)
    logits = activations()[..., :E]
    expected = np.mean(np.log(np.sum(np.exp(logits), axis=-1)) ** 2)
    np.testing.assert_allclose(stats_of(logits).z_loss, expected, rtol=1e-5)


def test_invariant_13_padding_changes_no_statistic():
    logits = activations(2, 6)[..., :E]
    valid = np.array([[True] * 4 + [False] * 2] * 2)
    padded = logits + 100.0 * ~valid[..., None] * np.arange(E)
    tiny.assert_trees_close(stats_of(padded, valid=valid), stats_of(logits[:, :4]), 1e-6)
    empty = stats_of(logits, valid=np.zeros((2, 6), bool))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(empty))


def test_invariant_13_padding_changes_no_statistic_of_the_model():
    params, text = tiny.language_model(tiny.SPARSE), tiny.tokens(tiny.SPARSE, 2, 6)
    _, _, alone = tiny.apply(params, text, cfg=tiny.SPARSE)
    segments = jnp.asarray([[1] * 6 + [0] * 6] * 2)
    _, _, padded = tiny.apply(
        params, np.pad(text, ((0, 0), (0, 6))), cfg=tiny.SPARSE,
        segment_ids_BT=segments, positions_BT=jnp.cumsum(segments, axis=1) - 1,
    )  # fmt: skip
    np.testing.assert_array_equal(padded.routes[:, :, :6], alone.routes)
    tiny.assert_trees_close(padded.replace(routes=None), alone.replace(routes=None), 1e-5)


def test_invariant_21_router_loss_and_metrics_are_of_all_layers():
    one, two = stats_of(activations(seed=1)[..., :E]), stats_of(activations(seed=2)[..., :E])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), one, two)
    cfg = MoEConfig(num_experts=E, load_balance_coef=0.3, z_loss_coef=0.07)
    expected = 0.3 * (one.load_balance + two.load_balance) / 2 + 0.07 * (one.z_loss + two.z_loss) / 2
    np.testing.assert_allclose(router_loss(stacked, cfg), expected, rtol=1e-6)
    metrics = router_metrics(stacked)
    np.testing.assert_allclose(metrics["moe/max_load"], E * max(one.load.max(), two.load.max()), rtol=1e-6)
    np.testing.assert_allclose(metrics["moe/load"][1, 2], two.load[2])
    for name in ("load_balance", "z_loss", "entropy", "logit_norm", "dropped"):
        np.testing.assert_allclose(metrics[f"moe/layer/{name}"], [getattr(one, name), getattr(two, name)], rtol=1e-6)
    np.testing.assert_allclose(metrics["moe/layer/max_load"], [E * one.load.max(), E * two.load.max()], rtol=1e-6)
    dead = stats_of(np.broadcast_to([3.0, 2.0, 1.0, 0.0], (1, 2, 4)))
    assert router_metrics(jax.tree.map(lambda leaf: leaf[None], dead))["moe/dead_experts"] == 2


# The layer


def test_the_layer_is_the_weighted_sum_of_the_chosen_experts():
    w, x = layer_weights(), activations()
    y, _ = layer(w, x, jnp.ones(x.shape[:2], jnp.int32), cfg=tiny.SPARSE)
    logits = x @ np.asarray(w.router)
    for row, place in np.ndindex(x.shape[:2]):
        chosen = np.argsort(-logits[row, place])[:2]
        gates = np.exp(logits[row, place, chosen])
        expected = np.zeros(x.shape[-1])
        for e, gate in zip(chosen, gates / gates.sum()):
            g = x[row, place] @ np.asarray(w.gate[e])
            expected += gate * (g / (1 + np.exp(-g)) * (x[row, place] @ np.asarray(w.up[e]))) @ np.asarray(w.down[e])
        np.testing.assert_allclose(y[row, place], expected, atol=1e-5)


def test_invariant_13_padding_reaches_no_expert():
    x = activations()
    segments = np.array([[1, 1, 1, 0, 0]] * 3, np.int32)
    y, _ = layer(layer_weights(), x, segments, cfg=tiny.SPARSE)
    assert np.all(y[:, 3:] == 0) and np.all(np.any(y[:, :3] != 0, axis=-1))

    def loss(w, x):
        return jnp.sum(jnp.square(moe_layer(w, x, jnp.asarray(segments), tiny.SPARSE)[0]))

    garbage = x + 100 * (segments == 0)[..., None]
    args = layer_weights(), x.astype(np.float32)
    clean = tiny.value_and_grads(loss, *args)
    dirty = tiny.value_and_grads(loss, args[0], garbage.astype(np.float32))
    tiny.assert_trees_close(dirty[1][0], clean[1][0], 1e-5)
    assert np.all(clean[1][1][:, 3:] == 0)


def test_invariant_08_permuting_tokens_permutes_outputs():
    w, x = layer_weights(), activations()
    ones = jnp.ones(x.shape[:2], jnp.int32)
    flat = x.reshape(-1, x.shape[-1])
    order = np.random.default_rng(0).permutation(len(flat))
    y, stats = layer(w, x, ones, cfg=tiny.SPARSE)
    permuted, permuted_stats = layer(w, flat[order].reshape(x.shape), ones, cfg=tiny.SPARSE)
    np.testing.assert_allclose(permuted.reshape(flat.shape), y.reshape(flat.shape)[order], atol=1e-6)
    close = ("load_balance", "z_loss", "load", "entropy", "logit_norm")
    tiny.assert_trees_close(*({name: getattr(s, name) for name in close} for s in (permuted_stats, stats)), 1e-5)


def test_invariant_12_a_row_does_not_depend_on_its_neighbours():
    w, x = layer_weights(), activations()
    ones = jnp.ones(x.shape[:2], jnp.int32)
    y, _ = layer(w, x, ones, cfg=tiny.SPARSE)
    other = np.concatenate([x[:1], 10 * activations(2, 5, seed=9)])
    np.testing.assert_allclose(layer(w, other, ones, cfg=tiny.SPARSE)[0][0], y[0], atol=1e-6)


def test_one_expert_with_one_choice_is_the_dense_model():
    one = MoEConfig(num_experts=1, top_k=1, mlp_dim=tiny.DENSE.mlp_dim, renormalize=False)
    cfg = dataclasses.replace(tiny.DENSE, moe=one)
    dense, text = tiny.language_model(tiny.DENSE), tiny.tokens(tiny.DENSE, 2, 6)
    mlp: Mlp = dense.blocks.mlp
    router = jnp.asarray(np.random.default_rng(0).normal(size=(cfg.num_layers, cfg.embed_dim, 1)), jnp.float32)
    moe = Moe(router=router, gate=mlp.gate[:, None], up=mlp.up[:, None], down=mlp.down[:, None])
    sparse = dense.replace(blocks=dense.blocks.replace(mlp=moe))
    np.testing.assert_allclose(tiny.logits(sparse, text, cfg), tiny.logits(dense, text, tiny.DENSE), atol=1e-5)


def test_invariant_09_equal_experts_are_the_dense_model():
    cfg = dataclasses.replace(tiny.DENSE, moe=MoEConfig(num_experts=4, top_k=2, mlp_dim=tiny.DENSE.mlp_dim))
    dense, text = tiny.language_model(tiny.DENSE), tiny.tokens(tiny.DENSE, 2, 6)
    copies = jax.tree.map(lambda leaf: jnp.repeat(leaf[:, None], 4, axis=1), dense.blocks.mlp)
    router = jnp.asarray(np.random.default_rng(0).normal(size=(cfg.num_layers, cfg.embed_dim, 4)), jnp.float32)
    moe = Moe(router=router, gate=copies.gate, up=copies.up, down=copies.down)
    sparse = dense.replace(blocks=dense.blocks.replace(mlp=moe))
    np.testing.assert_allclose(tiny.logits(sparse, text, cfg), tiny.logits(dense, text, tiny.DENSE), atol=1e-5)


def test_the_router_gets_a_gradient_through_its_gates():
    x = activations()
    ones = jnp.ones(x.shape[:2], jnp.int32)
    single = MoEConfig(num_experts=E, top_k=1, mlp_dim=12, renormalize=False)
    for moe in (CFG, single):
        cfg = dataclasses.replace(tiny.SPARSE, moe=moe)
        _, (grad, _) = tiny.value_and_grads(
            lambda w, x, cfg=cfg: jnp.sum(jnp.square(moe_layer(w, x, ones, cfg)[0])), layer_weights(), x
        )
        assert np.max(np.abs(grad.router)) > 1e-4
