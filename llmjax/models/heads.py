"""A scalar head on a Transformer: the reward model and PPO's critic are both a backbone with one."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import struct
from jax.lax import Precision
from jax.sharding import Mesh

from llmjax import sharding
from llmjax.models.config import ModelConfig
from llmjax.models.spec import init_params, param
from llmjax.models.transformer import Params, hidden_states, transformer_spec
from llmjax.typing import Array, Float, Int


@struct.dataclass
class ScalarModel:
    """backbone: a Transformer. weight [D, 1], bias [1]: the head, float32."""

    backbone: Params
    weight: Array
    bias: Array


def scalar_model_spec(cfg: ModelConfig) -> ScalarModel:
    """Head drawn from N(0, 1/sqrt(D + 1)) with zero bias (Stiennon et al. 2020, arXiv:2009.01325, appendix)."""
    return ScalarModel(
        backbone=transformer_spec(cfg),
        weight=param((cfg.embed_dim, 1), (None, None), std=(cfg.embed_dim + 1) ** -0.5),
        bias=param((1,), (None,), constant=0.0),
    )


def add_head(backbone: Params, cfg: ModelConfig, key: Array, mesh: Mesh | None, zero: bool = False) -> ScalarModel:
    """A scalar model around a language model, with a fresh head; zero: one whose values are all 0."""
    specs: Any = dataclasses.replace(scalar_model_spec(cfg), backbone=None)  # type: ignore
    head = init_params(specs, key, mesh)
    return ScalarModel(backbone, 0.0 * head.weight if zero else head.weight, head.bias)


def scalars(
    params: ScalarModel,
    tokens_BT: Int[Array, "B T"],
    cfg: ModelConfig,
    *,
    positions_BT: Int[Array, "B T"] | None = None,
    segment_ids_BT: Int[Array, "B T"] | None = None,
):
    """One float32 number per position [B, T], and the backbone's router statistics; experts drop nothing."""
    x_BTD, _, stats = hidden_states(
        params.backbone, tokens_BT, cfg.dropless(), positions_BT=positions_BT, segment_ids_BT=segment_ids_BT
    )
    y_BTO = sharding.einsum("BTD,DO->BTO", x_BTD.astype(jnp.float32), params.weight, precision=Precision.HIGHEST)
    return y_BTO[..., 0] + params.bias[0], stats


def last_token(values_BT: Float[Array, "B T"], segment_ids_BT: Int[Array, "B T"]) -> Float[Array, "B"]:
    """The value at each row's last real token, wherever the padding is and however much of it there is."""
    slots = jnp.arange(values_BT.shape[1])
    last_B = jnp.max(jnp.where(segment_ids_BT > 0, slots, 0), axis=1)
    return jnp.sum(jnp.where(slots == last_B[:, None], values_BT, 0.0), axis=1)
