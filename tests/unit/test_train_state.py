"""The compiled step: it learns, it updates what it should, and every part lies where it should."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from llmjax import sharding
from llmjax.config import validate
from llmjax.errors import UserError
from llmjax.models.spec import ParamSpec, param
from llmjax.models.transformer import transformer_spec
from llmjax.objectives.lm import lm_loss
from llmjax.sharding import MeshConfig
from llmjax.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer, short_of_peak
from llmjax.training.program import train_program
from llmjax.training.rng import fold_purpose, key_for
from llmjax.training.state import abstract_state, init_state, make_train_step

SPECS = {
    "matrix": ParamSpec((4, 8), ("embed", "mlp"), std=1.0),
    "scale": ParamSpec((8,), (None,), constant=1.0),
}


def quadratic(params, batch, key):
    """Its gradient is params - batch."""
    loss = sum(0.5 * jnp.sum(jnp.square(params[name] - batch[name])) for name in params)
    return loss, {"loss": loss}


def test_training_learns_a_batch_by_heart():
    cfg = tiny.DENSE
    specs, batch = transformer_spec(cfg), tiny.lm_batch(cfg, 4, 8)
    tx = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=0, schedule="constant"), 60, specs)
    abstract = abstract_state(specs, tx, None)
    state = init_state(tiny.language_model(cfg), tx, abstract)
    step = make_train_step(lambda p, b, key: lm_loss(p, b, key, cfg), tx, abstract)
    losses = []
    for _ in range(60):
        state, metrics = step(state, batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    assert int(state.step) == 60
    assert losses[-1] < 0.2 * losses[0], losses[::10]


def test_one_step_is_the_optimizer_applied_to_the_gradient():
    params, target = tiny.draw(SPECS), tiny.draw(SPECS, 1)
    tx = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(0.5))
    abstract = abstract_state(SPECS, tx, None)
    state, metrics = make_train_step(quadratic, tx, abstract)(init_state(params, tx, abstract), target, None)
    grads = jax.tree.map(lambda p, t: np.asarray(p - t), params, target)
    norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)  # before clipping
    expected = jax.tree.map(lambda p, g: p - 0.5 * 1e-3 * g / norm, params, grads)
    tiny.assert_trees_close(state.params, expected, 1e-6)
    assert state.step == 1 and state.step.dtype == jnp.int32


def test_a_state_owns_its_parameters():
    params = tiny.draw(SPECS)
    tx = optax.sgd(0.1)
    abstract = abstract_state(SPECS, tx, None)
    state = init_state(params, tx, abstract)
    make_train_step(quadratic, tx, abstract)(state, tiny.draw(SPECS, 1), None)
    assert state.params["matrix"].is_deleted()  # donated
    assert np.all(np.isfinite(params["matrix"]))  # not taken with it


def test_an_abstract_state_is_the_shape_and_place_of_the_real_one():
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=4))
    tx = make_optimizer(OptimizerConfig(), 10, SPECS)
    for place in (None, mesh):
        abstract = abstract_state(SPECS, tx, place)
        state = init_state(tiny.draw(SPECS), tx, abstract)
        described = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state)
        assert described == jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), abstract)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == (4, 8)]
    assert len(moments) == 2 and all(m.sharding.spec == P(("fsdp", "expert"), "tensor") for m in moments)


def test_weight_decay_is_on_matrices_only():
    cfg = OptimizerConfig(learning_rate=0.1, warmup_steps=0, schedule="constant", weight_decay=0.5)
    specs = SPECS | {"bias": ParamSpec((8,), (None,), std=1.0)}
    params, tx = tiny.draw(specs), make_optimizer(cfg, 10, specs)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_allclose(updates["matrix"], -0.1 * 0.5 * params["matrix"], rtol=1e-6)
    assert np.all(updates["scale"] == 0) and np.all(updates["bias"] == 0)


SCHEDULES = ["cosine", "linear", "constant"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rate(schedule):
    """By hand: from 0 in a straight line to the peak, then from the peak down."""
    cfg = OptimizerConfig(learning_rate=2.0, warmup_steps=10, schedule=schedule, final_fraction=0.1)
    rate = learning_rate_schedule(cfg, 110)
    np.testing.assert_allclose([rate(i) for i in range(11)], np.arange(11) / 5, rtol=1e-6)
    np.testing.assert_allclose(rate(60), {"cosine": 1.1, "linear": 1.1, "constant": 2.0}[schedule], rtol=1e-5)
    np.testing.assert_allclose(rate(110), 2.0 if schedule == "constant" else 0.2, rtol=1e-5)
    assert float(learning_rate_schedule(dataclasses.replace(cfg, warmup_steps=0), 110)(0)) == 2.0


def test_stable_then_decay():
    """By hand: the peak until a fifth of all updates is left, then 1 - (1 - 0.1) sqrt(share of the decay) of it."""
    cfg = OptimizerConfig(learning_rate=2.0, warmup_steps=10, schedule="wsd", final_fraction=0.1, decay_fraction=0.2)
    rate = learning_rate_schedule(cfg, 100)
    np.testing.assert_allclose([rate(i) for i in (5, 10, 40, 80)], [1.0, 2.0, 2.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose([rate(i) for i in (85, 90, 100)], [2 * (1 - 0.9 * s**0.5) for s in (0.25, 0.5, 1.0)], rtol=1e-5)
    longer = learning_rate_schedule(cfg, 200)
    np.testing.assert_array_equal([rate(i) for i in range(81)], [longer(i) for i in range(81)])


@pytest.mark.parametrize(("warmup", "steps"), [(0, 12), (1, 12), (3, 12), (11, 12)])
def test_learning_rates_are_those_of_optax(warmup, steps):
    cfg = OptimizerConfig(learning_rate=3e-3, warmup_steps=warmup, final_fraction=0.2)
    rate = learning_rate_schedule(cfg, steps)
    ours = optax.warmup_cosine_decay_schedule(0.0, 3e-3, warmup, steps, 0.2 * 3e-3)
    np.testing.assert_allclose([rate(i) for i in range(steps + 3)], [ours(i) for i in range(steps + 3)], rtol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize(("warmup", "steps"), [(0, 12), (1, 12), (3, 12), (12, 12), (20, 12)])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rates_are_those_of_transformers(schedule, warmup, steps):
    torch = pytest.importorskip("torch")
    optimization = pytest.importorskip("transformers.optimization")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = {
        "cosine": lambda: optimization.get_cosine_schedule_with_warmup(optimizer, warmup, steps),
        "linear": lambda: optimization.get_linear_schedule_with_warmup(optimizer, warmup, steps),
        "constant": lambda: optimization.get_constant_schedule_with_warmup(optimizer, warmup),
    }[schedule]().lr_lambdas[0]
    cfg = OptimizerConfig(learning_rate=1.0, warmup_steps=warmup, schedule=schedule, final_fraction=0.0)
    rate = learning_rate_schedule(cfg, steps)
    np.testing.assert_allclose([rate(i) for i in range(steps)], [theirs(i) for i in range(steps)], rtol=1e-5, atol=1e-7)


@pytest.mark.parity
@pytest.mark.parametrize(("warmup", "steps"), [(0, 20), (4, 20), (10, 40)])
def test_stable_then_decay_is_that_of_transformers(warmup, steps):
    torch = pytest.importorskip("torch")
    optimization = pytest.importorskip("transformers.optimization")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = optimization.get_wsd_schedule(
        optimizer, warmup, steps // 4, num_training_steps=steps, decay_type="1-sqrt", min_lr_ratio=0.1
    ).lr_lambdas[0]
    cfg = OptimizerConfig(learning_rate=1.0, warmup_steps=warmup, schedule="wsd", final_fraction=0.1, decay_fraction=0.25)
    rate = learning_rate_schedule(cfg, steps)
    later = range(warmup, steps)  # their warm-up begins at the ratio
    np.testing.assert_allclose([rate(i) for i in later], [theirs(i) for i in later], rtol=1e-5)


@pytest.mark.parametrize(("warmup", "steps", "share"), [(20, 10, "45%"), (10, 10, "90%"), (100, 1, "0%")])
def test_a_warm_up_that_does_not_end_is_said(warmup, steps, share):
    cfg = OptimizerConfig(warmup_steps=warmup)
    rates = [float(learning_rate_schedule(cfg, steps)(i)) for i in range(steps)]
    np.testing.assert_allclose(rates, cfg.learning_rate * np.arange(steps) / warmup, rtol=1e-6)
    assert short_of_peak(cfg, steps) == (
        f"warmup_steps={warmup} for {steps} updates: the learning rate rises to {share} of its peak only; lower "
        "optimizer.warmup_steps to reach it"
    )
    assert not short_of_peak(cfg, warmup + 1) and not short_of_peak(OptimizerConfig(warmup_steps=0), 1)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_the_learning_rate_of_each_update_is_reported(clip):
    """Also where the state's own step counts something else."""
    cfg = OptimizerConfig(learning_rate=2.0, warmup_steps=3, grad_clip=clip)
    specs = {"w": ParamSpec((3, 3), (None, None), std=1.0)}
    batch = {"x": jax.ShapeDtypeStruct((3, 3), jnp.float32)}

    def loss(params, batch, key):
        value = jnp.sum(jnp.square(params["w"] - batch["x"]))
        return value, {"loss": value}

    program = train_program(loss, specs, cfg, 8, batch, None, tokens=1, flops_per_token=0.0)
    state, rates = program.init(tiny.draw(specs)), []
    for _ in range(8):
        state, metrics = program.fn(dataclasses.replace(state, step=jnp.int32(0)), {"x": jnp.ones((3, 3))}, jax.random.key(0))
        rates.append(float(metrics["learning_rate"]))
    schedule = learning_rate_schedule(cfg, 8)
    np.testing.assert_allclose(rates, [schedule(i) for i in range(8)], rtol=1e-6)


