"""LoRA: adapted equals merged, the first step starts from the model itself, only the low rank is trained, PEFT both ways."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from llmjax.config import validate
from llmjax.errors import UserError
from llmjax.models.config import MLAConfig
from llmjax.models.linear import LowRank
from llmjax.models.lora import LoRAConfig, adapt, lora_spec, merge
from llmjax.models.spec import abstract_params, init_params, num_params
from llmjax.models.transformer import transformer_spec
from llmjax.objectives.lm import lm_loss
from llmjax.training.optimizer import OptimizerConfig
from llmjax.training.program import language_batch, train_program

LORA = LoRAConfig(rank=3, alpha=6.0)
MLA = MLAConfig(kv_lora_rank=12, q_lora_rank=10, nope_dim=8, rope_dim=4, v_dim=6)
MODELS = tiny.MODELS | {
    "latent": dataclasses.replace(
        tiny.SPARSE, mla=MLA, num_kv_heads=4, num_layers=3,
        moe=dataclasses.replace(tiny.SPARSE.moe, first_k_dense=1, shared_mlp_dim=8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name, layer_loop", tiny.crossed([("moe", "unroll"), ("dense", "scan")], MODELS, ("unroll", "scan")))
def test_adapted_equals_merged_and_both_differ_from_the_base(name, layer_loop):
    cfg = dataclasses.replace(MODELS[name], layer_loop=layer_loop)
    base, updates, text = tiny.language_model(cfg), tiny.updates(cfg, LORA), tiny.tokens(cfg, 2, 12)
    merged = tiny.logits(merge(base, updates, LORA, cfg), text, cfg)
    np.testing.assert_allclose(tiny.logits(adapt(base, updates, LORA), text, cfg), merged, atol=3e-5)
    assert np.max(np.abs(merged - tiny.logits(base, text, cfg))) > 0.1


@pytest.mark.parametrize("name", tiny.crossed([("dense",), ("moe",)], MODELS))
def test_every_target_counts(name):
    """Each matrix alone moves the logits, by what the definition says: base + alpha / rank * a b."""
    cfg = MODELS[name]
    base, text = tiny.language_model(cfg), tiny.tokens(cfg, 2, 12)
    plain = tiny.logits(base, text, cfg)
    leaves, _ = jax.tree_util.tree_flatten_with_path(tiny.updates(cfg, LORA), is_leaf=lambda x: isinstance(x, LowRank))
    names = [".".join(key.name for key in path) for path, _ in leaves]
    assert len(names) == {"dense": 7, "moe": 7, "latent": 6 * 2 + 3 + 6}[name]
    for leaf in names:
        lora = dataclasses.replace(LORA, targets=(leaf,))
        updates = tiny.updates(cfg, lora)
        moved = merge(base, updates, lora, cfg)
        assert np.max(np.abs(tiny.logits(moved, text, cfg) - plain)) > 1e-4, leaf
        assert num_params(lora_spec(cfg, lora)) == sum(x.size for x in jax.tree.leaves(updates))


def test_the_sum_by_hand():
    cfg = tiny.SPARSE
    base, updates = tiny.language_model(cfg), tiny.updates(cfg, LORA)
    merged = merge(base, updates, LORA, cfg)
    up, update = merged.blocks.mlp.up[1, 2], updates.blocks.mlp.up
    np.testing.assert_allclose(up, base.blocks.mlp.up[1, 2] + 2.0 * update.a[1, 2] @ update.b[1, 2], atol=1e-6)
    o, update = merged.blocks.attention.o[0], updates.blocks.attention.o
    want = base.blocks.attention.o[0] + 2.0 * jnp.einsum("nhr,rd->nhd", update.a[0], update.b[0])
    np.testing.assert_allclose(o, want, atol=1e-6)


@pytest.mark.parametrize("name", tiny.crossed([("dense",)], MODELS))
def test_training_starts_from_the_model_and_leaves_it_alone(name):
    cfg = MODELS[name]
    base, specs = tiny.language_model(cfg), lora_spec(cfg, LORA)
    updates = init_params(specs, jax.random.key(0))
    text = tiny.tokens(cfg, 2, 12)
    np.testing.assert_array_equal(tiny.logits(adapt(base, updates, LORA), text, cfg), tiny.logits(base, text, cfg))
    optimizer = OptimizerConfig(learning_rate=0.02, warmup_steps=0, schedule="constant", weight_decay=0.0, grad_clip=0.0)
    program = train_program(
        lambda p, b, key, base: lm_loss(adapt(base, p, LORA), b, key, cfg), specs, optimizer, 8, language_batch(4, 16, None),
        None, tokens=64, flops_per_token=0.0, frozen=(abstract_params(transformer_spec(cfg), None),),
    )  # fmt: skip
    step, state = tiny.compiled(program).fn, program.init(updates)
    before = jax.tree.map(np.array, base)
    losses = []
    for _ in range(8):
        state, metrics = step(state, tiny.lm_batch(cfg, 4, 16), jax.random.key(0), base)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.05
    tiny.assert_trees_equal(before, base)
    assert jax.tree.structure(state.params) == jax.tree.structure(updates)
    assert all(np.any(np.asarray(x)) for x in jax.tree.leaves(state.params))  # every factor has left zero


@pytest.mark.parametrize("name", tiny.crossed([("dense",)], MODELS))
def test_gradients_are_those_of_the_merged_model(name):
    cfg = MODELS[name]
    base, updates, batch = tiny.language_model(cfg), tiny.updates(cfg, LORA), tiny.lm_batch(cfg, 2, 12)
    _, (adapted,) = tiny.value_and_grads(lambda u: lm_loss(adapt(base, u, LORA), batch, None, cfg)[0], updates)
    _, (merged,) = tiny.value_and_grads(lambda u: lm_loss(merge(base, u, LORA, cfg), batch, None, cfg)[0], updates)
    for got, want in zip(jax.tree.leaves(adapted), jax.tree.leaves(merged), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)
        assert np.any(np.asarray(want))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(rank=0), "rank=0 must be positive"),
        (dict(targets=("router",)), "'router' is no matrix that can be adapted; there is q, k"),
        (dict(targets=("kv_down",)), "lora.targets=kv_down: the model has no such matrix"),
        (dict(targets=()), "the model has no such matrix"),
    ],
)
def test_wrong_configs(fields, words):
    lora = dataclasses.replace(LORA, **fields)
    with pytest.raises(UserError, match=words):
        validate(lora)
        lora_spec(tiny.DENSE, lora)


def test_targets_may_be_exact():
    lora = dataclasses.replace(LORA, targets=("shared.up", "attention.o"))
    leaves, _ = jax.tree_util.tree_flatten_with_path(tiny.updates(MODELS["latent"], lora))
    names = {".".join(key.name for key in path[:-1]) for path, _ in leaves}
    assert names == {"blocks.mlp.shared.up", "blocks.attention.o", "dense_blocks.attention.o"}
