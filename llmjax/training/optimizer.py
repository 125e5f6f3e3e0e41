"""The optimizer, from its config to an Optax chain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax

from llmjax.config import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, Range
from llmjax.models.spec import is_spec


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101) with warm-up and decay.

    learning_rate: peak. warmup_steps: updates from rate 0, that of the first, in a straight line to the peak, that of the one
    after them; a run that is no longer than that does not reach it, and says so. schedule: of the rest, down to final_fraction
    of the peak; "wsd" stays at the peak and comes down in the last decay_fraction of all updates, by the 1-sqrt rule (Hägele et
    al. 2024, arXiv:2405.18392, eq. 2), so that a run can be prolonged from before its decay. weight_decay: on
    matrices only. grad_clip: largest global norm of the gradient, 0 for none; where a stage trains two models (policy and
    critic) that of each by itself, so that one's large gradient does not shrink the other's.
    """

    learning_rate: PositiveFloat = 1e-3
    warmup_steps: NonNegativeInt = 20
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    final_fraction: Fraction = 0.1
    decay_fraction: Fraction = 0.2
    b1: Annotated[float, Range(least=0, below=1)] = 0.9
    b2: Annotated[float, Range(least=0, below=1)] = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    grad_clip: NonNegativeFloat = 1.0


def learning_rate_schedule(cfg: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """step -> learning rate over `num_steps` updates, the first of which is step 0: peak * step / warmup_steps before step
    warmup_steps, then the decay, which begins at the peak."""
    peak, warmup = cfg.learning_rate, cfg.warmup_steps
    rest = max(num_steps - warmup, 1)
    decay = {
        "cosine": optax.cosine_decay_schedule(peak, rest, cfg.final_fraction),
        "linear": optax.linear_schedule(peak, peak * cfg.final_fraction, rest),
        "constant": optax.constant_schedule(peak),
        "wsd": _stable_then_decay(peak, rest, max(1, round(cfg.decay_fraction * num_steps)), cfg.final_fraction),
    }[cfg.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup]) if warmup else decay


def _stable_then_decay(peak: float, steps: int, decay: int, final_fraction: float) -> optax.Schedule:
    """The peak, and over the last `decay` of `steps` updates peak * (1 - (1 - final_fraction) * sqrt(share of the decay))."""

    def rate(step):
        share = jnp.clip((step - (steps - decay)) / decay, 0.0, 1.0)
        return peak * (1 - (1 - final_fraction) * jnp.sqrt(share))

    return rate


def short_of_peak(cfg: OptimizerConfig, num_steps: int) -> str:
    """What to know of a warm-up that `num_steps` updates do not come to the end of, in words; "" if they do."""
    if not cfg.warmup_steps or num_steps > cfg.warmup_steps:
        return ""
    share = (num_steps - 1) / cfg.warmup_steps
    return (
        f"warmup_steps={cfg.warmup_steps} for {num_steps} updates: the learning rate rises to {share:.0%} of its peak only; "
        "lower optimizer.warmup_steps to reach it"
    )


def updates_made(opt_state: Any) -> jax.Array:
    """How many updates an optimizer of `make_optimizer` has made, scalar int32."""
    return optax.tree_utils.tree_get_all_with_path(opt_state, "count")[0][1]


def make_optimizer(
    cfg: OptimizerConfig, num_steps: int, specs: Any, rates: Sequence[float] = ()
) -> optax.GradientTransformation:
    """The Optax chain for parameters with these `specs`: clip by global norm, AdamW; decay on leaves with fan-in only.

    rates: the parts at the top of `specs` are models of their own: each is clipped by its own norm, and has so many times the
    learning rate of `cfg`. () for one model.
    """
    decayed = jax.tree.map(lambda spec: spec.constant is None and len(spec.shape) > 1, specs, is_leaf=is_spec)
    adamw = optax.adamw(
        learning_rate_schedule(cfg, num_steps), cfg.b1, cfg.b2, cfg.eps, weight_decay=cfg.weight_decay, mask=decayed
    )
    clip = optax.clip_by_global_norm(cfg.grad_clip) if cfg.grad_clip else optax.identity()
    if not rates:
        return optax.chain(clip, adamw) if cfg.grad_clip else adamw
    return optax.chain(_each_part([clip] * len(rates)), adamw, _each_part([optax.scale(rate) for rate in rates]))


def _each_part(transforms: Sequence[optax.GradientTransformation]) -> optax.GradientTransformation:
    """Stateless transformations, one for each part at the top of a tree; a part may be None."""

    def update(updates, params=None):
        del params
        parts, tree = jax.tree.flatten(updates, is_leaf=lambda node: node is not updates)
        return tree.unflatten([
            part if part is None else one.update(part, one.init(part))[0] for one, part in zip(transforms, parts, strict=True)
        ])  # fmt: skip

    return optax.stateless(update)
