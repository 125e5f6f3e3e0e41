"""Algorithms: what they make of scores, their losses in NumPy, what they converge to, and a whole step of each."""

import dataclasses
import re
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from llmjax.config import validate
from llmjax.errors import UserError
from llmjax.generation.decode import generate
from llmjax.generation.sampling import SamplingConfig
from llmjax.generation.score import response_log_probs
from llmjax.models.config import ModelConfig
from llmjax.objectives.policy import Scored, actor_critic_spec
from llmjax.rl.algorithms import GRPO, PPO, Algorithm
from llmjax.rl.learner import Learner, Programs, policy_loss
from llmjax.rl.rollout import Rollout, score_rollout
from llmjax.training.optimizer import OptimizerConfig
from llmjax.training.state import abstract_state, init_state, make_train_step

# From scores to advantages


def rollout_of(scores, response: int = 3) -> Rollout:
    """A rollout with these scores, of responses of different lengths; GRPO looks at nothing else."""
    scores = np.asarray(scores, np.float32)
    mask = (np.arange(response) < np.arange(len(scores))[:, None] % response + 1).astype(np.float32)
    return Rollout(
        tokens=None, segment_ids=None, positions=None, mask=mask, scores=scores, log_probs=mask, ref_log_probs=mask, values=None
    )


def advantages_of(scores, **fields):
    """(advantage of each answer, share of groups without any) as GRPO makes them."""
    rollout, algorithm = rollout_of(scores), GRPO(**fields)
    made, metrics = algorithm.advantages(rollout)
    got = np.asarray(made["advantages"])
    assert made.keys() == {"advantages"} and got.shape == rollout.mask.shape
    np.testing.assert_array_equal(got, got[:, :1] * rollout.mask)  # the same for each token, 0 outside the answer
    return got[:, 0], float(metrics["equal_groups"])


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_an_answer_is_compared_with_its_group(size, scale):
    scores = np.random.default_rng(0).normal(size=(4, size)) * 3 + 5
    expected = scores - scores.mean(axis=1, keepdims=True)
    if scale:
        expected = expected / scores.std(axis=1, keepdims=True)
    got, equal = advantages_of(scores.ravel(), group_size=size, scale=scale)
    np.testing.assert_allclose(got, expected.ravel(), rtol=1e-4, atol=1e-5)
    assert equal == 0


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("size", [2, 3, 6, 8, 16])
def test_groups_of_equal_scores_say_nothing(size, scale):
    """Exactly: a rounding error must not become an advantage when it is divided by a deviation of its own size."""
    values = [0.0, 0.1, 0.7, 1.0, -2.3, 100.1]
    alike = np.repeat(np.float32(values), size)
    one_better = alike + (np.arange(len(alike)) % size == 0)
    got, equal = advantages_of(np.concatenate([alike, one_better]), group_size=size, scale=scale)
    np.testing.assert_array_equal(got[: len(alike)], 0)
    assert equal == 0.5 and np.all(got[len(alike) :] != 0)


@pytest.mark.parametrize("scale", [True, False])
def test_a_constant_added_to_a_group_changes_nothing(scale):
    scores = np.random.default_rng(1).integers(-8, 8, (3, 4)) / 4
    shift = np.array([[8.0], [-16.0], [0.5]])
    before, _ = advantages_of(scores.ravel(), group_size=4, scale=scale)
    after, _ = advantages_of((scores + shift).ravel(), group_size=4, scale=scale)
    np.testing.assert_allclose(after, before, atol=1e-6)
    assert np.any(before != 0)


def test_only_scaled_advantages_forget_how_far_scores_lie_apart():
    scores = np.random.default_rng(1).normal(size=12)
    for scale, factor in ((True, 1.0), (False, 5.0)):
        small, large = (advantages_of(x, group_size=4, scale=scale)[0] for x in (scores, 5 * scores))
        np.testing.assert_allclose(large, factor * small, rtol=1e-4, atol=1e-5)


# Losses


