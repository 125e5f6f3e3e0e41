"""GRPO with a verifier: a reward that a program can check, and no reward model.

    llmjax --config=experiments/grpo_math.py --workdir=runs/grpo        (sums of the built-in world, from the quickstart's SFT)
    llmjax --config=experiments/grpo_math.py:test --workdir=runs/test   (seconds; what the tests run)
    llmjax --config=experiments/grpo_math.py:models/Qwen3-0.6B --config.grpo.data.path='gsm8k/*.jsonl.gz' --workdir=runs/gsm8k

The reward is 1 if the last number of an answer is the right one. With a folder behind the colon the prompts are your own,
records with a question and an answer as gsm8k has them ("... #### 72"); a step of a real model writes 64 answers of up to 256
tokens, so it wants an accelerator.
"""

from dataclasses import replace

from experiments import quickstart
from llmjax.data.sources import Prompts
from llmjax.generation.sampling import SamplingConfig
from llmjax.rl.algorithms import GRPO
from llmjax.stages.experiment import Evaluation, Experiment
from llmjax.stages.rl import RL
from llmjax.tasks.verify import Number
from llmjax.tasks.world.data import WorldPrompts
from llmjax.training.optimizer import OptimizerConfig


def get_config(arg: str = "sums") -> Experiment:
    if arg == "sums":
        return sums(quickstart.get_config("dense"))
    if arg == "test":
        config = sums(quickstart.get_config("test"))
        return replace(config.with_stage("grpo", steps=2, batch_size=16), name="grpo-math-test")
    return gsm8k(arg)


def sums(start: Experiment) -> Experiment:
    """On from the quickstart's SFT stage."""
    prompts = WorldPrompts(kinds=("sum", "difference"))
    grpo = RL(
        data=prompts, rewards={"right": Number("answers")}, policy="sft", algorithm=GRPO(group_size=8),
        steps=60, batch_size=128, epochs=1, minibatches=2,
        prompt_length=quickstart.PROMPT_LENGTH, max_new_tokens=quickstart.ANSWERS.max_new_tokens,
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=5, schedule="constant", weight_decay=0.0, eps=1e-5),
    )  # fmt: skip
    evaluation = replace(start.evaluation, prompts=prompts, scores={"right": Number("answers")})
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
