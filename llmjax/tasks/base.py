"""What a task can say about answers: a reward for one, a ranking of several. Any Python function is a reward."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from llmjax.config import NonNegativeFloat
from llmjax.data.records import Completion, Prompt
from llmjax.errors import UserError

Reward = Callable[[Prompt, Completion], float]
"""(prompt, completion) -> a number, higher is better, or True and False for right and wrong. It runs on the host, and sees the
fields of the prompt's record. A function of an experiment file will do; frozen dataclasses with a `__call__` have options."""


Edit = Callable[[Prompt, Completion, np.random.Generator], str | None]
"""(prompt, completion, rng) -> the completion's text with one thing changed, None where there is nothing to change."""


def score(reward: Reward, prompts: Sequence[Prompt], completions: Sequence[Completion], name: str) -> np.ndarray:
    """`reward` of each completion, float64 [N]. Raises UserError, naming the prompt, if it is not a finite number."""
    values = np.empty(len(completions))
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        value = reward(prompt, completion)
        try:
            values[i] = value
        except (TypeError, ValueError) as error:
            raise UserError(f"reward {name}: {value!r} for prompt {prompt.id!r}; return a number") from error
        if not np.isfinite(values[i]):
            raise UserError(f"reward {name}: {value!r} for prompt {prompt.id!r}; return a finite number")
    return values


class Ranker:
    """Orders K completions of a prompt: people, a judge, a model. Subclasses are frozen dataclasses."""

    def rank(self, prompt: Prompt, completions: Sequence[Completion], rng: np.random.Generator) -> Sequence[int]:
        """A rank for each completion, 0 is best, equal ranks are ties. rng: for what people's moods would decide."""
        raise TypeError(f"{type(self).__name__} has no rank(prompt, completions, rng)")

    def scores(self, prompt: Prompt, completions: Sequence[Completion]) -> Sequence[float]:
        """What the ranks are made of without the annotator's error, where that is known; () where it is not."""
        del prompt, completions
        return ()


@dataclass(frozen=True)
class RewardRanker(Ranker):
    """Ranks by a reward, as a person would who sees it through noise.

    reward: any. noise: standard deviation of the error on it, drawn once for equal answers, which tie. tie: answers that seem
    no further apart than this are not told apart.
    """

    reward: Reward
    noise: NonNegativeFloat = 0.0
    tie: NonNegativeFloat = 0.0

    def rank(self, prompt: Prompt, completions: Sequence[Completion], rng: np.random.Generator) -> Sequence[int]:
        keys = [(completion.text, completion.ended) for completion in completions]
        return noisy_ranks(self.scores(prompt, completions), rng, self.noise, keys, self.tie)

    def scores(self, prompt: Prompt, completions: Sequence[Completion]) -> Sequence[float]:
        return score(self.reward, [prompt] * len(completions), completions, "of the ranker").tolist()


def noisy_ranks(
    scores: Sequence[float], rng: np.random.Generator, noise: float, keys: Sequence[Hashable] | None = None, tie: float = 0.0
) -> list[int]:
    """Ranks (0 = best) of K answers as a person gives them: by score plus Gaussian noise of deviation `noise`.

    Answers with equal `keys` (their texts) get one draw of noise and so tie; a rank is the number of answers that seem better
    by more than `tie`. Raises UserError for negative noise or another number of keys.
    """
    if noise < 0:
        raise UserError(f"noise={noise}: a standard deviation is 0 or more; choose one such as 0.1")
    keys = range(len(scores)) if keys is None else keys
    if len(keys) != len(scores):
        raise UserError(f"keys has {len(keys)} entries for {len(scores)} scores; give one key for each answer")
    seen: dict[Hashable, float] = {}
    for value, key in zip(scores, keys, strict=True):
        if key not in seen:
            seen[key] = float(value) + noise * float(rng.standard_normal())
    perceived = [seen[key] for key in keys]
    return [sum(other > mine + tie for other in perceived) for mine in perceived]