def made_up(rows: int = 24, response: int = 5):
    """(log-probabilities now, batch) with ratios on all sides of a clip of 0.1 below and 0.4 above."""
    rng = np.random.default_rng(0)
    mask = (np.arange(response) < rng.integers(1, response + 1, (rows, 1))).astype(np.float32)
    now, drift, off, advantages = rng.normal(size=(4, rows, response)).astype(np.float32)
    batch = {
        "mask": mask, "old_log_probs": (now - 0.3 * drift) * mask, "ref_log_probs": (now - 0.5 * off) * mask,
        "advantages": advantages * mask,
    }  # fmt: skip
    return now, batch


@pytest.mark.parametrize("kl_coef", [0.0, 0.7])
def test_loss_of_grpo_and_its_gradient(kl_coef):
    algorithm = GRPO(clip_low=0.1, clip_high=0.4, kl_coef=kl_coef)
    now, batch = made_up()
    mask, advantages = batch["mask"], batch["advantages"]
    if not kl_coef:
        batch.pop("ref_log_probs")  # not looked at

    def loss(log_probs):
        return algorithm.loss(Scored(log_probs, entropy=jnp.zeros_like(log_probs), values=None), batch)

    (got, metrics), grad = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(now))

    def mean(x):
        return np.sum(x * mask) / mask.sum()

    log_ratio = (now - batch["old_log_probs"]) * mask
    ratio = np.exp(log_ratio)
    policy_loss = -mean(np.minimum(advantages * ratio, advantages * np.clip(ratio, 0.9, 1.4)))
    stopped = np.where(advantages > 0, ratio > 1.4, ratio < 0.9)
    for moves in (stopped, ~stopped):  # every case is there, below as above
        for side in (advantages > 0, advantages < 0):
            assert np.any(moves & side & (mask > 0))
    assert np.any((ratio > 1.1) & (ratio < 1.4) & (advantages > 0) & (mask > 0))
    expected_grad = np.where(stopped, 0.0, -advantages * ratio) * mask / mask.sum()
    kl = 0.0
    if kl_coef:
        off = (now - batch["ref_log_probs"]) * mask
        kl = mean(0.5 * off**2)
        expected_grad = expected_grad + kl_coef * off / mask.sum()
        np.testing.assert_allclose(metrics["kl_loss"], kl, rtol=1e-5)
    np.testing.assert_allclose(got, policy_loss + kl_coef * kl, atol=1e-6)
    np.testing.assert_allclose(grad, expected_grad, atol=1e-6)
    np.testing.assert_allclose(metrics["policy_loss"], policy_loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["clip_fraction"], mean((ratio < 0.9) | (ratio > 1.4)), rtol=1e-6)
    np.testing.assert_allclose(metrics["approx_kl"], 0.5 * mean(log_ratio**2), rtol=1e-5)
    np.testing.assert_allclose(metrics["ratio_max"], np.max(ratio[mask > 0]), rtol=1e-5)


def test_the_gradient_of_the_penalty_is_that_of_the_kl():
    """By exact enumeration: eight samples stand for a policy of probabilities 1/8, 2/8, 4/8 and 1/8."""
    actions = np.repeat(np.arange(4), [1, 2, 4, 1])
    logits = jnp.log(jnp.array([1.0, 2.0, 4.0, 1.0])) + 0.3
    reference = jax.nn.log_softmax(jnp.array([0.5, -1.0, 0.2, 2.0]))
    ones = np.ones((8, 1), np.float32)

    def loss(logits):
        now = jax.nn.log_softmax(logits)[actions][:, None]
        batch = {"mask": ones, "old_log_probs": jax.lax.stop_gradient(now), "ref_log_probs": reference[actions][:, None]}
        new = Scored(now, entropy=ones, values=None)
        return GRPO(kl_coef=1.0).loss(new, batch | {"advantages": 0 * ones})[0]

    def kl(logits):
        now = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(now) * (now - reference))

    expected = jax.grad(kl)(logits)
    assert np.max(np.abs(expected)) > 0.1
    np.testing.assert_allclose(jax.grad(loss)(logits), expected, atol=1e-6)


loss_grads = jax.jit(jax.value_and_grad(policy_loss, has_aux=True), static_argnums=(3, 4, 5))


