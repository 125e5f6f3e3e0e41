"""The last word: models, best-of-n and bots answer the same held-out prompts and stand side by side in one table."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from llmjax.config import NonNegativeFloat, PositiveInt
from llmjax.data.records import Completion, Prompt
from llmjax.errors import UserError
from llmjax.evals.answers import Answers
from llmjax.evals.statistics import clustered_mean, clustered_ratio
from llmjax.models.transformer import Params
from llmjax.results import Metric, Table
from llmjax.stages.answers import Asked
from llmjax.stages.base import Context, Input, Preview, Result, Stage, check_decodes
from llmjax.stages.reward import ModelReward
from llmjax.tasks.base import score
from llmjax.units import words

_FIRST_SENTENCE = re.compile(r".*?[.!?\n](?=\s|$)", re.DOTALL)


class Row:
    """Somebody who answers. Subclasses are frozen dataclasses."""

    def inputs(self) -> tuple[Input, ...]:
        """The stages whose models it needs."""
        return ()

    def prepare(self, context: Context, asked: Asked) -> None:
        """Before anything is trained. Raises UserError for what cannot be asked later."""

    def sampled(self, context: Context, asked: Asked, reference: Params, draws: int) -> Answers:
        """Every prompt's answers, `draws` in a row; their KL is from `reference`, where they have one."""
        raise TypeError(f"{type(self).__name__} has no sampled(...)")

    def greedy(self, context: Context, asked: Asked) -> Answers | None:
        """Every prompt's likeliest answer; None where there is no such thing."""
        raise TypeError(f"{type(self).__name__} has no greedy(...)")


@dataclass(frozen=True)
class Model(Row):
    """The model of a stage.

    form: a text with {prompt} in it, for a model that has not learnt to chat: it goes on from this text instead of a dialogue,
    and its answer ends with its first sentence or line. temperature: of its sampled answers; None for the evaluation's. A
    model at a lower one is what training for a reward has to beat: it costs nothing and makes sampled answers surer, too.
    """

    stage: str
    form: str = ""
    temperature: NonNegativeFloat | None = None

    def validate(self) -> None:
        if self.form and "{prompt}" not in self.form:
            raise UserError(f"form={self.form!r} has no place for the {{prompt}}")

    def inputs(self) -> tuple[Input, ...]:
        return (Input("rows", self.stage),)

    def prepare(self, context: Context, asked: Asked) -> None:
        most = context.experiment.evaluation.prompt_length
        longest = max(map(len, self._tokens(context, asked)), default=0) if self.form else 0
        if longest > most:
            raise UserError(
                f"{context.name}: form={self.form!r} makes prompts of up to {longest} tokens; evaluation.prompt_length={most}"
            )

    def sampled(self, context: Context, asked: Asked, reference: Params, draws: int) -> Answers:
        if self.form:
            return self._plain(context, asked, draws=draws, temperature=self.temperature)
        return asked.of(context.load_lm(self.stage), reference, draws=draws, temperature=self.temperature)

    def greedy(self, context: Context, asked: Asked) -> Answers | None:
        if self.temperature is not None:  # it is that of the row without one
            return None
        if self.form:
            return self._plain(context, asked, temperature=0.0)
        return asked.of(context.load_lm(self.stage), temperature=0.0)

    def _tokens(self, context: Context, asked: Asked) -> list[list[int]]:
        """The prompts in this form."""
        texts = [self.form.replace("{prompt}", prompt.text) for prompt in asked.prompts]
        return [[context.tokenizer.bos_id, *ids] for ids in context.tokenizer.encode_batch(texts)]

    def _plain(self, context: Context, asked: Asked, **how: Any) -> Answers:
        found = asked.of(context.load_lm(self.stage), tokens=self._tokens(context, asked), **how)
        return Answers(found.prompts, found.prompt_tokens, [_first_sentence(one) for one in found.completions], None)


def _first_sentence(completion: Completion) -> Completion:
    found = _FIRST_SENTENCE.match(completion.text)
    text = completion.text if found is None else found[0].strip()
    return Completion(text, completion.tokens, ended=found is not None or completion.ended)


