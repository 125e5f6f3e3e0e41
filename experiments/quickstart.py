"""The whole life of a small language model in a few minutes on two CPU cores: text -> base -> SFT -> reward -> PPO.

    llmjax --config=experiments/quickstart.py --workdir=runs/quickstart          (dense)
    llmjax --config=experiments/quickstart.py:moe --workdir=runs/quickstart-moe  (8 experts, top-2, same active parameters)
    llmjax --config=experiments/quickstart.py:full --workdir=runs/full           (the whole table; :full_moe: sparse)
    llmjax --config=experiments/quickstart.py:test --workdir=runs/test           (seconds; what the tests run)
    python benchmarks/quickstart_table.py --workdir=runs/table --check           (all claims, three seeds, dense and sparse)

Expected, seeds 0 and 1: base knows 99 % of the held-out facts in plain text (greedily), SFT 94-97 % of them in the chat
(`:moe` 90-93 %); the reward model puts right above wrong, all else equal, in 78-79 % of pairs about facts of training prompts
and 63-68 % about new ones (79-88 and 66-70 %); sampled answers are right in 63 % of cases after SFT and 70-75 % after PPO
(52-58 and 63-68 %), greedy ones as often as before or a little more. README.md has the table. Hardware: 2 CPU cores; on slow
ones (13 k tokens/s in pre-training) 9 minutes, half as long again for `:moe`, and 15 to 20 for `:full`; on fast ones about
half of that.
"""

from dataclasses import replace
from typing import Literal

from llmjax.generation.sampling import SamplingConfig
from llmjax.models.config import ModelConfig, MoEConfig
from llmjax.rl.algorithms import PPO
from llmjax.stages.candidates import RankedAnswers
from llmjax.stages.compare import BestOf, Bot, Compare, Model
from llmjax.stages.experiment import Evaluation, Experiment
from llmjax.stages.pretrain import Pretrain
from llmjax.stages.reward import ModelReward, RewardModel
from llmjax.stages.rl import RL
from llmjax.stages.sft import SFT
from llmjax.tasks.base import RewardRanker
from llmjax.tasks.world.bots import template_bot
from llmjax.tasks.world.data import WorldDialogues, WorldPrompts, WorldText
from llmjax.tasks.world.judge import correct, gold, instruction_following, other_fact
from llmjax.training.optimizer import OptimizerConfig

PROMPT_LENGTH = 22  # tokens of the longest question
ANSWERS = SamplingConfig(max_new_tokens=24)


Variant = Literal["dense", "moe", "full", "full_moe", "test", "test_moe"]


def get_config(arg: Variant = "dense") -> Experiment:
    config = quickstart()
    if arg.endswith("moe"):
        # Two of eight experts are as wide as the dense layer together: equal active parameters, but for the router.
        width = config.model.mlp_dim // 2
        config = replace(config, model=replace(config.model, moe=MoEConfig(num_experts=8, top_k=2, mlp_dim=width)))
        config = config.with_stage("pretrain", steps=900, batch_size=16, eval_every=300)  # a sparse step likes larger batches
    if arg.startswith("full"):
        config = full(config)
    if arg.startswith("test"):
        config = test_sized(config)
    return replace(config, name=f"quickstart-{arg}")


