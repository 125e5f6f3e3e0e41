"""What a model answers to questions, and what the gold judge says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llmjax.data.chat import encode_chat
from llmjax.data.dialogues import Question
from llmjax.data.gold import follows_instruction, judge
from llmjax.data.prompts import left_pad
from llmjax.data.tokenizer import Tokenizer
from llmjax.generation.decode import generate
from llmjax.generation.sampling import SamplingConfig
from llmjax.models.config import ModelConfig
from llmjax.models.transformer import Params
from llmjax.objectives.ppo import response_log_probs
from llmjax.rl.rollout import join_response
from llmjax.sharding import put_batch


@dataclass(frozen=True)
class Answer:
    """text: what the user sees. tokens: with the end of turn, if there is one. ended: whether the model ended itself.
    kl: log pi(answer) - log reference(answer), nats (0 without a reference)."""

    text: str
    tokens: tuple[int, ...]
    ended: bool
    kl: float = 0.0


def question_tokens(questions: Sequence[Question], tokenizer: Tokenizer) -> list[list[int]]:
    """Each question as a one-turn chat that an answer goes on from."""
    return [
        encode_chat(tokenizer, [{"role": "user", "content": q.text}], add_generation_prompt=True).tokens
        for q in questions
    ]


def question_prompts(questions: Sequence[Question], tokenizer: Tokenizer, length: int) -> dict[str, np.ndarray]:
    """`question_tokens` padded on the left: tokens and segment_ids [N, length] int32. Raises UserError if one is longer."""
    tokens, segment_ids = left_pad(question_tokens(questions, tokenizer), length, tokenizer.pad_id)
    return {"tokens": tokens, "segment_ids": segment_ids}


def answer_prompts(
    params: Params,
    prompts: dict[str, np.ndarray],
    keys_N: jax.Array,
    *,
    cfg: ModelConfig,
    sampling: SamplingConfig,
    tokenizer: Tokenizer,
    end_id: int,
    batch_size: int,
    mesh: Mesh | None = None,
    reference: Params | None = None,
) -> list[Answer]:
    """One answer per prompt row [N, T], in batches of `batch_size` rows (the last one is filled up and cut).

    Each ends with `end_id` or at sampling.max_new_tokens. reference: a model to measure the KL against.
    """
    count = len(prompts["tokens"])
    answers: list[Answer] = []
    for start in range(0, count, batch_size):
        rows = np.minimum(np.arange(start, start + batch_size), count - 1)
        batch = put_batch({name: value[rows] for name, value in prompts.items()}, mesh)
        generation = generate(
            params, batch["tokens"], batch["segment_ids"], keys_N[rows],
            cfg=cfg, sampling=sampling, end_id=end_id, pad_id=tokenizer.pad_id,
        )  # fmt: skip
        kl_B = np.zeros(batch_size)
        if reference is not None:
            kl_B = np.asarray(_sequence_log_ratio(params, reference, batch, generation, cfg, sampling.temperature or 1.0))
        tokens_BR, mask_BR, ended_B = (
            np.asarray(x) for x in (generation.tokens, generation.mask, generation.ended)
        )
        answers += to_answers(tokens_BR, mask_BR, ended_B, tokenizer, kl_B)[: count - start]
    return answers


def to_answers(tokens_BR, mask_BR, ended_B, tokenizer: Tokenizer, kl_B=None) -> list[Answer]:
    """Host arrays of a `Generation` as text."""
    answers = []
    for i, (row, mask, ended) in enumerate(zip(tokens_BR, mask_BR, ended_B)):
        ids = [int(t) for t in row[mask > 0]]
        text = tokenizer.decode(ids[:-1] if ended else ids).strip()
        answers.append(Answer(text, tuple(ids), bool(ended), 0.0 if kl_B is None else float(kl_B[i])))
    return answers


@partial(jax.jit, static_argnames=("cfg", "temperature"))
def _sequence_log_ratio(params, reference, batch, generation, cfg, temperature):
    joined = join_response(batch["tokens"], batch["segment_ids"], generation)
    own, _, _ = response_log_probs(params, joined, cfg, temperature)
    other, _, _ = response_log_probs(reference, joined, cfg, temperature)
    return jnp.sum((own - other) * generation.mask, axis=1)


def answer_report(questions: Sequence[Question], answers: Sequence[Answer]) -> dict[str, float]:
    """Means over the questions: gold (0 to 1) and its standard error, correct, instruction_following (shares), kl (nats
    per answer) and its standard error, length (tokens)."""
    judgements = [judge(q, a.text, a.ended) for q, a in zip(questions, answers, strict=True)]
    gold = np.array([j.score for j in judgements])
    kl = np.array([a.kl for a in answers])
    root = np.sqrt(len(answers))
    follows = [follows_instruction(q, a.text, a.ended) for q, a in zip(questions, answers)]
    return {
        "gold": float(gold.mean()),
        "gold_stderr": float(gold.std(ddof=1) / root) if len(gold) > 1 else 0.0,
        "correct": float(np.mean([j.right for j in judgements])),
        "instruction_following": float(np.mean(follows)),
        "kl": float(kl.mean()),
        "kl_stderr": float(kl.std(ddof=1) / root) if len(kl) > 1 else 0.0,
        "length": float(np.mean([len(a.tokens) for a in answers])),
    }
