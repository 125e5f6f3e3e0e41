"""What compiled programs send between devices, read from their text: no weight twice, none in a loop over tokens."""

import dataclasses
import math
from functools import partial

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, Mesh

from benchmarks.compiled import computations, group_size, sent, walk
from llmjax import sharding
from llmjax.generation.decode import generate
from llmjax.generation.sampling import SamplingConfig
from llmjax.models.spec import abstract_params
from llmjax.models.stats import total_params
from llmjax.models.transformer import transformer_spec
from llmjax.objectives.lm import lm_loss
from llmjax.training.optimizer import OptimizerConfig
from llmjax.training.program import abstract_batch, language_batch, train_program

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
    """Weights twice (forward, and again for the backward pass), their gradients once; nothing as an all-reduce but scalars."""
    n, found = 8, sent(compiled_step(MODEL, mesh_of(fsdp=8)))
    weights = 4 * total_params(MODEL) * (n - 1) / n
    by_kind = {kind: sum(size for (one, _), size in found.items() if one == kind) for kind, _ in found}
    assert by_kind["all-gather"] <= 2.1 * weights
    others = by_kind.get("reduce-scatter", 0) + by_kind.get("all-reduce", 0) / 2  # XLA:CPU writes some as all-reduce and slice
    assert 0.8 * weights <= others <= 1.15 * weights


SPARSE = dataclasses.replace(MODEL, moe=dataclasses.replace(tiny.SPARSE.moe, num_experts=8, mlp_dim=256))


@pytest.mark.parametrize("cfg, mesh", [
    (MODEL, dict(fsdp=8)), (SPARSE, dict(fsdp=8)), (SPARSE, dict(fsdp=4, expert=2)), (MODEL, dict(fsdp=4, tensor=2)),
], ids=["dense", "sparse", "sparse, experts split", "dense, tensor"])  # fmt: skip
def test_no_weight_is_sent_for_each_token(cfg, mesh):
    """What a token sends is its own: hidden states, to experts and over `tensor`, and logits: less than the smallest matrices."""
    mesh = mesh_of(**mesh)
    prompt = abstract_batch(dict.fromkeys(("tokens", "segment_ids"), (8, 16)), mesh)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 8))
    write = partial(generate, cfg=cfg, sampling=SamplingConfig(8), stop_ids=(1,), pad_id=0)
    with sharding.use_mesh(mesh):
        params = abstract_params(transformer_spec(cfg), mesh)
        text = jax.jit(write).lower(params, prompt["tokens"], prompt["segment_ids"], keys).compile().as_text()
    found = sent(text)
    turns = sum(size for (_, dtype), size in found.items() if dtype.endswith("a turn"))
    assert turns < 8000 < 4 * 4096 * 7 / 8  # bytes; the smallest matrix is of 4,096, in each of 4 layers
    assert sum(found.values()) > 0.4 * 4 * total_params(cfg)  # it was sent before


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
