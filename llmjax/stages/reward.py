"""The reward model: from ranked answers to a scalar that stands for people's preference."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np

from llmjax.data.batches import make_batches
from llmjax.data.gold import noise_ceiling, pair_accuracy
from llmjax.models.heads import ScalarModel, scalar_model_spec
from llmjax.models.spec import init_params
from llmjax.objectives.reward import pairwise_ranking_loss, reward_loss, reward_of
from llmjax.sharding import put_batch
from llmjax.stages.rankings import load_rankings, ranking_arrays
from llmjax.stages.run import Run, finish, fit


def run_reward(run: Run) -> None:
    """Trains on the rankings from the `init` model; accuracy on held-out prompts is compared with what the noise allows.

    At the end the head is shifted and scaled so that the rewards of the `init` model's own answers have mean 0 and
    standard deviation 1 (Ziegler et al. 2019, section 2.1); rankings do not change.
    """
    cfg, model = run.experiment.reward, run.model
    length = cfg.prompt_length + cfg.sampling.max_new_tokens
    rows = {
        name: ranking_arrays(load_rankings(run, name), length, run.tokenizer.pad_id)
        for name in ("train", "held_out", "new_facts")
    }
    inputs = ("tokens", "segment_ids", "ranks")
    batches = make_batches(
        {name: rows["train"][name] for name in inputs}, batch_size=cfg.batch_size, seed=run.experiment.seed
    )
    trained = fit(
        run, "reward", scalar_model_spec(model), start_params(run),
        lambda params, batch, key: reward_loss(params, batch, key, model), batches, cfg.optimizer, cfg.steps,
        cfg.batch_size * cfg.k * length, length,
    )  # fmt: skip
    train_rewards = score_all(run, trained.params, rows["train"])
    params = normalised(trained.params, float(train_rewards.mean()), float(train_rewards.std()))
    metrics = agreement(run, params, rows["held_out"])
    metrics |= {f"new_facts_{name}": value for name, value in agreement(run, params, rows["new_facts"]).items()}
    finish(run, "reward", params, trained, metrics)


def agreement(run: Run, params: ScalarModel, rows: dict[str, np.ndarray]) -> dict[str, float]:
    """accuracy on rankings, the ceiling that their noise leaves, their ratio; accuracy against the noiseless gold score.

    What is not defined, since no two answers differ in it, is left out.
    """
    rewards = score_all(run, params, rows)
    loss, accuracy = pairwise_ranking_loss(rewards, rows["ranks"])
    ceiling = noise_ceiling(rows["gold"], rows["ranks"])
    metrics = {
        "loss": float(loss),
        "accuracy": float(accuracy),
        "noise_ceiling": ceiling,
        "accuracy_of_ceiling": float(accuracy) / ceiling,
        "gold_accuracy": pair_accuracy(rewards, -rows["gold"]),
    }
    return {name: value for name, value in metrics.items() if np.isfinite(value)}


def start_params(run: Run) -> ScalarModel:
    """The `init` model as backbone, a fresh head."""
    head = init_params(scalar_model_spec(run.model).replace(backbone=None), run.key("reward", "init"), run.mesh)
    return head.replace(backbone=run.load_lm(run.experiment.reward.init))


def score_all(run: Run, params: ScalarModel, rows: dict[str, np.ndarray]) -> np.ndarray:
    """Rewards [N, K] of all answers, scored in batches of evaluation.batch_size answers."""
    n, k, length = rows["tokens"].shape
    flat = {name: rows[name].reshape(n * k, length) for name in ("tokens", "segment_ids")}
    size = run.experiment.evaluation.batch_size
    rewards = []
    for start in range(0, n * k, size):
        index = np.minimum(np.arange(start, start + size), n * k - 1)
        batch = put_batch({name: value[index] for name, value in flat.items()}, run.mesh)
        rewards.append(np.asarray(_score(params, batch["tokens"], batch["segment_ids"], cfg=run.model)))
    return np.concatenate(rewards)[: n * k].reshape(n, k)


@partial(jax.jit, static_argnames="cfg")
def _score(params, tokens_BT, segment_ids_BT, cfg):
    return reward_of(params, tokens_BT, segment_ids_BT, cfg)[0]


def normalised(params: ScalarModel, mean: float, std: float) -> ScalarModel:
    """The same ranking with rewards (r - mean) / std."""
    gain = 1.0 / max(std, 1e-6)
    return params.replace(weight=params.weight * gain, bias=(params.bias - mean) * gain)

