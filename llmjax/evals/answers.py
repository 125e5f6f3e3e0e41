"""What a model answers to prompts, and what scores say of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llmjax.data.packing import left_pad
from llmjax.data.records import Completion, Prompt
from llmjax.data.tokenizer import Tokenizer
from llmjax.evals.statistics import clustered_mean
from llmjax.generation.decode import Generation, generate
from llmjax.generation.sampling import SamplingConfig
from llmjax.generation.score import join_response, response_log_probs
from llmjax.models.config import ModelConfig
from llmjax.models.transformer import Params
from llmjax.results import Metric
from llmjax.sharding import put_batch
from llmjax.tasks.base import Reward
from llmjax.units import words


@dataclass(frozen=True)
class Answers:
    """One answer to each of N prompts.

    prompt_tokens: ids that each answer goes on from. kl: log pi(answer) - log reference(answer), nats [N]; 0 without a
    reference, None where nothing is to be said of it.
    """

    prompts: Sequence[Prompt]
    prompt_tokens: Sequence[Sequence[int]]
    completions: Sequence[Completion]
    kl: np.ndarray | None


def answer_prompts(
    params: Params,
    prompts: Sequence[Prompt],
    prompt_tokens: Sequence[Sequence[int]],
    keys_N: jax.Array,
    *,
    cfg: ModelConfig,
    sampling: SamplingConfig,
    tokenizer: Tokenizer,
    stop_ids: Sequence[int],
    length: int,
    batch_size: int,
    mesh: Mesh | None = None,
    reference: Params | None = None,
    reference_temperature: float = 1.0,
) -> Answers:
    """Answers every prompt, padded on the left to `length`, in batches of `batch_size` rows (the last is filled up and cut).

    Each answer ends with one of `stop_ids` or at sampling.max_new_tokens. reference: a model to measure the KL against,
    which samples at `reference_temperature`; a greedy model is taken as one of temperature 1.
    """
    tokens, segment_ids = left_pad(prompt_tokens, length, tokenizer.pad_id)
    count, completions, kl = len(tokens), [], []
    for start in range(0, count, batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), count - 1)
        batch = put_batch({"tokens": tokens[rows], "segment_ids": segment_ids[rows]}, mesh)
        generation = generate(
            params, batch["tokens"], batch["segment_ids"], keys_N[rows],
            cfg=cfg, sampling=sampling, stop_ids=tuple(stop_ids), pad_id=tokenizer.pad_id,
        )  # fmt: skip
        kl_B = np.zeros(batch_size)
        if reference is not None:
            kl_B = np.asarray(_sequence_log_ratio(
                params, reference, batch, generation, cfg, sampling.temperature or 1.0, reference_temperature or 1.0
            ))  # fmt: skip
        completions += to_completions(generation, tokenizer)[: count - start]
        kl.append(kl_B[: count - start])
    return Answers(prompts, prompt_tokens, completions, np.concatenate(kl) if kl else np.zeros(0))


def to_completions(generation: Generation, tokenizer: Tokenizer) -> list[Completion]:
    """A `Generation` as records on the host."""
    tokens_BR, log_probs_BR, mask_BR, ended_B = (
        np.asarray(x) for x in (generation.tokens, generation.log_probs, generation.mask, generation.ended)
    )
    completions = []
    for tokens, log_probs, mask, ended in zip(tokens_BR, log_probs_BR, mask_BR > 0, ended_B):
        ids = tokens[mask].tolist()
        text = tokenizer.decode(ids[:-1] if ended else ids).strip()
        completions.append(Completion(text, tuple(ids), tuple(log_probs[mask].tolist()), bool(ended)))
    return completions


@partial(jax.jit, static_argnames=("cfg", "temperature", "reference_temperature"))
def _sequence_log_ratio(params, reference, batch, generation, cfg, temperature, reference_temperature):
    joined = join_response(batch["tokens"], batch["segment_ids"], generation)
    own, _, _ = response_log_probs(params, joined, cfg, temperature)
    other, _, _ = response_log_probs(reference, joined, cfg, reference_temperature)
    return jnp.sum((own - other) * generation.mask, axis=1)


def mean_metric(
    name: str, values: Sequence[Any] | np.ndarray, groups: Sequence[str], label: str, unit: str = "", **fields: Any
) -> Metric:
    """The mean of N values with its standard error, clustered by the prompts' groups; a share in per cent if all are True or
    False."""
    shares = not unit and all(isinstance(value, (bool, np.bool_)) for value in values)
    mean, error = clustered_mean([float(value) for value in values], groups)
    return Metric(name, mean, label, "%" if shares else unit, error if math.isfinite(error) else None, **fields)


def report(scores: Mapping[str, Reward], answers: Answers) -> list[Metric]:
    """The mean of each score over the answers, then KL (nats per answer), share that ended, and length (tokens)."""
    pairs = list(zip(answers.prompts, answers.completions, strict=True))
    groups = [prompt.group for prompt in answers.prompts]
    found = [mean_metric(name, [score(*pair) for pair in pairs], groups, words(name)) for name, score in scores.items()]
    if answers.kl is not None:
        found.append(mean_metric("kl", answers.kl, groups, "KL from the start", "nats per answer"))
    return [
        *found,
        mean_metric("ended", [completion.ended for completion in answers.completions], groups, "Ends itself"),
        mean_metric("length", [len(completion.tokens) for completion in answers.completions], groups, "Length", "tokens"),
    ]