@dataclass(frozen=True)
class BestOf(Row):
    """The one of n answers of a policy that a reward model likes best.

    Its KL from the policy is at most log n - (n - 1) / n (Beirami et al. 2024, arXiv:2401.01879, theorem 1), which is shown.
    """

    policy: str
    reward: str
    n: PositiveInt = 4

    def inputs(self) -> tuple[Input, ...]:
        return (Input("rows", self.policy), Input("rows", self.reward, "scalar"))

    def sampled(self, context: Context, asked: Asked, reference: Params, draws: int) -> Answers:
        found = asked.of(context.load_lm(self.policy), draws=draws * self.n)
        rewards = ModelReward(self.reward).open(context)(found)
        best = np.arange(0, len(rewards), self.n) + rewards.reshape(-1, self.n).argmax(axis=1)
        prompts, tokens, completions = (
            [items[i] for i in best] for items in (found.prompts, found.prompt_tokens, found.completions)
        )
        return Answers(prompts, tokens, completions, np.full(len(best), math.log(self.n) - (self.n - 1) / self.n))

    def greedy(self, context: Context, asked: Asked) -> Answers | None:
        return None


@dataclass(frozen=True)
class Bot(Row):
    """A function from a prompt to a text: the cheap baseline that a sceptic would try first."""

    answer: Callable[[Prompt], str]

    def prepare(self, context: Context, asked: Asked) -> None:
        self._said(asked.prompts[:1])

    def sampled(self, context: Context, asked: Asked, reference: Params, draws: int) -> Answers:
        return self._said([prompt for prompt in asked.prompts for _ in range(draws)])

    def greedy(self, context: Context, asked: Asked) -> Answers | None:
        return self._said(asked.prompts)

    def _said(self, prompts: Sequence[Prompt]) -> Answers:
        texts = [self.answer(prompt) for prompt in prompts]
        for prompt, text in zip(prompts, texts):
            if not isinstance(text, str):
                name = getattr(self.answer, "__name__", type(self.answer).__name__)  # a function may be an object with options
                raise UserError(f"the bot {name} said {text!r} to prompt {prompt.id!r}; return a text")
        return Answers(prompts, [()] * len(prompts), [Completion(text) for text in texts], None)


@dataclass(frozen=True)
class _Measured:
    """What came of a row. scores: of the sampled answers, by name [N * draws]. kl: of these. greedy: the main score of the
    greedy ones [N]."""

    scores: Mapping[str, np.ndarray]
    kl: np.ndarray | None
    greedy: np.ndarray | None


