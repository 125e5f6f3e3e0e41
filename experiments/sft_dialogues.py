"""SFT of a model in Hugging Face format on your own dialogues, with LoRA.

    llmjax --config=experiments/sft_dialogues.py:models/SmolLM2-135M --config.sft.data.path='chats/*.jsonl' --preview
    llmjax --config=experiments/sft_dialogues.py:models/SmolLM2-135M --config.sft.data.path='chats/*.jsonl' --workdir=runs/chats
    llmjax-chat --workdir=runs/chats

The argument is a folder with config.json, *.safetensors and tokenizer files. The format of the records is recognised: messages,
prompt and completion, Alpaca, ShareGPT, HH-RLHF (docs/data.md). `--preview` shows the first examples as tokens, with what
carries loss set apart, and how many are cut or left out. With ",mixed" behind the folder two sources are mixed by weight:

    llmjax --config=experiments/sft_dialogues.py:models/SmolLM2-135M,mixed --config.sft.data.instructions.path='dolly.jsonl' \\
        --config.sft.data.dialogues.path='sgd/*.jsonl.gz' --config.sft.data.weights.dialogues=2 --workdir=runs/mixed

SmolLM2-135M-Instruct on 1,000 instructions (dolly and hh-rlhf, prompt and completion), 30 steps, eleven minutes on two cores:
held-out loss 2.22 nats per token, before 2.38. On 10,957 dialogues of schema-guided tasks (SGD), 20 steps, eleven minutes on
slow cores: 2.23, before 2.68; asked for a bus ticket it asks what the budget is.
"""

from llmjax.data.base import Mixture
from llmjax.data.sources import Dialogues
from llmjax.errors import UserError
from llmjax.generation.sampling import SamplingConfig
from llmjax.models.lora import LoRAConfig
from llmjax.stages.experiment import Evaluation, Experiment
from llmjax.stages.sft import SFT
from llmjax.training.optimizer import OptimizerConfig


def get_config(arg: str = "") -> Experiment:
    folder, mixed = arg.removesuffix(",mixed"), arg.endswith(",mixed")
    if not folder:
        raise UserError("give the model's folder behind a colon: --config=experiments/sft_dialogues.py:FOLDER")
    data = Mixture({"instructions": Dialogues(), "dialogues": Dialogues()}, {"dialogues": 1.0}) if mixed else Dialogues()
    return Experiment(
        name="sft-dialogues",
        stages={
            "sft": SFT(
                data=data, init=f"hf:{folder}", lora=LoRAConfig(rank=16),
                steps=60, batch_size=4, length=512, eval_every=20, eval_batches=4,
                optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=10, weight_decay=0.0),
            )
        },
        evaluation=Evaluation(
            num_prompts=8, batch_size=8, prompt_length=256, sampling=SamplingConfig(max_new_tokens=48, temperature=0.0)
        ),
    )  # fmt: skip
