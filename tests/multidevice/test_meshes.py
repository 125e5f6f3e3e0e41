"""The same loss, gradients, training and tokens on one device and on 8, however the mesh is cut."""

import dataclasses
from functools import cache, partial

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from llmjax import sharding
from llmjax.errors import UserError
from llmjax.generation.decode import Generation, generate
from llmjax.generation.sampling import SamplingConfig
from llmjax.models.config import MLAConfig, MoEConfig, RopeScaling
from llmjax.models.heads import scalar_model_spec
from llmjax.models.lora import LoRAConfig, adapt, lora_spec, merge
from llmjax.models.spec import init_params, shardings
from llmjax.models.transformer import transformer_spec
from llmjax.objectives.lm import lm_loss
from llmjax.objectives.policy import actor_critic_spec
from llmjax.objectives.reward import reward_loss
from llmjax.rl.algorithms import GRPO, PPO
from llmjax.rl.learner import Learner, Programs, policy_loss
from llmjax.rl.rollout import score_rollout
from llmjax.sharding import MeshConfig
from llmjax.training.optimizer import OptimizerConfig, make_optimizer
from llmjax.training.state import abstract_state, init_state, make_train_step

ROWS = 8
MESHES = {
    "data2-fsdp4": dict(data=2, fsdp=4),
    "fsdp2-expert2-tensor2": dict(fsdp=2, expert=2, tensor=2),
    "data4-tensor2": dict(data=4, tensor=2),
    "fsdp8": dict(fsdp=8),
    "expert4-data2": dict(expert=4, data=2),
}
EVERY_KIND = "fsdp2-expert2-tensor2"
ALGORITHM, TEMPERATURE = PPO(value_clip=0.3, kl_coef=0.1), 0.9
MODES = ("auto", "explicit")

# What families add to the two models that every other test uses.
FAMILIES = {
    "latent": dataclasses.replace(
        tiny.DENSE, num_layers=3, mla=MLAConfig(kv_lora_rank=8, q_lora_rank=8, nope_dim=6, rope_dim=4, v_dim=8),
        num_mtp_layers=1,
        moe=MoEConfig(
            num_experts=4, top_k=2, mlp_dim=12, scoring="sigmoid", selection_bias=True, num_groups=2, top_k_groups=1,
            routed_scaling=2.0, shared_mlp_dim=12, first_k_dense=1,
        ),
    ),
    "sinks": dataclasses.replace(
        tiny.SPARSE, sliding_window=3, global_every=2, attention_sinks=True, qkv_bias=True, out_bias=True,
        activation="clipped_silu", activation_limit=0.5, moe=dataclasses.replace(
            tiny.SPARSE.moe, router_bias=True, expert_bias=True),
    ),
    "norms": dataclasses.replace(
        tiny.DENSE, sliding_window=3, global_every=2, local_rope_theta=100.0, qk_norm="full", post_norms=True,
        norm_offset=1.0, scale_embedding=True, activation="gelu", attention_softcap=2.0, logit_softcap=3.0,
        rope_scaling=RopeScaling("yarn", factor=4.0, original_length=8),
    ),
}  # fmt: skip
# Other ways for tokens and experts to meet; the noise of a router is drawn alike on every mesh.


def sparse(**fields):
    return dataclasses.replace(tiny.SPARSE, moe=dataclasses.replace(tiny.SPARSE.moe, **fields))


DISPATCHES = {
    "exchange": sparse(expert_parallel="all_to_all"),
    "exchange-many": sparse(expert_parallel="all_to_all", num_experts=64, top_k=8, mlp_dim=4),
    "exchange-one": sparse(expert_parallel="all_to_all", top_k=1, renormalize=False),
    "many": sparse(num_experts=64, top_k=8, mlp_dim=4),
    "capacity": sparse(capacity_factor=0.75, sequence_balance_coef=0.1),
    "experts-choose": sparse(router="expert_choice"),
    "hash": sparse(router="hash"),
    "noise": sparse(router_noise=2.0, router_jitter=0.3),
    "interleaved": dataclasses.replace(sparse(every=2, first_k_dense=1), num_layers=4),
}
MODELS = tiny.MODELS | FAMILIES | DISPATCHES


def model_config(model: str, loop: str = "unroll"):
    return dataclasses.replace(MODELS[model], layer_loop=loop)


def objective(name: str, cfg):
    """(specs, loss, batch) of one objective."""
    if name == "lm":
        return transformer_spec(cfg), lm_loss, tiny.lm_batch(cfg, ROWS, 8)
    if name == "reward":
        return scalar_model_spec(cfg), reward_loss, tiny.rankings(cfg, ROWS, 3, 6)
    loss = partial(policy_loss, algorithm=ALGORITHM, temperature=TEMPERATURE)
    return actor_critic_spec(cfg), loss, tiny.experience(cfg, ROWS, 3, 5)