def test_at_ratio_one_the_gradient_is_that_of_reinforce_with_the_groups_mean_as_baseline():
    cfg, algorithm = tiny.DENSE, GRPO(group_size=3, scale=False)
    params, batch = tiny.actor_critic(cfg, critic=False), tiny.experience(cfg, 6, 3, 5)
    text = dict(batch)

    def log_probs(policy):
        return response_log_probs(policy, text, cfg, 0.8)[0] * text["mask"]

    scores = np.random.default_rng(3).normal(size=6).astype(np.float32)
    rollout = rollout_of(scores).replace(mask=batch["mask"])
    batch |= {"old_log_probs": jax.jit(log_probs)(params.policy)}
    batch |= algorithm.advantages(rollout)[0]
    baseline = np.repeat(scores.reshape(2, 3).mean(axis=1), 3)

    def reinforce(policy):
        return -jnp.sum((scores - baseline) * jnp.sum(log_probs(policy), axis=1)) / text["mask"].sum()

    _, (expected,) = tiny.value_and_grads(reinforce, params.policy)
    (_, metrics), grads = loss_grads(params, batch, None, cfg, algorithm, 0.8)
    tiny.assert_trees_close(grads.policy, expected, 1e-5)
    np.testing.assert_allclose(metrics["ratio_max"], 1.0, atol=1e-6)
    assert grads.critic is None


