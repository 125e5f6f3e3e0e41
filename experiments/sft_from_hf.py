"""SFT of a model in Hugging Face format on the built-in dialogues.

    llmjax --config=experiments/sft_from_hf.py:models/Qwen3-0.6B --workdir=runs/sft
    llmjax-chat --workdir=runs/sft

The argument is a folder with config.json, *.safetensors and tokenizer files; model and tokenizer are its own. Expected: the
instruction-following rate rises by tens of points (a 0.6 B model wants an accelerator: --config.model.dtype=bfloat16).
`llmjax-convert --source=runs/sft/sft --target=models/mine` writes the result back in the same format.
"""

from llmjax.errors import UserError
from llmjax.stages.config import SFT, Evaluation, Experiment
from llmjax.training.optimizer import OptimizerConfig


def get_config(arg: str = "") -> Experiment:
    if not arg:
        raise UserError("give the model's folder behind a colon: --config=experiments/sft_from_hf.py:FOLDER")
    return Experiment(
        name="sft-from-hf",
        sft=SFT(
            init=f"hf:{arg}",
            steps=200,
            batch_size=16,
            length=256,
            optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=20, weight_decay=0.0),
        ),
        evaluation=Evaluation(num_questions=128, batch_size=64),
    )
