"""Decoding and scoring drop nothing, however tight the experts' capacity in pre-training: sampling and training agree."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from llmjax import sharding
from llmjax.errors import UserError
from llmjax.generation.decode import generate
from llmjax.generation.sampling import SamplingConfig
from llmjax.generation.score import response_log_probs, response_values, reward_of
from llmjax.models.spec import shardings
from llmjax.models.transformer import transformer_spec
from llmjax.objectives.lm import lm_loss
from llmjax.objectives.preference import answer_log_probs, dpo_loss
from llmjax.rl.algorithms import PPO
from llmjax.rl.learner import policy_loss
from llmjax.rl.rollout import score_rollout
from llmjax.sharding import MeshConfig

ROWS, PROMPT, RESPONSE = 8, 4, 6


def sparse(**fields):
    return dataclasses.replace(tiny.SPARSE, moe=dataclasses.replace(tiny.SPARSE.moe, **fields))


FREE, TIGHT = sparse(), sparse(capacity_factor=0.3)
EXCHANGE = dict(num_experts=8, top_k=2, expert_parallel="all_to_all")


def log_probs(params, batch, cfg):
    return response_log_probs(params, batch, cfg, 1.0)[0] * batch["mask"]


def values(params, batch, cfg):
    return response_values(params, batch, cfg)[0] * batch["mask"]


def rewards(params, batch, cfg):
    return reward_of(params, batch["tokens"], batch["segment_ids"], cfg)[0]


def answers(params, batch, cfg):
    answer = jnp.pad(batch["mask"], ((0, 0), (batch["tokens"].shape[1] - batch["mask"].shape[1], 0)))
    return answer_log_probs(params, batch | {"loss_mask": answer}, cfg)[0]


SCORES = {
    "log_probs": (log_probs, tiny.language_model),
    "values": (values, tiny.scalar_model),
    "rewards": (rewards, tiny.scalar_model),
    "answers": (answers, tiny.language_model),
}
each_score = pytest.mark.parametrize("score, model", SCORES.values(), ids=SCORES.keys())


@each_score
def test_a_score_depends_on_neither_capacity_padding_nor_neighbours(score, model):
    params, batch = model(FREE), tiny.experience(FREE, ROWS, PROMPT, RESPONSE)
    of = jax.jit(score, static_argnames="cfg")
    want = of(params, batch, cfg=FREE)
    np.testing.assert_array_equal(of(params, batch, cfg=TIGHT), want)
    np.testing.assert_array_equal(of(params, batch, cfg=sparse(exchange_factor=0.3)), want)
    padded = {name: np.pad(batch[name], ((0, 0), (5, 0))) for name in ("tokens", "segment_ids", "positions")}
    np.testing.assert_allclose(of(params, batch | padded, cfg=TIGHT), want, atol=1e-5)
    alone = {name: value[2:3] for name, value in batch.items()}
    np.testing.assert_allclose(of(params, alone, cfg=TIGHT), want[2:3], atol=1e-5)


def test_pre_training_still_drops():
    params, batch = tiny.language_model(FREE), tiny.lm_batch(FREE, 4, 12)
    dropped = [jax.jit(lambda p, cfg=cfg: lm_loss(p, batch, None, cfg)[1]["moe/dropped"])(params) for cfg in (FREE, TIGHT)]
    assert dropped[0] == 0 and dropped[1] > 0.1


def test_dpo_starts_at_ln_2_and_drops_nothing():
    params, batch = tiny.language_model(FREE), tiny.rankings(FREE, 3, 2, 9)
    batch["loss_mask"] = batch["segment_ids"] * (np.arange(9) > 0)
    loss, metrics = jax.jit(dpo_loss, static_argnums=(3, 4))(params, params, batch, TIGHT, 0.1)
    want, _ = jax.jit(dpo_loss, static_argnums=(3, 4))(params, params, batch, FREE, 0.1)
    np.testing.assert_allclose(metrics["loss"], np.log(2), rtol=1e-6)
    assert loss == want and metrics["moe/dropped"] == 0


def asked(segments):
    return tiny.tokens(FREE, ROWS, PROMPT), np.asarray(segments, np.int32)


def test_ppo_starts_at_a_ratio_of_one_and_without_kl():
    """The ratio is that of what was sampled, and all is as if nothing limited the experts."""
    params, prompt = tiny.actor_critic(FREE), asked(np.arange(PROMPT) >= np.arange(ROWS)[:, None] % PROMPT)
    keys, sampling = jax.random.split(jax.random.key(0), ROWS), SamplingConfig(RESPONSE)
    algorithm, results = PPO(), []
    for cfg in (TIGHT, FREE):
        made = generate(params.policy, *prompt, keys, cfg=cfg, sampling=sampling, stop_ids=(7,), pad_id=0)
        scores = jnp.arange(ROWS, dtype=jnp.float32)
        of = jax.jit(score_rollout, static_argnums=(6, 7))
        rollout, metrics = of(params, params.policy, *prompt, made, scores, cfg, 1.0)
        added, _ = algorithm.advantages(rollout)
        _, first = jax.jit(policy_loss, static_argnums=(3, 4, 5))(params, rollout.batch() | added, None, cfg, algorithm, 1.0)
        assert metrics["kl"] == 0 and metrics["sampler_gap"] < 1e-5
        np.testing.assert_allclose(first["ratio_max"], 1.0, atol=1e-6)
        results.append((made.tokens, metrics, first["ratio_max"], first["approx_kl"]))
    tiny.assert_trees_equal(*results)


def test_identical_prompts_get_identical_answers_on_a_mesh_of_experts():
    if len(jax.devices()) < ROWS:
        pytest.skip("needs 8 devices")
    cfg, mesh = sparse(**EXCHANGE, exchange_factor=0.3), sharding.make_mesh(MeshConfig(expert=ROWS))
    specs = transformer_spec(cfg)
    prompt = np.repeat(tiny.tokens(cfg, 1, PROMPT), ROWS, axis=0), np.ones((ROWS, PROMPT), np.int32)
    options = dict(sampling=SamplingConfig(RESPONSE, 0.0), stop_ids=(-1,), pad_id=0)
    keys = jax.random.split(jax.random.key(0), ROWS)
    alone = generate(tiny.draw(specs), *prompt, keys, cfg=sparse(**EXCHANGE), **options)
    with sharding.use_mesh(mesh):
        batch = sharding.put_batch({"tokens": prompt[0], "segments": prompt[1]}, mesh)
        answer = jax.jit(partial(generate.__wrapped__, cfg=cfg, **options))
        made = answer(jax.device_put(tiny.draw(specs), shardings(specs, mesh)), batch["tokens"], batch["segments"], keys)
    np.testing.assert_array_equal(made.tokens, alone.tokens)
    assert len(np.unique(np.asarray(made.tokens), axis=0)) == 1


def test_experts_that_choose_score_nothing():
    cfg = sparse(router="expert_choice")
    with pytest.raises(UserError, match="cannot decode, nor score answers"):
        rewards(tiny.scalar_model(cfg), tiny.experience(cfg, ROWS, PROMPT, RESPONSE), cfg)