@pytest.mark.parametrize(
    "algorithm, what",
    [
        (PPO(kl_coef=-0.1), "kl_coef=-0.1 must be 0 or more"),
        (PPO(clip_ratio=0.0), "0.0 must be positive"),
        (PPO(gamma=1.1), "gamma=1.1 must be between 0 and 1"),
        (PPO(gae_lambda=-0.5), "gae_lambda=-0.5 must be between 0 and 1"),
        (GRPO(group_size=1), "group_size=1 must be at least 2"),
        (GRPO(kl_coef=-1.0), "kl_coef=-1.0 must be 0 or more"),
        (GRPO(clip_high=-0.2), "-0.2 must be positive"),
        (GRPO(clip_low=0.0), "must be positive"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(algorithm, what):
    with pytest.raises(UserError, match=re.escape(what)):
        validate(algorithm)


# What they converge to


@pytest.mark.parametrize("name", ["PPO", "GRPO"])
def test_it_converges_to_the_optimal_policy_of_a_bandit(name):
    """argmax E[r] - beta KL(pi || ref) is ref * exp(r / beta), normalised (Ziegler et al. 2019, section 2), whether the KL is
    taken off the rewards or is part of the loss."""
    cfg = ModelConfig(
        vocab_size=6, num_layers=1, embed_dim=8, num_heads=2, num_kv_heads=2, head_dim=4, mlp_dim=8,
        tie_embeddings=False,
    )  # fmt: skip
    rows, steps, beta = 256, 150, 0.5
    algorithm = {
        "PPO": PPO(kl_coef=beta, gae_lambda=1.0, vf_coef=0.1),
        "GRPO": GRPO(group_size=rows, scale=False, kl_coef=beta),
    }[name]
    rewards = np.array([0.4, -0.8, 0.9, 0.1, -0.3, 1.1], np.float32)
    reference = tiny.language_model(cfg, 1)
    prompt, ones = jnp.zeros((rows, 1), jnp.int32), jnp.ones((rows, 1), jnp.int32)
    sampling = SamplingConfig(max_new_tokens=1)
    tx = optax.adam(optax.linear_schedule(3e-2, 0.0, 2 * steps))
    specs = actor_critic_spec(cfg, algorithm.needs_critic)
    abstract = abstract_state(specs, tx, None)
    state = init_state(tiny.draw(specs).replace(policy=reference), tx, abstract)
    update = make_train_step(lambda p, batch, key: policy_loss(p, batch, key, cfg, algorithm, 1.0), tx, abstract)

    @jax.jit
    def experience(params, keys):
        made = generate(params.policy, prompt, ones, keys, cfg=cfg, sampling=sampling, stop_ids=(), pad_id=0)
        scores = jnp.asarray(rewards)[made.tokens[:, 0]]
        rollout, _ = score_rollout(params, reference, prompt, ones, made, scores, cfg, 1.0)
        return rollout.batch() | algorithm.advantages(rollout)[0]

    for step in range(steps):
        batch = experience(state.params, jax.random.split(jax.random.fold_in(jax.random.key(0), step), rows))
        for _ in range(2):
            state, _ = update(state, batch, None)

    start = np.asarray(jax.nn.softmax(tiny.logits(reference, prompt[:1], cfg)[0, 0]))
    best = start * np.exp(rewards / beta)
    best /= best.sum()
    learnt = np.asarray(jax.nn.softmax(tiny.logits(state.params.policy, prompt[:1], cfg)[0, 0]))

    def kl(p, q):
        return float(np.sum(p * np.log(p / q)))

    assert kl(start, best) > 0.1
    assert kl(learnt, best) < 1e-2


# A step


ROWS, PROMPT, RESPONSE, EPOCHS, PARTS, STEPS = 12, 4, 6, 2, 3, 3
ALGORITHMS = {"PPO": PPO(), "GRPO": GRPO(group_size=4, clip_high=0.3, kl_coef=0.1)}


def learner_of(cfg, algorithm, **fields) -> Learner:
    # A schedule that ends at 0, so that how many updates were planned shows.
    optimizer = OptimizerConfig(learning_rate=2e-2, warmup_steps=0, schedule="linear", final_fraction=0.0, weight_decay=0.0)
    return Learner(
        cfg, None, algorithm, optimizer, SamplingConfig(RESPONSE, temperature=0.9), STEPS, ROWS, EPOCHS, PARTS, PROMPT,
        stop_ids=(7, 8), pad_id=0, **fields,
    )  # fmt: skip


def prompts(cfg, repeats: int):
    """Prompts of different lengths, each `repeats` times."""
    count = ROWS // repeats
    segments = (np.arange(PROMPT) >= np.arange(count)[:, None] % PROMPT).astype(np.int32)
    rows = {"tokens": tiny.tokens(cfg, count, PROMPT), "segment_ids": segments, "prompt": np.arange(count)}
    return {name: jnp.asarray(np.repeat(value, repeats, axis=0)) for name, value in rows.items()}


def small_ids(batch, generation):
    """A reward as a person writes it: plain Python on the host, the share of small ids in each answer."""
    scores = []
    for row, mask in zip(np.asarray(generation.tokens).tolist(), np.asarray(generation.mask).tolist()):
        answer = [token for token, real in zip(row, mask) if real]
        scores.append(sum(token < 16 for token in answer) / len(answer))
    return np.array(scores), {"reward": float(np.mean(scores)), "asked": float(np.sum(batch["prompt"]))}


class Calls:
    """The programs of a learner, compiled as they are planned; of those that are watched, what each was called with and what it
    answered, on the host."""

    def __init__(self, learner: Learner):
        self.programs = Programs(*map(tiny.compiled, learner.programs()))
        self._made: dict[str, list] = {name: [] for name in Programs._fields}

    def watched(self) -> Programs:
        return Programs(*(self._watch(name, getattr(self.programs, name)) for name in Programs._fields))

    def _watch(self, name, program):
        def call(*args):
            kept = jax.device_get(args[1:])  # not what is donated
            out = program.fn(*args)
            self._made[name].append((kept, jax.device_get(out[1] if name == "update" else out)))
            return out

        return dataclasses.replace(program, fn=call)

    def take(self, name):
        return self._made[name]


@cache
def one_step(model: str, name: str):
    """(learner, programs, first parameters, state and metrics after a step, what was called)."""
    cfg, algorithm = dataclasses.replace(tiny.MODELS[model], num_layers=1), ALGORITHMS[name]
    learner = learner_of(cfg, algorithm)
    calls = Calls(learner)
    params = tiny.actor_critic(cfg, critic=algorithm.needs_critic)
    step = learner.step_fn(calls.watched(), params.policy, small_ids)
    state = calls.programs.update.init(params)
    state, metrics = step(state, prompts(cfg, algorithm.answers_per_prompt), jax.random.key(1))
    return learner, calls, params, state, metrics


def moved(before, after) -> list[bool]:
    """Of each leaf, whether it has changed."""
    return [bool(np.any(np.asarray(a) != np.asarray(b))) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True)]


every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)
on_models = pytest.mark.parametrize("model, name", tiny.crossed([("dense", "PPO"), ("dense", "GRPO")], tiny.MODELS, ALGORITHMS))


@on_models
def test_the_first_update_is_on_policy(model, name):
    _, _, params, state, metrics = one_step(model, name)
    np.testing.assert_allclose(metrics["first_ratio_max"], 1.0, atol=1e-5)
    assert metrics["ratio_max"] > 1.0 + 1e-3  # later ones are not
    assert metrics["kl"] == 0 and metrics["sampler_gap"] < 1e-4
    assert int(state.step) == 1  # iterations
    assert all(moved(params.policy, state.params.policy))
    if name == "PPO":  # all but the table of the next token, of which a critic makes no use
        assert moved(params.critic, state.params.critic).count(False) == 1
    for value in metrics.values():
        assert np.all(np.isfinite(value))


@pytest.mark.parametrize("model", tiny.MODELS)
def test_while_the_critic_warms_up_the_policy_stays(model):
    """To the bit, though routers have losses of their own."""
    cfg = dataclasses.replace(tiny.MODELS[model], num_layers=1)
    learner = learner_of(cfg, PPO(), critic_warmup=1)
    calls = Calls(learner)
    params = tiny.actor_critic(cfg)
    step = learner.step_fn(calls.programs, params.policy, small_ids)
    first, metrics = step(calls.programs.update.init(params), prompts(cfg, 1), jax.random.key(1))
    first = jax.device_get(first)
    assert not any(moved(params.policy, first.params.policy)) and any(moved(params.critic, first.params.critic))
    assert metrics["policy_loss"] == 0 and metrics["first_ratio_max"] == pytest.approx(1.0, abs=1e-5)
    second, _ = step(jax.device_put(first), prompts(cfg, 1), jax.random.key(2))
    assert any(moved(first.params.policy, second.params.policy))


@on_models
def test_every_row_is_used_once_an_epoch(model, name):
    _, calls, _, _, metrics = one_step(model, name)
    ((_, (whole, _)),) = calls.take("score")
    updates = [batch for (batch, _), _ in calls.take("update")]
    assert len(updates) == EPOCHS * PARTS and len(np.unique(whole["tokens"], axis=0)) == ROWS
    orders = []
    for epoch in range(EPOCHS):
        parts = updates[epoch * PARTS : (epoch + 1) * PARTS]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in whole}
        order = [int(np.flatnonzero(np.all(whole["tokens"] == row, axis=1))[0]) for row in joined["tokens"]]
        assert sorted(order) == list(range(ROWS))
        for key, value in whole.items():  # rows stay together
            np.testing.assert_array_equal(joined[key], value[order], err_msg=key)
        orders.append(order)
    assert orders[0] != orders[1] and orders[0] != list(range(ROWS))
    losses = [out["loss"] for _, out in calls.take("update")]
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-6)
    np.testing.assert_allclose(metrics["ratio_max"], max(out["ratio_max"] for _, out in calls.take("update")), rtol=1e-6)


