"""DPO of a model in Hugging Face format on pairs, or on rankings of any size.

    llmjax --config=experiments/dpo_pairs.py:models/SmolLM2-135M --config.dpo.data.path='pairs/*.jsonl.gz' --preview
    llmjax --config=experiments/dpo_pairs.py:models/SmolLM2-135M --config.dpo.data.path='pairs/*.jsonl.gz' --workdir=runs/dpo
    llmjax-chat --workdir=runs/dpo

The records are those of a reward model (docs/data.md): chosen and rejected, K answers with ranks or scores, partial orders.
What is trained are low-rank updates; --config.dpo.lora=none trains all parameters beside a frozen copy.

SmolLM2-135M-Instruct on the first 400 pairs of HH-RLHF (harmless), of which 187 fit 160 tokens, in 46 steps: on 82 held-out
pairs 57.3 +- 5.5 % right (chance 50 %), loss 0.692 (ln 2 at the start), KL 2.7 +- 1.1 nats per answer. So few pairs move
little; a run of all of them wants an accelerator.
"""

from llmjax.data.sources import Rankings
from llmjax.errors import UserError
from llmjax.generation.sampling import SamplingConfig
from llmjax.models.lora import LoRAConfig
from llmjax.stages.experiment import Evaluation, Experiment
from llmjax.stages.preference import DPO
from llmjax.training.optimizer import OptimizerConfig


def get_config(arg: str = "") -> Experiment:
    if not arg:
        raise UserError("give the model's folder behind a colon: --config=experiments/dpo_pairs.py:FOLDER")
    return Experiment(
        name="dpo-pairs",
        stages={
            "dpo": DPO(
                data=Rankings(), init=f"hf:{arg}", lora=LoRAConfig(rank=16),
                beta=0.1, epochs=1, batch_size=4, length=160, eval_every=50, eval_rankings=64,
                optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=10, weight_decay=0.0),
            )
        },
        evaluation=Evaluation(
            num_prompts=8, batch_size=8, prompt_length=160, sampling=SamplingConfig(max_new_tokens=48, temperature=0.0)
        ),
    )  # fmt: skip
