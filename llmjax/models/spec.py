"""One `ParamSpec` per leaf, from which initialisation, sharding, checkpoint targets and parameter counts follow."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llmjax import sharding
from llmjax.typing import Array, PRNGKeyArray

PyTree = Any


@dataclass(frozen=True)
class ParamSpec:
    """What one parameter is. axes: a logical axis per dimension. std: of the normal initialiser; constant: instead of it."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    std: float = 0.0
    constant: float | None = None
    dtype: Any = jnp.float32

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")

    def stacked(self, num_layers: int) -> "ParamSpec":
        """The spec of `num_layers` such leaves in one array."""
        return ParamSpec((num_layers, *self.shape), ("layers", *self.axes), self.std, self.constant, self.dtype)

    def init(self, key: PRNGKeyArray) -> Array:
        if self.constant is not None:
            return jnp.full(self.shape, self.constant, self.dtype)
        return self.std * jax.random.normal(key, self.shape, self.dtype)


def param(
    shape: tuple[int, ...], axes: tuple[str | None, ...], std: float = 0.0, constant: float | None = None
) -> Any:
    """A `ParamSpec`, for the type checker anything: in a tree of specs it stands where the array will be."""
    return ParamSpec(shape, axes, std, constant)


def is_spec(x: Any) -> bool:
    """Whether x is a leaf of a tree of specs."""
    return isinstance(x, ParamSpec)


def init_params(specs: PyTree, key: PRNGKeyArray, mesh: Mesh | None = None) -> PyTree:
    """Draws parameters, each leaf from its own key (folded with a hash of its path), straight onto the mesh.

    The values do not depend on the mesh, nor on which other leaves exist.
    """

    def draw(key):
        def one(path, spec):
            return spec.init(jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode())))

        return jax.tree_util.tree_map_with_path(one, specs, is_leaf=is_spec)

    # It runs once: on CPU LLVM would spend more time on optimising it than it can save, and the numbers are the same.
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    return jax.jit(draw, out_shardings=shardings(specs, mesh), compiler_options=options)(key)


def shardings(specs: PyTree, mesh: Mesh | None) -> PyTree:
    """Storage sharding of every leaf."""

    def one(path, spec):
        return sharding.named_sharding(mesh, spec.axes, spec.shape, jax.tree_util.keystr(path).strip("."))

    return jax.tree_util.tree_map_with_path(one, specs, is_leaf=is_spec)


def abstract_params(specs: PyTree, mesh: Mesh | None = None) -> PyTree:
    """ShapeDtypeStructs with shardings: what a checkpoint is restored into. Allocates nothing."""
    return jax.tree.map(
        lambda spec, place: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=place),
        specs,
        shardings(specs, mesh),
        is_leaf=is_spec,
    )


def num_params(specs: PyTree) -> int:
    """Numbers in all leaves together."""
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(specs, is_leaf=is_spec))
