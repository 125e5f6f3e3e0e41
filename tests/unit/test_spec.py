"""One spec per leaf: what follows from it agrees with it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from llmjax import sharding
from llmjax.models.spec import ParamSpec, abstract_params, init_params, is_spec, num_params, shardings
from llmjax.models.transformer import transformer_spec
from llmjax.sharding import MeshConfig

# Few leaves: drawing normals is slow to compile.
SPECS = {
    "matrix": ParamSpec((64, 32), ("embed", "mlp"), std=0.5),
    "scale": ParamSpec((32,), (None,), constant=1.5),
    "stack": ParamSpec((8, 4), ("mlp", None), std=2.0).stacked(3),
}


@pytest.fixture(scope="module")
def params():
    return init_params(SPECS, jax.random.key(0))


def test_a_leaf_is_drawn_as_its_spec_says(params):
    assert abs(float(jnp.std(params["matrix"])) - 0.5) < 0.05 and abs(float(jnp.mean(params["matrix"]))) < 0.05
    assert np.all(params["scale"] == 1.5)
    assert params["stack"].shape == (3, 8, 4) and SPECS["stack"].axes == ("layers", "mlp", None)
    assert len(np.unique(params["stack"])) == 96  # no layer is a copy of another


def test_init_depends_on_the_key_and_on_no_other_leaf(params):
    alone = init_params({"stack": SPECS["stack"]}, jax.random.key(0))
    tiny.assert_trees_equal(alone["stack"], params["stack"])
    other = init_params({"stack": SPECS["stack"]}, jax.random.key(1))
    assert not np.any(other["stack"] == params["stack"])
    renamed = init_params({"other": SPECS["stack"]}, jax.random.key(0))
    assert not np.any(renamed["other"] == params["stack"])


def test_init_does_not_depend_on_the_mesh(params):
    mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
    placed = init_params(SPECS, jax.random.key(0), mesh)
    assert placed["matrix"].sharding.spec == jax.sharding.PartitionSpec(("fsdp", "expert"), "tensor")
    # The same random bits; newer XLA rounds the last place of a sharded draw differently.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-6, atol=1e-6), placed, params)


def test_abstract_params_are_the_shapes_dtypes_and_places_of_the_real_ones(params):
    mesh = sharding.make_mesh(MeshConfig(fsdp=2))
    for abstract, spec in zip(jax.tree.leaves(abstract_params(SPECS, mesh)), SPECS.values()):
        assert (abstract.shape, abstract.dtype) == (spec.shape, spec.dtype)
    assert jax.tree.map(lambda a: a.sharding, abstract_params(SPECS, mesh)) == shardings(SPECS, mesh)
    got = jax.tree.map(lambda p: (p.shape, p.dtype, p.sharding), params)
    assert got == jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), abstract_params(SPECS))


def test_every_leaf_of_a_model_has_one_axis_per_dimension_and_knows_it():
    known = set(sharding.LOGICAL_AXES.values())
    for cfg in tiny.MODELS.values():
        for spec in jax.tree.leaves(transformer_spec(cfg), is_leaf=is_spec):
            assert len(spec.axes) == len(spec.shape) and {a for a in spec.axes if a} <= known
    with pytest.raises(ValueError, match="differ in length"):
        ParamSpec((2, 3), ("embed",))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_number_of_parameters(name, tied):
    cfg = dataclasses.replace(tiny.MODELS[name], tie_embeddings=tied)
    specs = transformer_spec(cfg)
    assert num_params(specs) == sum(leaf.size for leaf in jax.tree.leaves(tiny.draw(specs)))
