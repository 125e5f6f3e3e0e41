"""Held-out language modelling: nats per token, perplexity, bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llmjax.models.config import ModelConfig
from llmjax.models.transformer import Params, head_table, hidden_states
from llmjax.objectives.lm import cross_entropy_sum
from llmjax.sharding import put_batch
from llmjax.typing import Array


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


def language_metrics(nats: float, tokens: int, num_bytes: int) -> dict[str, float]:
    """loss (nats per token), perplexity, bits_per_byte (of the UTF-8 bytes that the tokens stand for)."""
    loss = nats / max(tokens, 1)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "bits_per_byte": bits_per_byte(nats, num_bytes)}


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Nats over a text of `num_bytes` UTF-8 bytes, in bits per byte: comparable between tokenizers."""
    return nats / math.log(2) / max(num_bytes, 1)
