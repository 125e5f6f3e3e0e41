"""What compiled programs send between devices, read from their text, and where the weights lie for decoding."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, Mesh

from benchmarks.compiled import computations, group_size, sent, walk
from llmjax import sharding
from llmjax.models.spec import init_params
from llmjax.models.stats import total_params
from llmjax.models.transformer import for_decoding, transformer_spec
from llmjax.objectives.lm import lm_loss
from llmjax.training.optimizer import OptimizerConfig
from llmjax.training.program import language_batch, train_program

MODEL = dataclasses.replace(tiny.DENSE, vocab_size=512, embed_dim=64, num_layers=4, layer_loop="scan", remat=True)


def mesh_of(**sizes) -> Mesh:
    shape = [sizes.get(axis, 1) for axis in sharding.MESH_AXES]
    devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
    return Mesh(devices, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def compiled_step(cfg, mesh) -> str:
    program = train_program(
        lambda params, batch, key: lm_loss(params, batch, key, cfg), transformer_spec(cfg), OptimizerConfig(), 10,
        language_batch(8, 32, mesh), mesh, tokens=256, flops_per_token=1.0,
    )  # fmt: skip
    with sharding.use_mesh(mesh):
        return program.lower().compile().as_text()


def test_a_step_sends_what_zero_3_needs():
    """Weights twice (forward, and again for the backward pass), their gradients once; the table's is scattered, not summed on
    every device."""
    text = compiled_step(MODEL, mesh_of(fsdp=8))
    table = rf"\[{MODEL.vocab_size},{MODEL.embed_dim}\]"
    assert not re.search(rf" = \(?f32{table}\S* all-reduce", text)
    assert re.search(rf" = \(?f32\[{MODEL.vocab_size},{MODEL.embed_dim // 8}\]\S* reduce-scatter", text)
    n, found = 8, sent(text)
    weights = 4 * total_params(MODEL) * (n - 1) / n
    by_kind = {kind: sum(size for (one, _), size in found.items() if one == kind) for kind, _ in found}
    assert by_kind["all-gather"] <= 2.1 * weights
    others = by_kind.get("reduce-scatter", 0) + by_kind.get("all-reduce", 0) / 2  # XLA:CPU writes some as all-reduce and slice
    assert 0.8 * weights <= others <= 1.15 * weights


SPARSE = dataclasses.replace(MODEL, moe=dataclasses.replace(tiny.SPARSE.moe, num_experts=8, mlp_dim=256), dtype="bfloat16")


@pytest.mark.parametrize("sizes", [dict(fsdp=8), dict(fsdp=2, expert=4), dict(fsdp=2, tensor=2)], ids=str)
def test_weights_for_decoding_are_whole_over_fsdp_and_cast(sizes):
    """What a loop over tokens reads is gathered before it: on GPUs a loop that gathers is not mended by the compiler
    (benchmarks/compiled.py, decode-1b-fsdp)."""
    mesh = mesh_of(**sizes)
    with sharding.use_mesh(mesh):
        params = init_params(transformer_spec(SPARSE), jax.random.key(0), mesh)
        laid_out = jax.jit(for_decoding, static_argnums=1)(params, SPARSE)
    axes = dict.fromkeys(("fsdp", "data"), 1) | {name: sizes.get(name, 1) for name in ("expert", "tensor")}
    for layer in laid_out.blocks:
        gate, router = layer.mlp.gate, layer.mlp.router
        assert gate.dtype == layer.attention.q.dtype == jnp.bfloat16 and router.dtype == layer.mlp_norm.dtype == jnp.float32
        assert gate.addressable_shards[0].data.size * axes["expert"] * axes["tensor"] == gate.size
        assert layer.attention.q.addressable_shards[0].data.size * axes["tensor"] == layer.attention.q.size
    assert laid_out.embed.dtype == jnp.bfloat16
    assert laid_out.embed.addressable_shards[0].data.size * axes["tensor"] == laid_out.embed.size


HLO = """HloModule jit_step

%body.1 (arg: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %gather = bf16[64,4]{1,0} all-gather(%x), channel_id=3, replica_groups=[1,8]<=[8], dimensions={0}
  %scatter-start = ((f32[64,4]{1,0}), (f32[8,4]{1,0})) reduce-scatter-start(%y), channel_id=4, replica_groups={{0,1,2,3}}
}

%condition.1 (arg: (s32[], f32[8,4])) -> pred[] {
  %bound = s32[] constant(5)
}

%turn.1 (arg: (s32[])) -> (s32[]) {
  %reduce-start = f32[10]{0} all-reduce-start(%z), channel_id=5, replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%sum
}

%open.1 (arg: (s32[])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %loop = (s32[], f32[8,4]) while(%t), condition=%condition.1, body=%body.1
  %known = (s32[], f32[8,4]) while(%t), condition=%condition.1, body=%body.1, backend_config={"known_trip_count":{"n":"3"}}
  %waits = (s32[]) while(%t), condition=%open.1, body=%turn.1
}
"""


def test_reading_a_program():
    assert computations(HLO)[1] == "main"
    assert {(times, turn) for line, times, turn in walk(HLO) if "all-gather(" in line} == {(5, False), (3, False)}
    assert sent(HLO) == {
        ("all-gather", "bf16"): 8 * 64 * 4 * 2 * 7 / 8,
        ("reduce-scatter", "f32"): 8 * 8 * 4 * 4 * 3,
        ("all-reduce", "f32 a turn"): 10 * 4 * 2 * 3 / 4,
    }


@pytest.mark.parametrize("text, size", [
    ("replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_0'}", 8), ("replica_groups=mesh['x'=4,'y'=2] {'x','y'}", 8),
    ("replica_groups=[4,2]<=[8]", 2), ("replica_groups={{0,1,2},{3,4,5}}", 3), ("source_target_pairs={{0,1}}", 2),
])  # fmt: skip
def test_how_many_talk(text, size):
    assert group_size(text) == size
