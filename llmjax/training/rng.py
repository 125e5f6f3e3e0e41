"""Keys by purpose: one root seed, folded by name and by step, so that no key is used twice and none need be saved."""

from __future__ import annotations

import zlib

import jax

from llmjax.typing import PRNGKeyArray


def key_for(seed: int, *purpose: str | int) -> PRNGKeyArray:
    """The key of a purpose, e.g. key_for(seed, "ppo", "rollout", step). The same arguments give the same key anywhere."""
    key = jax.random.key(seed)
    for part in purpose:
        key = jax.random.fold_in(key, zlib.crc32(part.encode()) if isinstance(part, str) else part)
    return key


def fold_purpose(key: PRNGKeyArray, purpose: str) -> PRNGKeyArray:
    """A key for `purpose` under `key`, usable inside jit."""
    return jax.random.fold_in(key, zlib.crc32(purpose.encode()))
