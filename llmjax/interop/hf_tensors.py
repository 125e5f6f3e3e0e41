"""Which tensors of a Hugging Face checkpoint hold which parts of our parameters, and how they lie there.

`tensor_map(cfg, family)` is the whole knowledge: name on disk -> `Place`. Reading, writing and every check follow from it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from llmjax.models.config import ModelConfig
from llmjax.models.spec import ParamSpec, is_spec
from llmjax.models.transformer import layer_rows, transformer_spec

Leaf = str  # dotted path of a leaf of `Params`, e.g. "blocks.attention.q"


@dataclass(frozen=True)
class Form:
    """How one tensor on disk lies in our leaves: `split` it into them, `join` them into it; inverse of each other.

    split(tensor, shapes) -> one array for each part; join(*parts) -> tensor. Views wherever possible.
    """

    split: Callable[..., tuple[Any, ...]]
    join: Callable[..., Any]


@dataclass(frozen=True)
class Place:
    """Parts of a tensor on disk: (leaf, index into the leaf) each, and the form that relates them."""

    parts: tuple[tuple[Leaf, tuple[int, ...]], ...]
    form: Form


def _linear(in_axes: int) -> Form:
    """torch's [out, in] against our [in..., out...], with `in_axes` axes of input."""

    def join(w):
        return w.reshape(math.prod(w.shape[:in_axes]), -1).T

    return Form(lambda x, shapes: (x.T.reshape(shapes[0]),), join)


SAME = Form(lambda x, shapes: (x.reshape(shapes[0]),), lambda w: w)
FLAT = Form(lambda x, shapes: (x.reshape(shapes[0]),), lambda w: w.reshape(-1))
INTO, OUT = _linear(1), _linear(2)


