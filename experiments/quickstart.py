"""The whole life of a small language model in a few minutes on two CPU cores: text -> base -> SFT -> reward -> PPO.

    llmjax --config=experiments/quickstart.py --workdir=runs/quickstart          (dense)
    llmjax --config=experiments/quickstart.py:moe --workdir=runs/quickstart-moe  (8 experts, top-2, same active parameters)
    llmjax --config=experiments/quickstart.py:test --workdir=runs/test           (seconds; what the tests run)

Expected with --config.seed=0, 1, 2: held-out bits per byte about half of the 5-gram model's; instruction following from 0 %
to 86-90 % by SFT; the reward model at 0.92-0.94 of the accuracy that the noise in the rankings allows; gold score from
0.58-0.60 (SFT) to 0.73-0.77 (PPO), standard error 0.016, at a KL of 2.5-3.4 nats an answer. PPO learns style (polite,
complete, to the point) more than facts. Hardware: 2 CPU cores, 4.2 minutes dense and 5.5 minutes sparse.
"""

from dataclasses import replace

from llmjax.data.sources import CorpusConfig
from llmjax.generation.sampling import SamplingConfig
from llmjax.models.config import ModelConfig, MoEConfig
from llmjax.stages.config import PPO, SFT, Evaluation, Experiment, Pretrain, RewardModel
from llmjax.training.optimizer import OptimizerConfig


def get_config(arg: str = "dense") -> Experiment:
    if arg not in ("dense", "moe", "test", "test_moe"):
        raise ValueError(f"unknown argument {arg!r}; there is dense, moe, test and test_moe")
    config = quickstart()
    if arg.endswith("moe"):
        # Two of eight experts are as wide as the dense layer together: equal active parameters, but for the router.
        width = config.model.mlp_dim // 2
        config = replace(
            config,
            model=replace(config.model, moe=MoEConfig(num_experts=8, top_k=2, mlp_dim=width)),
            # A sparse step takes longer on a CPU, and fewer get as far; dense_vs_moe.py compares at equal tokens.
            pretrain=replace(config.pretrain, steps=1400, eval_every=350),
        )
    if arg.startswith("test"):
        config = test_sized(config)
    return replace(config, name=f"quickstart-{arg}")


def quickstart() -> Experiment:
    return Experiment(
        name="quickstart",
        model=ModelConfig(num_layers=3, embed_dim=128, num_heads=4, num_kv_heads=2, head_dim=32, mlp_dim=344),
        pretrain=Pretrain(
            steps=2000, batch_size=8, length=128, eval_every=500,
            optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=100, final_fraction=0.02),
        ),
        sft=SFT(
            steps=600, batch_size=8, length=128, eval_every=300,
            optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=20),
        ),
        reward=RewardModel(
            num_prompts=1344, rankings_per_prompt=2, num_eval_prompts=288, epochs=1, batch_size=4, prompt_length=22,
            sampling=SamplingConfig(max_new_tokens=24, temperature=0.7),
            label_noise=0.15, optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=20),
        ),
        ppo=PPO(
            steps=20, batch_size=128, epochs=1, minibatches=4, kl_coef=0.15, temperature=0.7,
            prompt_length=22, max_new_tokens=24,
            optimizer=OptimizerConfig(
                learning_rate=3e-4, warmup_steps=5, schedule="constant", weight_decay=0.0, eps=1e-5
            ),
        ),
    )  # fmt: skip


def test_sized(config: Experiment) -> Experiment:
    """Every stage, nothing learnt: for tests of the machinery."""
    moe = config.model.moe and replace(config.model.moe, num_experts=4, mlp_dim=24)
    return replace(
        config,
        data=CorpusConfig(num_documents=400, num_dialogues=200),
        model=replace(config.model, num_layers=2, embed_dim=32, num_heads=2, num_kv_heads=1, head_dim=16, mlp_dim=48, moe=moe),
        pretrain=replace(config.pretrain, steps=6, batch_size=8, length=64, eval_every=3, eval_batches=2),
        sft=replace(config.sft, steps=4, batch_size=8, length=64, eval_every=2),
        reward=replace(config.reward, num_prompts=16, num_eval_prompts=8, batch_size=8),
        ppo=replace(config.ppo, steps=3, batch_size=8),
        evaluation=Evaluation(num_questions=16, batch_size=16, num_samples=2),
    )  # fmt: skip
