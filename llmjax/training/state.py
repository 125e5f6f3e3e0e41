"""What a training stage is made of between two steps, and the compiled step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmjax.models.spec import abstract_params
from llmjax.typing import Array

PyTree = Any
LossFn = Callable[..., tuple[Array, dict[str, Array]]]
"""(params, batch, key, *frozen) -> (loss, metrics); frozen: parameters that take part and are not trained."""


@struct.dataclass
class TrainState:
    """step: scalar int32, updates made. params, opt_state: pytrees. Keys and data order follow from the step alone."""

    step: Array
    params: PyTree
    opt_state: PyTree


def abstract_state(specs: PyTree, tx: optax.GradientTransformation, mesh: Mesh | None) -> TrainState:
    """Shapes, dtypes and shardings of a state: where a checkpoint is restored to. Optimizer moments lie like their
    parameters, everything else is on every device."""
    params = abstract_params(specs, mesh)
    single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    everywhere = single if mesh is None else NamedSharding(mesh, PartitionSpec())
    opt_state = optax.tree_utils.tree_map_params(
        tx.init,
        lambda moment, param: jax.ShapeDtypeStruct(moment.shape, moment.dtype, sharding=param.sharding),
        jax.eval_shape(tx.init, params),
        params,
        transform_non_params=lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
    )
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    return TrainState(step, params, opt_state)


def init_state(params: PyTree, tx: optax.GradientTransformation, abstract: TrainState) -> TrainState:
    """A state at step 0 around `params`, each part on its place. The params are copied, so they may be used elsewhere
    although training donates its state."""
    places = jax.tree.map(lambda x: x.sharding, abstract)

    def build(params):
        return TrainState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), tx.init(params))

    return jax.jit(build, out_shardings=places)(params)


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    abstract: TrainState,
    after: Callable[[PyTree, dict[str, Array]], PyTree] | None = None,
    learning_rate: Callable[[PyTree], Array] | None = None,
):
    """(state, batch, key, *frozen) -> (state, metrics), compiled; the old state is donated.

    metrics: what the loss reports, and grad_norm: the global norm of the gradient before clipping. after(params, metrics)
    -> params is called once behind the optimizer's update, for what moves by no gradient. learning_rate(opt_state) is reported
    too.
    """
    places = jax.tree.map(lambda x: x.sharding, abstract)

    def step(state: TrainState, batch, key, *frozen):
        grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params, batch, key, *frozen)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params = params if after is None else after(params, metrics)
        metrics = metrics | {"grad_norm": optax.tree.norm(grads)}
        if learning_rate is not None:
            metrics["learning_rate"] = learning_rate(state.opt_state)
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(places, None))
