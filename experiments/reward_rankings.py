"""A reward model from people's rankings: a model in Hugging Face format gets a scalar head.

    llmjax --config=experiments/reward_rankings.py:models/SmolLM2-135M --config.reward.data.path='rankings/*.jsonl.gz' --preview
    llmjax --config=experiments/reward_rankings.py:models/SmolLM2-135M --config.reward.data.path='rankings/*.jsonl.gz' \\
        --workdir=runs/reward

The records are K answers to a prompt with ranks or scores, pairs (chosen, rejected), or partial orders (docs/data.md); rankings
of different sizes and with ties go together. Answers longer than --config.reward.length tokens with their prompt are left out,
and counted. An RL stage behind it may learn from it: rewards={"people": ModelReward("reward")}.

SmolLM2-135M-Instruct on people's rankings of four answers to a question (qa_feedback of FineGrainedRLHF; 247 of 301 rankings
fit 160 tokens), one epoch of 61 steps, 35 minutes on two cores that did other work: right about 62.2 +- 5.7 % of the held-out
pairs (chance 50 %; "the longer answer is better" is right about 51 % of all pairs), loss 0.679. So few rankings teach
little; an accelerator does thousands in that time.
"""

from llmjax.data.sources import Rankings
from llmjax.errors import UserError
from llmjax.stages.experiment import Experiment
from llmjax.stages.reward import RewardModel
from llmjax.training.optimizer import OptimizerConfig


def get_config(arg: str = "") -> Experiment:
    if not arg:
        raise UserError("give the model's folder behind a colon: --config=experiments/reward_rankings.py:FOLDER")
    return Experiment(
        name="reward-rankings",
        stages={
            "reward": RewardModel(
                data=Rankings(), init=f"hf:{arg}",
                epochs=1, batch_size=4, length=160, eval_every=25, eval_rankings=64,
                optimizer=OptimizerConfig(learning_rate=3e-5, warmup_steps=10, weight_decay=0.0),
            )
        },
    )  # fmt: skip
