"""SFT of a model in Hugging Face format on the built-in dialogues.

    llmjax --config=experiments/sft_from_hf.py:models/Qwen3-0.6B --workdir=runs/sft
    llmjax --config=experiments/sft_from_hf.py:models/Qwen3-0.6B,lora --config.sft.lora.rank=8 --workdir=runs/sft-lora
    llmjax-chat --workdir=runs/sft

The argument is a folder with config.json, *.safetensors and tokenizer files; model and tokenizer are its own. With ",lora" only
low-rank updates of its matrices are trained, experts included: a third of the work less, and hardly any optimizer memory.
Expected: the instruction-following rate rises by tens of points (a 0.6 B model wants an accelerator:
--config.model.dtype=bfloat16). `llmjax-convert --source=runs/sft/sft --target=models/mine` writes the result back in the same
format, `--adapter_only` the updates alone in the format of PEFT. Your own dialogues: sft_dialogues.py.
"""

from llmjax.errors import UserError
from llmjax.generation.sampling import SamplingConfig
from llmjax.models.lora import LoRAConfig
from llmjax.stages.experiment import Evaluation, Experiment
from llmjax.stages.sft import SFT
from llmjax.tasks.world.data import WorldDialogues, WorldPrompts
from llmjax.tasks.world.judge import correct, instruction_following
from llmjax.training.optimizer import OptimizerConfig


def get_config(arg: str = "") -> Experiment:
    folder, lora = arg.removesuffix(",lora"), arg.endswith(",lora")
    if not folder:
        raise UserError("give the model's folder behind a colon: --config=experiments/sft_from_hf.py:FOLDER")
    return Experiment(
        name="sft-from-hf",
        stages={
            "sft": SFT(
                data=WorldDialogues(),
                init=f"hf:{folder}",
                lora=LoRAConfig() if lora else None,
                steps=200,
                batch_size=16,
                length=256,
                optimizer=OptimizerConfig(learning_rate=2e-4 if lora else 2e-5, warmup_steps=20, weight_decay=0.0),
            )
        },
        evaluation=Evaluation(
            prompts=WorldPrompts(),
            scores={"correct": correct, "instruction_following": instruction_following},
            num_prompts=128,
            sampling=SamplingConfig(max_new_tokens=32),
        ),
    )