def _rotary_pairs(x, width: int, pairs_to_halves: bool):
    """Reorders the last `width` columns: rotary pairs side by side (DeepSeek) <-> half and half (ours)."""
    plain, rotary = x[..., :-width], x[..., -width:]
    if pairs_to_halves:
        rotary = rotary.reshape(*rotary.shape[:-1], width // 2, 2).swapaxes(-1, -2)
    else:
        rotary = rotary.reshape(*rotary.shape[:-1], 2, width // 2).swapaxes(-1, -2)
    return np.concatenate([plain, rotary.reshape(*plain.shape[:-1], width)], axis=-1)


def _rotary(rope_dim: int) -> Form:
    return Form(
        lambda x, shapes: (_rotary_pairs(x.T.reshape(shapes[0]), rope_dim, True),),
        lambda w: INTO.join(_rotary_pairs(w, rope_dim, False)),
    )


def _kv_up(nope_dim: int) -> Form:
    """kv_b_proj [N * (nope + v), R] against k_up [R, N, nope] and v_up [R, N, v]."""

    def split(x, shapes):
        both = x.T.reshape(*shapes[0][:2], -1)
        return both[..., :nope_dim], both[..., nope_dim:]

    def join(k_up, v_up):
        return INTO.join(np.concatenate([k_up, v_up], axis=-1))

    return Form(split, join)


def _interleaved_join(gate, up):
    return np.stack([gate, up], axis=-1).reshape(*gate.shape[:-1], -1)


# gpt-oss: columns gate, up, gate, up ...
INTERLEAVED = Form(lambda x, shapes: (x[..., ::2], x[..., 1::2]), _interleaved_join)


# [out, 2 in]: two matrices of one output.
SIDE_BY_SIDE = Form(
    lambda x, shapes: (x.T[: shapes[0][0]], x.T[shapes[0][0] :]), lambda *parts: np.concatenate([w.T for w in parts], axis=1)
)


def _one_below_another() -> Form:
    """[out 1 + out 2 + ..., in]: matrices of one input (Phi-3)."""

    def split(x, shapes):
        ends = np.cumsum([math.prod(shape[1:]) for shape in shapes])
        return tuple(part.T.reshape(shape) for part, shape in zip(np.split(x, ends[:-1]), shapes))

    return Form(split, lambda *parts: np.concatenate([INTO.join(w) for w in parts]))


BELOW = _one_below_another()


def leaves(cfg: ModelConfig) -> dict[Leaf, ParamSpec]:
    """Every leaf of the model by its dotted path."""
    found, _ = jax.tree_util.tree_flatten_with_path(transformer_spec(cfg), is_leaf=is_spec)
    return {".".join(key.name for key in path): spec for path, spec in found}


def tensor_map(cfg: ModelConfig, family: str) -> dict[str, Place]:
    """Every tensor of a checkpoint of `family` with this shape, by its name on disk."""
    out = {
        "model.embed_tokens.weight": _one("embed", (), SAME),
        "model.norm.weight": _one("final_norm", (), SAME),
    }
    if not cfg.tie_embeddings:
        out["lm_head.weight"] = _one("head", (), SAME)
    for module in range(cfg.num_mtp_layers):
        prefix = f"model.layers.{cfg.num_layers + module}."
        for name, parts, form in _mtp(cfg, family):
            out[prefix + name] = Place(tuple((leaf, (module, *index)) for leaf, index in parts), form)
        # Copies of the main model's, as they are published.
        out[f"{prefix}embed_tokens.weight"] = _one("embed", (), SAME)
        out[f"{prefix}shared_head.head.weight"] = _one("embed" if cfg.tie_embeddings else "head", (), SAME)
    for layer, (stack, row) in enumerate(layer_rows(cfg)):
        for name, parts, form in _layer(cfg, family, cfg.sparse_layers[layer]):
            place = Place(tuple((f"{stack}.{leaf}", (row, *index)) for leaf, index in parts), form)
            out[f"model.layers.{layer}.{name}"] = place
    return out


def is_copy(name: str) -> bool:
    """Whether a tensor repeats the embedding or the head of the main model: written, and not read."""
    return name.startswith("model.layers.") and name.endswith((".embed_tokens.weight", ".shared_head.head.weight"))


def _one(leaf: Leaf, index: tuple[int, ...], form: Form) -> Place:
    return Place(((leaf, index),), form)


_Entry = tuple[str, list[tuple[Leaf, tuple[int, ...]]], Form]


@functools.cache
def _layer(cfg: ModelConfig, family: str, sparse: bool) -> tuple[_Entry, ...]:
    """Name below `model.layers.i.`, parts and form of each tensor of a layer."""
    attention = _mla(cfg) if cfg.mla is not None else _attention(cfg, family)
    feed_forward = _experts(cfg, family) if sparse else _mlp("mlp", "mlp", fused=family == "phi3")
    return (*_norms(cfg), *attention, *feed_forward)


def _mtp(cfg: ModelConfig, family: str) -> Iterator[_Entry]:
    yield _entry("hnorm.weight", "mtp.hidden_norm", SAME)
    yield _entry("enorm.weight", "mtp.token_norm", SAME)
    yield "eh_proj.weight", [("mtp.token", ()), ("mtp.hidden", ())], SIDE_BY_SIDE
    yield _entry("shared_head.norm.weight", "mtp.final_norm", SAME)
    for name, parts, form in _layer(cfg, family, sparse=cfg.moe is not None):
        yield name, [(f"mtp.block.{leaf}", index) for leaf, index in parts], form


def _entry(name: str, leaf: Leaf, form: Form, index: tuple[int, ...] = ()) -> _Entry:
    return name, [(leaf, index)], form


def _norms(cfg: ModelConfig) -> Iterator[_Entry]:
    if cfg.pre_norms:
        yield _entry("input_layernorm.weight", "attention_norm", SAME)
    if cfg.post_norms:
        yield _entry("post_attention_layernorm.weight", "attention_post_norm", SAME)
        if cfg.pre_norms:
            yield _entry("pre_feedforward_layernorm.weight", "mlp_norm", SAME)
        yield _entry("post_feedforward_layernorm.weight", "mlp_post_norm", SAME)
    else:
        yield _entry("post_attention_layernorm.weight", "mlp_norm", SAME)


def _attention(cfg: ModelConfig, family: str) -> Iterator[_Entry]:
    if family == "phi3":
        yield "self_attn.qkv_proj.weight", [(f"attention.{name}", ()) for name in "qkv"], BELOW
    for name in "" if family == "phi3" else "qkv":
        yield _entry(f"self_attn.{name}_proj.weight", f"attention.{name}", INTO)
        if cfg.qkv_bias:
            yield _entry(f"self_attn.{name}_proj.bias", f"attention.{name}_bias", FLAT)
    yield _entry("self_attn.o_proj.weight", "attention.o", OUT)
    if cfg.out_bias:
        yield _entry("self_attn.o_proj.bias", "attention.o_bias", SAME)
    if cfg.qk_norm != "none":
        yield _entry("self_attn.q_norm.weight", "attention.q_norm", FLAT)
        yield _entry("self_attn.k_norm.weight", "attention.k_norm", FLAT)
    if cfg.attention_sinks:
        yield _entry("self_attn.sinks", "attention.sinks", SAME)


def _mla(cfg: ModelConfig) -> Iterator[_Entry]:
    rotary = _rotary(cfg.latent.rope_dim)
    if cfg.latent.q_lora_rank:
        yield _entry("self_attn.q_a_proj.weight", "attention.q_down", INTO)
        yield _entry("self_attn.q_a_layernorm.weight", "attention.q_norm", SAME)
        yield _entry("self_attn.q_b_proj.weight", "attention.q_up", rotary)
    else:
        yield _entry("self_attn.q_proj.weight", "attention.q_up", rotary)
    yield _entry("self_attn.kv_a_proj_with_mqa.weight", "attention.kv_down", rotary)
    yield _entry("self_attn.kv_a_layernorm.weight", "attention.kv_norm", SAME)
    yield "self_attn.kv_b_proj.weight", [("attention.k_up", ()), ("attention.v_up", ())], _kv_up(cfg.latent.nope_dim)
    yield _entry("self_attn.o_proj.weight", "attention.o", OUT)


def _mlp(name: str, leaf: Leaf, index: tuple[int, ...] = (), fused: bool = False) -> Iterator[_Entry]:
    if fused:
        yield f"{name}.gate_up_proj.weight", [(f"{leaf}.gate", index), (f"{leaf}.up", index)], BELOW
    for matrix in ("down",) if fused else ("gate", "up", "down"):
        yield _entry(f"{name}.{matrix}_proj.weight", f"{leaf}.{matrix}", INTO, index)


def _experts(cfg: ModelConfig, family: str) -> Iterator[_Entry]:
    experts = range(cfg.experts.num_experts)
    if family == "gpt_oss":
        yield _entry("mlp.router.weight", "mlp.router", INTO)
        yield _entry("mlp.router.bias", "mlp.router_bias", SAME)
        yield "mlp.experts.gate_up_proj", [("mlp.gate", ()), ("mlp.up", ())], INTERLEAVED
        yield "mlp.experts.gate_up_proj_bias", [("mlp.gate_bias", ()), ("mlp.up_bias", ())], INTERLEAVED
        yield _entry("mlp.experts.down_proj", "mlp.down", SAME)
        yield _entry("mlp.experts.down_proj_bias", "mlp.down_bias", SAME)
        return
    if family == "mixtral":
        yield _entry("block_sparse_moe.gate.weight", "mlp.router", INTO)
        for e in experts:
            for name, matrix in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
                yield _entry(f"block_sparse_moe.experts.{e}.{name}.weight", f"mlp.{matrix}", INTO, (e,))
        return
    yield _entry("mlp.gate.weight", "mlp.router", INTO)
    if cfg.experts.selection_bias:
        yield _entry("mlp.gate.e_score_correction_bias", "mlp.selection_bias", SAME)
    if cfg.experts.shared_mlp_dim:
        yield from _mlp("mlp.shared_experts", "mlp.shared")
    for e in experts:
        yield from _mlp(f"mlp.experts.{e}", "mlp", (e,))


def disk_shape(place: Place, specs: dict[Leaf, ParamSpec]) -> tuple[int, ...]:
    """The shape that the tensor of `place` must have on disk."""
    return _joined_shape(place.form, tuple(specs[leaf].shape[len(index) :] for leaf, index in place.parts))


@functools.cache
def _joined_shape(form: Form, shapes: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    # One number, seen as an array of that shape: allocates only what `join` copies.
    return form.join(*(np.broadcast_to(np.zeros((), np.int8), shape) for shape in shapes)).shape