def quickstart() -> Experiment:
    return Experiment(
        name="quickstart",
        model=ModelConfig(num_layers=3, embed_dim=128, num_heads=4, num_kv_heads=2, head_dim=32, mlp_dim=344),
        stages={
            "pretrain": Pretrain(
                data=WorldText(),
                steps=1800, batch_size=8, length=128, eval_every=600, eval_batches=128,
                optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=100, final_fraction=0.02),
            ),
            "sft": SFT(
                data=WorldDialogues(num_dialogues=16_000), init="pretrain", text=WorldText(), text_fraction=0.5,
                steps=1000, batch_size=8, length=128, eval_every=500,
                optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=20),
            ),
            "reward": RewardModel(
                data=ranked_answers(num_prompts=800, num_eval_prompts=120), init="sft",
                batch_size=8, length=PROMPT_LENGTH + ANSWERS.max_new_tokens,
                optimizer=OptimizerConfig(learning_rate=7e-4, warmup_steps=20),
            ),
            "ppo": RL(
                data=WorldPrompts(), rewards={"model": ModelReward("reward")}, watch={"gold": gold, "correct": correct},
                policy="sft", critic="reward", algorithm=PPO(kl_coef=0.2, value_clip=10.0),
                steps=20, critic_warmup=3, critic_rate=5.0, batch_size=160, epochs=1, minibatches=4, missing_end_penalty=1.0,
                temperature=ANSWERS.temperature, prompt_length=PROMPT_LENGTH, max_new_tokens=ANSWERS.max_new_tokens,
                optimizer=OptimizerConfig(
                    learning_rate=2e-4, warmup_steps=0, schedule="constant", weight_decay=0.0, eps=1e-5
                ),
            ),
            "table": Compare(
                rows={
                    "template bot": Bot(template_bot),
                    "base, plain text": Model("pretrain", form="{prompt}\n"),
                    "base, chat form": Model("pretrain"),
                    "sft": Model("sft"),
                    "sft at 0.7": Model("sft", temperature=0.7),
                    "best of 4": BestOf("sft", "reward", n=4),
                    "ppo": Model("ppo"),
                    "ppo at 0.7": Model("ppo", temperature=0.7),
                },
                against="sft", score="correct", beside=("gold",), knowledge="base, plain text",
            ),
        },
        evaluation=Evaluation(
            prompts=WorldPrompts(), prompt_length=PROMPT_LENGTH, sampling=ANSWERS, num_prompts=384, batch_size=128,
            scores={"gold": gold, "correct": correct, "instruction_following": instruction_following},
        ),
    )  # fmt: skip


def ranked_answers(num_prompts: int, num_eval_prompts: int) -> RankedAnswers:
    """Two answers of the SFT model to each prompt and the same two with another fact, ranked by people who see the gold score
    through noise and call a tie what they cannot tell apart."""
    return RankedAnswers(
        policy="sft", prompts=WorldPrompts(), ranker=RewardRanker(gold, noise=0.05, tie=0.12), k=4, edit=other_fact, edits=2,
        num_prompts=num_prompts, num_eval_prompts=num_eval_prompts, rankings_per_prompt=3,
        prompt_length=PROMPT_LENGTH, sampling=replace(ANSWERS, temperature=0.7),  # mostly answers that are worth ranking
    )  # fmt: skip


def full(config: Experiment) -> Experiment:
    """The rows of the table that do not fit into a few minutes: PPO without KL, best of 16, four answers to each prompt."""
    ppo, table = config.stage("ppo", RL), config.stage("table", Compare)
    without_kl = replace(
        ppo, algorithm=PPO(kl_coef=0.0, value_clip=10.0), steps=60, optimizer=replace(ppo.optimizer, learning_rate=3e-4)
    )
    rows = table.rows | {"best of 16": BestOf("sft", "reward", n=16), "ppo without KL": Model("ppo_without_kl")}
    stages = {name: stage for name, stage in config.stages.items() if name != "table"}
    stages |= {"ppo_without_kl": without_kl, "table": replace(table, rows=rows, draws=4)}
    return replace(config, stages=stages)


def test_sized(config: Experiment) -> Experiment:
    """Every stage, nothing learnt: for tests of the machinery."""
    moe = config.model.moe and replace(config.model.moe, num_experts=4, mlp_dim=24)
    config = replace(
        config,
        model=replace(config.model, num_layers=2, embed_dim=32, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=48, moe=moe),
        evaluation=replace(config.evaluation, num_prompts=16, batch_size=16, num_samples=2),
    )
    text, dialogues = WorldText(num_documents=400), WorldDialogues(num_dialogues=200)
    config = config.with_stage("pretrain", data=text, steps=6, batch_size=8, length=64, eval_every=3, eval_batches=2)
    config = config.with_stage("sft", data=dialogues, text=text, steps=4, batch_size=8, length=64, eval_every=2)
    rankings = ranked_answers(num_prompts=16, num_eval_prompts=8)
    rankings = replace(rankings, ranker=RewardRanker(gold, noise=0.15))  # untaught models are all wrong, and would all tie
    config = config.with_stage("reward", data=rankings, batch_size=8)
    return config.with_stage("ppo", steps=3, critic_warmup=1, batch_size=8)
