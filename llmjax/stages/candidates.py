"""K answers of a stage's model to each prompt, ranked: made once, kept as rankings-*.jsonl in the folder of who asks."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import jax
import numpy as np

from llmjax.config import NonNegativeInt, PositiveInt, Range
from llmjax.data.base import Data, Splits, check_kind
from llmjax.data.records import Completion, Message, Prompt, Ranking
from llmjax.errors import UserError
from llmjax.evals.answers import answer_prompts
from llmjax.files import read_text, write_text_atomic
from llmjax.generation.sampling import SamplingConfig
from llmjax.stages.base import Context, Input
from llmjax.stages.datasets import draw, prompt_sets
from llmjax.tasks.base import Edit, Ranker


@dataclass(frozen=True)
class RankedAnswers(Data):
    """Rankings of what a model of this experiment answers.

    policy: the stage whose model answers. prompts: what it is asked. ranker: orders the answers; `RewardRanker` does so by any
    reward. k: answers to a prompt; edits: so many of them are not written anew, but others with one thing changed by `edit`,
    so that pairs differ in that thing alone (fewer where it finds nothing to change). num_prompts: of the training split; each
    is answered and ranked rankings_per_prompt times, with new answers. num_eval_prompts: further prompts of the training split
    that are held out ("held_out"), and as many of the prompts' own held-out split ("new_prompts"). prompt_length: longer
    prompts are left out. batch_size: answers at a time.
    """

    policy: str
    prompts: Data
    ranker: Ranker
    k: Annotated[int, Range(least=2)] = 4
    edit: Edit | None = None
    edits: NonNegativeInt = 0
    num_prompts: PositiveInt = 768
    rankings_per_prompt: PositiveInt = 1
    num_eval_prompts: PositiveInt = 192
    prompt_length: PositiveInt = 128
    batch_size: PositiveInt = 128
    sampling: SamplingConfig = SamplingConfig()

    kind: ClassVar[type] = Ranking
    from_model: ClassVar[bool] = True

    def validate(self) -> None:
        check_kind("prompts", self.prompts, Prompt)
        if self.edits and self.edit is None:
            raise UserError(f"edits={self.edits} without `edit`; give the function that changes an answer")
        if self.edits > self.k // 2:
            raise UserError(f"edits={self.edits} of k={self.k} answers: each is made from another; at most {self.k // 2}")

    def inputs(self) -> tuple[Input, ...]:
        return (Input("data.policy", self.policy),)

    def asked(self) -> Data:
        return self.prompts

    def prepare(self, context: Context) -> None:
        """Raises UserError if there are fewer prompts than are wanted."""
        sets = prompt_sets(context, self.prompts, self.prompt_length)
        held_out = next(name for name in sets if name != "train")
        wanted = [
            ("num_prompts + num_eval_prompts", self.num_prompts + self.num_eval_prompts, "train"),
            ("num_eval_prompts", self.num_eval_prompts, held_out),
        ]
        for name, number, split in wanted:
            if number > len(sets[split]):
                where, there = f"{context.name}.data.{name}={number}", len(sets[split])
                raise UserError(f"{where}: there are {there} {split} prompts; ask for that many or fewer")

    def read(self, place: Context) -> Splits:  # pyrefly: ignore[bad-override]
        splits = {name: self._split(place, name) for name in ("train", "held_out", "new_prompts")}
        note = f"{len(splits['train']):,} rankings of {self.k} answers of {self.policy}"
        return Splits(splits.pop("train"), splits, note)

    def _split(self, context: Context, name: str) -> list[Ranking]:
        path = context.path(f"rankings-{name}.jsonl")
        if os.path.exists(path):
            return [_from_json(json.loads(line)) for line in read_text(path).splitlines()]
        sets = prompt_sets(context, self.prompts, self.prompt_length)
        split = "train" if name != "new_prompts" else next(other for other in sets if other != "train")
        prompts = sets[split]
        if split == "train":
            drawn = draw(prompts, self.num_prompts + self.num_eval_prompts, context.seed, context.name)
            drawn = drawn[: self.num_prompts] if name == "train" else drawn[self.num_prompts :]
        else:
            drawn = draw(prompts, self.num_eval_prompts, context.seed, context.name)
        drawn = drawn * self.rankings_per_prompt
        context.say(f"{len(drawn):,} rankings of {self.k} answers ({name})")
        asked = [prompts[i] for i in drawn]
        rankings = self._sample_and_rank(context, name, asked, [prompts.tokens(i) for i in drawn])
        if jax.process_index() == 0:
            write_text_atomic(path, "".join(json.dumps(_to_json(r), ensure_ascii=False) + "\n" for r in rankings))
        return rankings

    def _sample_and_rank(
        self, context: Context, name: str, asked: Sequence[Prompt], tokens: Sequence[Sequence[int]]
    ) -> list[Ranking]:
        written = self.k - self.edits
        answers = answer_prompts(
            context.load_lm(self.policy), [prompt for prompt in asked for _ in range(written)],
            [ids for ids in tokens for _ in range(written)],
            jax.random.split(context.key("answers", name), len(asked) * written),
            cfg=context.model, sampling=self.sampling, tokenizer=context.tokenizer, stop_ids=context.tokenizer.stop_ids,
            length=self.prompt_length, batch_size=self.batch_size, mesh=context.mesh,
        )  # fmt: skip
        rng = np.random.default_rng([context.seed, *name.encode()])
        rankings = []
        for i, prompt in enumerate(asked):
            own, sources = answers.completions[i * written : (i + 1) * written], [-1] * written
            for number in range(self.edits):
                changed = None if self.edit is None else self.edit(prompt, own[number], rng)
                if changed is not None:
                    own, sources = [*own, Completion(changed, ended=own[number].ended)], [*sources, number]
            own = tuple(own)
            ranks, scores = self.ranker.rank(prompt, own, rng), self.ranker.scores(prompt, own)
            if len(ranks) != len(own):
                raise UserError(f"{type(self.ranker).__name__} gave {len(ranks)} ranks for {len(own)} answers to {prompt.id!r}")
            rankings.append(Ranking(prompt, own, tuple(map(int, ranks)), tuple(map(float, scores)), tuple(sources)))
        return rankings


def _to_json(ranking: Ranking) -> dict[str, Any]:
    """A ranking as `llmjax.data.formats` reads it too: messages, answers, ranks (and what they were made of)."""
    messages = [{**m.extra, "role": m.role, "content": m.content} for m in ranking.prompt.messages]
    answers = [{"text": c.text, "tokens": list(c.tokens), "ended": c.ended} for c in ranking.completions]
    return {
        "id": ranking.prompt.id, "prompt": messages, "answers": answers, "ranks": list(ranking.ranks),
        "scores": list(ranking.scores), "edited_from": list(ranking.edited_from), "fields": dict(ranking.prompt.fields),
        "tools": list(ranking.prompt.tools),
    }  # fmt: skip


def _from_json(row: dict[str, Any]) -> Ranking:
    messages = tuple(Message(m.pop("role"), m.pop("content"), m) for m in row["prompt"])
    completions = tuple(Completion(a["text"], tuple(a["tokens"]), ended=a["ended"]) for a in row["answers"])
    ranks, scores, edited = (tuple(row.get(name, ())) for name in ("ranks", "scores", "edited_from"))
    prompt = Prompt(row["id"], messages, row["fields"], tuple(row.get("tools", ())))
    return Ranking(prompt, completions, ranks, scores, edited)
