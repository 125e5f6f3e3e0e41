"""Answers to held-out prompts at the end of a stage: scored, compared with the models it started from, shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.data.base import Data
from llmjax.data.records import Prompt
from llmjax.errors import UserError
from llmjax.evals.answers import Answers, answer_prompts, report
from llmjax.models.transformer import Params
from llmjax.results import Metric, Sample
from llmjax.stages.base import Context
from llmjax.stages.datasets import PromptSet, draw, encode_prompt, held_out_prompts, prompt_sets
from llmjax.tasks.base import Reward
from llmjax.training.rng import key_for

PURPOSE = "evaluation"  # of the drawn prompts and of the keys: one for all stages, so that models meet on equal terms


class Asked:
    """The held-out prompts that the models of a stage are asked.

    data: the stage's own, where the experiment's evaluation names none. scores: the stage's own, beside the evaluation's.
    """

    def __init__(self, context: Context, data: Data, scores: Mapping[str, Reward] | None = None):
        self._context, self._cfg = context, context.experiment.evaluation
        self.scores = {**(scores or {}), **self._cfg.scores} if self._cfg.prompts is None else dict(self._cfg.scores)
        self.prompts, self.tokens = _held_out_prompts(context, self._cfg.prompts or data.asked())

    def of(
        self, params: Params, reference: Params | None = None, *, draws: int = 1, temperature: float | None = None,
        tokens: Sequence[Sequence[int]] | None = None,
    ) -> Answers:  # fmt: skip
        """What a model answers, each prompt `draws` times in a row, each time with a key of its own.

        reference: to measure the KL against, as it is sampled by the experiment. temperature: another than the experiment's;
        0 for the likeliest token always. tokens: of the prompts in another form than that of a dialogue.
        """
        cfg, context = self._cfg, self._context
        keys = [jax.random.split(key_for(context.seed, PURPOSE), len(self.prompts))]
        keys += [jax.random.split(key_for(context.seed, PURPOSE, draw), len(self.prompts)) for draw in range(1, draws)]
        every = [(prompt, ids) for prompt, ids in zip(self.prompts, tokens or self.tokens) for _ in range(draws)]
        sampling = cfg.sampling if temperature is None else replace(cfg.sampling, temperature=temperature)
        rows = min(cfg.batch_size, context.experiment.mesh.rows(len(every)))
        return answer_prompts(
            params, [prompt for prompt, _ in every], [ids for _, ids in every], jnp.stack(keys, axis=1).reshape(-1),
            cfg=context.model, sampling=sampling, tokenizer=context.tokenizer, stop_ids=context.tokenizer.stop_ids,
            length=cfg.prompt_length, batch_size=rows, mesh=context.mesh, reference=reference,
            reference_temperature=cfg.sampling.temperature,
        )  # fmt: skip

    def metrics(self, answers: Answers, before: Answers | None = None) -> list[Metric]:
        """The scores of a model's answers; before: those of the model it started from, to compare with."""
        found = [self._described(metric) for metric in report(self.scores, answers)]
        if before is None:
            return found
        earlier = {metric.name: metric.value for metric in report(self.scores, before)}
        return [replace(m, baseline=("before", earlier[m.name])) if m.name in self.scores else m for m in found]

    def _described(self, metric: Metric) -> Metric:
        headline = metric.name in list(self.scores)[:2]
        return replace(metric, headline=headline, label=metric.label if metric.name in self.scores else "")

    def samples(self, answers: Answers) -> list[Sample]:
        """The first few prompts with their answers."""
        note = "greedy" if not self._cfg.sampling.temperature else "sampled"
        shown = list(zip(answers.prompts, answers.completions))[: self._cfg.num_samples]
        return [Sample(p.text, c.text, note if c.ended else f"{note}, cut off") for p, c in shown]


def _held_out_prompts(context: Context, data: Data) -> tuple[Sequence[Prompt], list[list[int]]]:
    """The prompts by which all stages of all experiments of this seed are judged, and their tokens."""
    cfg = context.experiment.evaluation
    if data.kind is Prompt:
        sets = prompt_sets(context, data, cfg.prompt_length)
        held: PromptSet = next(part for name, part in sets.items() if name != "train")
        chosen = draw(held, cfg.num_prompts, context.seed, PURPOSE)
        return [held[i] for i in chosen], [held.tokens(i) for i in chosen]
    pairs = [(p, encode_prompt(context.tokenizer, p)) for p in held_out_prompts(context, data)]
    kept = [(prompt, ids) for prompt, ids in pairs if len(ids) <= cfg.prompt_length]
    if len(kept) < len(pairs):
        left_out = f"{len(pairs) - len(kept):,} of {len(pairs):,} held-out prompts have more than "
        left_out += f"evaluation.prompt_length={cfg.prompt_length} tokens"
        if not kept:
            longest = max(len(ids) for _, ids in pairs)
            raise UserError(f"{context.name}: {left_out}, up to {longest}, so that there is nothing to ask; allow more")
        context.say(f"{left_out} and are not asked")
    pairs = kept
    order = np.random.default_rng([context.seed, *PURPOSE.encode()]).permutation(len(pairs))[: cfg.num_prompts]
    return [pairs[i][0] for i in order], [pairs[i][1] for i in order]
