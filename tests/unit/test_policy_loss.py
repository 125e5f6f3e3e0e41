"""The loss of PPO: its value in NumPy, and where its gradient must vanish."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from llmjax.generation.score import response_log_probs, response_values
from llmjax.models.moe import router_loss
from llmjax.rl.algorithms import PPO
from llmjax.rl.learner import policy_loss

ROWS, PROMPT, RESPONSE = 4, 3, 5
both = pytest.mark.parametrize("cfg", tiny.MODELS.values(), ids=tiny.MODELS.keys())
ALGORITHM = PPO(clip_ratio=0.2, value_clip=0.3, vf_coef=0.5)

policy_grads = jax.jit(jax.value_and_grad(policy_loss, has_aux=True), static_argnums=(3, 4, 5))


def ppo_grads(params, batch, cfg=tiny.DENSE, algorithm=ALGORITHM):
    return policy_grads(params, batch, None, cfg, algorithm, 1.0)


def some_experience(cfg=tiny.DENSE):
    return tiny.experience(cfg, ROWS, PROMPT, RESPONSE)


def current_log_probs(params, batch, cfg=tiny.DENSE, temperature=1.0):
    return np.asarray(jax.jit(lambda p: response_log_probs(p, batch, cfg, temperature)[0])(params.policy))


def largest(tree) -> float:
    return max(float(np.max(np.abs(leaf))) for leaf in jax.tree.leaves(tree))


@both
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_response_log_probs_are_those_of_the_full_forward_pass(cfg, temperature):
    params, batch = tiny.actor_critic(cfg), some_experience(cfg)
    logits = tiny.logits(params.policy, batch["tokens"], cfg, segments=batch["segment_ids"])
    log_probs = np.asarray(jax.nn.log_softmax(logits / temperature, axis=-1))
    got = current_log_probs(params, batch, cfg, temperature)
    for row in range(ROWS):
        for t in range(int(batch["mask"][row].sum())):
            token = batch["tokens"][row, PROMPT + t]
            np.testing.assert_allclose(got[row, t], log_probs[row, PROMPT + t - 1, token], atol=1e-5)


def test_a_value_is_of_the_state_before_its_token():
    cfg = tiny.DENSE
    params, batch = tiny.actor_critic(cfg), some_experience()
    values = jax.jit(lambda tokens: response_values(params.critic, batch | {"tokens": tokens}, cfg)[0])
    before = np.asarray(values(batch["tokens"]))
    for t in range(RESPONSE):
        changed = batch["tokens"].copy()
        changed[:, PROMPT + t] = (changed[:, PROMPT + t] + 1) % cfg.vocab_size
        after = np.asarray(values(changed))
        np.testing.assert_array_equal(after[:, : t + 1], before[:, : t + 1])


@pytest.mark.parametrize("name", tiny.crossed([("dense",)], tiny.MODELS))
def test_value_of_the_loss_and_its_metrics(name):
    cfg = tiny.MODELS[name]
    params, batch = tiny.actor_critic(cfg), some_experience(cfg)
    drift = np.random.default_rng(2).normal(size=batch["mask"].shape).astype(np.float32) * 0.3
    log_probs, entropy, stats = jax.jit(lambda p: response_log_probs(p, batch, cfg, 1.0))(params.policy)
    values, critic_stats = jax.jit(lambda p: response_values(p, batch, cfg))(params.critic)
    batch["old_log_probs"] = (np.asarray(log_probs) + drift) * batch["mask"]
    (loss, metrics), _ = ppo_grads(params, batch, cfg)
    mask = batch["mask"]

    def mean(x):
        return np.sum(x * mask) / mask.sum()

    log_ratio = -drift * mask
    ratio, advantages = np.exp(log_ratio), batch["advantages"]
    surrogate = np.minimum(advantages * ratio, advantages * np.clip(ratio, 0.8, 1.2))
    old, returns, values = batch["old_values"], batch["returns"], np.asarray(values)
    near = old + np.clip(values - old, -0.3, 0.3)
    value_loss = 0.5 * mean(np.maximum((values - returns) ** 2, (near - returns) ** 2))
    np.testing.assert_allclose(metrics["policy_loss"], -mean(surrogate), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["value_loss"], value_loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], metrics["policy_loss"] + 0.5 * value_loss, rtol=1e-5)
    clipped = np.abs(ratio - 1) > 0.2
    assert 0 < mean(clipped) < 1
    np.testing.assert_allclose(metrics["clip_fraction"], mean(clipped), rtol=1e-6)
    np.testing.assert_allclose(metrics["approx_kl"], 0.5 * mean(log_ratio**2), rtol=1e-4)
    np.testing.assert_allclose(metrics["ratio_max"], max(1.0, np.max(ratio * mask)), rtol=1e-4)
    np.testing.assert_allclose(metrics["entropy"], mean(entropy), rtol=1e-5)
    routers = [] if cfg.moe is None else [float(router_loss(one, cfg.moe)) for one in (stats, critic_stats)]
    assert cfg.moe is None or 1e-3 < routers[0] != routers[1] > 1e-3  # policy and critic have their own
    np.testing.assert_allclose(loss - metrics["loss"], sum(routers), atol=1e-6)


@pytest.mark.parametrize(
    "advantage, ratio, moves",
    [
        (1.0, 1.5, False), (1.0, 1.1, True), (1.0, 0.9, True), (1.0, 0.5, True),
        (-1.0, 1.5, True), (-1.0, 1.1, True), (-1.0, 0.9, True), (-1.0, 0.5, False),
    ],
)  # fmt: skip
def test_the_policy_stops_where_the_objective_is_clipped(advantage, ratio, moves):
    params, batch = tiny.actor_critic(tiny.DENSE), some_experience()
    log_probs = current_log_probs(params, batch)
    batch |= {
        "old_log_probs": (log_probs - np.float32(np.log(ratio))) * batch["mask"],
        "advantages": np.float32(advantage) * batch["mask"],
    }
    _, grads = ppo_grads(params, batch, algorithm=dataclasses.replace(ALGORITHM, vf_coef=0.0))
    if moves:
        assert largest(grads.policy) > 1e-3
    else:
        assert largest(grads.policy) == 0
    assert largest(grads.critic) == 0  # vf_coef 0


def test_at_ratio_one_the_gradient_is_that_of_reinforce():
    cfg, params, batch = tiny.DENSE, tiny.actor_critic(tiny.DENSE), some_experience()
    batch |= {"old_log_probs": current_log_probs(params, batch) * batch["mask"]}

    def reinforce(policy):
        log_probs, _, _ = response_log_probs(policy, batch, cfg, 1.0)
        return -jnp.sum(batch["advantages"] * log_probs * batch["mask"]) / jnp.sum(batch["mask"])

    _, (expected,) = tiny.value_and_grads(reinforce, params.policy)
    _, grads = ppo_grads(params, batch)
    tiny.assert_trees_close(grads.policy, expected, 1e-5)


def test_the_critic_stops_where_its_loss_is_clipped():
    cfg, params, batch = tiny.DENSE, tiny.actor_critic(tiny.DENSE), some_experience()
    values = np.asarray(jax.jit(lambda p: response_values(p, batch, cfg)[0])(params.critic))

    def critic_gradient(old, returns):
        made = batch | {"old_values": np.float32(old), "returns": np.float32(returns)}
        return largest(ppo_grads(params, made)[1].critic)

    assert critic_gradient(values, values + 1) > 1e-3
    assert critic_gradient(values - 1, values + 1) == 0  # moved 1 > value_clip towards the target: no further
    assert critic_gradient(values + 1, values + 0.9) > 1e-3  # moved away from the target: still pulled back


def test_what_lies_outside_the_mask_does_not_matter():
    params, batch = tiny.actor_critic(tiny.DENSE), some_experience()
    outside = 1 - batch["mask"]
    assert outside.sum() > 0
    garbage = {name: batch[name] + 3 * outside for name in ("old_log_probs", "advantages", "returns", "old_values")}
    expected, got = (ppo_grads(params, b) for b in (batch, batch | garbage))
    tiny.assert_trees_close(got, expected, 1e-6)
