"""Pre-training: text by self-supervision, to a base model."""

from __future__ import annotations

import numpy as np

from llmjax.data.batches import make_batches, sequential_batches
from llmjax.data.packing import Packed
from llmjax.evals.language import RoutingChange, bits_per_byte, held_out, language_metrics
from llmjax.evals.ngram import ngram_nats
from llmjax.models.spec import init_params
from llmjax.models.stats import active_params, total_params, train_flops_per_token
from llmjax.models.transformer import transformer_spec
from llmjax.objectives.lm import lm_loss
from llmjax.stages.prepare import pretrain_data
from llmjax.stages.run import Run, balancing, finish, fit
from llmjax.stages.samples import continuations
from llmjax.training.loop import Hook

NGRAM_ORDER = 5


def run_pretrain(run: Run) -> None:
    """Trains on packed documents; reports held-out loss beside a 5-gram model of the same tokens."""
    cfg, model = run.experiment.pretrain, run.model
    train_data, eval_data = pretrain_data(run)
    batches = make_batches(train_data.arrays(), batch_size=cfg.batch_size, seed=run.experiment.seed)
    token_bytes = run.tokenizer.token_bytes()
    specs = transformer_spec(model)

    def evaluate(step, state, max_batches=cfg.eval_batches):
        nats, tokens, num_bytes = 0.0, 0, 0
        for i, batch in enumerate(sequential_batches(eval_data.arrays(), cfg.batch_size)):
            if max_batches and i == max_batches:
                break
            more_nats, more_tokens = held_out(state.params, [batch], model, run.mesh)
            nats, tokens = nats + more_nats, tokens + more_tokens
            num_bytes += int((token_bytes[batch["targets"]] * batch["loss_mask"]).sum())
        return language_metrics(nats, tokens, num_bytes)

    first_batch = next(sequential_batches(eval_data.arrays(), cfg.batch_size))
    routing_change = RoutingChange(model, run.mesh)

    def evaluate_and_compare(step, state):
        return evaluate(step, state) | routing_change(state.params, first_batch)

    start = run.load_lm(cfg.init) if cfg.init else init_params(specs, run.key("pretrain", "init"), run.mesh)
    trained = fit(
        run, "pretrain", specs, start,
        lambda params, batch, key: lm_loss(params, batch, key, model), batches, cfg.optimizer, cfg.steps,
        cfg.batch_size * cfg.length, cfg.length, [Hook(cfg.eval_every, evaluate_and_compare)], after=balancing(model),
    )  # fmt: skip
    metrics = evaluate(cfg.steps, trained, max_batches=0)
    train_streams, eval_streams = (document_streams(data, run.tokenizer.endoftext_id) for data in (train_data, eval_data))
    nats, tokens = ngram_nats(train_streams, eval_streams, order=NGRAM_ORDER, vocab_size=model.vocab_size)
    num_bytes = sum(int(token_bytes[stream].sum()) for stream in eval_streams)
    flops = train_flops_per_token(model, cfg.length)
    metrics |= {
        "ngram5_loss": nats / tokens,
        "ngram5_bits_per_byte": bits_per_byte(nats, num_bytes),
        "num_params": total_params(model),
        "num_active_params": active_params(model),
        "train_tokens": trained.tokens,
        "train_flops_per_token": flops,
        "train_flops": trained.tokens * flops,
    }
    decodes = model.moe is None or model.moe.router != "expert_choice"
    samples = continuations(run, trained.params, eval_data) if decodes else []
    finish(run, "pretrain", trained.params, trained, metrics, samples)


def document_streams(packed: Packed, endoftext_id: int) -> list[np.ndarray]:
    """The packed documents one by one, each with its <|endoftext|>: what a model of the packed rows has to predict."""
    targets = np.asarray(packed.targets)[np.asarray(packed.loss_mask) > 0]
    return [part for part in np.split(targets, np.flatnonzero(targets == endoftext_id) + 1) if part.size]
