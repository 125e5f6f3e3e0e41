"""Supervised fine-tuning: dialogues, to a model that follows instructions."""

from __future__ import annotations

import jax

from llmjax.data.batches import make_batches, sequential_batches
from llmjax.evals.answers import answer_report
from llmjax.evals.language import held_out
from llmjax.models.lora import adapt, lora_spec, merge
from llmjax.models.spec import init_params, num_params
from llmjax.models.transformer import transformer_spec
from llmjax.objectives.lm import lm_loss
from llmjax.stages.prepare import sft_data
from llmjax.stages.run import Run, balancing, finish, fit
from llmjax.stages.samples import as_samples, ask, evaluation_questions
from llmjax.training.loop import Hook


def run_sft(run: Run) -> None:
    """Fine-tunes the `init` model; measures the instruction-following rate on held-out questions before and after."""
    cfg, model = run.experiment.sft, run.model
    train_data, eval_data = sft_data(run)
    batches = make_batches(train_data.arrays(), batch_size=cfg.batch_size, seed=run.experiment.seed)
    base = run.load_lm(cfg.init)
    if cfg.lora is None:
        specs, start, frozen = transformer_spec(model), base, ()
    else:
        specs, frozen = lora_spec(model, cfg.lora), (base,)
        start = init_params(specs, run.key("sft", "lora"), run.mesh)

    def language_model(params, *frozen):
        return adapt(*frozen, params, cfg.lora) if frozen else params

    def loss_fn(params, batch, key, *frozen):
        return lm_loss(language_model(params, *frozen), batch, key, model)

    def evaluate(step, state):
        rows = sequential_batches(eval_data.arrays(), cfg.batch_size)
        nats, tokens = held_out(language_model(state.params, *frozen), rows, model, run.mesh)
        return {"loss": nats / max(tokens, 1)}

    trained = fit(
        run, "sft", specs, start, loss_fn, batches, cfg.optimizer, cfg.steps,
        cfg.batch_size * cfg.length, cfg.length, [Hook(cfg.eval_every, evaluate)], frozen,
        None if cfg.lora else balancing(model),
    )  # fmt: skip
    final, adapter = trained.params, None
    if cfg.lora is not None:
        adapter = trained.params
        final = jax.jit(merge, static_argnums=(2, 3))(base, trained.params, cfg.lora, model)
    asked = evaluation_questions(run)
    answers = ask(run, final, asked, "evaluation")
    before, after = answer_report(asked, ask(run, base, asked, "evaluation")), answer_report(asked, answers)
    metrics = evaluate(cfg.steps, trained) | {
        "instruction_following_before": before["instruction_following"],
        "instruction_following_after": after["instruction_following"],
        "gold": after["gold"],
        "correct": after["correct"],
    }
    if cfg.lora is not None:
        metrics["trained_params"] = num_params(specs)
    finish(run, "sft", final, trained, metrics, as_samples(run, asked, answers, "sampled"), adapter)
