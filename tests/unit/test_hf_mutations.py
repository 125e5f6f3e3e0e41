"""What the parity tests would see: each detail that could be wrong, made wrong, moves the logits far beyond their gate."""

import dataclasses
from functools import cache

import numpy as np
import peers
import pytest
import tiny

from llmjax.interop.hf_folder import load_params, read_config

pytestmark = pytest.mark.parity

GATE = 2e-4  # of tests/unit/test_hf_parity.py


def moe(**fields):
    return lambda cfg: dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, **fields))


def model(**fields):
    return lambda cfg: dataclasses.replace(cfg, **fields)


def rope(**fields):
    return lambda cfg: dataclasses.replace(cfg, rope_scaling=dataclasses.replace(cfg.rope_scaling, **fields))


CONFIGS = {
    "routed scaling": ("deepseek_v3", moe(routed_scaling=1.0)),
    "group limit": ("deepseek_v3", moe(num_groups=1, top_k_groups=1)),
    "sigmoid for softmax": ("deepseek_v3", moe(scoring="softmax")),
    "chosen weights renormalised": ("olmoe", moe(renormalize=True)),
    "chosen weights as they are": ("qwen3_moe", moe(renormalize=False)),
    "one expert fewer": ("mixtral", moe(top_k=1, renormalize=False)),
    "window of every layer off by one": ("mistral", model(sliding_window=6)),
    "own list of layers ignored": ("gemma3-layers", model(global_layers=(), global_every=6)),
    "window off by one": ("gpt_oss", model(sliding_window=6)),
    "clamp": ("gpt_oss", model(activation_limit=7.0)),
    "yarn truncated": ("gpt_oss", rope(truncate=True)),
    "no soft-cap of attention": ("gemma2", model(attention_softcap=0.0)),
    "softmax scale": ("deepseek_v3", model(attention_scale=0.0)),
}


def swapped(mlp):
    return mlp.replace(gate=mlp.up, up=mlp.gate)


def without(*names):
    return lambda part: part.replace(**{name: 0 * getattr(part, name) for name in names})


WEIGHTS = {
    "bias of the choice ignored": ("deepseek_v3", "mlp", without("selection_bias")),
    "bias of the router ignored": ("gpt_oss", "mlp", without("router_bias")),
    "shared expert left out": ("deepseek_v3", "mlp", lambda mlp: mlp.replace(shared=None)),
    "gate and up swapped": ("mixtral", "mlp", swapped),
    "biases of experts left out": ("gpt_oss", "mlp", without("gate_bias", "up_bias", "down_bias")),
    "biases of attention left out": ("qwen2", "attention", without("q_bias", "k_bias", "v_bias")),
    "sinks left out": ("gpt_oss", "attention", lambda part: part.replace(sinks=part.sinks - 1e9)),
}


@pytest.fixture(scope="module", name="case")
def make_case(tmp_path_factory):
    """family -> (text, the peer's logits, our config, our parameters)."""

    @cache
    def case(family):
        folder = str(tmp_path_factory.mktemp(family) / "hf")
        peer = peers.save(family, folder)
        cfg, raw = read_config(folder)
        cfg, text = dataclasses.replace(cfg, layer_loop="unroll"), tiny.tokens(cfg, 2, 24)
        params = load_params(folder, cfg, raw["model_type"])
        want = peers.logits(peer, text)
        assert np.max(np.abs(tiny.logits(params, text, cfg) - want)) <= GATE
        return text, want, cfg, params

    return case


@pytest.mark.parametrize("name", CONFIGS)
def test_invariant_26_a_wrong_field_is_seen(case, name):
    family, change = CONFIGS[name]
    text, want, cfg, params = case(family)
    assert change(cfg) != cfg
    assert np.max(np.abs(tiny.logits(params, text, change(cfg)) - want)) > 20 * GATE


@pytest.mark.parametrize("name", WEIGHTS)
def test_invariant_26_a_wrong_use_of_weights_is_seen(case, name):
    family, part, change = WEIGHTS[name]
    text, want, cfg, params = case(family)
    blocks = params.blocks.replace(**{part: change(getattr(params.blocks, part))})
    assert np.max(np.abs(tiny.logits(params.replace(blocks=blocks), text, cfg) - want)) > 20 * GATE
