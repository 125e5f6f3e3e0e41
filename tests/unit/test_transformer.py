"""The whole model: its variants compute the same, its counts are right, and its logits are those of transformers."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from llmjax.config import validate
from llmjax.errors import UserError
from llmjax.models import transformer
from llmjax.models.attention import Attention
from llmjax.models.config import ModelConfig, MoEConfig
from llmjax.models.layers import Mlp
from llmjax.models.moe import Moe
from llmjax.models.spec import num_params
from llmjax.models.stats import (
    active_params,
    forward_flops_per_token,
    steps_for_flops,
    total_params,
    train_flops_per_token,
)
from llmjax.models.transformer import Block, Params, transformer_spec
from llmjax.objectives.lm import lm_loss

both = pytest.mark.parametrize("cfg", tiny.MODELS.values(), ids=tiny.MODELS.keys())


# Variants


def loss_and_grads(cfg):
    batch = {k: jnp.asarray(v) for k, v in tiny.lm_batch(cfg, 2, 8).items()}
    loss, (grads,) = tiny.value_and_grads(lambda p: lm_loss(p, batch, None, cfg)[0], tiny.language_model(cfg))
    return loss, grads


@pytest.mark.parametrize("name", tiny.crossed([("dense",)], tiny.MODELS))
def test_scan_and_remat_change_neither_loss_nor_gradients(name):
    cfg = tiny.MODELS[name]
    expected = loss_and_grads(cfg)
    for change in (dict(layer_loop="scan"), dict(remat=True)):
        tiny.assert_trees_close(loss_and_grads(dataclasses.replace(cfg, **change)), expected, 1e-5)


def test_scan_stacks_the_statistics_of_layers_like_unroll():
    cfg, text = tiny.SPARSE, tiny.tokens(tiny.SPARSE, 2, 6)
    params = tiny.language_model(cfg)
    _, _, unrolled = tiny.apply(params, text, cfg=cfg)
    _, _, scanned = tiny.apply(params, text, cfg=dataclasses.replace(cfg, layer_loop="scan"))
    assert unrolled.load.shape == (cfg.num_layers, cfg.moe.num_experts)
    tiny.assert_trees_close(scanned, unrolled, 1e-6)


def test_tied_logits_come_from_the_embedding():
    untied = tiny.language_model(tiny.DENSE)
    cfg, text = dataclasses.replace(tiny.DENSE, tie_embeddings=True), tiny.tokens(tiny.DENSE, 2, 6)
    tied = untied.replace(head=None)
    assert transformer_spec(cfg).head is None
    got = tiny.logits(tied, text, cfg)
    np.testing.assert_array_equal(got, tiny.logits(untied.replace(head=untied.embed), text, tiny.DENSE))
    assert np.max(np.abs(got - tiny.logits(untied, text, tiny.DENSE))) > 0.1


def test_positions_and_segments_default_to_one_segment_from_zero():
    params, text = tiny.language_model(tiny.DENSE), tiny.tokens(tiny.DENSE, 2, 6)
    default, cache, stats = tiny.apply(params, text, cfg=tiny.DENSE)
    np.testing.assert_array_equal(default, tiny.logits(params, text, tiny.DENSE))
    assert cache is None and stats is None and default.dtype == jnp.float32


def test_bfloat16_activations_give_float32_logits_near_the_float32_ones():
    cfg = dataclasses.replace(tiny.DENSE, dtype="bfloat16")
    params, text = tiny.language_model(cfg), tiny.tokens(cfg, 2, 6)
    got, _, _ = tiny.apply(params, text, cfg=cfg)
    want = tiny.logits(params, text, tiny.DENSE)
    assert got.dtype == jnp.float32
    assert 1e-4 < np.max(np.abs(got - want)) < 0.1 * np.max(np.abs(want))


def test_a_cache_needs_positions():
    with pytest.raises(ValueError, match="positions_BT must be given"):
        transformer.apply(tiny.language_model(tiny.DENSE), tiny.tokens(tiny.DENSE, 1, 2), tiny.DENSE, cache=())


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(num_heads=4, num_kv_heads=3), "num_heads=4 is not a multiple of num_kv_heads=3"),
        (dict(head_dim=5), "head_dim=5 must be even"),
        (dict(num_layers=0), "num_layers=0 must be positive"),
        (dict(vocab_size=-1), "vocab_size=-1"),
    ],
)
def test_impossible_shapes_are_refused(fields, words):
    with pytest.raises(UserError, match=words):
        validate(ModelConfig(**fields))


# Counts


def test_parameter_counts_by_hand():
    # q and o 16*4*8 each, k and v 16*2*8 each, two norms of 16; SwiGLU 3*16*24, or router 16*4, 4 experts of 3*16*12.
    attention_and_norms, tables = 2 * 512 + 2 * 256 + 2 * 16, 2 * 32 * 16 + 16
    assert total_params(tiny.DENSE) == 2 * (attention_and_norms + 3 * 16 * 24) + tables
    assert active_params(tiny.DENSE) == total_params(tiny.DENSE)
    assert total_params(tiny.SPARSE) == 2 * (attention_and_norms + 64 + 4 * 3 * 16 * 12) + tables
    assert active_params(tiny.SPARSE) == 2 * (attention_and_norms + 64 + 2 * 3 * 16 * 12) + tables
    tied = dataclasses.replace(tiny.DENSE, tie_embeddings=True)
    assert total_params(tied) == num_params(transformer_spec(tied)) == total_params(tiny.DENSE) - 32 * 16


@both
@pytest.mark.parametrize("tied", [True, False])
def test_flops_by_hand(cfg, tied):
    cfg, length = dataclasses.replace(cfg, tie_embeddings=tied), 100
    feed_forward = 3 * 16 * 24 if cfg.moe is None else 16 * 4 + 2 * 3 * 16 * 12
    products = 2 * (2 * 512 + 2 * 256 + feed_forward) + 32 * 16  # two layers and the head
    scores_and_sums = 2 * (2 * 2 * 4 * 8 * length / 2)  # two layers: q k^T and weights v, half of them masked
    assert forward_flops_per_token(cfg, length) == 2 * products + scores_and_sums
    assert train_flops_per_token(cfg, length) == 3 * forward_flops_per_token(cfg, length)
    step = 4 * length * train_flops_per_token(cfg, length)
    assert [steps_for_flops(cfg, length, 4, steps * step) for steps in (0.1, 7.0, 7.4, 7.6)] == [1, 7, 7, 8]


# transformers


def from_peer(weights: dict[str, np.ndarray], cfg: ModelConfig) -> Params:
    """Weights of LlamaForCausalLM or MixtralForCausalLM in our layout."""

    def stack(name, form=lambda w: w):
        return jnp.stack([form(weights[f"model.layers.{i}.{name}"]) for i in range(cfg.num_layers)])

    def projection(name, heads):
        return stack(f"self_attn.{name}.weight", lambda w: w.T.reshape(cfg.embed_dim, heads, cfg.head_dim))

    attention = Attention(
        q=projection("q_proj", cfg.num_heads),
        k=projection("k_proj", cfg.num_kv_heads),
        v=projection("v_proj", cfg.num_kv_heads),
        o=stack("self_attn.o_proj.weight", lambda w: w.T.reshape(cfg.num_heads, cfg.head_dim, cfg.embed_dim)),
    )
    if cfg.moe is None:
        mlp = Mlp(*(stack(f"mlp.{name}_proj.weight", lambda w: w.T) for name in ("gate", "up", "down")))
    else:
        f = cfg.moe.mlp_dim
        mlp = Moe(
            router=stack("mlp.gate.weight", lambda w: w.T),
            gate=stack("mlp.experts.gate_up_proj", lambda w: w[:, :f].transpose(0, 2, 1)),
            up=stack("mlp.experts.gate_up_proj", lambda w: w[:, f:].transpose(0, 2, 1)),
            down=stack("mlp.experts.down_proj", lambda w: w.transpose(0, 2, 1)),
        )
    return Params(
        embed=jnp.asarray(weights["model.embed_tokens.weight"]),
        blocks=Block(stack("input_layernorm.weight"), attention, stack("post_attention_layernorm.weight"), mlp),
        final_norm=jnp.asarray(weights["model.norm.weight"]),
        head=jnp.asarray(weights["lm_head.weight"]),
    )


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parity
def test_logits_are_those_of_transformers(kind):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    moe = MoEConfig(num_experts=4, top_k=2, mlp_dim=20) if kind == "mixtral" else None
    cfg = ModelConfig(
        vocab_size=50, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=44, moe=moe,
        tie_embeddings=False, rope_theta=500.0, norm_eps=1e-5,
    )  # fmt: skip
    shared = dict(
        vocab_size=cfg.vocab_size, hidden_size=cfg.embed_dim, num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads, num_key_value_heads=cfg.num_kv_heads, head_dim=cfg.head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta}, rms_norm_eps=cfg.norm_eps,
        tie_word_embeddings=False, use_cache=False, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    if moe is None:
        peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shared, intermediate_size=cfg.mlp_dim))
    else:
        peer = transformers.MixtralForCausalLM(
            transformers.MixtralConfig(
                **shared, intermediate_size=moe.mlp_dim, num_local_experts=moe.num_experts,
                num_experts_per_tok=moe.top_k, sliding_window=None,
            )
        )  # fmt: skip
    with torch.no_grad():
        for name, weight in peer.named_parameters():
            if "norm" in name:  # ones would hide a scale that is left out
                weight.add_(0.2 * torch.randn_like(weight))
        text = tiny.tokens(cfg, 2, 12)
        expected = peer.float().eval()(input_ids=torch.from_numpy(text).long()).logits.numpy()
    weights = {name: weight.detach().numpy() for name, weight in peer.named_parameters()}
    got = tiny.logits(from_peer(weights, cfg), text, cfg)
    assert np.std(expected) > 0.3
    assert np.max(np.abs(got - expected)) <= 2e-5
