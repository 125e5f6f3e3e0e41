"""Where arrays live: mesh, the one rule table, and the helpers through which models touch a mesh.

Models are written once, in axis letters, and run in three situations:

* no mesh (one device, or inside `shard_map`): matrix products over tokens are flattened to two dimensions, which is the
  difference between half and full speed on CPU and costs nothing elsewhere;
* a mesh with Auto axes: the helpers place sharding constraints, the compiler does the rest;
* a mesh with Explicit axes: the helpers state every output sharding, shardings are part of the types.

Parameters are stored by `RULES` (fully sharded over `fsdp`, `tensor`, `expert`); for a computation the `embed` axis of a
weight is gathered first, as in ZeRO-3 (Rajbhandari et al. 2020, arXiv:1910.02054).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llmjax.config import PositiveInt
from llmjax.errors import UserError
from llmjax.typing import LOGICAL_AXES, Array

MESH_AXES = ("data", "fsdp", "expert", "tensor")

# Logical axis -> mesh axes. An absent axis is replicated.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "embed": ("fsdp", "expert"),  # the second where a parameter has no axis of experts
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "vocab": ("tensor",),
    "expert": ("expert",),
}
BATCH_AXES = RULES["batch"]


@dataclass(frozen=True)
class MeshConfig:
    """How many devices along each mesh axis; their product is the number of devices used.

    data: batch split, parameters copied. fsdp: batch split, parameters split. expert: batch split, experts split.
    tensor: heads and feed-forward width split. mode: "auto" (compiler propagates) or "explicit" (shardings in types).
    """

    data: PositiveInt = 1
    fsdp: PositiveInt = 1
    expert: PositiveInt = 1
    tensor: PositiveInt = 1
    mode: Literal["auto", "explicit"] = "auto"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in MESH_AXES)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def batch_shards(self) -> int:
        """Number of parts into which a batch is split."""
        return math.prod(getattr(self, axis) for axis in BATCH_AXES)

    def rows(self, count: int) -> int:
        """The smallest number of rows that holds `count` and is split evenly."""
        return -(-count // self.batch_shards) * self.batch_shards

    def describe(self) -> str:
        return " x ".join(f"{a}={n}" for a, n in zip(MESH_AXES, self.shape) if n > 1) or "one device"


def make_mesh(cfg: MeshConfig) -> Mesh | None:
    """The device mesh of `cfg`, or None for a single device. Raises UserError when there are too few devices."""
    if cfg.size == 1:
        return None
    devices = jax.devices()
    if cfg.size > len(devices):
        cpu = f"; on CPU add --cpu_devices={cfg.size}" if devices[0].platform == "cpu" else ""
        raise UserError(f"mesh: {cfg.describe()} needs {cfg.size} devices, {len(devices)} found; lower --config.mesh.*{cpu}")
    kind = AxisType.Explicit if cfg.mode == "explicit" else AxisType.Auto
    return jax.make_mesh(cfg.shape, MESH_AXES, axis_types=(kind,) * len(MESH_AXES), devices=devices[: cfg.size])


def use_mesh(mesh: Mesh | None):
    """Context in which the helpers below see `mesh` (no-op for None)."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def platform() -> str:
    """What is computed on, such as "cpu" or "tpu": where the mesh in use is, without one JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def check_batch(name: str, batch_size: int, cfg: MeshConfig) -> None:
    """Refuses a batch that the mesh cannot split evenly."""
    if batch_size % cfg.batch_shards:
        near = max(1, round(batch_size / cfg.batch_shards)) * cfg.batch_shards
        raise UserError(
            f"{name}={batch_size} is not divisible by the {cfg.batch_shards} batch shards of the mesh "
            f"({cfg.describe()}); use {name}={near}"
        )


def _active_mesh():
    """The surrounding mesh if an axis of it is still to be sharded over, else None (no mesh, or inside shard_map)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or all(kind == AxisType.Manual for kind in mesh.axis_types):
        return None
    return mesh


def _is_explicit(mesh) -> bool:
    return any(kind == AxisType.Explicit for kind in mesh.axis_types)


