"""A dense model becomes a sparse one: every expert begins as a copy of the feed-forward layer (arXiv:2212.05055)."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.errors import UserError
from llmjax.models.config import ModelConfig, MoEConfig
from llmjax.models.moe import Moe
from llmjax.models.transformer import Params, transformer_spec
from llmjax.typing import Array, PRNGKeyArray


def upcycle(
    params: Params, cfg: ModelConfig, moe: MoEConfig, key: PRNGKeyArray, *, noise: float = 0.0, drop: float = 0.0
) -> tuple[Params, ModelConfig]:
    """The sparse model of `moe` made of a dense one, and its config.

    With noise=0 and drop=0 it computes what the dense model does, because the gate weights of equal experts sum to one;
    the router is drawn afresh. noise: standard deviation of what is added to each expert's copy, relative to that of the
    matrix. drop: share of the hidden units that each expert draws afresh, from a normal distribution with the mean and the
    deviation of the weights that they replace (arXiv:2502.19261, section 3.1).

    Raises UserError if the model is sparse already, the experts have another width than its feed-forward layer, or the
    gate weights would not sum to one.
    """
    if cfg.moe is not None:
        raise UserError("the model is sparse already; only a dense one can be upcycled")
    if cfg.num_mtp_layers:
        raise UserError("a model with modules for multi-token prediction cannot be upcycled; leave them out")
    if moe.mlp_dim != cfg.mlp_dim or moe.first_k_dense or moe.every > 1 or moe.shared_mlp_dim or moe.expert_bias:
        raise UserError(f"an upcycled model has experts of the dense width alone: mlp_dim={cfg.mlp_dim} in every layer")
    if not moe.renormalize or moe.routed_scaling != 1.0:
        raise UserError("an upcycled model needs renormalize=True and routed_scaling=1, so that gate weights sum to one")
    for name, value in (("noise", noise), ("drop", drop)):
        if not 0 <= value <= 1:
            raise UserError(f"{name}={value} must be between 0 and 1")
    sparse = dataclasses.replace(cfg, moe=moe)
    fresh: Any = transformer_spec(sparse).blocks.mlp

    def part(*name: str) -> PRNGKeyArray:
        return jax.random.fold_in(key, zlib.crc32(".".join(name).encode()))

    units = (cfg.num_layers, moe.num_experts, cfg.mlp_dim)
    dropped_LEF = jax.random.uniform(part("drop"), units) < drop
    dense = params.blocks.mlp
    experts: dict[str, Any] = {}
    for name, unit_axis in (("gate", -1), ("up", -1), ("down", -2)):
        experts[name] = _copies(getattr(dense, name), dropped_LEF, unit_axis, part(name, "noise"), part(name, "drop"), noise)
    router = fresh.router.init(part("router"))
    zeros = {name: spec.init(key) for name in ("router_bias", "selection_bias") if (spec := getattr(fresh, name)) is not None}
    mlp = Moe(router=router, **experts, **zeros)
    blocks = dataclasses.replace(params.blocks, mlp=mlp)
    return dataclasses.replace(params, blocks=blocks), sparse


def _copies(w: Array, dropped_LEF: Array, unit_axis: int, noise_key, drop_key, noise: float) -> Array:
    """[L, ...] -> [L, E, ...]; hidden units lie along `unit_axis`."""
    mean, std = (f(w, axis=(-1, -2), keepdims=True)[:, None] for f in (jnp.mean, jnp.std))
    shape = (w.shape[0], dropped_LEF.shape[1], *w.shape[1:])
    copies = jnp.broadcast_to(w[:, None], shape)
    if noise:
        copies = copies + noise * std * jax.random.normal(noise_key, shape, w.dtype)
    dropped = dropped_LEF[..., None, :] if unit_axis == -1 else dropped_LEF[..., :, None]
    return jnp.where(dropped, mean + std * jax.random.normal(drop_key, shape, w.dtype), copies)
