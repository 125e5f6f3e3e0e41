"""Held-out language modelling: nats per token, perplexity, bits per byte; and how much the routing of held-out text moves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llmjax.models.config import ModelConfig
from llmjax.models.transformer import Params, head_table, hidden_states
from llmjax.objectives.lm import cross_entropy_sum
from llmjax.sharding import put_batch
from llmjax.typing import Array, Float, Int


@partial(jax.jit, static_argnames="cfg")
def _batch_nats(params: Params, batch: dict[str, Array], cfg: ModelConfig) -> tuple[Array, Array]:
    x_BTD, _, _ = hidden_states(
        params, batch["inputs"], cfg, positions_BT=batch["positions"], segment_ids_BT=batch["segment_ids"]
    )
    mask_BT = batch["loss_mask"].astype(jnp.float32)
    nats = cross_entropy_sum(x_BTD, head_table(params), batch["targets"], mask_BT, cfg.logit_softcap)
    return nats, jnp.sum(mask_BT)


def held_out(
    params: Params, batches: Iterable[Mapping[str, np.ndarray]], cfg: ModelConfig, mesh: Mesh | None
) -> tuple[float, int]:
    """Total nats and number of the target tokens with loss_mask 1 in `batches`."""
    totals = [_batch_nats(params, put_batch(dict(batch), mesh), cfg) for batch in batches]
    return float(sum(float(nats) for nats, _ in totals)), int(sum(float(count) for _, count in totals))


def language_metrics(nats: float, tokens: int, num_bytes: float) -> dict[str, float]:
    """loss (nats per token), perplexity, bits_per_byte (of the UTF-8 bytes that the tokens stand for)."""
    loss = nats / max(tokens, 1)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "bits_per_byte": bits_per_byte(nats, num_bytes)}


def bits_per_byte(nats: float, num_bytes: float) -> float:
    """Nats over a text of `num_bytes` UTF-8 bytes, in bits per byte: comparable between tokenizers."""
    return nats / math.log(2) / max(num_bytes, 1)


@partial(jax.jit, static_argnames="cfg")
def _batch_routes(params: Params, batch: dict[str, Array], cfg: ModelConfig) -> Int[Array, "L B T C"]:
    _, _, stats = hidden_states(
        params, batch["inputs"], cfg, positions_BT=batch["positions"], segment_ids_BT=batch["segment_ids"]
    )
    assert stats is not None and stats.routes is not None, "a dense model has no routes"
    return stats.routes


@jax.jit
def changed_routes(
    before_LBTC: Int[Array, "L B T C"], after_LBTC: Int[Array, "L B T C"], segment_ids_BT: Int[Array, "B T"]
) -> Float[Array, ""]:
    """Fraction of the choices in `after` that are not among the same token's choices in `before`, in whatever order: mean over
    layers and tokens, without padding (segment 0)."""
    new_LBTC = jnp.all(after_LBTC[..., :, None] != before_LBTC[..., None, :], axis=-1)
    weight_BT = (segment_ids_BT > 0).astype(jnp.float32)
    mean_BT = jnp.mean(new_LBTC.astype(jnp.float32), axis=(0, 3))
    return jnp.sum(mean_BT * weight_BT) / jnp.maximum(jnp.sum(weight_BT), 1.0)


@dataclass
class RoutingChange:
    """moe/routing_change of one batch from each call to the next (`changed_routes`); nothing at the first, and nothing where
    tokens do not choose by what the router has learnt. Kept in memory only: a resumed run begins anew.
    """

    cfg: ModelConfig
    mesh: Mesh | None
    before_LBTC: Array | None = None

    def __call__(self, params: Params, batch: Mapping[str, np.ndarray]) -> dict[str, float]:
        if self.cfg.moe is None or self.cfg.moe.router != "top_k":
            return {}
        on_device = put_batch(dict(batch), self.mesh)
        before_LBTC, self.before_LBTC = self.before_LBTC, _batch_routes(params, on_device, self.cfg)
        if before_LBTC is None:
            return {}
        return {"moe/routing_change": float(changed_routes(before_LBTC, self.before_LBTC, on_device["segment_ids"]))}
