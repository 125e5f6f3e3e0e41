"""PPO: the SFT model against the reward model, with a KL penalty to where it started."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.data.batches import make_batches
from llmjax.data.gold import judge
from llmjax.evals.answers import answer_report, question_prompts, to_answers
from llmjax.generation.decode import generate
from llmjax.models.heads import scalar_model_spec
from llmjax.models.stats import train_flops_per_token
from llmjax.objectives.ppo import ActorCritic, actor_critic_spec, ppo_loss
from llmjax.rl.rollout import minibatches, score_experience
from llmjax.stages.prepare import all_questions
from llmjax.stages.run import Run, finish, fit_state
from llmjax.stages.samples import as_samples, ask, evaluation_questions
from llmjax.training.optimizer import make_optimizer
from llmjax.training.rng import fold_purpose
from llmjax.training.state import TrainState, abstract_state, make_train_step


def run_ppo(run: Run) -> None:
    """Trains policy and critic (initialised from the reward model, as in Stiennon et al. 2020), then judges every
    stage's model on the held-out questions: gold score, correctness, KL to the `policy` stage."""
    cfg, model = run.experiment.ppo, run.model
    reference, reward_model = run.load_lm(cfg.policy), run.load(cfg.reward, scalar_model_spec(model))
    asked = all_questions(run, "train")
    prompts = question_prompts(asked, run.tokenizer, cfg.prompt_length)
    prompts["question"] = np.arange(len(asked), dtype=np.int32)
    batches = make_batches(prompts, batch_size=cfg.batch_size, seed=run.experiment.seed)
    specs = actor_critic_spec(model)
    updates = cfg.steps * cfg.epochs * cfg.minibatches
    tx = make_optimizer(cfg.optimizer, updates, specs)
    abstract = abstract_state(specs, tx, run.mesh)
    step_fn = make_ppo_step(run, tx, abstract, reference, reward_model, asked)
    length = cfg.prompt_length + cfg.max_new_tokens
    start, flops = ActorCritic(policy=reference, critic=reward_model), train_flops_per_token(model, length)
    trained = fit_state(run, "ppo", tx, abstract, start, step_fn, batches, cfg.steps, cfg.batch_size * length, flops)
    policy = trained.params.policy
    table, asked, answers = final_table(run, policy)
    metrics = {k: v for k, v in table[-1].items() if k != "model"}
    finish(run, "ppo", policy, trained, metrics, as_samples(run, asked, answers, "sampled"), table=table)


def make_ppo_step(run: Run, tx, abstract: TrainState, reference, reward_model, asked):
    """(state, prompts, key) -> (state, metrics): sample, score, and `epochs` x `minibatches` updates.

    `state.step` counts iterations, not updates.
    """
    cfg, model = run.experiment.ppo, run.model
    score = jax.jit(score_experience, static_argnums=(6, 7))
    update = make_train_step(lambda params, batch, key: ppo_loss(params, batch, key, model, cfg), tx, abstract)
    shuffle = jax.jit(minibatches, static_argnums=2)

    def step(state: TrainState, prompts, key):
        iteration = int(state.step)
        keys_B = jax.random.split(fold_purpose(key, "sample"), cfg.batch_size)
        generation = generate(
            state.params.policy, prompts["tokens"], prompts["segment_ids"], keys_B,
            cfg=model, sampling=cfg.sampling, end_id=run.tokenizer.end_id, pad_id=run.tokenizer.pad_id,
        )  # fmt: skip
        experience, rollout_metrics = score(
            state.params, reference, reward_model, prompts["tokens"], prompts["segment_ids"], generation, model, cfg
        )
        all_metrics = []
        for epoch in range(cfg.epochs):
            shuffled = shuffle(experience, jax.random.fold_in(fold_purpose(key, "shuffle"), epoch), cfg.minibatches)
            for i in range(cfg.minibatches):
                batch = jax.tree.map(lambda x, i=i: x[i], shuffled)
                state, metrics = update(state, batch, key)
                all_metrics.append(metrics)
        state = state.replace(step=jax.device_put(jnp.int32(iteration + 1), abstract.step.sharding))
        means = {name: np.mean([np.asarray(m[name]) for m in all_metrics], axis=0) for name in all_metrics[0]}
        means["ratio_max"] = max(float(m["ratio_max"]) for m in all_metrics)
        means["first_ratio_max"] = float(all_metrics[0]["ratio_max"])
        return state, rollout_metrics | means | {"gold": gold_of(run, asked, prompts, generation)}

    return step


def gold_of(run: Run, asked, prompts, generation) -> float:
    """Mean gold score of a rollout: watched, never trained on."""
    answers = to_answers(
        np.asarray(generation.tokens), np.asarray(generation.mask), np.asarray(generation.ended), run.tokenizer
    )
    index = np.asarray(prompts["question"])
    return float(np.mean([judge(asked[q], a.text, a.ended).score for q, a in zip(index, answers)]))


def final_table(run: Run, policy):
    """One row per model - base, sft, ppo - on the same held-out questions; and the questions with PPO's answers."""
    cfg = run.experiment.ppo
    asked = evaluation_questions(run)
    reference = run.load_lm(cfg.policy)
    base = run.load_lm(run.experiment.sft.init)
    table, answers = [], []
    for name, params in (("base", base), ("sft", reference), ("ppo", policy)):
        answers = ask(run, params, asked, "evaluation", reference)
        table.append({"model": name} | answer_report(asked, answers))
    return table, asked, answers