def partition_spec(axes: Sequence[str | None], *, gathered: bool = False) -> PartitionSpec:
    """Logical axes -> PartitionSpec by `RULES`; `gathered` leaves `embed` whole, as in a computation."""
    used: set[str] = set()
    entries = []
    for axis in axes:
        mesh_axes = () if axis is None or (gathered and axis == "embed") else RULES.get(axis, ())
        mesh_axes = tuple(a for a in mesh_axes if a not in used)
        used.update(mesh_axes)
        entries.append(mesh_axes if len(mesh_axes) > 1 else (mesh_axes[0] if mesh_axes else None))
    return PartitionSpec(*entries)


def letters_spec(letters: str) -> PartitionSpec:
    """Sharding in a computation of an array whose axes are `letters` of the glossary ("." for any other axis); behind a "=",
    as a parameter with these axes is stored."""
    axes = [LOGICAL_AXES.get(letter) for letter in letters.removeprefix("=")]
    return partition_spec(axes, gathered=not letters.startswith("="))


def named_sharding(mesh: Mesh | None, axes: Sequence[str | None], shape: Sequence[int], name: str):
    """Storage sharding of one leaf; raises UserError, in words, when an axis does not divide.

    With no mesh: the sharding of the default device, so that restoring a checkpoint always has a target.
    """
    if mesh is None:
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    spec = partition_spec(axes)
    for dim, axis, entry in zip(shape, axes, spec):
        split = [one for one in _axes(entry) if mesh.shape[one] > 1]
        parts = math.prod(mesh.shape[one] for one in split)
        if dim % parts:
            raise UserError(
                f"mesh: {name} has {axis}={dim}, which the mesh axes {' and '.join(split)} split into {parts} unequal parts; "
                f"choose a {axis} size divisible by {parts} or a smaller --config.mesh.{split[0]}"
            )
    return NamedSharding(mesh, spec)


def constrain(x: Array, letters: str) -> Array:
    """States that `x`, with axes `letters`, is sharded as computations shard it. Identity without a mesh."""
    return _constrained(x, letters_spec(letters))


def _constrained(x: Array, spec: PartitionSpec) -> Array:
    mesh = _active_mesh()
    if mesh is None:
        return x
    return jax.sharding.reshard(x, spec) if _is_explicit(mesh) else jax.lax.with_sharding_constraint(x, spec)


def place(x: Array, axes: Sequence[str | None], stored: bool = False) -> Array:
    """States that a parameter with these logical axes is sharded as computations read it, or as it is stored. Identity
    without a mesh."""
    return _constrained(x, partition_spec(axes, gathered=not stored))


def gathered(w: Array, letters: str, dtype) -> Array:
    """A stored weight as a computation in `dtype` reads it: cast where it lies, then gathered over fsdp.

    Were the cast not tied to the stored shards, XLA would move it behind the gather, and send float32.
    """
    if w.dtype != dtype:
        w = constrain(w.astype(dtype), f"={letters}")
    return constrain(w, letters)


def cast_to_send(w: Array, dtype) -> Array:
    """A stored weight in `dtype`, where there is a mesh to gather it over; else as it is, to be cast where it is read."""
    return w if _active_mesh() is None else w.astype(dtype)


def einsum(equation: str, x: Array, w: Array, *, out_dtype=None, precision: jax.lax.Precision | None = None) -> Array:
    """The einsum of activations `x` with a weight `w`, in glossary letters, e.g. "BTD,DF->BTF", in the dtype of x.

    Without a mesh, the leading letters of `x` are flattened so that the product and both its gradients are plain 2-D
    matrix products. On a mesh, `w` is gathered over fsdp and the output is sharded by its letters. `out_dtype` asks for
    accumulation and output in that dtype (float32 for logits). `precision`: HIGHEST for products whose factors must not be
    rounded (TPUs round float32 to bfloat16 by default, GPUs to TF32).
    """
    inputs, out = equation.split("->")
    x_letters, w_letters = inputs.split(",")
    mesh, w = _active_mesh(), gathered(w, w_letters, x.dtype)
    if mesh is None:
        return _flat_einsum(x_letters, w_letters, out, x, w, out_dtype, precision)
    if _is_explicit(mesh):
        where = letters_spec(out)
        return jnp.einsum(equation, x, w, precision=precision, preferred_element_type=out_dtype, out_sharding=where)
    return constrain(jnp.einsum(equation, x, w, precision=precision, preferred_element_type=out_dtype), out)


