"""Upcycling: exact at step 0, and what noise and drop change."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from llmjax.commands import convert
from llmjax.errors import UserError
from llmjax.interop.hf_folder import load_params, read_config, save_params
from llmjax.models.config import MoEConfig
from llmjax.models.upcycle import upcycle

KEY = jax.random.key(0)
MOE = MoEConfig(num_experts=4, top_k=2, mlp_dim=tiny.DENSE.mlp_dim)


@pytest.mark.parametrize("top_k", [2, 4])
def test_invariant_09_an_upcycled_model_is_the_dense_one_at_step_0(top_k):
    dense, text = tiny.language_model(tiny.DENSE), tiny.tokens(tiny.DENSE, 2, 12)
    params, cfg = upcycle(dense, tiny.DENSE, dataclasses.replace(MOE, top_k=top_k), KEY)
    assert cfg.moe.num_experts == 4 and np.std(params.blocks.mlp.router) > 0
    np.testing.assert_allclose(tiny.logits(params, text, cfg), tiny.logits(dense, text, tiny.DENSE), atol=1e-5)


def test_noise_tells_the_experts_apart_by_its_size():
    dense = tiny.language_model(tiny.DENSE)
    params, _ = upcycle(dense, tiny.DENSE, MOE, KEY, noise=0.1)
    for name in ("gate", "up", "down"):
        one, many = getattr(dense.blocks.mlp, name), getattr(params.blocks.mlp, name)
        assert np.std(np.asarray(many) - np.asarray(one)[:, None]) == pytest.approx(0.1 * float(np.std(one)), rel=0.1)
        assert np.any(np.asarray(many)[:, 0] != np.asarray(many)[:, 1])


def test_drop_draws_whole_hidden_units_afresh():
    dense = tiny.language_model(tiny.DENSE)
    params, _ = upcycle(dense, tiny.DENSE, MOE, KEY, drop=0.5)
    kept = {}
    for name, other_axis in (("gate", -2), ("up", -2), ("down", -1)):
        same = np.asarray(getattr(params.blocks.mlp, name)) == np.asarray(getattr(dense.blocks.mlp, name))[:, None]
        kept[name] = same.all(axis=other_axis)
        np.testing.assert_array_equal(kept[name], same.any(axis=other_axis))  # a unit is kept whole or not at all
        assert 0.4 < kept[name].mean() < 0.6
    np.testing.assert_array_equal(kept["gate"], kept["down"])
    np.testing.assert_array_equal(kept["gate"], kept["up"])
    everything, _ = upcycle(dense, tiny.DENSE, MOE, KEY, drop=1.0)
    for name in ("gate", "up", "down"):
        got, was = getattr(everything.blocks.mlp, name), getattr(dense.blocks.mlp, name)
        assert np.std(got) == pytest.approx(float(np.std(was)), rel=0.1)


@pytest.mark.parametrize(
    ("cfg", "moe", "options", "words"),
    [
        (tiny.SPARSE, MOE, {}, "sparse already"),
        (tiny.DENSE, dataclasses.replace(MOE, mlp_dim=8), {}, "mlp_dim=24 in every layer"),
        (tiny.DENSE, dataclasses.replace(MOE, renormalize=False), {}, "gate weights sum to one"),
        (tiny.DENSE, MOE, dict(noise=-1.0), "noise=-1.0 must be between 0 and 1"),
        (tiny.DENSE, MOE, dict(drop=2.0), "drop=2.0 must be between 0 and 1"),
    ],
)
def test_what_cannot_be_upcycled(cfg, moe, options, words):
    with pytest.raises(UserError, match=words):
        upcycle(tiny.language_model(cfg), cfg, moe, KEY, **options)


def test_upcycling_a_folder(tmp_path):
    dense, source, target = tiny.language_model(tiny.DENSE), str(tmp_path / "dense"), str(tmp_path / "sparse")
    save_params(dense, tiny.DENSE, "llama", source)
    convert.run(["llmjax-convert", f"--source={source}", f"--target={target}", "--num_experts=4", "--top_k=2"])
    cfg, raw = read_config(target)
    assert raw["model_type"] == "mixtral" and cfg.moe.num_experts == 4
    text = tiny.tokens(tiny.DENSE, 2, 12)
    got = tiny.logits(load_params(target, cfg, "mixtral"), text, dataclasses.replace(cfg, layer_loop="unroll"))
    np.testing.assert_allclose(got, tiny.logits(dense, text, tiny.DENSE), atol=1e-5)
    with pytest.raises(UserError, match="top_k=9 must not exceed num_experts=4"):
        convert.run(["llmjax-convert", f"--source={source}", f"--target={target}2", "--num_experts=4", "--top_k=9"])
    assert not (tmp_path / "sparse2").exists()
