"""The model: plain functions over pytrees of weights. Dense and sparse are the same functions under different configs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from llmjax import sharding
from llmjax.models.attention import Attention, attention, attention_spec
from llmjax.models.cache import LayerCache
from llmjax.models.config import UNLIMITED, ModelConfig
from llmjax.models.layers import Mlp, activation, embed_tokens, gated_mlp, mlp_spec, rms_norm, rope_table
from llmjax.models.linear import linear
from llmjax.models.mla import Mla, mla_attention, mla_spec
from llmjax.models.moe import Moe, RouterStats, moe_layer, moe_spec, updated_selection_bias
from llmjax.models.spec import is_spec, param
from llmjax.typing import Array, Float, Int, PRNGKeyArray


@struct.dataclass
class Block:
    """One Transformer block; leaves are stacked over layers [L, ...]. Norms before the branches and behind them, or None."""

    attention_norm: Array | None
    attention: Attention | Mla
    mlp_norm: Array | None
    mlp: Mlp | Moe
    attention_post_norm: Array | None = None
    mlp_post_norm: Array | None = None


@struct.dataclass
class Mtp:
    """Modules for multi-token prediction; leaves are stacked over modules: norms [D], hidden, token [D, D]."""

    hidden_norm: Array
    hidden: Array
    token_norm: Array
    token: Array
    block: Block
    final_norm: Array


@struct.dataclass
class Params:
    """embed [V, D]; blocks stacked [L, ...]; final_norm [D]; head [V, D], or None when tied to embed.

    dense_blocks: the dense layers of a sparse model (`MoEConfig.first_k_dense`, `every`), stacked, or None; blocks are then
    the sparse ones. mtp: modules for multi-token prediction (`ModelConfig.num_mtp_layers`), or None. For decoding there is
    another layout, `unstacked`.
    """

    embed: Array
    blocks: Block
    final_norm: Array
    head: Array | None
    dense_blocks: Block | None = None
    mtp: Mtp | None = None


def transformer_spec(cfg: ModelConfig) -> Params:
    """The `ParamSpec` of every leaf."""
    d = cfg.embed_dim
    norm = param((d,), (None,), constant=1.0 - cfg.norm_offset)
    pre_norm, post_norm = norm if cfg.pre_norms else None, norm if cfg.post_norms else None

    def block(mlp):
        attention = attention_spec(cfg) if cfg.mla is None else mla_spec(cfg)
        return Block(pre_norm, attention, pre_norm, mlp, post_norm, post_norm)

    def stack(spec, num_layers) -> Any:
        return jax.tree.map(lambda s: s.stacked(num_layers), spec, is_leaf=is_spec) if num_layers else None

    dense = mlp_spec(cfg, cfg.mlp_dim)
    main = block(dense if cfg.moe is None else moe_spec(cfg))
    # Two terms are added, each of the size that one alone would have.
    half = param((d, d), ("embed", None), std=(2 * d) ** -0.5)
    # Normalised hidden states have unit-size entries, so this width gives logits of unit size.
    table = param((cfg.vocab_size, d), ("vocab", "embed"), std=d**-0.5)
    return Params(
        embed=table,
        blocks=stack(main, cfg.num_layers - cfg.num_dense_layers),
        final_norm=norm,
        head=None if cfg.tie_embeddings else table,
        dense_blocks=stack(block(dense), cfg.num_dense_layers),
        mtp=stack(Mtp(norm, half, norm, half, main, norm), cfg.num_mtp_layers),
    )


def layer_rows(cfg: ModelConfig) -> list[tuple[str, int]]:
    """Where each layer lies in `Params`: the name of its stack and the row in it."""
    names = ["blocks" if cfg.moe is None or sparse else "dense_blocks" for sparse in cfg.sparse_layers]
    return [(name, names[:layer].count(name)) for layer, name in enumerate(names)]


def hidden_states(
    params: Params,
    tokens_BT: Int[Array, "B T"],
    cfg: ModelConfig,
    *,
    positions_BT: Int[Array, "B T"] | None = None,
    segment_ids_BT: Int[Array, "B T"] | None = None,
    cache: tuple[LayerCache, ...] | None = None,
    routes: Int[Array, "L B T C"] | None = None,
    key: PRNGKeyArray | None = None,
) -> tuple[Float[Array, "B T D"], tuple[LayerCache, ...] | None, RouterStats | None]:
    """Everything but the head: normalised hidden states, the updated cache, router statistics stacked over sparse layers.

    positions: for RoPE, default 0..T-1. segment_ids: default all 1; 0 is padding, others attend only to their own.
    With a cache it is `cached_hidden_states`, and positions must be given. routes: `RouterStats.routes` of an earlier pass, to
    be taken again by the sparse layers. key: of the routers' noise in training.
    """
    if positions_BT is None:
        if cache is not None:
            raise ValueError("positions_BT must be given with a cache: the default 0..T-1 would be wrong")
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    if segment_ids_BT is None:
        segment_ids_BT = jnp.ones(tokens_BT.shape, jnp.int32)
    if cache is not None:
        if routes is not None or key is not None:
            raise ValueError("routes and noise are for passes without a cache")
        x_BTD, cache, all_stats = cached_hidden_states(
            params, tokens_BT, cfg, positions_BT=positions_BT, segment_ids_BT=segment_ids_BT, cache=cache
        )
        return x_BTD, cache, _stacked(all_stats)
    tokens_BT, positions_BT, segment_ids_BT = (sharding.constrain(a, "BT") for a in (tokens_BT, positions_BT, segment_ids_BT))
    x_BTD, ropes = _embedded(params.embed, tokens_BT, positions_BT, cfg)
    first, stats = 0, None
    for blocks, below, depth in _runs(params, cfg):
        windows = cfg.windows[first : first + depth]
        router = RouterInputs(tokens_BT, None, None)
        if blocks is params.blocks:
            keys = None if key is None else jax.random.split(key, cfg.num_layers - cfg.num_dense_layers)
            router = RouterInputs(tokens_BT, routes, keys)
        x_BTD, new = _run_blocks(blocks, below, x_BTD, windows, ropes, segment_ids_BT, cfg, router)
        stats = stats if new is None else new
        first += depth
    return rms_norm(x_BTD, params.final_norm, cfg.norm_eps, cfg.norm_offset), None, stats


def cached_hidden_states(
    params: Params,
    tokens_BT: Int[Array, "B T"],
    cfg: ModelConfig,
    *,
    positions_BT: Int[Array, "B T"],
    segment_ids_BT: Int[Array, "B T"],
    cache: tuple[LayerCache, ...],
) -> tuple[Float[Array, "B T D"], tuple[LayerCache, ...], list[RouterStats]]:
    """Hidden states of tokens that are appended to a cache, which is used up; the new cache; statistics of each sparse layer.

    params: stacked, or as `unstacked` lays them out. Experts drop nothing. Each layer is a function of its own, compiled once
    for all layers alike: called outside of `jax.jit`, the time to compile does not grow with the depth.
    """
    cfg, params = cfg.dropless(), unstacked(params, cfg)
    tokens_BT, positions_BT, segment_ids_BT = (sharding.constrain(a, "BT") for a in (tokens_BT, positions_BT, segment_ids_BT))
    x_BTD, ropes = _compiled_embedded(params.embed, tokens_BT, positions_BT, cfg=cfg, stored=False)
    layers: Any = params.blocks
    caches, all_stats = [], []
    for w, window, layer_cache in zip(layers, cfg.windows, cache, strict=True):
        rope = _choose_rope(ropes, window)
        x_BTD, layer_cache, stats = _compiled_layer(
            w, x_BTD, rope, segment_ids_BT, layer_cache, tokens_BT, window=window, cfg=cfg
        )
        caches.append(layer_cache)
        all_stats += [] if stats is None else [stats]
    return _compiled_norm(x_BTD, params.final_norm, cfg.norm_eps, cfg.norm_offset), tuple(caches), all_stats


def unstacked(params: Params, cfg: ModelConfig) -> Params:
    """The weights as decoding reads them: `blocks` is a tuple of all layers in order, each with arrays of its own.

    A product with one row of a stack copies that row first, so it is done once, before the first token; while both are in use
    the layers take twice their memory. Modules for multi-token prediction are left out. Weights laid out so stay as they are.
    """
    if isinstance(params.blocks, tuple):
        return params
    layers: Any = tuple(_row(getattr(params, stack), row) for stack, row in layer_rows(cfg))
    return dataclasses.replace(params, blocks=layers, dense_blocks=None, mtp=None)


def for_decoding(params: Params, cfg: ModelConfig) -> Params:
    """`unstacked`, with every matrix in the dtype of the activations and gathered over fsdp: once for many tokens, each of
    which would else read all of them in float32, and on a mesh receive them. To be called where the tokens are made, inside a
    function under `jax.jit`. Weights with a low-rank update of their own stay as they are.
    """
    if isinstance(params.blocks, tuple):
        return params

    def cast(path, spec, w):
        matrix = isinstance(w, jax.Array) and spec.constant is None and path[-1].name != "router"  # which computes in float32
        return sharding.place(w.astype(cfg.dtype), spec.axes, stored=True) if matrix else w

    specs: Any = dataclasses.replace(transformer_spec(cfg), mtp=None)
    params = dataclasses.replace(params, mtp=None)
    laid_out = unstacked(jax.tree_util.tree_map_with_path(cast, specs, params, is_leaf=is_spec), cfg)

    def whole(spec, w):
        axes = spec.axes[1:] if spec.axes[:1] == ("layers",) else spec.axes
        return sharding.place(w, axes) if isinstance(w, jax.Array) else w

    blocks: Any = tuple(
        jax.tree.map(whole, getattr(specs, stack), block, is_leaf=is_spec)
        for (stack, _), block in zip(layer_rows(cfg), laid_out.blocks, strict=True)  # type: ignore
    )
    head = None if laid_out.head is None else whole(specs.head, laid_out.head)
    return dataclasses.replace(laid_out, blocks=blocks, embed=whole(specs.embed, laid_out.embed), head=head)


@jax.jit
def _row(blocks: Block, row: int) -> Block:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, row, keepdims=False), blocks)


def _embedded(table_VD, tokens_BT, positions_BT, cfg: ModelConfig, stored: bool = True):
    """What the layers start from: embeddings, and the tables of global and of local layers. stored: see `embed_tokens`."""
    x_BTD = embed_tokens(table_VD, tokens_BT, jnp.dtype(cfg.dtype), stored)
    if cfg.scale_embedding:
        x_BTD = x_BTD * jnp.asarray(cfg.embed_dim**0.5, x_BTD.dtype)
    return x_BTD, _rope_tables(positions_BT, cfg)


def mtp_hidden_states(
    params: Params,
    module: int,
    x_BTD: Float[Array, "B T D"],
    next_tokens_BT: Int[Array, "B T"],
    cfg: ModelConfig,
    *,
    positions_BT: Int[Array, "B T"],
    segment_ids_BT: Int[Array, "B T"],
) -> tuple[Float[Array, "B T D"], RouterStats | None]:
    """Normalised hidden states that predict one token further than x, and router statistics.

    x: what `hidden_states`, or the module before, returned. next_tokens: those that x predicts. Arguments else as there;
    DeepSeek-V3, arXiv:2412.19437, eq. 21-23.
    """
    w: Mtp = jax.tree.map(lambda leaf: leaf[module : module + 1], params.mtp)
    known_BTD = embed_tokens(params.embed, next_tokens_BT, x_BTD.dtype)
    x_BTD = rms_norm(x_BTD, w.hidden_norm[0], cfg.norm_eps, cfg.norm_offset)
    known_BTD = rms_norm(known_BTD, w.token_norm[0], cfg.norm_eps, cfg.norm_offset)
    x_BTD = linear("BTD,Dd->BTd", x_BTD, w.hidden[0]) + linear("BTD,Dd->BTd", known_BTD, w.token[0])
    ropes = _rope_tables(positions_BT, cfg)
    router = RouterInputs(next_tokens_BT, None, None)
    x_BTD = sharding.constrain(x_BTD, "BTD")
    x_BTD, stats = _run_blocks(w.block, None, x_BTD, (UNLIMITED,), ropes, segment_ids_BT, cfg, router)
    return rms_norm(x_BTD, w.final_norm[0], cfg.norm_eps, cfg.norm_offset), stats


def _rope_tables(positions_BT, cfg: ModelConfig):
    """The table of global layers, and that of local ones, None where it is the same."""
    table = rope_table(positions_BT, cfg.rope_dim, cfg.rope_theta, cfg.rope_scaling)
    return table, rope_table(positions_BT, cfg.rope_dim, cfg.local_rope_theta) if cfg.local_rope_theta else None


@dataclass(frozen=True)
class RouterInputs:
    """What routers look at beside the hidden states: tokens [B, T]; routes to replay [L, B, T, C]; keys [L]."""

    tokens: Array
    routes: Array | None
    keys: PRNGKeyArray | None


def _runs(params: Params, cfg: ModelConfig) -> list[tuple[Block, Block | None, int]]:
    """The layers in order as runs of groups alike: (the last block of each group, the dense ones below it in each group or
    None, number of layers)."""
    if cfg.moe is None:
        return [(params.blocks, None, cfg.num_layers)]
    groups, first = cfg.sparse_layers.count(True), cfg.moe.first_k_dense
    between = groups * (cfg.moe.every - 1)
    last = cfg.num_dense_layers - first - between
    bottom, below, top = params.dense_blocks, None, None
    if cfg.moe.every > 1:
        assert params.dense_blocks is not None
        bottom, below, top = _cut(params.dense_blocks, (first, between, last))
    runs: list[Any] = [(bottom, None, first), (params.blocks, below, groups + between), (top, None, last)]
    return [run for run in runs if run[2]]


def _layer(
    w: Block, x_BTD, rope, segment_ids_BT, cache: LayerCache | None, tokens_BT, routes=None, key=None, *, window,
    cfg: ModelConfig,
):  # fmt: skip
    """One block: (x, its cache or None, its router's statistics or None)."""
    y_BTD = _optional_norm(x_BTD, w.attention_norm, cfg)
    inputs = y_BTD, rope, segment_ids_BT, cfg, window, cache
    own = w.attention
    y_BTD, cache = mla_attention(own, *inputs) if isinstance(own, Mla) else attention(own, *inputs)
    x_BTD = x_BTD + _optional_norm(y_BTD, w.attention_post_norm, cfg)
    y_BTD = _optional_norm(x_BTD, w.mlp_norm, cfg)
    if isinstance(w.mlp, Mlp):
        y_BTD, stats = gated_mlp(w.mlp, y_BTD, activation(cfg.activation, cfg.activation_limit)), None
    else:
        y_BTD, stats = moe_layer(
            w.mlp, y_BTD, segment_ids_BT, cfg, tokens_BT=tokens_BT, routes_BTC=routes, key=key, stored=cache is None
        )
    return x_BTD + _optional_norm(y_BTD, w.mlp_post_norm, cfg), cache, stats


_compiled_embedded = jax.jit(_embedded, static_argnames=("cfg", "stored"))
_compiled_layer = jax.jit(_layer, static_argnames=("window", "cfg"), donate_argnames="cache")
_compiled_norm = jax.jit(rms_norm, static_argnums=(2, 3))


def _run_blocks(blocks: Block, below: Block | None, x_BTD, windows, ropes, segment_ids_BT, cfg: ModelConfig, router):
    """Groups of blocks, `cfg.moe.every` - 1 rows of the dense `below`, or none, and a row of `blocks` each: (x, router
    statistics stacked or None)."""

    def block(x_BTD, w, window, routes, key):
        rope = _choose_rope(ropes, window)
        x_BTD, _, stats = _layer(w, x_BTD, rope, segment_ids_BT, None, router.tokens, routes, key, window=window, cfg=cfg)
        return x_BTD, stats

    def group(x_BTD, blocks, windows, routes, key):
        stats = None
        for w, window in zip(blocks, windows):
            x_BTD, stats = block(x_BTD, w, window, routes, key)
        return x_BTD, stats  # those of the last block: the dense ones below it have none

    size = 1 if below is None else cfg.experts.every
    groups = len(windows) // size
    periodic = windows == windows[:size] * groups
    if cfg.remat:
        block = jax.checkpoint(block, static_argnums=(2,) if periodic or not _use_scan(cfg) else ())
    if _use_scan(cfg):

        def step(x_BTD, layers):
            below, w, changing, routes, key = layers
            own = [*_unstack(below, size - 1), w]
            return group(x_BTD, own, windows[:size] if periodic else changing, routes, key)

        below = jax.tree.map(lambda leaf: leaf.reshape(groups, size - 1, *leaf.shape[1:]), below)
        changing = None if periodic else jnp.asarray(windows).reshape(groups, size)
        return jax.lax.scan(step, x_BTD, (below, blocks, changing, router.routes, router.keys))
    dense, all_stats = _unstack(below, groups * (size - 1)), []
    for i, w in enumerate(_unstack(blocks, groups)):
        own = [*dense[i * (size - 1) : (i + 1) * (size - 1)], w]
        extra = (None if every is None else every[i] for every in (router.routes, router.keys))
        x_BTD, stats = group(x_BTD, own, windows[i * size : (i + 1) * size], *extra)
        all_stats += [] if stats is None else [stats]
    return x_BTD, _stacked(all_stats)


def _stacked(stats: list[RouterStats]) -> RouterStats | None:
    return jax.tree.map(lambda *s: jnp.stack(s), *stats) if stats else None


def _choose_rope(ropes, window):
    """The global or the local table; chosen at run time where the window is traced (layers in a scan)."""
    everywhere, local = ropes
    if local is None:
        return everywhere
    if isinstance(window, int):
        return everywhere if window == UNLIMITED else local
    return jax.tree.map(lambda far, near: jnp.where(window == UNLIMITED, far, near), everywhere, local)


def _optional_norm(x_BTD, scale_D, cfg: ModelConfig):
    return x_BTD if scale_D is None else rms_norm(x_BTD, scale_D, cfg.norm_eps, cfg.norm_offset)


def with_mean_rows(params: Params, ids: tuple[int, ...]) -> Params:
    """The rows of these tokens, in the embedding and an untied head, are the mean of all others: for tokens that training never
    met, whose rows are noise (Hewitt 2021, "Initializing new word embeddings for pretrained language models")."""
    if not ids:
        return params
    new = np.zeros(params.embed.shape[0], bool)
    new[list(ids)] = True

    def filled(table_VD: Array) -> Array:
        mean_D = jnp.mean(table_VD, axis=0, where=~new[:, None], dtype=jnp.float32)
        return jnp.where(new[:, None], mean_D.astype(table_VD.dtype), table_VD)

    return replace(params, embed=filled(params.embed), head=None if params.head is None else filled(params.head))


def head_table(params: Params) -> Float[Array, "V D"]:
    """The matrix that turns hidden states into logits."""
    return params.embed if params.head is None else params.head


def logits(params: Params, x_BTD: Float[Array, "B T D"], cfg: ModelConfig) -> Float[Array, "B T V"]:
    """float32 logits of hidden states."""
    logits_BTV = sharding.einsum("BTD,VD->BTV", x_BTD, head_table(params), out_dtype=jnp.float32)
    return cfg.logit_softcap * jnp.tanh(logits_BTV / cfg.logit_softcap) if cfg.logit_softcap else logits_BTV


def apply(params: Params, tokens_BT: Array, cfg: ModelConfig, **inputs):
    """logits [B, T, V] float32, cache, router statistics; arguments as in `hidden_states`."""
    x_BTD, cache, stats = hidden_states(params, tokens_BT, cfg, **inputs)
    return logits(params, x_BTD, cfg), cache, stats


def _use_scan(cfg: ModelConfig) -> bool:
    if cfg.layer_loop == "auto":
        return sharding.platform() != "cpu"
    return cfg.layer_loop == "scan"


def _unstack(blocks: Block | None, num_layers: int) -> list[Block]:
    """The blocks one by one."""
    if blocks is None:
        return []
    return [jax.tree.map(lambda leaf: leaf[0], row) for row in _cut(blocks, (1,) * num_layers)]


def _cut(blocks: Block, depths: tuple[int, ...]) -> list[Block]:
    """Stacks of these depths. By `lax.split`, whose gradient is one concatenation instead of a sum of padded arrays."""
    leaves, tree = jax.tree.flatten(blocks)
    pieces = [jax.lax.split(leaf, depths, axis=0) for leaf in leaves]
    return [tree.unflatten([piece[i] for piece in pieces]) for i in range(len(depths))]


def with_updated_selection_bias(params: Params, load_LE: Float[Array, "L E"], cfg: ModelConfig) -> Params:
    """The parameters after a step of auxiliary-loss-free balancing; load: `RouterStats.load` of the step's batch, over the
    sparse layers and then the modules for multi-token prediction."""
    layers = cfg.num_layers - cfg.num_dense_layers

    def moved(block: Block, load_LE) -> Block:
        assert isinstance(block.mlp, Moe) and block.mlp.selection_bias is not None
        bias_LE = updated_selection_bias(block.mlp.selection_bias, load_LE, cfg.experts)
        return dataclasses.replace(block, mlp=dataclasses.replace(block.mlp, selection_bias=bias_LE))

    params = dataclasses.replace(params, blocks=moved(params.blocks, load_LE[:layers]))
    if params.mtp is None:
        return params
    mtp = dataclasses.replace(params.mtp, block=moved(params.mtp.block, load_LE[layers:]))
    return dataclasses.replace(params, mtp=mtp)