@pytest.mark.parametrize("fields", [dict(learning_rate=0.0), dict(warmup_steps=-1), dict(b2=1.5)])
def test_impossible_optimizers_are_refused(fields):
    with pytest.raises(UserError, match=f"{next(iter(fields))}="):
        validate(OptimizerConfig(**fields))


def test_keys_differ_by_purpose_and_agree_with_themselves():
    keys = [key_for(0, "ppo", 1), key_for(0, "ppo", 2), key_for(0, "sft", 1), key_for(1, "ppo", 1), key_for(0)]
    keys += [fold_purpose(keys[0], "sample"), fold_purpose(keys[0], "shuffle")]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == len(keys)
    assert jnp.all(jax.random.key_data(key_for(0, "ppo", 1)) == jax.random.key_data(keys[0]))


def test_two_models_are_clipped_apart():
    """A critic's huge gradient leaves the policy's as it is; together it would shrink it to nearly nothing."""
    specs = {"policy": param((3,), (None,)), "critic": param((3,), (None,))}
    params = {name: jnp.zeros(3) for name in specs}
    small, huge = jnp.array([0.3, 0.4, 0.0]), jnp.array([300.0, 400.0, 0.0])
    cfg = OptimizerConfig(grad_clip=1.0, warmup_steps=0, weight_decay=0.0)

    def clipped(apart):
        clip = make_optimizer(cfg, 10, specs, (1.0, 1.0) if apart else ())
        _, state = clip.update({"policy": small, "critic": huge}, clip.init(params), params)
        return optax.tree_utils.tree_get(state, "mu")

    apart, together = clipped(True), clipped(False)
    np.testing.assert_allclose(apart["policy"], 0.1 * small, rtol=1e-6)
    np.testing.assert_allclose(apart["critic"], 0.1 * huge / 500, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(together["policy"]), 0.1 * 0.5 / 500, rtol=1e-4)
