"""Rollouts: what an algorithm starts from is consistent with what it then computes."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from llmjax.data.records import Prompt, user
from llmjax.evals.answers import Answers, to_completions
from llmjax.generation.decode import Generation, generate
from llmjax.generation.sampling import SamplingConfig
from llmjax.generation.score import join_response, response_log_probs, response_values, reward_of
from llmjax.objectives.policy import ActorCritic
from llmjax.rl.algorithms import PPO
from llmjax.rl.learner import policy_loss
from llmjax.rl.rollout import minibatches, score_rollout
from llmjax.sharding import MeshConfig
from llmjax.stages.reward import ModelReward
from llmjax.stages.rl import RL

ROWS, PROMPT, RESPONSE = 8, 4, 6
both = pytest.mark.parametrize("cfg", tiny.MODELS.values(), ids=tiny.MODELS.keys())
ALGORITHM = PPO(kl_coef=0.1)
SCORES = np.random.default_rng(0).normal(size=ROWS).astype(np.float32)

# `generate` itself, compiled once for all ids that stop.
generate_any_end = jax.jit(generate.__wrapped__, static_argnames=("cfg", "sampling"))
loss = jax.jit(policy_loss, static_argnums=(3, 4, 5))
of_rollout = jax.jit(score_rollout, static_argnums=(6, 7))
advantages = jax.jit(lambda rollout, algorithm: algorithm.advantages(rollout), static_argnums=1)


def score(params, reference, cfg, made, algorithm=ALGORITHM, temperature=1.0, scores=SCORES):
    """(batch of the loss, metrics) of answers with these scores."""
    rollout, metrics = of_rollout(params, reference, *prompts(cfg), made, jnp.asarray(scores), cfg, temperature)
    added, more = advantages(rollout, algorithm)
    return rollout.batch() | added, metrics | more


def prompts(cfg):
    lengths = np.arange(ROWS)[:, None] % PROMPT + 1
    segments = (np.arange(PROMPT) >= PROMPT - lengths).astype(np.int32)
    return jnp.asarray(tiny.tokens(cfg, ROWS, PROMPT)), jnp.asarray(segments)


def answers(cfg, policy, temperature: float = 1.0) -> Generation:
    """Sampled answers; the token that ends a turn is one that ends some of them."""
    sampling = SamplingConfig(max_new_tokens=RESPONSE, temperature=temperature)
    keys = jax.random.split(jax.random.key(0), ROWS)
    for stop_id in jnp.arange(cfg.vocab_size):
        made = generate_any_end(policy, *prompts(cfg), keys, cfg=cfg, sampling=sampling, stop_ids=(stop_id,), pad_id=0)
        if 2 <= int(made.ended.sum()) <= ROWS - 2:
            return made
    raise AssertionError("no token ends some of the rows")


def without_values(params: ActorCritic, bias: float = 0.0) -> ActorCritic:
    return params.replace(critic=constant_head(params.critic, bias))


def constant_head(model, value: float):
    return model.replace(weight=jnp.zeros_like(model.weight), bias=jnp.full((1,), value))


@pytest.mark.parametrize("name, temperature", tiny.crossed([("dense", 1.0), ("dense", 0.7)], tiny.MODELS, (1.0, 0.7)))
def test_the_first_minibatch_has_ratio_one_and_no_kl(name, temperature):
    cfg = tiny.MODELS[name]
    params = tiny.actor_critic(cfg)
    made = answers(cfg, params.policy, temperature)
    batch, metrics = score(params, tiny.language_model(cfg, 5), cfg, made, temperature=temperature)
    first = jax.tree.map(lambda x: x[0], minibatches(batch, jax.random.key(0), 2))
    _, got = loss(params, first, None, cfg, PPO(), temperature)
    np.testing.assert_allclose(got["ratio_max"], 1.0, atol=1e-6)
    assert got["approx_kl"] <= 1e-12 and got["clip_fraction"] == 0
    assert metrics["sampler_gap"] <= 1e-5  # the sampler and the scorer see one distribution
    assert metrics["kl"] != 0


@both
def test_kl_is_zero_when_the_policy_is_the_reference(cfg):
    params = tiny.actor_critic(cfg)
    made = answers(cfg, params.policy)
    batch, metrics = score(params, params.policy, cfg, made, PPO(kl_coef=100.0))
    assert metrics["kl"] == 0
    np.testing.assert_array_equal(batch["ref_log_probs"], batch["old_log_probs"])
    free, _ = score(params, params.policy, cfg, made, PPO(kl_coef=0.0))
    tiny.assert_trees_equal(batch, free)


def test_kl_is_the_mean_over_rows_of_the_summed_log_ratio():
    cfg, params, reference = tiny.DENSE, tiny.actor_critic(tiny.DENSE), tiny.language_model(tiny.DENSE, 5)
    made = answers(cfg, params.policy)
    batch, metrics = score(params, reference, cfg, made)
    of = jax.jit(lambda p: response_log_probs(p, batch, cfg, 1.0)[0])
    ours, theirs = (np.asarray(of(p)) * made.mask for p in (params.policy, reference))
    np.testing.assert_allclose(batch["old_log_probs"], ours, atol=1e-6)
    np.testing.assert_allclose(batch["ref_log_probs"], theirs, atol=1e-6)
    np.testing.assert_allclose(metrics["kl"], (ours - theirs).sum(axis=1).mean(), atol=1e-5)
    np.testing.assert_allclose(metrics["response_length"], np.asarray(made.mask).sum(axis=1).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["ended"], np.asarray(made.ended).mean(), rtol=1e-6)


def test_without_a_critic_there_are_no_values():
    cfg, params = tiny.DENSE, tiny.actor_critic(tiny.DENSE)
    made, reference = answers(cfg, params.policy), tiny.language_model(tiny.DENSE, 5)
    args = reference, *prompts(cfg), made, jnp.asarray(SCORES), cfg, 1.0
    (whole, metrics), (alone, same) = of_rollout(params, *args), of_rollout(params.replace(critic=None), *args)
    values, _ = jax.jit(lambda p: response_values(p, whole.batch(), cfg))(params.critic)
    np.testing.assert_allclose(whole.values, values * made.mask, atol=1e-6)
    assert alone.values is None and "old_values" not in alone.batch()
    tiny.assert_trees_equal(alone, whole.replace(values=None))
    tiny.assert_trees_equal(same, metrics)


def test_join_response_puts_the_answer_behind_its_prompt():
    cfg = tiny.DENSE
    (tokens, segments), made = prompts(cfg), answers(cfg, tiny.language_model(cfg))
    got = join_response(tokens, segments, made)
    for row in range(ROWS):
        real = np.asarray(got["segment_ids"][row]) > 0
        length = int(made.mask[row].sum())
        prompt = np.asarray(tokens[row])[np.asarray(segments[row]) > 0]
        expected = np.concatenate([prompt, np.asarray(made.tokens[row, :length])])
        np.testing.assert_array_equal(np.asarray(got["tokens"][row])[real], expected)
        np.testing.assert_array_equal(np.asarray(got["positions"][row])[real], np.arange(len(expected)))
        assert got["segment_ids"].dtype == got["positions"].dtype == jnp.int32


def test_scores_arrive_exactly():
    cfg = tiny.DENSE
    params = without_values(tiny.actor_critic(cfg))
    made = answers(cfg, params.policy)
    scores = np.where(made.ended, np.float32(0.75), np.float32(0.25))
    batch, _ = score(params, params.policy, cfg, made, PPO(kl_coef=0.0, gae_lambda=1.0), scores=scores)
    assert batch["returns"].dtype == jnp.float32
    np.testing.assert_array_equal(batch["returns"], scores[:, None] * np.asarray(made.mask))


def test_the_score_is_given_at_the_last_token():
    cfg = tiny.DENSE
    params = without_values(tiny.actor_critic(cfg))
    made = answers(cfg, params.policy)
    batch, _ = score(params, params.policy, cfg, made, PPO(kl_coef=0.0, gamma=0.0))
    last = np.asarray(made.mask).sum(axis=1).astype(int) - 1
    expected = np.zeros((ROWS, RESPONSE), np.float32)
    expected[np.arange(ROWS), last] = SCORES
    np.testing.assert_allclose(batch["returns"], expected, atol=1e-6)


def test_advantages_are_white_and_old_numbers_are_zero_outside_the_mask():
    cfg, params = tiny.DENSE, tiny.actor_critic(tiny.DENSE)
    made = answers(cfg, params.policy)
    batch, _ = score(params, tiny.language_model(cfg, 5), cfg, made)
    mask = np.asarray(made.mask) > 0
    advantages = np.asarray(batch["advantages"])
    np.testing.assert_allclose(advantages[mask].mean(), 0, atol=1e-6)
    np.testing.assert_allclose(advantages[mask].std(), 1, atol=1e-5)
    for name in ("advantages", "returns", "old_values", "old_log_probs", "ref_log_probs"):
        assert np.all(np.asarray(batch[name])[~mask] == 0) and np.any(np.asarray(batch[name])[mask] != 0), name


def test_explained_variance_of_a_critic_that_knows_nothing_is_zero_or_less():
    cfg = tiny.DENSE
    params, algorithm = tiny.actor_critic(cfg), PPO(kl_coef=0.1, gae_lambda=1.0)
    made = answers(cfg, params.policy)
    args = params.policy, cfg, made, algorithm
    batch, _ = score(without_values(params), *args)
    mean_return = float(np.sum(batch["returns"]) / np.sum(made.mask))
    _, metrics = score(without_values(params, mean_return), *args)
    np.testing.assert_allclose(metrics["explained_variance"], 0, atol=1e-5)
    _, metrics = score(without_values(params, mean_return + 3), *args)
    assert metrics["explained_variance"] < -0.1


class Prompts(list):
    """What a stage reads prompts from: records by number, and their tokens."""

    def tokens(self, number: int) -> list[int]:
        return [number + 10] * (number + 1)


NUMBERS = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)), pad_id=9)  # a tokenizer


def test_a_score_is_the_weighted_sum_of_the_rewards_less_what_a_cut_off_answer_costs():
    cfg = tiny.DENSE
    made = jax.device_get(answers(cfg, tiny.language_model(cfg)))
    prompts_of = Prompts(Prompt(f"p{i}", user(f"question {i}"), {"worth": i}) for i in range(4))
    rl = RL(
        data=None, weights={"worth": 0.5}, missing_end_penalty=0.25,
        rewards={"long": lambda prompt, completion: len(completion.text.split()), "worth": lambda p, c: p.fields["worth"]},
        watch={"ends": lambda prompt, completion: completion.ended},
    )  # fmt: skip
    scores = rl._scores(SimpleNamespace(tokenizer=NUMBERS), prompts_of)
    numbers = np.arange(ROWS) % 4
    got, measured = scores({"prompt": numbers}, made)
    ended = np.asarray(made.ended)
    lengths = made.mask.sum(axis=1) - ended  # the token that ends an answer is no part of its text
    reward = lengths + 0.5 * numbers
    np.testing.assert_allclose(got, reward - 0.25 * ~ended, rtol=1e-6)
    expected = {"reward": reward.mean(), "reward/long": lengths.mean(), "reward/worth": numbers.mean(), "ends": ended.mean()}
    assert measured == pytest.approx(expected)  # without the penalty


@both
def test_the_reward_of_a_model_is_its_score_at_the_last_token(cfg):
    """Whatever the padding is: the answers are scored behind their prompts without any on the left."""
    model, (tokens, segments) = tiny.scalar_model(cfg, 6), prompts(cfg)
    made = answers(cfg, tiny.language_model(cfg))
    joined = join_response(tokens, segments, made)
    expected = jax.jit(lambda p: reward_of(p, joined["tokens"], joined["segment_ids"], cfg)[0])(model)
    asked = [row[real > 0].tolist() for row, real in zip(np.asarray(tokens), np.asarray(segments))]
    context = SimpleNamespace(
        load=lambda stage, specs: {"judge": model}[stage], model=cfg, mesh=None,
        tokenizer=NUMBERS, experiment=SimpleNamespace(mesh=MeshConfig()),
    )  # fmt: skip
    completions = to_completions(made, NUMBERS)
    got = ModelReward("judge").open(context)(Answers([None] * ROWS, asked, completions, np.zeros(ROWS)))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert np.std(got) > 1e-2


def test_minibatches_use_every_row_once_and_epochs_differ():
    batch = {"tokens": jnp.arange(24).reshape(12, 2), "mask": jnp.arange(12.0)}
    orders = []
    for epoch in range(2):
        got = minibatches(batch, jax.random.key(epoch), 3)
        assert got["tokens"].shape == (3, 4, 2) and got["mask"].shape == (3, 4)
        np.testing.assert_array_equal(got["tokens"][..., 0] // 2, got["mask"])  # rows stay together
        orders.append(np.asarray(got["mask"]).ravel())
        np.testing.assert_array_equal(np.sort(orders[-1]), np.arange(12))
    assert np.any(orders[0] != orders[1]) and np.any(orders[0] != np.arange(12))
