"""Experience: what PPO starts from is consistent with what it then computes."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from llmjax.generation.decode import Generation, generate
from llmjax.generation.sampling import SamplingConfig
from llmjax.models.config import ModelConfig
from llmjax.objectives.ppo import ActorCritic, actor_critic_spec, ppo_loss, response_log_probs
from llmjax.objectives.reward import reward_of
from llmjax.rl.rollout import join_response, minibatches, score_experience
from llmjax.training.state import abstract_state, init_state, make_train_step

ROWS, PROMPT, RESPONSE = 8, 4, 6
both = pytest.mark.parametrize("cfg", tiny.MODELS.values(), ids=tiny.MODELS.keys())


@dataclass(frozen=True)
class Options:
    clip_ratio: float = 0.2
    value_clip: float = 0.2
    vf_coef: float = 0.5
    temperature: float = 1.0
    kl_coef: float = 0.1
    gamma: float = 1.0
    gae_lambda: float = 0.95
    missing_end_penalty: float = 1.0


score = tiny.jit(score_experience, static_argnums=(6, 7))
# `generate` itself, compiled once for all ends of turn.
generate_any_end = tiny.jit(generate.__wrapped__, static_argnames=("cfg", "sampling"))
loss = tiny.jit(ppo_loss, static_argnums=(3, 4))


def prompts(cfg):
    lengths = np.arange(ROWS)[:, None] % PROMPT + 1
    segments = (np.arange(PROMPT) >= PROMPT - lengths).astype(np.int32)
    return jnp.asarray(tiny.tokens(cfg, ROWS, PROMPT)), jnp.asarray(segments)


def answers(cfg, policy, temperature: float = 1.0) -> Generation:
    """Sampled answers; the token that ends a turn is one that ends some of them."""
    sampling = SamplingConfig(max_new_tokens=RESPONSE, temperature=temperature)
    keys = jax.random.split(jax.random.key(0), ROWS)
    for end_id in jnp.arange(cfg.vocab_size):
        made = generate_any_end(policy, *prompts(cfg), keys, cfg=cfg, sampling=sampling, end_id=end_id, pad_id=0)
        if 2 <= int(made.ended.sum()) <= ROWS - 2:
            return made
    raise AssertionError("no token ends some of the rows")


def without_values(params: ActorCritic, bias: float = 0.0) -> ActorCritic:
    return params.replace(critic=constant_head(params.critic, bias))


def constant_head(model, value: float):
    return model.replace(weight=jnp.zeros_like(model.weight), bias=jnp.full((1,), value))


@pytest.mark.parametrize("name, temperature", [("dense", 1.0), ("dense", 0.7), ("moe", 1.0)])
def test_the_first_minibatch_has_ratio_one_and_no_kl(name, temperature):
    cfg = tiny.MODELS[name]
    params, o = tiny.actor_critic(cfg), Options(temperature=temperature)
    made = answers(cfg, params.policy, temperature)
    batch, metrics = score(
        params, tiny.language_model(cfg, 5), tiny.scalar_model(cfg, 6), *prompts(cfg), made, cfg, o
    )
    first = jax.tree.map(lambda x: x[0], minibatches(batch, jax.random.key(0), 2))
    _, got = loss(params, first, None, cfg, o)
    np.testing.assert_allclose(got["ratio_max"], 1.0, atol=1e-6)
    assert got["approx_kl"] <= 1e-12 and got["clip_fraction"] == 0
    assert metrics["sampler_gap"] <= 1e-5  # the sampler and the scorer see one distribution
    assert metrics["kl"] != 0


@both
def test_kl_is_zero_when_the_policy_is_the_reference(cfg):
    params = tiny.actor_critic(cfg)
    made = answers(cfg, params.policy)
    args = *prompts(cfg), made, cfg, Options(kl_coef=100.0)
    reward_model = tiny.scalar_model(cfg, 6)
    batch, metrics = score(params, params.policy, reward_model, *args)
    assert metrics["kl"] == 0
    free, _ = score(params, params.policy, reward_model, *args[:-1], Options(kl_coef=0.0))
    tiny.assert_trees_equal(batch, free)


def test_kl_is_the_mean_over_rows_of_the_summed_log_ratio():
    cfg, params, reference = tiny.DENSE, tiny.actor_critic(tiny.DENSE), tiny.language_model(tiny.DENSE, 5)
    made = answers(cfg, params.policy)
    batch, metrics = score(params, reference, tiny.scalar_model(cfg, 6), *prompts(cfg), made, cfg, Options())
    of = tiny.jit(lambda p: response_log_probs(p, batch, cfg, 1.0)[0])
    log_ratio = (np.asarray(of(params.policy)) - np.asarray(of(reference))) * made.mask
    np.testing.assert_allclose(metrics["kl"], log_ratio.sum(axis=1).mean(), atol=1e-5)
    np.testing.assert_allclose(metrics["response_length"], np.asarray(made.mask).sum(axis=1).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["ended"], np.asarray(made.ended).mean(), rtol=1e-6)


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


def test_scores_arrive_exactly_and_the_penalty_is_taken_exactly():
    cfg = tiny.DENSE
    params = without_values(tiny.actor_critic(cfg))
    reward_model = constant_head(tiny.scalar_model(cfg), 0.75)
    made = answers(cfg, params.policy)
    o = Options(kl_coef=0.0, gae_lambda=1.0, missing_end_penalty=0.5)
    batch, metrics = score(params, params.policy, reward_model, *prompts(cfg), made, cfg, o)
    expected = np.where(made.ended, np.float32(0.75), np.float32(0.25))[:, None] * np.asarray(made.mask)
    assert batch["returns"].dtype == jnp.float32
    np.testing.assert_array_equal(batch["returns"], expected)
    assert metrics["reward"] == 0.75  # the proxy reward is reported without the penalty


def test_the_score_is_given_at_the_last_token():
    cfg = tiny.DENSE
    params = without_values(tiny.actor_critic(cfg))
    reward_model, made = tiny.scalar_model(cfg, 6), answers(cfg, params.policy)
    o = Options(kl_coef=0.0, gamma=0.0, missing_end_penalty=0.0)
    batch, _ = score(params, params.policy, reward_model, *prompts(cfg), made, cfg, o)
    joined = join_response(*prompts(cfg), made)
    rewards = tiny.jit(lambda p: reward_of(p, joined["tokens"], joined["segment_ids"], cfg)[0])(reward_model)
    last = np.asarray(made.mask).sum(axis=1).astype(int) - 1
    expected = np.zeros((ROWS, RESPONSE))
    expected[np.arange(ROWS), last] = rewards
    np.testing.assert_allclose(batch["returns"], expected, atol=1e-6)


def test_advantages_are_white_and_old_numbers_are_zero_outside_the_mask():
    cfg, params = tiny.DENSE, tiny.actor_critic(tiny.DENSE)
    made = answers(cfg, params.policy)
    reference, reward_model = tiny.language_model(cfg, 5), tiny.scalar_model(cfg, 6)
    batch, _ = score(params, reference, reward_model, *prompts(cfg), made, cfg, Options())
    mask = np.asarray(made.mask) > 0
    advantages = np.asarray(batch["advantages"])
    np.testing.assert_allclose(advantages[mask].mean(), 0, atol=1e-6)
    np.testing.assert_allclose(advantages[mask].std(), 1, atol=1e-5)
    for name in ("advantages", "returns", "old_values", "old_log_probs"):
        assert np.all(np.asarray(batch[name])[~mask] == 0) and np.any(np.asarray(batch[name])[mask] != 0), name


def test_explained_variance_of_a_critic_that_knows_nothing_is_zero_or_less():
    cfg = tiny.DENSE
    params, made = tiny.actor_critic(cfg), answers(cfg, tiny.actor_critic(cfg).policy)
    o = Options(gae_lambda=1.0)
    args = params.policy, tiny.scalar_model(cfg, 6), *prompts(cfg), made, cfg, o
    batch, _ = score(without_values(params), *args)
    mean_return = float(np.sum(batch["returns"]) / np.sum(made.mask))
    _, metrics = score(without_values(params, mean_return), *args)
    np.testing.assert_allclose(metrics["explained_variance"], 0, atol=1e-5)
    _, metrics = score(without_values(params, mean_return + 3), *args)
    assert metrics["explained_variance"] < -0.1


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


def test_ppo_converges_to_the_optimal_policy_of_a_bandit():
    """argmax E[r] - beta KL(pi || ref) is ref * exp(r / beta), normalised (Ziegler et al. 2019, section 2)."""
    cfg = ModelConfig(
        vocab_size=6, num_layers=1, embed_dim=8, num_heads=2, num_kv_heads=2, head_dim=4, mlp_dim=8,
        tie_embeddings=False,
    )  # fmt: skip
    rows, steps, beta = 256, 150, 0.5
    o = Options(kl_coef=beta, missing_end_penalty=0.0, gae_lambda=1.0, vf_coef=0.1)
    reference, reward_model = tiny.language_model(cfg, 1), tiny.scalar_model(cfg, 2)
    prompt, ones = jnp.zeros((rows, 1), jnp.int32), jnp.ones((rows, 1), jnp.int32)
    sampling = SamplingConfig(max_new_tokens=1)
    tx = optax.adam(optax.linear_schedule(3e-2, 0.0, 2 * steps))
    abstract = abstract_state(actor_critic_spec(cfg), tx, None)
    state = init_state(ActorCritic(policy=reference, critic=reward_model), tx, abstract)
    update = make_train_step(lambda p, batch, key: ppo_loss(p, batch, key, cfg, o), tx, abstract)
    for step in range(steps):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), step), rows)
        made = generate(state.params.policy, prompt, ones, keys, cfg=cfg, sampling=sampling, end_id=-1, pad_id=0)
        batch, _ = score(state.params, reference, reward_model, prompt, ones, made, cfg, o)
        for _ in range(2):
            state, _ = update(state, batch, None)

    actions = jnp.stack([jnp.zeros(6, jnp.int32), jnp.arange(6)], axis=1)
    rewards = np.asarray(reward_of(reward_model, actions, jnp.ones((6, 2), jnp.int32), cfg)[0])
    start = np.asarray(jax.nn.softmax(tiny.logits(reference, prompt[:1], cfg)[0, 0]))
    best = start * np.exp(rewards / beta)
    best /= best.sum()
    learnt = np.asarray(jax.nn.softmax(tiny.logits(state.params.policy, prompt[:1], cfg)[0, 0]))

    def kl(p, q):
        return float(np.sum(p * np.log(p / q)))

    assert kl(start, best) > 0.1
    assert kl(learnt, best) < 1e-2