@every_algorithm
def test_scores_of_the_host_arrive(name):
    _, calls, _, _, metrics = one_step("dense", name)
    ((_, generation),) = calls.take("sample")
    (((_, tokens, segments, made, scores), (batch, _)),) = calls.take("score")
    asked = {key: np.asarray(value) for key, value in prompts(tiny.DENSE, ALGORITHMS[name].answers_per_prompt).items()}
    np.testing.assert_array_equal(tokens, asked["tokens"])
    np.testing.assert_array_equal(segments, asked["segment_ids"])
    tiny.assert_trees_equal(made, generation)
    expected, measured = small_ids(asked, generation)
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    assert metrics["reward"] == measured["reward"] and metrics["asked"] == measured["asked"]
    mask = generation.mask
    if name == "GRPO":
        groups = expected.reshape(-1, 4)
        centred = (groups - groups.mean(axis=1, keepdims=True)) / groups.std(axis=1, keepdims=True)
        np.testing.assert_allclose(batch["advantages"], centred.reshape(-1, 1) * mask, atol=1e-4)
    else:  # the last return is the score: KL is 0
        last = (np.arange(ROWS), mask.sum(axis=1).astype(int) - 1)
        np.testing.assert_allclose(batch["returns"][last], expected, atol=1e-6)


@every_algorithm
def test_answers_stop_and_those_of_one_prompt_differ(name):
    _, calls, _, _, metrics = one_step("dense", name)
    ((_, made),) = calls.take("sample")
    stops = np.isin(made.tokens, (7, 8)) & (made.mask > 0)
    np.testing.assert_array_equal(stops.any(axis=1), made.ended)
    assert 0 < made.ended.sum() < ROWS and metrics["ended"] == pytest.approx(made.ended.mean())
    np.testing.assert_array_equal(np.argmax(stops, axis=1)[made.ended] + 1, made.mask.sum(axis=1)[made.ended])
    assert len(np.unique(made.tokens, axis=0)) == ROWS


