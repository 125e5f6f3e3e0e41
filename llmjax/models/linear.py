"""The product of tokens with a weight matrix, which may carry a low-rank update."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct

from llmjax import sharding
from llmjax.typing import Array


@struct.dataclass
class LowRank:
    """An update of a weight [in..., out...]: a [in..., r] times b [r, out...]; both may carry leading axes L and E."""

    a: Array
    b: Array


@struct.dataclass
class Adapted:
    """A weight that is used as base + scale * a b (Hu et al. 2021, arXiv:2106.09685, eq. 3)."""

    base: Array
    update: LowRank
    scale: float = struct.field(pytree_node=False)


Weight = Array | Adapted


def linear(equation: str, x: Array, w: Weight) -> Array:
    """`sharding.einsum` of tokens with a weight.

    An adapted weight multiplies by its two factors, so that the gradient of the base is never needed.
    """
    if not isinstance(w, Adapted):
        return sharding.einsum(equation, x, w)
    inputs, out = equation.split("->")
    x_letters, w_letters = inputs.split(",")
    shared = "".join(c for c in w_letters if c in x_letters)
    new = "".join(c for c in w_letters if c not in x_letters)
    kept = "".join(c for c in x_letters if c not in shared)
    down = sharding.einsum(f"{x_letters},{shared}r->{kept}r", x, w.update.a)
    up = sharding.einsum(f"{kept}r,r{new}->{out}", down, w.update.b)
    return sharding.einsum(equation, x, w.base) + w.scale * up


def full_weight(w: Weight, letters: str, num_leading: int, num_in: int) -> Array:
    """The weight as one array, for computations that are no `linear`; letters: its axes, in a computation.

    num_leading, num_in: how many of the axes come before the inputs, and how many are inputs.
    """
    if not isinstance(w, Adapted):
        return w
    split = num_leading + num_in

    def add(base, a, b):
        return base + w.scale * low_rank_product(a, b, num_leading).astype(base.dtype)

    parts = [letters, f"{letters[:split]}r", f"{letters[:num_leading]}r{letters[split:]}"]
    return sharding.local(add, parts, letters)(w.base, w.update.a, w.update.b)


def low_rank_product(a: Array, b: Array, num_leading: int) -> Array:
    """a b, on plain local arrays."""
    lead, rank = a.shape[:num_leading], a.shape[-1]
    product = jnp.matmul(a.reshape(*lead, -1, rank), b.reshape(*lead, rank, -1))
    return product.reshape(*a.shape[:-1], *b.shape[num_leading + 1 :])
