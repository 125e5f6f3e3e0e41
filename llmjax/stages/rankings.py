"""K answers of a model to each prompt, ranked by the annotator: made once, kept as rankings-*.jsonl in the workdir."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from llmjax.data.dialogues import Question
from llmjax.data.gold import judge, noisy_ranks
from llmjax.data.prompts import right_pad
from llmjax.evals.answers import answer_prompts, question_prompts
from llmjax.files import read_text, write_text_atomic
from llmjax.stages.prepare import questions
from llmjax.stages.run import Run


def load_rankings(run: Run, name: str) -> list[dict[str, Any]]:
    """Rows {"id", "prompt", "prompt_tokens", "answers": [{"text", "tokens", "gold", "rank"}]}; sampled if not there.

    name: "train"; "held_out", other prompts about facts that training prompts and dialogues may have asked for as well;
    "new_facts", prompts about facts that nobody has asked for before. rank: 0 is best, equal ranks are ties. gold: the
    judge's score before the annotator's error. A prompt stands in rankings_per_prompt rows.
    """
    path = run.path("reward", f"rankings-{name}.jsonl")
    if not os.path.exists(path):
        asked = _prompts(run, name)
        run.say(f"reward    {len(asked)} rankings of {run.experiment.reward.k} answers ({name})")
        rows = _sample_and_rank(run, name, asked)
        if jax.process_index() == 0:
            write_text_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return rows
    return [json.loads(line) for line in read_text(path).splitlines()]


def _prompts(run: Run, name: str) -> list[Question]:
    cfg = run.experiment.reward
    if name == "new_facts":
        drawn = questions(run, "validation", cfg.num_eval_prompts, "reward")
    else:
        drawn = questions(run, "train", cfg.num_prompts + cfg.num_eval_prompts, "reward")
        drawn = drawn[: cfg.num_prompts] if name == "train" else drawn[cfg.num_prompts :]
    return drawn * cfg.rankings_per_prompt


def _sample_and_rank(run: Run, name: str, asked: list[Question]) -> list[dict[str, Any]]:
    cfg = run.experiment.reward
    prompts = question_prompts(asked, run.tokenizer, cfg.prompt_length)
    repeated = {name: np.repeat(value, cfg.k, axis=0) for name, value in prompts.items()}
    answers = answer_prompts(
        run.load_lm(cfg.init), repeated, jax.random.split(run.key("reward", "answers", name), len(asked) * cfg.k),
        cfg=run.model, sampling=cfg.sampling, tokenizer=run.tokenizer, end_id=run.tokenizer.end_id,
        batch_size=run.experiment.evaluation.batch_size, mesh=run.mesh,
    )  # fmt: skip
    rng = np.random.default_rng([run.experiment.seed, *name.encode()])
    rows = []
    for i, question in enumerate(asked):
        own = answers[i * cfg.k : (i + 1) * cfg.k]
        tokens = prompts["tokens"][i][prompts["segment_ids"][i] > 0]
        rows.append(_rank(question, own, tokens.tolist(), rng, cfg.label_noise))
    return rows


def _rank(question: Question, answers: Sequence, prompt_tokens: list[int], rng, noise: float) -> dict[str, Any]:
    gold = [judge(question, a.text, a.ended).score for a in answers]
    ranks = noisy_ranks(gold, rng, noise, keys=[(a.text, a.ended) for a in answers])
    return {
        "id": question.id,
        "prompt": question.text,
        "prompt_tokens": prompt_tokens,
        "answers": [
            {"text": a.text, "tokens": list(a.tokens), "gold": score, "rank": int(rank)}
            for a, score, rank in zip(answers, gold, ranks)
        ],
    }


def ranking_arrays(rows: Sequence[dict[str, Any]], length: int, pad_id: int) -> dict[str, np.ndarray]:
    """tokens, segment_ids [N, K, length], ranks [N, K] int32, gold [N, K] float32. Prompt and answer, padded right."""
    k = len(rows[0]["answers"])
    texts = [row["prompt_tokens"] + answer["tokens"] for row in rows for answer in row["answers"]]
    tokens, segment_ids = right_pad(texts, length, pad_id)
    return {
        "tokens": tokens.reshape(-1, k, length),
        "segment_ids": segment_ids.reshape(-1, k, length),
        "ranks": np.array([[a["rank"] for a in row["answers"]] for row in rows], np.int32),
        "gold": np.array([[a["gold"] for a in row["answers"]] for row in rows], np.float32),
    }