def make(mesh: str, mode: str):
    return sharding.make_mesh(MeshConfig(**MESHES[mesh], mode=mode))


def place(params, specs, mesh):
    return params if mesh is None else jax.device_put(params, shardings(specs, mesh))


def metrics_loss_and_grads(name: str, cfg, mesh):
    specs, loss, batch = objective(name, cfg)
    params = place(tiny.draw(specs), specs, mesh)
    step = jax.jit(jax.value_and_grad(lambda p, b: loss(p, b, jax.random.key(3), cfg=cfg), has_aux=True))
    with sharding.use_mesh(mesh):
        (value, metrics), grads = step(params, sharding.put_batch(batch, mesh))
    return jax.device_get((metrics, value, grads))


@cache
def on_one_device(name: str, model: str):
    return metrics_loss_and_grads(name, model_config(model), None)


# One combined mesh, and each axis alone; the objectives and loops that share their code are not crossed with everything.
QUICK = [
    ("lm", EVERY_KIND, "auto", "moe", "unroll"),
    ("lm", "data2-fsdp4", "auto", "dense", "unroll"),
    ("lm", "data4-tensor2", "explicit", "dense", "unroll"),
    ("lm", "expert4-data2", "explicit", "moe", "unroll"),
    ("reward", EVERY_KIND, "auto", "dense", "unroll"),
    ("ppo", EVERY_KIND, "auto", "dense", "unroll"),
]
CASES = tiny.crossed(QUICK, ("lm", "reward", "ppo"), MESHES, MODES, tiny.MODELS, ("unroll", "scan"))


@pytest.mark.parametrize("name, mesh, mode, model, loop", CASES)
def test_loss_metrics_and_gradients(name, mesh, mode, model, loop):
    metrics, loss, grads = metrics_loss_and_grads(name, model_config(model, loop), make(mesh, mode))
    expected_metrics, expected_loss, expected_grads = on_one_device(name, model)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for key, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-4, atol=1e-5, err_msg=key)
    largest = max(float(np.max(np.abs(leaf))) for leaf in jax.tree.leaves(expected_grads))
    paths, _ = jax.tree_util.tree_flatten_with_path(expected_grads)
    for (path, want), got in zip(paths, jax.tree.leaves(grads)):
        worst = np.max(np.abs(got - want)) / largest
        assert worst <= 1e-5, f"{jax.tree_util.keystr(path)}: {worst:.1e} of the largest gradient"


KINDS = (*FAMILIES, "interleaved")
QUICK_FAMILIES = [("norms", "auto", "scan")]


@pytest.mark.parametrize("model, mode, loop", tiny.crossed(QUICK_FAMILIES, KINDS, MODES, ("unroll", "scan")))
def test_families(model, mode, loop):
    test_loss_metrics_and_gradients("lm", EVERY_KIND, mode, model, loop)


QUICK_DISPATCHES = [("exchange-many", "expert4-data2", "auto")]


@pytest.mark.parametrize("model, mesh, mode", tiny.crossed(QUICK_DISPATCHES, DISPATCHES, (EVERY_KIND, "expert4-data2"), MODES))
def test_invariant_23_dispatches(model, mesh, mode):
    test_loss_metrics_and_gradients("lm", mesh, mode, model, "unroll")


WRITERS = (*FAMILIES, "exchange", "capacity", "hash", "noise")


@pytest.mark.parametrize("model, mode", tiny.crossed([], WRITERS, MODES))
def test_families_and_dispatches_generate_the_same_tokens(model, mode):
    cfg = model_config(model)
    np.testing.assert_array_equal(answers(cfg, make(EVERY_KIND, mode)).tokens, answers_on_one_device(cfg).tokens)


# Training


def trajectory(cfg, mesh):
    """Losses of three updates and the parameters after them."""
    specs = transformer_spec(cfg)
    # A large eps: AdamW's first updates are the signs of gradients, and those of rounding errors are arbitrary.
    tx = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=0, eps=1e-2), 10, specs)
    abstract = abstract_state(specs, tx, mesh)
    batches = [sharding.put_batch(tiny.lm_batch(cfg, ROWS, 8, seed=i), mesh) for i in range(3)]
    key = jax.random.key(0)
    with sharding.use_mesh(mesh):
        state = init_state(place(tiny.draw(specs), specs, mesh), tx, abstract)
        step = make_train_step(lambda p, b, key: lm_loss(p, b, key, cfg), tx, abstract)
        step = step.lower(state, batches[0], key).compile()
        losses = []
        for batch in batches:
            state, metrics = step(state, batch, key)
            losses.append(float(metrics["loss"]))
        places = jax.tree.map(lambda x: x.sharding, abstract)
        assert jax.tree.map(lambda x: x.sharding, state) == places  # nothing moved
    return losses, jax.device_get(state.params)


