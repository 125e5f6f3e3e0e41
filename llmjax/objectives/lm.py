"""Next-token prediction: the loss of pre-training and, with a mask on the assistant's tokens, of SFT."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp

from llmjax import sharding
from llmjax.models.config import ModelConfig
from llmjax.models.moe import router_loss, router_metrics
from llmjax.models.transformer import Params, head_table, hidden_states, mtp_hidden_states
from llmjax.typing import Array, Float, Int

# Logits kept at a time by the fused loss: small enough for the caches, large enough for full-speed products.
CHUNK_LOGITS = 4 * 2**20
# Rows that a chunk has at least: each chunk reads and writes the table's whole gradient.
CHUNK_ROWS = 512


def lm_loss(params: Params, batch: dict[str, Array], key, cfg: ModelConfig) -> tuple[Array, dict[str, Array]]:
    """Mean negative log-likelihood of the targets where loss_mask is 1, in nats per token, plus the losses of the router and
    of the modules for multi-token prediction, where the model has them.

    batch, each [B, T] int32: inputs, targets (the input one place later), positions, segment_ids (0 is padding),
    loss_mask. The mean is over the loss tokens of the whole batch. key: of the routers' noise, where they have any.
    """
    x_BTD, _, stats = hidden_states(
        params, batch["inputs"], cfg, positions_BT=batch["positions"], segment_ids_BT=batch["segment_ids"],
        key=key if cfg.moe is not None and (cfg.moe.router_noise or cfg.moe.router_jitter) else None,
    )  # fmt: skip
    mask_BT = batch["loss_mask"].astype(jnp.float32)
    num_tokens = jnp.sum(mask_BT)
    total = cross_entropy_sum(x_BTD, head_table(params), batch["targets"], mask_BT, cfg.logit_softcap)
    nll = total / jnp.maximum(num_tokens, 1.0)
    loss, metrics = nll, {"loss": nll, "loss_tokens": num_tokens}
    if cfg.num_mtp_layers:
        further, more_stats = _further_tokens(params, x_BTD, batch, cfg)
        loss, metrics = loss + cfg.mtp_coef * further, metrics | {"mtp_loss": further}
        stats = None if stats is None else jax.tree.map(lambda *s: jnp.concatenate(s), stats, *more_stats)
    if stats is None:
        return loss, metrics
    return loss + router_loss(stats, cfg.experts), metrics | router_metrics(stats)


def _further_tokens(params: Params, x_BTD: Array, batch: dict[str, Array], cfg: ModelConfig) -> tuple[Array, list]:
    """Mean over the modules for multi-token prediction of their loss, nats per token, and their router statistics.

    Module k predicts the token k places behind the next one, within its own document.
    """
    segment_ids_BT, targets_BT = batch["segment_ids"], batch["targets"]
    mask_BT, stats, total = batch["loss_mask"].astype(jnp.float32), [], jnp.zeros((), jnp.float32)
    own_BT = jnp.concatenate([segment_ids_BT[:, 1:] == segment_ids_BT[:, :-1], jnp.zeros_like(mask_BT[:, :1])], axis=1)
    for module in range(cfg.num_mtp_layers):
        x_BTD, module_stats = mtp_hidden_states(
            params, module, x_BTD, targets_BT, cfg, positions_BT=batch["positions"], segment_ids_BT=segment_ids_BT
        )
        targets_BT, mask_BT = jnp.roll(targets_BT, -1, axis=1), jnp.roll(mask_BT, -1, axis=1) * own_BT
        nats = cross_entropy_sum(x_BTD, head_table(params), targets_BT, mask_BT, cfg.logit_softcap)
        total += nats / jnp.maximum(jnp.sum(mask_BT), 1.0)
        stats.append(module_stats)
    return total / cfg.num_mtp_layers, stats


def cross_entropy_sum(
    x_BTD: Float[Array, "B T D"],
    table_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Array,
    softcap: float = 0.0,
) -> Array:
    """sum of weights * -log softmax(x @ table^T)[target], float32; never holds the logits of the whole batch.

    softcap: as `ModelConfig.logit_softcap`. On a mesh each device sums its own tokens; over `tensor` each knows a part of the
    vocabulary, and they agree on the partition function (Shoeybi et al. 2019, arXiv:1909.08053, section 3).
    """

    def local_sum(x, table, targets, weights):
        rows = targets.size
        args = x.reshape(rows, -1), table, targets.reshape(rows), weights.reshape(rows)
        return fused_cross_entropy(*args, _num_chunks(rows, table.shape[0]), softcap)[None]

    sums = sharding.local(local_sum, ["BTD", "=VD", "BT", "BT"], "B")
    return jnp.sum(sums(x_BTD, table_VD.astype(x_BTD.dtype), targets_BT, weights_BT))


def _num_chunks(rows: int, vocab: int) -> int:
    """The smallest number of chunks whose logits fit CHUNK_LOGITS, or that have CHUNK_ROWS rows where those are more."""
    return math.ceil(rows / max(CHUNK_LOGITS // vocab, CHUNK_ROWS))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def fused_cross_entropy(x_MD, table_VD, targets_M, weights_M, num_chunks: int, softcap: float = 0.0):
    """The weighted sum over M tokens, in a loop over `num_chunks` chunks. Differentiable in x and table.

    The gradient of the logits is formed while a chunk of them is at hand, in the forward pass, so nothing of size [M, V]
    is stored or recomputed (the idea of Hsu et al. 2024, arXiv:2410.10989, section 3.2). Beside one chunk of logits it needs
    the table's gradient in float32. Inside `sharding.local` the table may be this device's part of the vocabulary, by the mesh
    axis `tensor`; the sum is then that of all parts, the gradient of x this part's share of it.
    """
    return _chunked(x_MD, table_VD, targets_M, weights_M, num_chunks, softcap, with_grad=False)[0]


def _chunked(x_MD, table_VD, targets_M, weights_M, num_chunks, softcap, with_grad):
    """(sum, gradient of x, float32 gradient of the table); the gradients are None unless asked for."""
    first = jax.lax.axis_index("tensor") * table_VD.shape[0] if sharding.axis_size("tensor") > 1 else 0

    def chunk(sums, part):
        total, dtable = sums
        x, targets, weights = part
        logits = jnp.einsum("md,vd->mv", x, table_VD, preferred_element_type=jnp.float32)
        if softcap:
            logits = softcap * jnp.tanh(logits / softcap)
        top = _over_parts(jax.lax.pmax, jnp.max(logits, axis=-1, keepdims=True))
        exps = jnp.exp(logits - top)
        partition = _over_parts(jax.lax.psum, jnp.sum(exps, axis=-1, keepdims=True))
        is_target = targets[:, None] == first + jnp.arange(table_VD.shape[0])
        chosen = _over_parts(jax.lax.psum, jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1))
        total += jnp.sum(weights * (jnp.log(partition[:, 0]) + top[:, 0] - chosen))
        if not with_grad:
            return (total, None), None
        scale = weights[:, None] / partition
        dlogits = exps * scale - jnp.where(is_target, weights[:, None], 0.0)
        if softcap:
            dlogits = dlogits * (1 - jnp.square(logits / softcap))
        dlogits = dlogits.astype(x.dtype)
        dtable += jnp.einsum("mv,md->vd", dlogits, x, preferred_element_type=jnp.float32)
        return (total, dtable), jnp.einsum("mv,vd->md", dlogits, table_VD)

    start = jnp.zeros((), jnp.float32), jnp.zeros(table_VD.shape, jnp.float32) if with_grad else None
    parts = x_MD, targets_M, weights_M
    if num_chunks == 1:
        (total, dtable), dx = chunk(start, parts)
        return total, dx, dtable
    count = targets_M.size
    rows = math.ceil(count / num_chunks)

    def cut(a):  # rows beyond the last have weight 0
        whole = jnp.pad(a, [(0, num_chunks * rows - count)] + [(0, 0)] * (a.ndim - 1))
        return whole.reshape(num_chunks, rows, *a.shape[1:])

    (total, dtable), dx = jax.lax.scan(chunk, start, jax.tree.map(cut, parts))
    return total, None if dx is None else dx.reshape(-1, x_MD.shape[1])[:count], dtable


def _over_parts(reduce, x: Array) -> Array:
    """`reduce` over the parts of the vocabulary."""
    return reduce(x, "tensor") if sharding.axis_size("tensor") > 1 else x


def _fused_fwd(x_MD, table_VD, targets_M, weights_M, num_chunks, softcap):
    total, dx, dtable = _chunked(x_MD, table_VD, targets_M, weights_M, num_chunks, softcap, with_grad=True)
    assert dtable is not None
    return total, (dx, dtable.astype(table_VD.dtype))


def _fused_bwd(num_chunks, softcap, residuals, dtotal):
    dx, dtable = residuals
    dtotal = _over_parts(jax.lax.psum, dtotal)  # the parts' sums are one number, of which each got its share of the gradient
    return (dx * dtotal).astype(dx.dtype), (dtable * dtotal).astype(dtable.dtype), None, None


fused_cross_entropy.defvjp(_fused_fwd, _fused_bwd)
