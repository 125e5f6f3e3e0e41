"""What every stage of one run shares, and the life of a stage: start or resume, train, hand on."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from llmjax.data.batches import BatchSource
from llmjax.data.tokenizer import Tokenizer
from llmjax.files import read_json, write_json_atomic
from llmjax.interop import hf_folder
from llmjax.models.config import ModelConfig
from llmjax.models.spec import abstract_params
from llmjax.models.stats import train_flops_per_token
from llmjax.models.transformer import Params, transformer_spec, with_updated_selection_bias
from llmjax.stages.config import HF, Experiment
from llmjax.training import checkpoint
from llmjax.training.checkpoint import Checkpoints
from llmjax.training.loop import Hook, Loop, StepFn, train
from llmjax.training.metrics import MetricsLog
from llmjax.training.optimizer import OptimizerConfig, make_optimizer
from llmjax.training.rng import key_for
from llmjax.training.state import LossFn, TrainState, abstract_state, init_state, make_train_step

PARAMS, ADAPTER = "params", "adapter"  # folders of a completed stage


@dataclass(frozen=True)
class Run:
    """One experiment in its working directory. verbose: whether this process writes to the terminal (process 0)."""

    experiment: Experiment
    workdir: str
    mesh: Mesh | None
    tokenizer: Tokenizer
    metrics: MetricsLog
    verbose: bool = True

    @property
    def model(self) -> ModelConfig:
        """The model's config with the tokenizer's vocabulary."""
        size = self.experiment.model.vocab_size or self.tokenizer.vocab_size
        return dataclasses.replace(self.experiment.model, vocab_size=size)

    def path(self, *parts: str) -> str:
        return os.path.join(self.workdir, *parts)

    def key(self, *purpose: str | int) -> jax.Array:
        return key_for(self.experiment.seed, *purpose)

    def say(self, text: str) -> None:
        if self.verbose:
            print(text, flush=True)

    def result(self, stage: str) -> dict[str, Any] | None:
        """What a completed stage left, or None: the file is written last, so its presence is completeness."""
        path = self.path(stage, "result.json")
        return read_json(path) if os.path.exists(path) else None

    def load_lm(self, stage: str) -> Params:
        """The language model that `stage` made, or that lies in Hugging Face format at "hf:FOLDER"."""
        if stage.startswith(HF):
            folder = stage.removeprefix(HF)
            return hf_folder.load_params(folder, self.model, hf_folder.read_config(folder)[1]["model_type"], self.mesh)
        return self.load(stage, transformer_spec(self.model))

    def load(self, stage: str, specs: Any) -> Any:
        """The parameters that `stage` made, onto the mesh."""
        return checkpoint.load_params(self.path(stage, PARAMS), abstract_params(specs, self.mesh))

    def load_adapter(self, stage: str, specs: Any) -> Any:
        """The low-rank updates that `stage` has left beside its merged parameters."""
        return checkpoint.load_params(self.path(stage, ADAPTER), abstract_params(specs, self.mesh))


@dataclass(frozen=True)
class Trained:
    """A stage's outcome: final parameters, how long it took, how many tokens it saw."""

    params: Any
    seconds: float
    tokens: int


def fit(
    run: Run,
    stage: str,
    specs: Any,
    start_params: Any,
    loss_fn: LossFn,
    batches: BatchSource,
    optimizer: OptimizerConfig,
    num_steps: int,
    tokens_per_step: int,
    length: int,
    hooks: Sequence[Hook] = (),
    frozen: Sequence[Any] = (),
    after: Callable[[Any, Mapping[str, Any]], Any] | None = None,
) -> Trained:
    """Trains `start_params` with one update a step; the life of every stage but PPO, which brings its own step.

    frozen: parameters that the loss sees behind its key, and that stay as they are. after: as in `make_train_step`.
    """
    tx = make_optimizer(optimizer, num_steps, specs)
    abstract = abstract_state(specs, tx, run.mesh)
    update = make_train_step(loss_fn, tx, abstract, after)
    flops = train_flops_per_token(run.model, length, frozen=bool(frozen))

    def step_fn(state, batch, key):
        return update(state, batch, key, *frozen)

    return fit_state(run, stage, tx, abstract, start_params, step_fn, batches, num_steps, tokens_per_step, flops, hooks)


def balancing(cfg: ModelConfig) -> Callable[[Params, Mapping[str, Any]], Params] | None:
    """What moves the selection bias after each step of a language model, if its config says so."""
    if cfg.moe is None or not cfg.moe.bias_update_rate:
        return None
    return lambda params, metrics: with_updated_selection_bias(params, metrics["moe/load"], cfg)


def fit_state(
    run: Run,
    stage: str,
    tx: optax.GradientTransformation,
    abstract: TrainState,
    start_params: Any,
    step_fn: StepFn,
    batches: BatchSource,
    num_steps: int,
    tokens_per_step: int,
    flops_per_token: float,
    hooks: Sequence[Hook] = (),
) -> Trained:
    """Runs THE loop for a stage, from its newest checkpoint if there is one."""
    began = time.monotonic()
    checkpoints = Checkpoints(run.path(stage, "checkpoints"))
    loop = Loop(
        stage=stage,
        num_steps=num_steps,
        key=run.key(stage, "step"),
        mesh=run.mesh,
        metrics=run.metrics,
        checkpoints=checkpoints,
        checkpoint_seconds=run.experiment.checkpoint_seconds,
        tokens_per_step=tokens_per_step,
        flops_per_token=flops_per_token,
        hooks=hooks,
        verbose=run.verbose,
    )
    try:
        state = train(loop, init_state(start_params, tx, abstract), abstract, step_fn, batches)
    finally:
        checkpoints.close()
    return Trained(state.params, time.monotonic() - began, num_steps * tokens_per_step)


def finish(
    run: Run,
    stage: str,
    params: Any,
    trained: Trained,
    metrics: Mapping[str, float],
    samples: Sequence[Mapping[str, str]] = (),
    adapter: Any = None,
    **extra: Any,
) -> None:
    """Hands on: the parameters first, then result.json, which makes the stage complete; checkpoints are dropped then.

    adapter: the low-rank updates that are in the parameters, if they were trained that way.
    """
    checkpoint.save_params(run.path(stage, PARAMS), params)
    if adapter is not None:
        checkpoint.save_params(run.path(stage, ADAPTER), adapter)
    result = {
        "stage": stage,
        "steps": getattr(run.experiment, stage).steps,
        "seconds": round(trained.seconds, 1),
        "tokens": trained.tokens,
        "metrics": {name: float(value) for name, value in metrics.items()},
        "samples": [dict(sample) for sample in samples],
        **extra,
    }
    if jax.process_index() == 0:
        write_json_atomic(run.path(stage, "result.json"), result)
        checkpoint.delete(run.path(stage, "checkpoints"))
    shown = "  ".join(f"{name} {_short(value)}" for name, value in result["metrics"].items())
    run.say(f"{stage:<9} complete in {trained.seconds:.0f} s: {shown}")
    for sample in samples:
        run.say(f"    {sample['prompt']!s} -> {sample['answer']!s}")


def _short(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) and value == int(value) else f"{value:.4g}"


def host_rows(array: jax.Array) -> np.ndarray:
    """A device array as numpy, on every process."""
    if jax.process_count() == 1:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
