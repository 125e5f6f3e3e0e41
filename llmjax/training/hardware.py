"""How fast the device could be: the denominator of MFU (model FLOPs utilisation, Chowdhery et al. 2022, arXiv:2204.02311)."""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp

# Dense bfloat16 matrix FLOP/s of one device, from the vendors' data sheets; matched as a prefix of its lower-case name.
PEAK_BF16 = {
    "tpu v4": 275e12,
    "tpu v5 lite": 197e12,
    "tpu v5e": 197e12,
    "tpu v5": 459e12,
    "tpu v6": 918e12,
    "nvidia a100": 312e12,
    "nvidia h100": 989e12,
    "nvidia h200": 989e12,
    "nvidia b200": 2250e12,
}


@functools.cache
def peak_flops(num_devices: int) -> float:
    """Peak matrix FLOP/s of `num_devices` devices. A CPU has no data sheet for this: the best of a few float32 products
    of this very machine is taken, and its virtual devices share it. Unknown accelerators give 0, and MFU is not shown."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return _measured_cpu_flops()
    name = device.device_kind.lower()
    known = [flops for prefix, flops in PEAK_BF16.items() if name.startswith(prefix)]
    return max(known, default=0.0) * num_devices


def peak_memory() -> float:
    """The most bytes that a device of this process has held since it began; 0 where devices do not tell (CPU)."""
    return float(max((device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()))


def _measured_cpu_flops(size: int = 1024, rounds: int = 8) -> float:
    """Of all virtual devices of the mesh in use: each makes the product, in its part of the cores."""
    a = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    copies = len(product(a).block_until_ready().sharding.device_set)
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        product(a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 * copies / best
