"""Rules from logical axes to mesh axes, the einsum helper, and errors in words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from llmjax import sharding
from llmjax.config import validate
from llmjax.errors import UserError
from llmjax.models.spec import init_params
from llmjax.models.transformer import transformer_spec
from llmjax.sharding import MeshConfig


def test_parameters_are_stored_split_and_computed_with_whole_rows():
    axes = ("layers", "expert", "embed", "mlp")
    assert sharding.partition_spec(axes) == P(None, "expert", "fsdp", "tensor")
    assert sharding.partition_spec(axes, gathered=True) == P(None, "expert", None, "tensor")
    assert sharding.letters_spec("BTD") == P(("data", "fsdp", "expert"), None, None)
    assert sharding.letters_spec("B.V") == P(("data", "fsdp", "expert"), None, "tensor")


def test_no_mesh_axis_is_used_twice():
    assert sharding.partition_spec(("mlp", "heads")) == P("tensor", None)
    assert sharding.partition_spec(("batch", "embed")) == P(("data", "fsdp", "expert"), None)
    assert sharding.partition_spec(("embed", "batch")) == P(("fsdp", "expert"), "data")
    assert sharding.partition_spec(("expert", "embed", "mlp")) == P("expert", "fsdp", "tensor")


EQUATIONS = ["BTD,DF->BTF", "BTD,DNH->BTNH", "BTNH,NHD->BTD", "BTD,VD->BTV", "BTD,DE->BTE"]


@pytest.mark.parametrize("equation", EQUATIONS)
def test_einsum_without_a_mesh_is_einsum(equation):
    sizes = dict(B=2, T=3, D=4, F=5, N=2, H=3, V=7, E=6)
    x_letters, w_letters = equation.split("->")[0].split(",")
    rng = np.random.default_rng(0)
    x, w = (rng.normal(size=[sizes[c] for c in letters]).astype(np.float32) for letters in (x_letters, w_letters))
    np.testing.assert_allclose(sharding.einsum(equation, x, w), np.einsum(equation, x, w), atol=1e-5)
    low = sharding.einsum(equation, jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16), out_dtype=jnp.float32)
    assert low.dtype == jnp.float32


@pytest.mark.parametrize("equation", ["BTD,DF->BFT", "BTD,BD->BT", "BTD,FDE->BTFE"])
def test_einsum_refuses_what_is_not_a_product_with_one_weight_matrix(equation):
    sizes = dict(B=2, T=3, D=4, F=5, E=6)
    x_letters, w_letters = equation.split("->")[0].split(",")
    x, w = (jnp.ones([sizes[c] for c in letters]) for letters in (x_letters, w_letters))
    with pytest.raises(ValueError, match="not a product of tokens"):
        sharding.einsum(equation, x, w)


def test_without_a_mesh_the_helpers_do_nothing():
    x = jnp.ones((2, 3))
    assert sharding.make_mesh(MeshConfig()) is None
    assert sharding.constrain(x, "BT") is x
    assert sharding.local(len, ["BT"], "B") is len
    assert sharding.axis_size("tensor") == 1
    with sharding.use_mesh(None):
        assert sharding.constrain(x, "BT") is x
    got = sharding.put_batch({"tokens": np.arange(4)}, None)
    np.testing.assert_array_equal(got["tokens"], np.arange(4))


def test_a_batch_is_split_over_the_batch_axes():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    value = np.arange(24, dtype=np.int32).reshape(8, 3)
    got = sharding.put_batch({"tokens": value}, mesh)["tokens"]
    np.testing.assert_array_equal(got, value)
    assert {shard.data.shape for shard in got.addressable_shards} == {(2, 3)}


def test_too_few_devices():
    with pytest.raises(UserError, match=r"data=3 x tensor=4 needs 12 devices, 8 found; .*--cpu_devices=12"):
        sharding.make_mesh(MeshConfig(data=3, tensor=4))
    with pytest.raises(UserError, match="fsdp=0 must be positive"):
        validate(MeshConfig(fsdp=0))


def test_a_batch_that_does_not_divide():
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    sharding.check_batch("pretrain.batch_size", 12, mesh)
    words = r"pretrain.batch_size=10 is not divisible by the 4 batch shards .*data=2 x fsdp=2.*batch_size=8"
    with pytest.raises(UserError, match=words):
        sharding.check_batch("pretrain.batch_size", 10, mesh)
    with pytest.raises(UserError, match="use batch_size=4"):
        sharding.check_batch("batch_size", 1, mesh)


@pytest.mark.parametrize(
    "mesh, words",
    [
        (dict(tensor=4), r"blocks.attention.k has kv_heads=2, .*tensor.* into 4 unequal parts"),
        (dict(fsdp=3), r"embed has embed=16, .*fsdp.* into 3 unequal parts"),
        (dict(expert=8), r"blocks.mlp.gate has expert=4, .*expert.* into 8 unequal parts"),
    ],
)
def test_a_model_that_does_not_divide(mesh, words):
    with pytest.raises(UserError, match=words) as error:
        init_params(transformer_spec(tiny.SPARSE), jax.random.key(0), sharding.make_mesh(MeshConfig(**mesh)))
    assert "\n" not in str(error.value) and "--config.mesh." in str(error.value)


def test_sizes_and_description_of_a_mesh():
    mesh = MeshConfig(data=2, fsdp=3, expert=4, tensor=5)
    assert (mesh.size, mesh.batch_shards) == (120, 24)
    assert mesh.describe() == "data=2 x fsdp=3 x expert=4 x tensor=5"
    assert MeshConfig().describe() == "one device"