def _flat_einsum(x_letters: str, w_letters: str, out: str, x: Array, w: Array, out_dtype, precision) -> Array:
    shared = [c for c in x_letters if c in w_letters]
    contracted = "".join(shared)
    kept = x_letters[: len(x_letters) - len(contracted)]
    new = "".join(c for c in w_letters if c not in contracted)
    plain = x_letters == kept + contracted and out == kept + new and w_letters in (contracted + new, new + contracted)
    if not plain:
        raise ValueError(f"{x_letters},{w_letters}->{out}: not a product of tokens with one weight matrix")
    rows = math.prod(x.shape[: len(kept)])
    inner = math.prod(x.shape[len(kept) :])
    outer = math.prod(w.shape) // inner
    new_shape = tuple(w.shape[w_letters.index(c)] for c in new)
    w_first = w_letters.startswith(contracted)
    w_2d = w.reshape((inner, outer) if w_first else (outer, inner))
    dims = (((1,), (0 if w_first else 1,)), ((), ()))
    y = jax.lax.dot_general(x.reshape(rows, inner), w_2d, dims, precision, preferred_element_type=out_dtype)
    return y.reshape(x.shape[: len(kept)] + new_shape)


def local(fn: Callable, in_letters: Sequence[str], out_letters: Sequence[str] | str) -> Callable:
    """`fn` on the local part of each argument (shard_map over the whole mesh); `fn` itself without a mesh.

    The letters say how each argument and result is sharded ("." for an axis that is not). Kernels that loop, sort or
    reshape run inside it, where they see plain local arrays. A "=" before the letters of a parameter: it comes as it is stored
    and is gathered inside, so that its gradient is a reduce-scatter; that of one that came gathered is an all-reduce of all.
    """
    mesh = _active_mesh()
    if mesh is None:
        return fn

    def with_whole(*args):
        return fn(*(_whole(a, letters) for a, letters in zip(args, in_letters, strict=True)))

    in_specs = tuple(letters_spec(letters) for letters in in_letters)
    single = isinstance(out_letters, str)
    out_specs = letters_spec(out_letters) if single else tuple(letters_spec(letters) for letters in out_letters)
    mapped = jax.shard_map(with_whole, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return lambda *args: mapped(*(constrain(a, letters) for a, letters in zip(args, in_letters)))


def local_stored(fn: Callable, in_axes: Sequence[Sequence[str | None]], out_axes: Sequence[str | None]) -> Callable:
    """Like `local`, on parameters as they are stored: each argument and the result by its logical axes."""
    mesh = _active_mesh()
    if mesh is None:
        return fn
    in_specs = tuple(partition_spec(axes) for axes in in_axes)
    return jax.shard_map(fn, in_specs=in_specs, out_specs=partition_spec(out_axes), check_vma=False)


def _whole(w: Array, letters: str) -> Array:
    """Inside `local`: an argument as a computation reads it, gathered from its stored parts ("=VD")."""
    if not letters.startswith("="):
        return w
    for dim, (stored, read) in enumerate(zip(letters_spec(letters), letters_spec(letters[1:]), strict=True)):
        axes = tuple(axis for axis in _axes(stored) if axis not in _axes(read) and axis_size(axis) > 1)
        if axes:
            w = jax.lax.all_gather(w, axes, axis=dim, tiled=True)
    return w


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else entry or ()


def axis_size(name: str) -> int:
    """Number of devices along mesh axis `name` in the surrounding `local` region; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape.get(name, 1)


def mesh_axis_size(name: str) -> int:
    """Number of devices along axis `name` of the surrounding mesh, outside of `local`; 1 without a mesh."""
    mesh = _active_mesh()
    return 1 if mesh is None else mesh.shape[name]


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh | None) -> dict[str, Array]:
    """Host arrays [B, ...] -> device arrays split over the batch axes. Every process passes the same global batch."""
    if mesh is None:
        return {name: jnp.asarray(value) for name, value in batch.items()}
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))

    def put(value):
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return {name: put(np.asarray(value)) for name, value in batch.items()}
