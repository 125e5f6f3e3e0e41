"""Sparse layers between dense ones: which they are, every way to run them, what they count, what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from llmjax.config import validate
from llmjax.errors import UserError
from llmjax.generation.decode import decode_step, prefill
from llmjax.interop.hf_config import family_of, hf_config, model_config
from llmjax.models.config import ModelConfig
from llmjax.models.moe import Moe
from llmjax.models.stats import active_params, forward_flops_per_token, total_params
from llmjax.models.transformer import layer_rows, with_updated_selection_bias
from llmjax.objectives.lm import lm_loss


def model(num_layers: int, first_k_dense: int, every: int, **fields) -> ModelConfig:
    moe = dataclasses.replace(tiny.SPARSE.moe, first_k_dense=first_k_dense, every=every)
    return dataclasses.replace(tiny.SPARSE, num_layers=num_layers, moe=moe, **fields)


LAYOUTS = {  # D: dense, S: sparse
    "SSS": (3, 0, 1),
    "DSS": (3, 1, 1),
    "DSDS": (4, 0, 2),
    "DSDSD": (5, 0, 2),
    "DDSDDSD": (7, 0, 3),
    "DDSDSD": (6, 1, 2),
    "DDDS": (4, 2, 2),
}
# Two groups with a dense layer below and one above them; windows that differ within groups, and between them.
MIXED = model(6, 1, 2)
CASES = {
    "mixed": MIXED,
    "windows-alike": model(5, 0, 2, sliding_window=3, global_every=2, local_rope_theta=100.0),
    "windows-differ-remat": dataclasses.replace(MIXED, sliding_window=3, global_every=3, remat=True),
    "mtp": dataclasses.replace(MIXED, num_mtp_layers=1),
}
cases = pytest.mark.parametrize("name", tiny.crossed([("mixed",)], CASES))
LOOPS = ("unroll", "scan")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_which_layers_are_sparse(layout):
    cfg = model(*LAYOUTS[layout])
    validate(cfg)
    assert cfg.sparse_layers == tuple(letter == "S" for letter in layout)
    assert cfg.num_dense_layers == layout.count("D")
    seen = {"S": 0, "D": 0}
    for letter, (stack, row) in zip(layout, layer_rows(cfg), strict=True):
        assert (stack, row) == ("blocks" if letter == "S" else "dense_blocks", seen[letter])
        seen[letter] += 1


def test_a_dense_model_has_one_stack():
    assert tiny.DENSE.sparse_layers == (False, False) and tiny.DENSE.num_dense_layers == 0
    assert layer_rows(tiny.DENSE) == [("blocks", 0), ("blocks", 1)]


@cases
def test_scanned_equals_unrolled(name):
    cfg = CASES[name]
    params, batch = tiny.language_model(cfg), tiny.lm_batch(cfg, 2, 8)
    results = []
    for loop in LOOPS:
        looped = dataclasses.replace(cfg, layer_loop=loop)
        of_params = jax.value_and_grad(lambda p: lm_loss(p, batch, None, looped), has_aux=True)
        results.append(jax.jit(of_params)(params))  # ((loss, metrics), gradients)
    tiny.assert_trees_close(results[1], results[0], 2e-5)


@pytest.mark.parametrize("loop", tiny.crossed([("scan",)], LOOPS))
def test_recorded_routes_are_taken_again_and_noise_goes_with_the_key(loop):
    cfg = dataclasses.replace(MIXED, layer_loop=loop, moe=dataclasses.replace(MIXED.moe, router_noise=4.0))
    params, text = tiny.language_model(cfg), tiny.tokens(cfg, 2, 8)
    plain = tiny.apply(params, text, cfg=cfg)[2].routes
    noisy = tiny.apply(params, text, cfg=cfg, key=jax.random.key(1))[2].routes
    assert noisy.shape == plain.shape == (2, 2, 8, 2)
    assert all(np.any(noisy[row] != plain[row]) for row in range(2))
    np.testing.assert_array_equal(tiny.apply(params, text, cfg=cfg, routes=noisy)[2].routes, noisy)


@cases
def test_cached_decoding_equals_the_full_forward_pass(name):
    cfg = CASES[name]
    params, text = tiny.language_model(cfg), tiny.tokens(cfg, 2, 10)
    want = tiny.logits(params, text, cfg)
    state = jax.jit(prefill, static_argnames=("cfg", "size"))(params, text[:, :5], np.ones((2, 5), np.int32), cfg=cfg, size=10)
    step = jax.jit(decode_step, static_argnames="cfg")
    for t in range(5, 10):
        np.testing.assert_allclose(state.logits, want[:, t - 1], atol=2e-5)
        state = step(params, state, jnp.asarray(text[:, t]), cfg=cfg)
    np.testing.assert_allclose(state.logits, want[:, 9], atol=2e-5)


@pytest.mark.parametrize("layout, loop", tiny.crossed([("DSDSD", "unroll"), ("DDSDSD", "scan")], LAYOUTS, LOOPS))
def test_experts_that_are_copies_of_dense_layers_make_the_dense_model(layout, loop):
    dense = dataclasses.replace(tiny.DENSE, num_layers=len(layout), sliding_window=3, global_every=2)
    cfg = model(*LAYOUTS[layout], sliding_window=3, global_every=2, layer_loop=loop)
    cfg = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, mlp_dim=dense.mlp_dim))
    params, text = tiny.language_model(dense), tiny.tokens(dense, 2, 8)

    def rows(letter):
        own = np.array([place for place, other in enumerate(layout) if other == letter])
        return jax.tree.map(lambda leaf: leaf[own], params.blocks) if len(own) else None

    sparse, bottom = rows("S"), rows("D")
    experts = {name: jnp.repeat(getattr(sparse.mlp, name)[:, None], 4, axis=1) for name in ("gate", "up", "down")}
    mlp = Moe(router=tiny.language_model(cfg).blocks.mlp.router, **experts)
    mixed = params.replace(blocks=sparse.replace(mlp=mlp), dense_blocks=bottom)
    np.testing.assert_allclose(tiny.logits(mixed, text, cfg), tiny.logits(params, text, dense), atol=2e-5)


def test_counts_by_hand():
    # As in test_transformer: attention and norms; SwiGLU 3*16*24, or router 16*4 and 4 experts of 3*16*12, of which 2 are met.
    attention_and_norms, tables, dense = 2 * 512 + 2 * 256 + 2 * 16, 2 * 32 * 16 + 16, 3 * 16 * 24
    assert total_params(MIXED) == 6 * attention_and_norms + tables + 4 * dense + 2 * (64 + 4 * 3 * 16 * 12)
    assert active_params(MIXED) == 6 * attention_and_norms + tables + 4 * dense + 2 * (64 + 2 * 3 * 16 * 12)
    products = 6 * (2 * 512 + 2 * 256) + 4 * dense + 2 * (64 + 2 * 3 * 16 * 12) + 32 * 16
    scores_and_sums = 6 * (2 * 2 * 4 * 8 * 100 / 2)
    assert forward_flops_per_token(MIXED, 100) == 2 * products + scores_and_sums


def test_each_sparse_layer_moves_its_own_selection_bias():
    balanced = dataclasses.replace(MIXED.moe, selection_bias=True, bias_update_rate=0.1)
    cfg = dataclasses.replace(MIXED, num_mtp_layers=1, moe=balanced)
    params = tiny.language_model(cfg)
    load = jnp.asarray([[0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1]])
    moved = with_updated_selection_bias(params, load, cfg)
    signs = np.sign(np.concatenate([
        moved.blocks.mlp.selection_bias - params.blocks.mlp.selection_bias,
        moved.mtp.block.mlp.selection_bias - params.mtp.block.mlp.selection_bias,
    ]))  # fmt: skip
    np.testing.assert_array_equal(signs, np.where(load > 0.25, -1, 1))


def test_decoder_sparse_step_is_read_and_written():
    cfg = dataclasses.replace(model(4, 0, 2), qk_norm="head")
    assert family_of(cfg) == "qwen3_moe"
    hf = hf_config(cfg, "qwen3_moe")
    assert hf["decoder_sparse_step"] == 2 and hf["intermediate_size"] == 24 and hf["moe_intermediate_size"] == 12
    assert model_config(hf).sparse_layers == (False, True, False, True)
    with pytest.raises(UserError, match="no Hugging Face family"):
        family_of(model(4, 1, 2))
    for change, words in ((dict(mlp_only_layers=[1]), "mlp_only_layers"), (dict(decoder_sparse_step=0), "every=0")):
        with pytest.raises(UserError, match=words):
            model_config(hf | change)
    with pytest.raises(UserError, match="decoder_sparse_step=2 is not supported for model_type='olmoe'"):
        model_config(hf | dict(model_type="olmoe"))


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((4, 0, 0), "every=0 must be positive"),
        ((4, 0, -1), "every=-1 must be positive"),
        ((4, 0, 5), "moe.first_k_dense=0 and moe.every=5 leave no sparse layer of num_layers=4"),
        ((4, 3, 2), "moe.first_k_dense=3 and moe.every=2 leave no sparse layer of num_layers=4"),
        ((4, 4, 1), "moe.first_k_dense=4 and moe.every=1 leave no sparse layer of num_layers=4"),
    ],
)
def test_impossible_layouts_are_refused(shape, words):
    cfg = model(*shape)
    with pytest.raises(UserError, match=words) as refused:
        validate(cfg)
    assert "\n" not in str(refused.value)