@dataclass(frozen=True)
class Compare(Stage):
    """Asks every row the held-out prompts of the experiment's evaluation, and scores the answers.

    rows: by name, in the order of the table. against: the row that differences are to, prompt by prompt, and whose model KL is
    measured from. score: the one of the evaluation's scores that differences, greedy answers and knowledge are counted in;
    beside: others that are shown. knowledge: the row of a base model asked in its own form; what the row `against` has kept of
    it, greedily, is reported. draws: sampled answers to each prompt. All errors are clustered by the prompts' groups.
    """

    rows: dict[str, Row]
    against: str
    score: str
    beside: tuple[str, ...] = ()
    knowledge: str = ""
    draws: PositiveInt = 1

    title: ClassVar[str] = "Side by side"
    lead: ClassVar[str] = (
        "Everybody answers the same held-out prompts, sampled and greedily. Differences are paired, errors clustered by what "
        "is asked for."
    )
    makes: ClassVar = "nothing"

    def validate(self) -> None:
        for name, row in (("against", self.against), ("knowledge", self.knowledge)):
            if row not in self.rows and (row or name == "against"):
                raise UserError(f"{name}={row!r} is no row; there is {', '.join(self.rows)}")
            found = self.rows.get(row)
            if row and not (isinstance(found, Model) and found.temperature is None):
                raise UserError(f"{name}={row!r}: take a Model without a temperature of its own, which has greedy answers, too")

    def inputs(self) -> tuple[Input, ...]:
        return tuple(dict.fromkeys(link for row in self.rows.values() for link in row.inputs()))

    def check(self, experiment, name) -> None:
        check_decodes(experiment, name)
        evaluation = experiment.evaluation
        if evaluation.prompts is None:
            raise UserError(f"{name}: everybody is asked evaluation.prompts; give some")
        for one in (self.score, *self.beside):
            if one not in evaluation.scores:
                raise UserError(f"{name}: {one!r} is none of evaluation.scores, {', '.join(evaluation.scores)}")

    def prepare(self, context: Context) -> None:
        asked = self._asked(context)
        for row in self.rows.values():
            row.prepare(context, asked)

    def preview(self, context: Context) -> Preview:
        prompts = self._asked(context).prompts
        things = len({prompt.group for prompt in prompts})
        return Preview((), [f"{len(prompts):,} held-out prompts that ask for {things:,} things, to {', '.join(self.rows)}"])

    def _asked(self, context: Context) -> Asked:
        prompts = context.experiment.evaluation.prompts
        assert prompts is not None, "see check"
        return Asked(context, prompts)

    def run(self, context: Context) -> Result:
        """Asks and scores; trains nothing."""
        asked, anchor = self._asked(context), self.rows[self.against]
        assert isinstance(anchor, Model), "see validate"
        reference, measured = context.load_lm(anchor.stage), {}
        for name, row in self.rows.items():
            context.say(f"asking {name}")
            measured[name] = self._measure(context, asked, row, reference)
        groups = [prompt.group for prompt in asked.prompts]
        table = self._table(measured, groups)
        return Result(None, metrics=self._metrics(measured, groups), tables=[table])

    def _measure(self, context: Context, asked: Asked, row: Row, reference: Params) -> _Measured:
        scores = {name: context.experiment.evaluation.scores[name] for name in (self.score, *self.beside)}
        drawn, greedy = row.sampled(context, asked, reference, self.draws), row.greedy(context, asked)
        return _Measured(
            {name: score(one, drawn.prompts, drawn.completions, name) for name, one in scores.items()},
            drawn.kl, None if greedy is None else score(scores[self.score], greedy.prompts, greedy.completions, self.score),
        )  # fmt: skip

    def _table(self, measured: Mapping[str, _Measured], groups: Sequence[str]) -> Table:
        own, rows = measured[self.against], []
        for name, found in measured.items():
            values: dict[str, np.ndarray | None] = dict(found.scores) | {"kl": found.kl}
            values["greedy"] = found.greedy
            if found is not own:
                values["difference"] = found.scores[self.score] - own.scores[self.score]
                if found.greedy is not None and own.greedy is not None:
                    values["greedy_difference"] = found.greedy - own.greedy
            row: dict[str, Any] = {"name": name}
            for key, array in values.items():
                if array is not None:
                    row[key], row[f"{key}_stderr"] = _mean(array, groups)
            rows.append(row)
        units = {name: "%" if set(values) <= {0.0, 1.0} else "" for name, values in own.scores.items()}
        columns = [
            (self.score, words(self.score), units[self.score]), ("difference", f"to {self.against}", units[self.score]),
            ("greedy", "greedy", units[self.score]), ("greedy_difference", f"to {self.against}", units[self.score]),
            *((name, words(name), units[name]) for name in self.beside), ("kl", "KL", "nats"),
        ]  # fmt: skip
        draws = f", {self.draws} answers each" if self.draws > 1 else ""
        caption = (
            f"{words(self.score)} of {len(groups):,} held-out prompts that ask for {len(set(groups)):,} things{draws}. Errors "
            f"are clustered by thing, differences paired by prompt, KL is per answer and from {self.against}."
        )
        return Table(caption, tuple(columns), tuple(rows))

    def _metrics(self, measured: Mapping[str, _Measured], groups: Sequence[str]) -> list[Metric]:
        if not self.knowledge:
            return []
        known, own = measured[self.knowledge].greedy, measured[self.against].greedy
        assert known is not None and own is not None
        share, error = clustered_ratio(own, known, groups)
        if not math.isfinite(share):
            return []
        label = f"What {self.against} keeps of what {self.knowledge} knows"
        return [Metric("knowledge_kept", share, label, "%", error if math.isfinite(error) else None, headline=True)]


def _mean(values: np.ndarray, groups: Sequence[str]) -> tuple[float, float | None]:
    """The mean of values [N * draws], N prompts with their draws in a row, and its error, None where it is not known."""
    mean, error = clustered_mean(values, np.repeat(np.array(groups), len(values) // len(groups)).tolist())
    return mean, error if math.isfinite(error) else None
