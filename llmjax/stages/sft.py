"""Supervised fine-tuning: dialogues, to a model that follows instructions."""

from __future__ import annotations

from llmjax.data.batches import make_batches, sequential_batches
from llmjax.evals.answers import answer_report
from llmjax.evals.language import held_out
from llmjax.models.transformer import transformer_spec
from llmjax.objectives.lm import lm_loss
from llmjax.stages.prepare import sft_data
from llmjax.stages.run import Run, finish, fit
from llmjax.stages.samples import as_samples, ask, evaluation_questions
from llmjax.training.loop import Hook


def run_sft(run: Run) -> None:
    """Fine-tunes the `init` model; measures the instruction-following rate on held-out questions before and after."""
    cfg, model = run.experiment.sft, run.model
    train_data, eval_data = sft_data(run)
    batches = make_batches(train_data.arrays(), batch_size=cfg.batch_size, seed=run.experiment.seed)
    base = run.load_lm(cfg.init)

    def evaluate(step, state):
        nats, tokens = held_out(
            state.params, sequential_batches(eval_data.arrays(), cfg.batch_size), model, run.mesh
        )
        return {"loss": nats / max(tokens, 1)}

    trained = fit(
        run, "sft", transformer_spec(model), base,
        lambda params, batch, key: lm_loss(params, batch, key, model), batches, cfg.optimizer, cfg.steps,
        cfg.batch_size * cfg.length, cfg.length, [Hook(cfg.eval_every, evaluate)],
    )  # fmt: skip
    asked = evaluation_questions(run)
    answers = ask(run, trained.params, asked, "evaluation")
    before, after = answer_report(asked, ask(run, base, asked, "evaluation")), answer_report(asked, answers)
    metrics = evaluate(cfg.steps, trained) | {
        "instruction_following_before": before["instruction_following"],
        "instruction_following_after": after["instruction_following"],
        "gold": after["gold"],
        "correct": after["correct"],
    }
    finish(run, "sft", trained.params, trained, metrics, as_samples(run, asked, answers, "sampled"))
