"""config.json of the Hugging Face format <-> `ModelConfig`, for the families in `FAMILIES`.

Both spellings of the rotary settings (`rope_theta` + `rope_scaling`, and `rope_parameters`) and of the dtype are read;
both are written, so that older and newer readers agree.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from llmjax.config import validate
from llmjax.errors import UserError
from llmjax.models.config import UNLIMITED, MLAConfig, ModelConfig, MoEConfig, RopeScaling

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
}
_GELU = ("gelu_pytorch_tanh", "gelu_new")
_BIASED = ("llama", "qwen3", "olmo2", "olmo3", "gemma", "gemma2", "gemma3_text", "qwen3_moe", "olmoe", "gpt_oss")
"""Families in which attention_bias gives each projection of attention a bias."""
_LAYER_TYPES = ("qwen2", "qwen3", "olmo3", "gemma2", "gemma3_text", "gpt_oss")
"""Families whose layer_types says which layers see a window only; in the others all do."""
_THETA = {"mixtral": 1e6, "gemma3_text": 1e6, "olmo3": 5e5, "gpt_oss": 1.5e5}
"""rope_theta where a config.json does not say it, if not 10,000."""
_LOCAL_ROPE = ("olmo3", "gemma3_text")
"""Families whose local layers have a table of their own, which is not scaled."""


def model_config(hf: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """The `ModelConfig` of a parsed config.json. UserError, naming `where`, for what this library does not model."""
    family = hf.get("model_type")
    if family not in ARCHITECTURES:
        raise UserError(f"{where}: model_type={family!r} is not supported; supported: {', '.join(sorted(ARCHITECTURES))}")
    _refuse(hf, family, where)
    heads = hf["num_attention_heads"]
    fields: dict[str, Any] = dict(
        vocab_size=hf["vocab_size"],
        num_layers=hf["num_hidden_layers"],
        embed_dim=hf["hidden_size"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        mlp_dim=hf["intermediate_size"],
        norm_eps=hf["rms_norm_eps"],
        tie_embeddings=hf.get("tie_word_embeddings", family.startswith("gemma")),
        dtype="bfloat16" if (hf.get("dtype") or hf.get("torch_dtype")) == "bfloat16" else "float32",
    )
    if hf.get("attention_bias") and family in _BIASED:
        fields |= dict(qkv_bias=True, out_bias=True)
    fields |= _rope(hf, family, where) | _FAMILY_FIELDS.get(family, lambda hf: {})(hf)
    config = _with_layer_types(ModelConfig(**fields), hf, where)
    validate(config)
    return config


def _refuse(hf: dict[str, Any], family: str, where: str) -> None:
    """Settings that would silently give other numbers."""
    activations = _GELU if family.startswith("gemma") else ("silu",)
    activation = hf.get("hidden_activation") or hf.get("hidden_act") or activations[0]
    if family == "gemma":  # its first releases say gelu and mean the tanh form
        activations = (*_GELU, "gelu")
    rope = hf.get("rope_parameters") or {}
    checks = {
        "quantization_config": hf.get("quantization_config") in (None, {}),
        "hidden_act": activation in activations,
        "mlp_bias": not hf.get("mlp_bias"),
        "clip_qkv": hf.get("clip_qkv") is None,
        "mlp_only_layers": not hf.get("mlp_only_layers"),
        "decoder_sparse_step": family == "qwen3_moe" or hf.get("decoder_sparse_step", 1) == 1,
        "partial_rotary_factor": (hf | rope).get("partial_rotary_factor") in (None, 1.0),
        "use_sliding_window": not (family == "qwen3_moe" and hf.get("use_sliding_window")),
        "use_bidirectional_attention": not hf.get("use_bidirectional_attention"),
        "rope_interleave": family != "deepseek_v3" or hf.get("rope_interleave", True),
        "attention_bias": family in (*_BIASED, "qwen2") or not hf.get("attention_bias"),
    }
    for name, fine in checks.items():
        if not fine:
            raise UserError(f"{where}: {name}={(hf | rope).get(name)!r} is not supported for model_type={family!r}")


def _rope(hf: dict[str, Any], family: str, where: str) -> dict[str, Any]:
    rope = hf.get("rope_parameters") or {}
    default = hf.get("rope_theta", _THETA.get(family, 10_000.0))
    local_default = hf.get("rope_local_base_freq", 10_000.0) if family == "gemma3_text" else default
    fields: dict[str, Any] = {}
    local: dict[str, Any] = {}
    if "full_attention" in rope:  # one entry for each kind of layer
        local, rope = rope.get("sliding_attention") or {}, rope["full_attention"]
    if family in _LOCAL_ROPE:
        if local.get("rope_type", "default") != "default":
            raise UserError(f"{where}: rope_type={local['rope_type']!r} of sliding_attention is not supported, only default is")
        fields["local_rope_theta"] = float(local.get("rope_theta", local_default))
    theta = rope.get("rope_theta", default)
    scaling = hf.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    fields["rope_theta"] = float(theta)
    if kind == "default":
        return fields
    known = ("linear", "llama3", "yarn") if family != "phi3" else ()  # Phi-3 calls another rule yarn
    if kind not in known:
        raise UserError(f"{where}: rope_type={kind!r} is not supported; supported: {', '.join(('default', *known))}")
    factor = float(scaling["factor"])
    original = scaling.get("original_max_position_embeddings") or hf.get("max_position_embeddings", 8192)
    options: dict[str, Any] = dict(kind=kind, factor=factor, original_length=original)
    if kind == "llama3":
        options |= {name: float(scaling[name]) for name in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        options |= dict(
            beta_fast=float(scaling.get("beta_fast") or 32), beta_slow=float(scaling.get("beta_slow") or 1),
            truncate=scaling.get("truncate", True), attention_factor=float(scaling.get("attention_factor") or 0),
        )  # fmt: skip
        mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if mscale and mscale_all and not options["attention_factor"]:
            options["attention_factor"] = _mscale(factor, mscale) / _mscale(factor, mscale_all)
        if mscale_all and family.startswith("deepseek"):
            width = hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"]
            fields["attention_scale"] = width**-0.5 * _mscale(factor, mscale_all) ** 2
    fields["rope_scaling"] = RopeScaling(**options)
    return fields


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0


def _gemma(hf):
    shared = dict(activation="gelu", norm_offset=1.0, scale_embedding=True)
    if hf["model_type"] == "gemma":
        return shared
    every = 2 if hf["model_type"] == "gemma2" else 6
    return shared | dict(
        post_norms=True, qk_norm="none" if hf["model_type"] == "gemma2" else "head",
        attention_scale=float(hf["query_pre_attn_scalar"]) ** -0.5,
        attention_softcap=float(hf.get("attn_logit_softcapping") or 0.0),
        logit_softcap=float(hf.get("final_logit_softcapping") or 0.0),
        sliding_window=hf.get("sliding_window") or 0,
        global_every=hf.get("_sliding_window_pattern") or hf.get("sliding_window_pattern") or every,
    )  # fmt: skip


def _qwen(hf):
    own = dict(qkv_bias=True) if hf["model_type"] == "qwen2" else dict(qk_norm="head")
    if not hf.get("use_sliding_window"):
        return own
    full = range(min(hf.get("max_window_layers", 28), hf["num_hidden_layers"]))
    return own | dict(sliding_window=hf.get("sliding_window") or 0, global_layers=tuple(full))


def _olmo(hf):
    shared = dict(qk_norm="full", pre_norms=False, post_norms=True)
    if hf["model_type"] == "olmo2":
        return shared
    return shared | dict(sliding_window=hf.get("sliding_window") or 0, global_every=4)


def _mixtral(hf):
    return dict(
        sliding_window=hf.get("sliding_window") or 0,
        moe=MoEConfig(
            hf["num_local_experts"], hf["num_experts_per_tok"], hf["intermediate_size"],
            load_balance_coef=hf.get("router_aux_loss_coef", 0.001), z_loss_coef=0.0,
        ),
    )  # fmt: skip


def _softmax_moe(hf):
    experts = hf.get("num_experts") or hf["num_local_experts"]
    return dict(
        qk_norm="full" if hf["model_type"] == "olmoe" else "head",
        moe=MoEConfig(
            experts, hf["num_experts_per_tok"], hf.get("moe_intermediate_size") or hf["intermediate_size"],
            renormalize=hf.get("norm_topk_prob", False), load_balance_coef=hf.get("router_aux_loss_coef", 0.001),
            z_loss_coef=0.0, every=hf.get("decoder_sparse_step", 1),
        ),
    )  # fmt: skip


def _deepseek(hf):
    v3 = hf["model_type"] == "deepseek_v3"
    grouped = v3 or hf.get("topk_method") == "group_limited_greedy"
    return dict(
        num_mtp_layers=hf.get("num_nextn_predict_layers") or 0 if v3 else 0,
        mla=MLAConfig(
            hf["kv_lora_rank"], hf.get("q_lora_rank") or 0, hf["qk_nope_head_dim"], hf["qk_rope_head_dim"], hf["v_head_dim"]
        ),
        moe=MoEConfig(
            hf["n_routed_experts"], hf["num_experts_per_tok"], hf["moe_intermediate_size"],
            scoring="sigmoid" if v3 else "softmax", selection_bias=v3,
            renormalize=bool(v3 and hf.get("norm_topk_prob", True)), routed_scaling=float(hf["routed_scaling_factor"]),
            num_groups=(hf.get("n_group") or 1) if grouped else 1, top_k_groups=(hf.get("topk_group") or 1) if grouped else 1,
            shared_mlp_dim=(hf.get("n_shared_experts") or 0) * hf["moe_intermediate_size"],
            first_k_dense=hf["first_k_dense_replace"], load_balance_coef=1e-4 if v3 else 1e-3, z_loss_coef=0.0,
        ),
    )  # fmt: skip


def _gpt_oss(hf):
    return dict(
        qkv_bias=True, out_bias=True, attention_sinks=True, activation="clipped_silu",
        activation_limit=float(hf.get("swiglu_limit", 7.0)), sliding_window=hf["sliding_window"], global_every=2,
        moe=MoEConfig(
            hf["num_local_experts"], hf["num_experts_per_tok"], hf["intermediate_size"], router_bias=True,
            expert_bias=True, load_balance_coef=hf.get("router_aux_loss_coef", 0.001), z_loss_coef=0.0,
        ),
    )  # fmt: skip


_FAMILY_FIELDS = {
    "mistral": lambda hf: dict(sliding_window=hf.get("sliding_window", 4096) or 0),
    "qwen2": _qwen,
    "qwen3": _qwen,
    "phi3": lambda hf: dict(sliding_window=hf.get("sliding_window") or 0),
    "olmo2": _olmo,
    "olmo3": _olmo,
    "gemma": _gemma,
    "gemma2": _gemma,
    "gemma3_text": _gemma,
    "mixtral": _mixtral,
    "qwen3_moe": _softmax_moe,
    "olmoe": _softmax_moe,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "gpt_oss": _gpt_oss,
}


def _with_layer_types(config: ModelConfig, hf: dict[str, Any], where: str) -> ModelConfig:
    """The config with the local and global layers that layer_types lists, in the shortest words."""
    types = hf.get("layer_types") if hf["model_type"] in _LAYER_TYPES else None
    if types is not None:
        kinds = {"full_attention", "sliding_attention"} if config.sliding_window else {"full_attention"}
        if len(types) != config.num_layers or not set(types) <= kinds:
            want = f"{' or '.join(sorted(kinds))} for each of {config.num_layers} layers"
            window = "" if config.sliding_window else " and no sliding_window"
            raise UserError(f"{where}: layer_types={types!r}{window}; supported is {want}")
        listed = tuple(layer for layer, kind in enumerate(types) if kind == "full_attention")
        if listed != tuple(layer for layer, window in enumerate(config.windows) if window == UNLIMITED):
            config = replace(config, global_every=0, global_layers=listed)
    if set(config.windows) == {UNLIMITED}:
        return replace(config, sliding_window=0, global_every=0, global_layers=(), local_rope_theta=0.0)
    return config


def family_of(cfg: ModelConfig) -> str:
    """The model_type whose config.json can say all that `cfg` says. UserError if there is none."""
    for family in ARCHITECTURES:
        try:
            told = model_config(hf_config(cfg, family))
        except (UserError, KeyError, ValueError, TypeError, ZeroDivisionError):
            continue  # this family has no word for something in cfg
        if _canonical(told) == _canonical(cfg):
            return family
    raise UserError("no Hugging Face family has this combination of model fields, so the model cannot be exported")


def _canonical(cfg: ModelConfig) -> ModelConfig:
    """What computes the same is the same here: fields that do not change the logits take one value."""
    scale = float(f"{cfg.attention_scale or cfg.qk_dim**-0.5:.6g}")
    changes: dict[str, Any] = dict(layer_loop="auto", remat=False, dtype="float32", attention_scale=scale, mtp_coef=0.0)
    local = tuple(window != UNLIMITED for window in cfg.windows)
    if any(local):
        changes |= dict(global_every=0, global_layers=tuple(layer for layer, is_local in enumerate(local) if not is_local))
    else:
        changes |= dict(sliding_window=0, global_every=0, global_layers=())
    if not any(local) or (cfg.rope_scaling is None and cfg.local_rope_theta == cfg.rope_theta):
        changes["local_rope_theta"] = 0.0
    if cfg.mla is not None:
        changes["head_dim"] = 2
    if cfg.rope_scaling is not None and cfg.rope_scaling.kind == "linear":
        changes["rope_scaling"] = RopeScaling("linear", factor=cfg.rope_scaling.factor)
    if cfg.moe is not None:
        changes["moe"] = replace(cfg.moe, load_balance_coef=0.0, z_loss_coef=0.0)
        if not cfg.num_dense_layers:
            changes["mlp_dim"] = 1
    return replace(cfg, **changes)


def hf_config(cfg: ModelConfig, family: str, source: dict[str, Any] | None = None) -> dict[str, Any]:
    """The config.json of a model. `source`: the config.json that it came from; only what does not fit any more is changed."""
    moe, mla = cfg.moe, cfg.mla
    out: dict[str, Any] = dict(source or {})
    if out.get("model_type") == family and _canonical(model_config(out)) == _canonical(cfg):
        return out
    # Where a file is silent, readers take ids of the family's first release.
    out = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) | out
    out |= dict(
        architectures=[ARCHITECTURES[family]], model_type=family, vocab_size=cfg.vocab_size, hidden_size=cfg.embed_dim,
        num_hidden_layers=cfg.num_layers, num_attention_heads=cfg.num_heads, num_key_value_heads=cfg.num_kv_heads,
        head_dim=cfg.head_dim, intermediate_size=cfg.mlp_dim, rms_norm_eps=cfg.norm_eps,
        tie_word_embeddings=cfg.tie_embeddings, hidden_act="silu",
    )  # fmt: skip
    out |= _rope_out(cfg, family, source or {})
    if family in _BIASED:
        out["attention_bias"] = cfg.qkv_bias and cfg.out_bias
    if family in (*_LAYER_TYPES, "mistral", "mixtral", "phi3"):
        out["sliding_window"] = cfg.sliding_window or None
    if family in _LAYER_TYPES:
        out["layer_types"] = ["full_attention" if w == UNLIMITED else "sliding_attention" for w in cfg.windows]
    if family in ("qwen2", "qwen3"):
        out["use_sliding_window"] = cfg.sliding_window > 0
    if family.startswith("gemma"):
        out |= dict(hidden_act=_GELU[0], hidden_activation=_GELU[0])
    if family in ("gemma2", "gemma3_text"):
        out |= dict(
            query_pre_attn_scalar=round((cfg.attention_scale or cfg.head_dim**-0.5) ** -2),
            attn_logit_softcapping=cfg.attention_softcap or None, final_logit_softcapping=cfg.logit_softcap or None,
        )  # fmt: skip
        if cfg.global_every:
            out["sliding_window_pattern"] = cfg.global_every
    if family == "gpt_oss":
        out["swiglu_limit"] = cfg.activation_limit
    if mla is not None:
        out |= dict(
            kv_lora_rank=mla.kv_lora_rank, q_lora_rank=mla.q_lora_rank or None, qk_nope_head_dim=mla.nope_dim,
            qk_rope_head_dim=mla.rope_dim, v_head_dim=mla.v_dim, head_dim=mla.rope_dim,
            qk_head_dim=mla.nope_dim + mla.rope_dim,
        )  # fmt: skip
    if moe is not None:
        grouped = dict(n_group=moe.num_groups, topk_group=moe.top_k_groups)
        out |= dict(
            num_experts_per_tok=moe.top_k, norm_topk_prob=moe.renormalize, router_aux_loss_coef=moe.load_balance_coef,
        )  # fmt: skip
        if family.startswith("deepseek"):
            if family == "deepseek_v3":
                out["num_nextn_predict_layers"] = cfg.num_mtp_layers
            out |= grouped | dict(
                n_routed_experts=moe.num_experts, moe_intermediate_size=moe.mlp_dim,
                n_shared_experts=moe.shared_mlp_dim // moe.mlp_dim, first_k_dense_replace=moe.first_k_dense,
                routed_scaling_factor=moe.routed_scaling,
                topk_method="group_limited_greedy" if moe.num_groups > 1 else "greedy",
            )  # fmt: skip
        else:
            out |= dict(num_experts=moe.num_experts, num_local_experts=moe.num_experts)
            out["moe_intermediate_size"] = out["intermediate_size"] = moe.mlp_dim
            if family == "qwen3_moe":
                out |= dict(intermediate_size=cfg.mlp_dim, decoder_sparse_step=moe.every)
    out["dtype"] = out["torch_dtype"] = cfg.dtype
    return out


def _rope_out(cfg: ModelConfig, family: str, source: dict[str, Any]) -> dict[str, Any]:
    kept = {k: source[k] for k in ("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq") if k in source}
    if kept:
        return kept
    s, scaling = cfg.rope_scaling, {"rope_type": "default"}
    if s is not None:
        scaling = dict(rope_type=s.kind, factor=s.factor, original_max_position_embeddings=s.original_length)
        if s.kind == "llama3":
            scaling |= dict(low_freq_factor=s.low_freq_factor, high_freq_factor=s.high_freq_factor)
        if s.kind == "yarn":
            scaling |= dict(beta_fast=s.beta_fast, beta_slow=s.beta_slow, truncate=s.truncate)
            if s.attention_factor:
                scaling["attention_factor"] = s.attention_factor
        if s.kind == "yarn" and cfg.mla is not None and cfg.attention_scale:
            ratio = math.sqrt(cfg.attention_scale * cfg.qk_dim**0.5)
            scaling["mscale_all_dim"] = (ratio - 1.0) / (0.1 * math.log(s.factor))
    parameters: dict[str, Any] = scaling | {"rope_theta": cfg.rope_theta}
    out = dict(rope_theta=cfg.rope_theta, rope_scaling=None if s is None else scaling)
    if family in _LOCAL_ROPE:
        local = {"rope_type": "default", "rope_theta": cfg.local_rope_theta or cfg.rope_theta}
        parameters = {"full_attention": parameters, "sliding_attention": local}
        out["rope_local_base_freq"] = cfg.local_rope_theta or cfg.rope_theta
    return out | {"rope_parameters": parameters}
