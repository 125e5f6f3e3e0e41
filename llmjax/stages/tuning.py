"""What is trained of a language model: all of it, or low-rank updates beside it; and what every such stage shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from llmjax.models.config import ModelConfig
from llmjax.models.lora import LoRAConfig, adapt, lora_spec, merge
from llmjax.models.spec import abstract_params, init_params, num_params
from llmjax.models.stats import train_flops_per_token
from llmjax.models.transformer import Params, transformer_spec, with_updated_selection_bias
from llmjax.results import Curve, Figure, HeatMap, Metric, Panel
from llmjax.stages.base import Context
from llmjax.training.optimizer import OptimizerConfig
from llmjax.training.program import TrainProgram, train_program
from llmjax.typing import Array


@dataclass(frozen=True)
class Tuned:
    """The parameters of a stage that starts from the language model `source`: with `lora`, updates beside frozen weights."""

    context: Context
    source: str
    lora: LoRAConfig | None

    @property
    def specs(self) -> Any:
        """Of what is trained."""
        model = self.context.model
        return transformer_spec(model) if self.lora is None else lora_spec(model, self.lora)

    def program(
        self,
        loss_fn: Callable[..., tuple[Array, dict[str, Any]]],
        optimizer: OptimizerConfig,
        steps: int,
        batch: Mapping[str, jax.ShapeDtypeStruct],
        *,
        tokens: int,
        length: int,
        with_base: bool = False,
    ) -> TrainProgram:
        """The update of loss_fn(language model, batch, key) -> (loss, metrics).

        with_base: the loss is called with the model that the stage starts from as a fourth argument.
        """
        context, lora = self.context, self.lora
        base = abstract_params(transformer_spec(context.model), context.mesh)
        frozen = (base,) if with_base or lora is not None else ()

        def loss(params, batch, key, base=None):
            own = self.language_model(params, base)
            return loss_fn(own, batch, key, base) if with_base else loss_fn(own, batch, key)

        return train_program(
            loss, self.specs, optimizer, steps, batch, context.mesh, tokens=tokens, frozen=frozen,
            flops_per_token=train_flops_per_token(context.model, length, frozen=lora is not None),
            after=None if lora is not None else balancing(context.model),
        )  # fmt: skip

    def start(self) -> Any:
        """The first parameters of what is trained."""
        if self.lora is None:
            return self.context.load_lm(self.source)
        return init_params(self.specs, self.context.key("lora"), self.context.mesh)

    def language_model(self, params: Any, base: Params | None) -> Params:
        """The language model with the parameters that are trained; base: needed with low-rank updates."""
        if self.lora is None:
            return params
        if base is None:
            raise ValueError("low-rank updates without the model that they belong to")
        return adapt(base, params, self.lora)

    def final(self, params: Any, base: Params | None) -> tuple[Params, tuple[Params, LoRAConfig] | None]:
        """What the stage hands on: plain parameters, and the updates that are in them."""
        if self.lora is None:
            return params, None
        merged = jax.jit(merge, static_argnums=(2, 3))(base, params, self.lora, self.context.model)
        return merged, (params, self.lora)

    def metrics(self) -> tuple[Metric, ...]:
        """How many numbers are trained, where that is not all of them."""
        if self.lora is None:
            return ()
        return (Metric("trained_params", num_params(self.specs), "Trained", "parameters"),)


def balancing(cfg: ModelConfig) -> Callable[[Params, Mapping[str, Any]], Params] | None:
    """What moves the selection bias after each step of a language model, if its config says so."""
    if cfg.moe is None or not cfg.moe.bias_update_rate:
        return None
    return lambda params, metrics: with_updated_selection_bias(params, metrics["moe/load"], cfg)


def loss_figure(unit: str, held_out: bool = True) -> Figure:
    """Training and held-out loss over the steps."""
    curves = (Curve("loss", label="training"), *((Curve("loss", "eval", "held out"),) if held_out else ()))
    return Figure("Loss", (Panel(unit, curves),))


def speed_figure() -> Figure:
    """Tokens per second over the steps."""
    return Figure("Throughput", (Panel("tokens/s", (Curve("tokens_per_second"),), from_zero=True),))


def expert_figures(cfg: ModelConfig) -> Sequence[Figure | HeatMap]:
    """How evenly experts are used, for models that have some."""
    if cfg.moe is None:
        return ()
    return (
        HeatMap(
            "Expert load", "moe/load", "train", "layer", "expert",
            "Share of the tokens that an expert gets, as a multiple of the uniform share (1.00), mean of the last tenth of the "
            "evaluations.",
        ),
        Figure("Busiest expert", (Panel("× the uniform load", (Curve("moe/max_load"),), from_zero=True),)),
        Figure("Router entropy", (Panel("nats per token", (Curve("moe/entropy"),)),)),
        Figure("Choices dropped", (Panel("% of choices", (Curve("moe/dropped"),), from_zero=True),)),
        Figure(
            "Routing change", (Panel("% of choices", (Curve("moe/routing_change", "eval"),), from_zero=True),),
            "Share of the router's choices on held-out text that the same token did not make one evaluation earlier.",
        ),
    )  # fmt: skip
