"""Programs compiled ahead of time for TPUs that are not here; needs `libtpu`, which is no dependency."""

import dataclasses
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding

from llmjax import sharding
from llmjax.models.moe import moe_layer, moe_spec
from llmjax.models.spec import abstract_params

pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def mesh_of_tpus(monkeypatch, expert: int) -> Mesh:
    """A mesh of the eight chips of a v5litepod-8."""
    for name, value in {"SKIP_MDS_QUERY": "1", "ACCELERATOR_TYPE": "v5litepod-8", "WORKER_HOSTNAMES": "localhost"}.items():
        monkeypatch.setenv(f"TPU_{name}", value)
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # by tests that run beside each other
    devices = np.array(topologies.get_topology_desc("v5e:2x4", "tpu").devices)
    return Mesh(devices.reshape(8 // expert, 1, expert, 1), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 4)


@pytest.mark.parametrize("expert", [8, 4])
def test_experts_exchange_by_the_ragged_all_to_all(monkeypatch, expert):
    mesh = mesh_of_tpus(monkeypatch, expert)
    moe = dataclasses.replace(tiny.SPARSE.moe, num_experts=16, mlp_dim=128, expert_parallel="all_to_all", exchange_factor=1.5)
    cfg = dataclasses.replace(tiny.SPARSE, embed_dim=128, moe=moe)
    w = abstract_params(moe_spec(cfg), mesh)
    batch = NamedSharding(mesh, sharding.letters_spec("BTD"))
    x = jax.ShapeDtypeStruct((8, 128, 128), jnp.bfloat16, sharding=batch)

    def loss(w, x):
        return jnp.sum(moe_layer(w, x, jnp.ones(x.shape[:2], jnp.int32), cfg)[0].astype(jnp.float32))

    with sharding.use_mesh(mesh):
        text = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(w, x).compile().as_text()
    # Tokens, ids of experts and answers go; gradients of the first and the last come back.
    assert len(re.findall(r"ragged-all-to-all(-start)?\(", text)) >= 5
    assert not re.findall(r" (f32|bf16)\S* all-to-all(-start)?\(", text)  # the other one exchanges sizes alone