@cache
def trajectory_on_one_device(model: str):
    return trajectory(model_config(model), None)


TRAINED = (("data2-fsdp4", "dense"), (EVERY_KIND, "moe"))


@pytest.mark.parametrize("where, mode", tiny.crossed([(TRAINED[0], "auto")], TRAINED, MODES))
def test_three_training_steps(where, mode):
    mesh, model = where
    losses, params = trajectory(model_config(model), make(mesh, mode))
    expected_losses, expected_params = trajectory_on_one_device(model)
    assert abs(expected_losses[2] - expected_losses[0]) > 1e-3
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    tiny.assert_trees_close(params, expected_params, 1e-5)


@cache
def lora_step(model: str, mesh_name: str | None, mode: str = "auto"):
    """Loss, gradients of the updates and merged parameters of a model with LoRA."""
    cfg, lora, mesh = model_config(model), LoRAConfig(rank=2, alpha=6.0), make(mesh_name, mode) if mesh_name else None
    updates = place(tiny.updates(cfg, lora), lora_spec(cfg, lora), mesh)
    base = place(tiny.language_model(cfg), transformer_spec(cfg), mesh)
    batch = sharding.put_batch(tiny.lm_batch(cfg, ROWS, 8), mesh)

    def loss(updates, base):
        return lm_loss(adapt(base, updates, lora), batch, None, cfg)[0]

    with sharding.use_mesh(mesh):
        value, grads = jax.jit(jax.value_and_grad(loss))(updates, base)
        merged = jax.jit(merge, static_argnums=(2, 3))(base, updates, lora, cfg)
    if mesh is not None:
        stored = jax.tree.leaves(shardings(transformer_spec(cfg), mesh))
        assert all(x.sharding.is_equivalent_to(where, x.ndim) for x, where in zip(jax.tree.leaves(merged), stored))
    return jax.device_get((value, grads, merged))


QUICK_LORA = [("dense", "explicit")]


@pytest.mark.parametrize("model, mode", tiny.crossed(QUICK_LORA, ("dense", "moe", *FAMILIES), MODES))
def test_lora(model, mode):
    (loss, grads, merged), (want_loss, want_grads, want_merged) = lora_step(model, EVERY_KIND, mode), lora_step(model, None)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
    tiny.assert_trees_close(grads, want_grads, 1e-5)
    tiny.assert_trees_close(merged, want_merged, 1e-5)


# Generation and scoring


def prompts():
    segments = (np.arange(5) >= np.arange(ROWS)[:, None] % 4).astype(np.int32)
    return {"tokens": tiny.tokens(tiny.DENSE, ROWS, 5), "segment_ids": segments}


def answers(cfg, mesh):
    """Sampled answers."""
    specs = transformer_spec(cfg)
    batch, keys = sharding.put_batch(prompts(), mesh), jax.random.split(jax.random.key(0), ROWS)
    keys = keys if mesh is None else jax.device_put(keys, NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES)))
    options = dict(cfg=cfg, sampling=SamplingConfig(max_new_tokens=6), stop_ids=(7, 8), pad_id=0)
    with sharding.use_mesh(mesh):
        answer = jax.jit(partial(generate.__wrapped__, **options))
        return jax.device_get(answer(place(tiny.draw(specs), specs, mesh), batch["tokens"], batch["segment_ids"], keys))


def experience(cfg, mesh):
    """What PPO learns from: made of the answers of one device, but scored on the mesh."""
    made = answers_on_one_device(cfg)
    specs = actor_critic_spec(cfg), transformer_spec(cfg)
    models = [place(tiny.draw(spec, seed), spec, mesh) for seed, spec in enumerate(specs)]
    scores = np.random.default_rng(0).normal(size=ROWS).astype(np.float32)
    batch, made = sharding.put_batch(prompts() | {"scores": scores}, mesh), Generation(**sharding.put_batch(vars(made), mesh))

    def score(params, reference, batch, made):
        args = batch["tokens"], batch["segment_ids"], made, batch["scores"], cfg, TEMPERATURE
        rollout, metrics = score_rollout(params, reference, *args)
        added, more = ALGORITHM.advantages(rollout)
        return rollout.batch() | added, metrics | more

    with sharding.use_mesh(mesh):
        return jax.device_get(jax.jit(score)(*models, batch, made))


