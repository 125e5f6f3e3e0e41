"""What the model writes at the end of a stage: shown on the terminal and in the report."""

from __future__ import annotations

import jax
import numpy as np

from llmjax.data.dialogues import Question
from llmjax.data.packing import Packed
from llmjax.evals.answers import Answer, answer_prompts, question_prompts
from llmjax.generation.sampling import SamplingConfig
from llmjax.stages.prepare import questions
from llmjax.stages.run import Run

PROMPT_TOKENS = 12
CONTINUATION_TOKENS = 48


def continuations(run: Run, params, held_out: Packed) -> list[dict[str, str]]:
    """The base model goes on from the first words of held-out windows (temperature 0.8)."""
    count = run.experiment.evaluation.num_samples
    rows = np.linspace(0, len(held_out.inputs) - 1, count).astype(int)
    tokens = np.asarray(held_out.inputs[rows, :PROMPT_TOKENS])
    # The sample begins with the newest document of the window's beginning.
    segments = np.asarray(held_out.segment_ids[rows, :PROMPT_TOKENS])
    prompts = {"tokens": tokens, "segment_ids": (segments == segments[:, -1:]).astype(np.int32)}
    sampling = SamplingConfig(max_new_tokens=CONTINUATION_TOKENS, temperature=0.8)
    answers = _answer(run, params, prompts, sampling, "continuations", run.tokenizer.endoftext_id)
    starts = [run.tokenizer.decode(list(row[keep > 0]), skip_special=True)
              for row, keep in zip(tokens, prompts["segment_ids"])]  # fmt: skip
    written = [run.tokenizer.decode(list(a.tokens), skip_special=True).rstrip() for a in answers]
    return [{"prompt": start, "answer": text, "note": "continuation"} for start, text in zip(starts, written)]


def ask(run: Run, params, asked: list[Question], purpose: str, reference=None) -> list[Answer]:
    """Answers to questions as PPO samples them (same temperature and length), so that means estimate the policy itself."""
    sampling = run.experiment.ppo.sampling if run.experiment.ppo else SamplingConfig()
    length = run.experiment.ppo.prompt_length if run.experiment.ppo else 48
    prompts = question_prompts(asked, run.tokenizer, length)
    return _answer(run, params, prompts, sampling, purpose, run.tokenizer.end_id, reference)


def evaluation_questions(run: Run) -> list[Question]:
    """The held-out questions by which all stages of all experiments of this seed are judged."""
    return questions(run, "validation", run.experiment.evaluation.num_questions, "evaluation")


def as_samples(run: Run, asked: list[Question], answers: list[Answer], note: str) -> list[dict[str, str]]:
    """The first few questions with their answers."""
    shown = zip(asked[: run.experiment.evaluation.num_samples], answers)
    return [{"prompt": q.text, "answer": a.text, "note": note if a.ended else f"{note}, cut off"} for q, a in shown]


def _answer(run: Run, params, prompts, sampling, purpose, end_id, reference=None) -> list[Answer]:
    keys = jax.random.split(run.key(purpose), len(prompts["tokens"]))
    batch_size = run.experiment.evaluation.batch_size
    if len(prompts["tokens"]) < batch_size:
        shards = run.experiment.mesh.batch_shards
        batch_size = -(-len(prompts["tokens"]) // shards) * shards
    return answer_prompts(
        params, prompts, keys, cfg=run.model, sampling=sampling, tokenizer=run.tokenizer, end_id=end_id,
        batch_size=batch_size, mesh=run.mesh, reference=reference,
    )  # fmt: skip
