"""What an experiment file returns: typed, frozen, nested data. Every stage is optional; each names what it starts from."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmjax.data.sources import CorpusConfig
from llmjax.data.tokenizer import TokenizerConfig
from llmjax.errors import UserError
from llmjax.generation.sampling import SamplingConfig
from llmjax.models.config import ModelConfig
from llmjax.models.lora import LoRAConfig
from llmjax.sharding import MeshConfig, check_batch
from llmjax.training.optimizer import OptimizerConfig

HF = "hf:"


def _positive(cfg, *names: str) -> None:
    for name in names:
        if getattr(cfg, name) < 1:
            raise UserError(f"{name}={getattr(cfg, name)} must be positive")


@dataclass(frozen=True)
class Pretrain:
    """Next-token prediction on packed documents.

    init: "" starts from random weights, "hf:FOLDER" from a model in Hugging Face format. batch_size sequences of `length`
    tokens a step; held-out loss every eval_every steps on at most eval_batches batches.
    """

    init: str = ""
    steps: int = 300
    batch_size: int = 32
    length: int = 128
    eval_every: int = 100
    eval_batches: int = 16
    optimizer: OptimizerConfig = OptimizerConfig()

    def validate(self) -> None:
        _positive(self, "steps", "batch_size", "length", "eval_every", "eval_batches")
        if self.init and not self.init.startswith(HF):
            raise UserError(f'init={self.init!r} is neither "" (random weights) nor "hf:FOLDER"')


@dataclass(frozen=True)
class SFT:
    """Supervised fine-tuning on dialogues, packed; loss on the assistant's tokens and their end of turn only.

    init: an earlier stage, or "hf:FOLDER" for a model in Hugging Face format. lora: train low-rank updates only; what the
    stage hands on is the merged model, with the updates beside it.
    """

    init: str = "pretrain"
    lora: LoRAConfig | None = None
    steps: int = 100
    batch_size: int = 32
    length: int = 128
    eval_every: int = 50
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-4)

    def validate(self) -> None:
        _positive(self, "steps", "batch_size", "length", "eval_every")


@dataclass(frozen=True)
class RewardModel:
    """K answers of the `init` model to each of num_prompts prompts, ranked, and a reward model trained on the rankings.

    num_eval_prompts: held-out prompts, and as many again about facts that nobody was asked for before. Every prompt is
    answered and ranked rankings_per_prompt times, with new answers. batch_size: rankings a step, each of k answers.
    label_noise: standard deviation of the annotators' error on the gold score (0 to 1). Answers are drawn with
    `sampling`; prompts and answers together fit `prompt_length` plus sampling.max_new_tokens.
    """

    init: str = "sft"
    k: int = 4
    num_prompts: int = 768
    rankings_per_prompt: int = 1
    num_eval_prompts: int = 192
    label_noise: float = 0.1
    epochs: int = 2
    batch_size: int = 16
    prompt_length: int = 48
    sampling: SamplingConfig = SamplingConfig()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-4)

    @property
    def steps(self) -> int:
        return self.epochs * (self.num_prompts * self.rankings_per_prompt // self.batch_size)

    def validate(self) -> None:
        _positive(self, "num_prompts", "rankings_per_prompt", "num_eval_prompts", "epochs", "batch_size", "prompt_length")
        if self.k < 2:
            raise UserError(f"k={self.k}: a ranking needs at least 2 answers")
        if self.label_noise < 0:
            raise UserError(f"label_noise={self.label_noise} must be 0 or more")
        if self.num_prompts * self.rankings_per_prompt < self.batch_size:
            raise UserError(
                f"num_prompts={self.num_prompts} times rankings_per_prompt={self.rankings_per_prompt} is less than "
                f"batch_size={self.batch_size}"
            )


@dataclass(frozen=True)
class PPO:
    """Proximal policy optimisation of `policy` against `reward`, with a per-token KL penalty to the frozen `policy`.

    A step: batch_size prompts are answered once each, then `epochs` passes over the answers in `minibatches`. kl_coef:
    nats of KL to reward. missing_end_penalty: taken off the score of an answer that does not end itself. temperature 1:
    log-probabilities and samples are of the same distribution.
    """

    policy: str = "sft"
    reward: str = "reward"
    steps: int = 40
    batch_size: int = 128
    epochs: int = 2
    minibatches: int = 2
    kl_coef: float = 0.05
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip_ratio: float = 0.2
    value_clip: float = 0.2
    vf_coef: float = 0.5
    temperature: float = 1.0
    missing_end_penalty: float = 1.0
    prompt_length: int = 48
    max_new_tokens: int = 32
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=2e-4, weight_decay=0.0, eps=1e-5)

    @property
    def sampling(self) -> SamplingConfig:
        return SamplingConfig(max_new_tokens=self.max_new_tokens, temperature=self.temperature)

    def validate(self) -> None:
        _positive(self, "steps", "batch_size", "epochs", "minibatches", "prompt_length", "max_new_tokens")
        if self.batch_size % self.minibatches:
            raise UserError(f"batch_size={self.batch_size} is not divisible by minibatches={self.minibatches}")
        if self.kl_coef < 0:
            raise UserError(f"kl_coef={self.kl_coef} must be 0 or more")
        if self.temperature <= 0:
            raise UserError(f"temperature={self.temperature} must be positive: PPO learns from samples")
        if self.clip_ratio <= 0:
            raise UserError(f"clip_ratio={self.clip_ratio} must be positive")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)} must be between 0 and 1")


@dataclass(frozen=True)
class Evaluation:
    """num_questions held-out questions, answered in rows of batch_size, after SFT and at the end."""

    num_questions: int = 256
    batch_size: int = 128
    num_samples: int = 4

    def validate(self) -> None:
        _positive(self, "num_questions", "batch_size", "num_samples")


@dataclass(frozen=True)
class Experiment:
    """One model's life. `seed` is the root of all randomness. checkpoint_seconds: between two saves of a stage."""

    name: str
    seed: int = 0
    data: CorpusConfig = CorpusConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    pretrain: Pretrain | None = None
    sft: SFT | None = None
    reward: RewardModel | None = None
    ppo: PPO | None = None
    evaluation: Evaluation = Evaluation()
    checkpoint_seconds: float = 30.0

    def validate(self) -> None:
        if not self.stages():
            raise UserError("no stage: give at least pretrain")
        if self.checkpoint_seconds <= 0:
            raise UserError(f"checkpoint_seconds={self.checkpoint_seconds} must be positive")
        self._validate_links()
        for stage in self.stages():
            check_batch(f"{stage}.batch_size", getattr(self, stage).batch_size, self.mesh)
        if self.ppo is not None:
            rows = self.ppo.batch_size // self.ppo.minibatches
            check_batch("a PPO minibatch, ppo.batch_size / ppo.minibatches", rows, self.mesh)
        if self.sft is not None:
            check_batch("evaluation.batch_size", self.evaluation.batch_size, self.mesh)
            if self.data.source != "world":
                raise UserError(
                    f"sft needs dialogues with a judge, which only the built-in world has (data is {self.data.source}); "
                    "leave out sft, reward and ppo"
                )
        chooses = self.model.moe is not None and self.model.moe.router == "expert_choice"
        if chooses and self.stages() != ("pretrain",):
            raise UserError("model.moe.router=expert_choice cannot decode: leave out sft, reward and ppo")
        if self.model.moe is not None and self.model.moe.num_experts % self.mesh.expert:
            raise UserError(
                f"mesh.expert={self.mesh.expert} does not divide model.moe.num_experts={self.model.moe.num_experts}"
            )

    def _validate_links(self) -> None:
        links = [("sft", "init"), ("reward", "init"), ("ppo", "policy"), ("ppo", "reward")]
        for stage, link in links:
            cfg = getattr(self, stage)
            if cfg is None:
                continue
            source, earlier = getattr(cfg, link), self.stages()[: self.stages().index(stage)]
            if stage == "sft" and source.startswith(HF) and not earlier:
                continue
            if source not in earlier:
                raise UserError(
                    f"{stage}.{link}={source!r} is not an earlier stage of this experiment; "
                    f"there is {', '.join(earlier) or 'none'}"
                )

    @property
    def hf_folder(self) -> str | None:
        """The Hugging Face folder that the first stage starts from, if it does; model and tokenizer are then its own."""
        init = getattr(getattr(self, self.stages()[0]), "init", "")
        return init.removeprefix(HF) if init.startswith(HF) else None

    def stages(self) -> tuple[str, ...]:
        """Names of the stages it has, in order."""
        return tuple(name for name in ("pretrain", "sft", "reward", "ppo") if getattr(self, name) is not None)


@dataclass(frozen=True)
class Study:
    """Several experiments that are run one after another and printed side by side."""

    name: str
    experiments: dict[str, Experiment] = field(default_factory=dict)

    def validate(self) -> None:
        if not self.experiments:
            raise UserError("no experiment in this study")
