"""LoRA: a second pytree of low-rank updates beside frozen weights (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax

from llmjax import sharding
from llmjax.config import PositiveFloat, PositiveInt
from llmjax.errors import UserError
from llmjax.models.config import ModelConfig
from llmjax.models.linear import Adapted, LowRank, low_rank_product
from llmjax.models.spec import ParamSpec, is_spec, param
from llmjax.models.transformer import Params, transformer_spec

ADAPTABLE = ("q", "k", "v", "o", "gate", "up", "down", "q_down", "q_up", "kv_down", "k_up", "v_up")
"""Names of the matrices that can carry an update; those of the last five are of latent attention."""


@dataclass(frozen=True)
class LoRAConfig:
    """Weights W are used as W + (alpha / rank) a b; a and b, of `rank` columns and rows, are all that is trained.

    targets: names of matrices, as in `ADAPTABLE`: "q" is that of every layer, "gate", "up" and "down" those of every
    feed-forward layer and of every expert, which has an update of its own; "shared.up" or "attention.o" is more exact.
    A name that the model does not have is left out, so one list serves all families. Modules for multi-token prediction
    stay as they are.
    """

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    targets: tuple[str, ...] = ADAPTABLE

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def validate(self) -> None:
        for target in self.targets:
            if target.split(".")[-1] not in ADAPTABLE:
                raise UserError(f"targets: {target!r} is no matrix that can be adapted; there is {', '.join(ADAPTABLE)}")


def num_leading(spec: ParamSpec) -> int:
    """Axes of a stacked weight before its inputs: layers, and experts where they have own weights."""
    return 2 if spec.axes[1] == "expert" else 1


def num_in(leaf: str) -> int:
    """Axes of a weight that are inputs: heads and their width for the output of attention, else one."""
    return 2 if leaf.split(".")[-1] == "o" else 1


def lora_spec(cfg: ModelConfig, lora: LoRAConfig) -> Params:
    """`Params` in which every target is a `LowRank` of `ParamSpec`s, and everything else None.

    a is drawn from a normal distribution, b is zero: the first step starts from the model itself. Raises UserError if no
    matrix of the model is a target.
    """

    def one(path, spec: ParamSpec):
        leaf = ".".join(key.name for key in path)
        adaptable = leaf.split(".")[-1] in ADAPTABLE and not leaf.startswith("mtp.")
        if not (adaptable and any(f".{leaf}".endswith(f".{target}") for target in lora.targets)):
            return None
        lead = num_leading(spec)
        split = lead + num_in(leaf)
        fan_in = math.prod(spec.shape[lead:split])
        a_axes, b_axes = _factor_axes(spec, lead, split)
        a = param((*spec.shape[:split], lora.rank), a_axes, std=fan_in**-0.5)
        return LowRank(a, param((*spec.shape[:lead], lora.rank, *spec.shape[split:]), b_axes))

    specs = jax.tree_util.tree_map_with_path(one, transformer_spec(cfg), is_leaf=is_spec)
    if not jax.tree.leaves(specs, is_leaf=is_spec):
        raise UserError(f"lora.targets={','.join(lora.targets)}: the model has no such matrix")
    return specs


def _factor_axes(spec: ParamSpec, lead: int, split: int) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
    return (*spec.axes[:split], None), (*spec.axes[:lead], None, *spec.axes[split:])


def adapt(params: Params, updates: Params, lora: LoRAConfig) -> Params:
    """The model whose targets are `Adapted`: for training, where only `updates` are differentiated."""

    def one(update, base):
        return base if update is None else Adapted(base, update, lora.scale)

    return jax.tree.map(one, updates, params, is_leaf=_is_update)


def merge(params: Params, updates: Params, lora: LoRAConfig, cfg: ModelConfig) -> Params:
    """Plain parameters with the updates added to them, stored as before."""

    def one(update, base, spec: ParamSpec):
        if update is None:
            return base
        lead = num_leading(spec)
        split = update.a.ndim - 1

        def add(base, a, b):
            return base + lora.scale * low_rank_product(a, b, lead).astype(base.dtype)

        # As they are stored, factors and weight are cut alike: nothing is gathered, nothing is sent.
        return sharding.local_stored(add, [spec.axes, *_factor_axes(spec, lead, split)], spec.axes)(base, update.a, update.b)

    return jax.tree.map(one, updates, params, transformer_spec(cfg), is_leaf=_is_update)


def _is_update(x) -> bool:
    return x is None or isinstance(x, LowRank)
