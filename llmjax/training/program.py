"""What a stage is going to compute, before it has weights or data: training runs it, benchmarks time it, plans compile it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmjax.sharding import BATCH_AXES
from llmjax.training.optimizer import (
    OptimizerConfig,
    learning_rate_schedule,
    make_optimizer,
    short_of_peak,
    updates_made,
)
from llmjax.training.state import LossFn, TrainState, abstract_state, init_state, make_train_step

PyTree = Any


@dataclass(frozen=True)
class Program:
    """A compiled function and the shapes it is called with.

    fn: under `jax.jit`. args: ShapeDtypeStructs with shardings. tokens: of one call, padding included. flops_per_token: of
    matrix products (0: not known).
    """

    fn: Any
    args: tuple[PyTree, ...]
    tokens: int
    flops_per_token: float

    def lower(self) -> Any:
        """The program for the devices that `args` name, ready to be compiled; nothing is allocated."""
        return self.fn.lower(*self.args)


@dataclass(frozen=True)
class TrainProgram(Program):
    """One update: fn(state, batch, key, *frozen) -> (state, metrics); the old state is donated.

    specs: the `ParamSpec` of what is trained. optimizer: made from its config. state: abstract, what checkpoints hold.
    note: what is to be said before training, "" for nothing.
    """

    specs: PyTree
    optimizer: optax.GradientTransformation
    state: TrainState
    note: str = ""

    @property
    def length(self) -> int:
        """Tokens of the longest text of a batch: its arrays are [B, ..., T]."""
        return max((one.shape[-1] for one in jax.tree.leaves(self.args[1]) if len(one.shape) > 1), default=0)

    def init(self, params: PyTree) -> TrainState:
        """The state at step 0 around `params`."""
        return init_state(params, self.optimizer, self.state)


def train_program(
    loss_fn: LossFn,
    specs: PyTree,
    optimizer: OptimizerConfig,
    num_updates: int,
    batch: Mapping[str, jax.ShapeDtypeStruct],
    mesh: Mesh | None,
    *,
    tokens: int,
    flops_per_token: float,
    frozen: Sequence[PyTree] = (),
    after: Callable[[PyTree, dict[str, Any]], PyTree] | None = None,
    rates: Sequence[float] = (),
) -> TrainProgram:
    """The update of `loss_fn` with the optimizer that `num_updates` updates are planned for.

    batch: shapes, as `abstract_batch` makes them. frozen: abstract parameters that the loss sees behind its key and that
    stay as they are. after: as in `make_train_step`. rates: as in `make_optimizer`.
    """
    tx = make_optimizer(optimizer, num_updates, specs, rates)
    state = abstract_state(specs, tx, mesh)
    key = jax.eval_shape(jax.random.key, 0)
    schedule, note = learning_rate_schedule(optimizer, num_updates), short_of_peak(optimizer, num_updates)
    step = make_train_step(loss_fn, tx, state, after, lambda opt_state: jnp.asarray(schedule(updates_made(opt_state))))
    return TrainProgram(step, (state, dict(batch), key, *frozen), tokens, flops_per_token, specs, tx, state, note)


def abstract_batch(
    shapes: Mapping[str, tuple[int, ...]], mesh: Mesh | None, dtypes: Mapping[str, Any] | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Arrays [B, ...] by name as `put_batch` lays them out: int32 but for what `dtypes` names."""
    place = None if mesh is None else NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    return {
        name: jax.ShapeDtypeStruct(shape, np.dtype((dtypes or {}).get(name, jnp.int32)), sharding=place)
        for name, shape in shapes.items()
    }


def language_batch(batch_size: int, length: int, mesh: Mesh | None) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch of a language-model loss, each [B, T] int32."""
    names = ("inputs", "targets", "segment_ids", "positions", "loss_mask")
    return abstract_batch(dict.fromkeys(names, (batch_size, length)), mesh)
