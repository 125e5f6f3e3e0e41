"""GRPO with a verifier: a reward that a program can check, and no reward model.

    llmjax --config=experiments/grpo_math.py --workdir=runs/grpo        (sums, from the quickstart's SFT model)
    llmjax --config=experiments/grpo_math.py:test --workdir=runs/test   (seconds; what the tests run)
    llmjax --config=experiments/grpo_math.py:models/Qwen3-0.6B --config.grpo.data.path='gsm8k/*.jsonl.gz' --workdir=runs/gsm8k

The reward is 1 if the last number of an answer is the right one. Of sums up to 5 + 5, each asked in three ways, the share of
right answers rises from 20 % to 97 % within five minutes on two cores; of the same sums, each asked in a fourth way, from
16 +- 8 % to 64 +- 10 % (seed 0). What the reward does not look at gets worse: "5 + 4? -> The sum of 5 and 6 is 9."

With a folder behind the colon the prompts are your own: records with a question and an answer, as in gsm8k ("... #### 72").
A step of a real model writes 64 answers of up to 256 tokens, so it wants an accelerator.
"""

from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar

from experiments import quickstart
from llmjax.config import PositiveInt
from llmjax.data.base import Data, Place, Splits
from llmjax.data.records import Prompt, user
from llmjax.data.sources import Prompts
from llmjax.generation.sampling import SamplingConfig
from llmjax.rl.algorithms import GRPO
from llmjax.stages.experiment import Evaluation, Experiment
from llmjax.stages.rl import RL
from llmjax.tasks.verify import Number
from llmjax.tasks.world.language import SUM_QUESTIONS
from llmjax.training.optimizer import OptimizerConfig


@dataclass(frozen=True)
class Sums(Data):
    """Every sum of two numbers from 1 to `largest`, asked in several ways; of each sum one way is held out."""

    largest: PositiveInt = 5
    kind: ClassVar[type] = Prompt

    def read(self, place: Place) -> Splits:
        del place  # nothing is read from anywhere
        train: list[Prompt] = []
        held_out: list[Prompt] = []
        for a, b in product(range(1, self.largest + 1), repeat=2):
            for way, words in enumerate(SUM_QUESTIONS):
                text = words.format(a=a, b=b)
                part = held_out if way == (a + 2 * b) % len(SUM_QUESTIONS) else train
                part.append(Prompt(text, user(text), {"answer": str(a + b)}))
        return Splits(train, {"held_out": held_out})


def get_config(arg: str = "sums") -> Experiment:
    if arg == "sums":
        return sums(quickstart.get_config("dense"))
    if arg == "test":
        config = sums(quickstart.get_config("test"))
        return replace(config.with_stage("grpo", steps=2, batch_size=16), name="grpo-math-test")
    return gsm8k(arg)


def sums(start: Experiment) -> Experiment:
    """On from the quickstart's SFT stage."""
    prompts = Sums()
    grpo = RL(
        data=prompts, rewards={"right": Number()}, policy="sft", algorithm=GRPO(group_size=8),
        steps=200, batch_size=128, epochs=1, minibatches=2,
        prompt_length=quickstart.PROMPT_LENGTH, max_new_tokens=quickstart.ANSWERS.max_new_tokens,
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=5, schedule="constant", weight_decay=0.0, eps=1e-5),
    )  # fmt: skip
    evaluation = replace(start.evaluation, prompts=prompts, scores={"right": Number()})
    stages = {name: start.stages[name] for name in ("pretrain", "sft")} | {"grpo": grpo}
    return replace(start, name="grpo-math", stages=stages, evaluation=evaluation)


def gsm8k(folder: str) -> Experiment:
    """From a model in Hugging Face format, on questions and answers in files."""
    return Experiment(
        name="grpo-math-files",
        stages={
            "grpo": RL(
                data=Prompts(), rewards={"right": Number()}, policy=f"hf:{folder}", algorithm=GRPO(group_size=8),
                steps=200, batch_size=64, epochs=1, minibatches=1, prompt_length=256, max_new_tokens=256,
                optimizer=OptimizerConfig(learning_rate=1e-6, warmup_steps=10, schedule="constant", weight_decay=0.0),
            )
        },
        evaluation=Evaluation(num_prompts=128, batch_size=64, sampling=SamplingConfig(max_new_tokens=256, temperature=0.0)),
    )  # fmt: skip