@pytest.mark.parametrize("model", tiny.crossed([("dense",)], tiny.MODELS))
def test_without_need_there_is_no_critic(model):
    _, calls, _, state, metrics = one_step(model, "GRPO")
    assert state.params.critic is None and "value_loss" not in metrics and "explained_variance" not in metrics
    (((batch, _), _), *_) = calls.take("update")
    assert not {"old_values", "returns"} & batch.keys()
    _, ppo_calls, _, ppo_state, ppo_metrics = one_step(model, "PPO")
    assert ppo_state.params.critic is not None and {"value_loss", "explained_variance"} <= ppo_metrics.keys()
    for one in ("score", "update"):
        sizes = [len(jax.tree.leaves(getattr(c.programs, one).args)) for c in (calls, ppo_calls)]
        assert sizes[0] < sizes[1]


@every_algorithm
def test_steps_repeat_and_the_schedule_spans_all_updates(name):
    """The same key makes the same step; after the last one the learning rate has come to its end."""
    learner, calls, params, first, first_metrics = one_step("dense", name)
    repeats = learner.algorithm.answers_per_prompt
    step = learner.step_fn(calls.programs, params.policy, small_ids)
    state = calls.programs.update.init(params)
    for i in range(STEPS):
        state, metrics = step(state, prompts(learner.cfg, repeats), jax.random.key(1 + i))
        if i == 0:
            tiny.assert_trees_equal(state.params, first.params)
            assert metrics["loss"] == first_metrics["loss"]
    assert int(state.step) == STEPS and metrics["kl"] != 0
    (((batch, _), _), *_) = calls.take("update")
    last = jax.device_get(state.params)
    after, _ = calls.programs.update.fn(state, batch, jax.random.key(0))
    tiny.assert_trees_close(after.params, last, 1e-6)


@every_algorithm
def test_it_learns_what_the_reward_asks_for(name):
    learner, calls, params, _, _ = one_step("dense", name)
    learner = dataclasses.replace(learner, steps=20)
    update = tiny.compiled(learner.programs().update)
    step = learner.step_fn(calls.programs._replace(update=update), params.policy, small_ids)
    state, rewards = update.init(params), []
    for i in range(20):
        state, metrics = step(state, prompts(tiny.DENSE, learner.algorithm.answers_per_prompt), jax.random.key(i))
        rewards.append(metrics["reward"])
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.2


@dataclass(frozen=True)
class Imitation(Algorithm):
    """An algorithm as an experiment would write one: likelihood of the better half of the answers."""

    bonus: float = 2.0

    def advantages(self, rollout):
        better = (rollout.scores >= jnp.median(rollout.scores)).astype(jnp.float32)
        return {"weights": self.bonus * better[:, None] * rollout.mask}, {"kept": jnp.mean(better)}

    def loss(self, new, batch):
        loss = -jnp.sum(batch["weights"] * new.log_probs) / jnp.sum(batch["mask"])
        return loss, {"imitation": loss}


def test_an_algorithm_of_ones_own():
    cfg, algorithm = tiny.DENSE, Imitation()
    learner, params = learner_of(cfg, algorithm), tiny.actor_critic(cfg, critic=False)
    calls = Calls(learner)
    step = learner.step_fn(calls.watched(), params.policy, small_ids)
    _, metrics = step(calls.programs.update.init(params), prompts(cfg, 1), jax.random.key(1))
    ((_, (batch, _)),) = calls.take("score")
    assert set(np.unique(batch["weights"])) == {0.0, 2.0}
    assert metrics["imitation"] == metrics["loss"] and 0.5 <= metrics["kept"] < 1 and "first_ratio_max" not in metrics


def test_an_algorithm_says_what_it_lacks():
    with pytest.raises(TypeError, match=r"Algorithm has no advantages\(rollout\)"):
        Algorithm().advantages(None)
    with pytest.raises(TypeError, match=r"Algorithm has no loss\(new, batch\)"):
        Algorithm().loss(None, {})