@cache
def answers_on_one_device(cfg):
    return answers(cfg, None)


@cache
def experience_on_one_device(cfg):
    return experience(cfg, None)


WRITING = (("data4-tensor2", "dense"), (EVERY_KIND, "moe"))
QUICK_WRITING = [(WRITING[0], "auto"), (WRITING[1], "explicit")]
on_two_meshes = pytest.mark.parametrize("where, mode", tiny.crossed(QUICK_WRITING, WRITING, MODES))


@on_two_meshes
def test_generated_tokens(where, mode):
    mesh, model = where
    got, expected = answers(model_config(model), make(mesh, mode)), answers_on_one_device(model_config(model))
    assert 0 < np.sum(expected.ended) < ROWS
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_array_equal(got.mask, expected.mask)
    np.testing.assert_array_equal(got.ended, expected.ended)
    np.testing.assert_allclose(got.log_probs, expected.log_probs, atol=1e-5)


@pytest.mark.parametrize("where, mode", tiny.crossed([(WRITING[0], "auto")], WRITING, MODES))
def test_experience(where, mode):
    mesh, model = where
    got, expected = experience(model_config(model), make(mesh, mode)), experience_on_one_device(model_config(model))
    for got_part, expected_part in zip(got, expected, strict=True):  # batch, metrics
        for key, value in expected_part.items():
            np.testing.assert_allclose(got_part[key], value, atol=2e-5, err_msg=key)


# Whole steps of reinforcement learning


LEARNERS = {"PPO": ALGORITHM, "GRPO": GRPO(group_size=4, clip_high=0.3, kl_coef=0.1)}


def first_tokens(batch, generation):
    """Scores of the host."""
    return np.asarray(generation.tokens)[:, 0] % 5 / 2, {"asked": float(np.sum(batch["tokens"]))}


def learnt(name: str, cfg, mesh):
    """Metrics of two steps, and the parameters after them; the programs are those that are planned, compiled ahead."""
    algorithm, rows = LEARNERS[name], 16
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, eps=1e-2)  # eps: as in `trajectory`
    learner = Learner(
        cfg, mesh, algorithm, optimizer, SamplingConfig(6, temperature=TEMPERATURE), steps=2, batch_size=rows, epochs=2,
        minibatches=2, prompt_length=5, stop_ids=(7, 8), pad_id=0,
    )  # fmt: skip
    specs = actor_critic_spec(cfg, algorithm.needs_critic)
    asked = {key: np.concatenate([value, value[::-1]]) for key, value in prompts().items()}
    with sharding.use_mesh(mesh):
        programs = Programs(*map(tiny.compiled, learner.programs()))
        params = place(tiny.draw(specs), specs, mesh)
        step, state = learner.step_fn(programs, params.policy, first_tokens), programs.update.init(params)
        metrics = []
        for i in range(2):
            state, one = step(state, sharding.put_batch(asked, mesh), jax.random.key(i))
            metrics.append(jax.device_get(one))
        return metrics, jax.device_get(state.params)


@cache
def learnt_on_one_device(name: str, model: str):
    return learnt(name, model_config(model), None)


QUICK_LEARNERS = [("GRPO", "fsdp8", "explicit", "dense")]


@pytest.mark.parametrize(
    "name, mesh, mode, model", tiny.crossed(QUICK_LEARNERS, LEARNERS, (EVERY_KIND, "fsdp8"), MODES, tiny.MODELS)
)
def test_two_steps_of_reinforcement_learning(name, mesh, mode, model):
    metrics, params = learnt(name, model_config(model), make(mesh, mode))
    expected_metrics, expected_params = learnt_on_one_device(name, model)
    for got, expected in zip(metrics, expected_metrics, strict=True):
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_allclose(got[key], value, rtol=1e-4, atol=2e-5, err_msg=key)
    assert expected_metrics[0]["kl"] == 0 and expected_metrics[1]["kl"] > 1e-3
    tiny.assert_trees_close(params, expected_params, 1e-4)


# What does not divide


def test_a_batch_that_does_not_divide_is_refused_in_words():
    with pytest.raises(UserError, match=r"batch_size=12 is not divisible by the 8 batch shards of the mesh \(fsdp=8\)"):
        sharding.check_batch("batch_size", 12, MeshConfig(fsdp=8))


def test_heads_that_do_not_divide_are_refused_in_words():
    mesh = sharding.make_mesh(MeshConfig(tensor=8))
    with pytest.raises(UserError, match=r"has (kv_)?heads=\d, which the mesh axes tensor split into 8 unequal parts"):
        init_params(transformer_spec(tiny.DENSE), jax.random.key(0), mesh)
