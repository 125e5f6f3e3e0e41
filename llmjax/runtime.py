"""The process around JAX: memory allocator, devices, quiet libraries. Imports no jax: some of it must come first."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import warnings

import absl.logging

from llmjax.errors import UserError

# mallopt parameters of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -3, -4, -8
_MADV_HUGEPAGE = 14  # of sys/mman.h
_MEMORY_NEEDED = 8 * 2**30
_keeping = False


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory instead of returning it to the kernel after every step, and in huge pages.

    XLA on CPU allocates its temporaries anew in each step; without this a third of a training step can be page faults.
    The price is a larger resident size (2x to 3x), so it is left alone on machines with less than 8 GB, on other C
    libraries, and when LLMJAX_KEEP_MEMORY=0; `give_back_memory` ends it. Call it before jax is imported; returns whether
    it was done.
    """
    global _keeping
    if os.environ.get("LLMJAX_KEEP_MEMORY") == "0" or not sys.platform.startswith("linux"):
        return False
    memory = _memory()
    libc = ctypes.CDLL(None)
    if memory < _MEMORY_NEEDED or not hasattr(libc, "mallopt"):
        return False
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 2**28))
    if not all(libc.mallopt(ctypes.c_int(name), ctypes.c_int(value)) == 1 for name, value in settings):
        return False
    _advise_huge_pages(libc, memory // 2)
    _keeping = True
    return True


def give_back_memory() -> bool:
    """Where freed memory is kept and this process has come to hold a third of the machine's: gives it back, now and whenever
    a large block is freed. Returns whether it was so. Large models on CPU would else end for want of memory; their steps are
    long, so it costs them little."""
    if not _keeping or _resident() < _memory() // 3:
        return False
    libc = ctypes.CDLL(None)
    for name, value in ((_M_MMAP_THRESHOLD, 2**25), (_M_MMAP_MAX, 2**16), (_M_TRIM_THRESHOLD, 2**28)):
        libc.mallopt(ctypes.c_int(name), ctypes.c_int(value))
    libc.malloc_trim(ctypes.c_size_t(0))
    return True


def _memory() -> int:
    """Bytes of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _resident() -> int:
    """Bytes that this process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _advise_huge_pages(libc: ctypes.CDLL, size: int) -> None:
    """Grows the heap to `size` bytes of addresses, not of memory, and asks for huge pages there.

    A kernel that has none to give refuses, and nothing else changes.
    """
    libc.malloc.restype = ctypes.c_void_p
    heap = libc.malloc(ctypes.c_size_t(size))
    if heap:
        page = os.sysconf("SC_PAGE_SIZE")
        start = -(-heap // page) * page
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(heap + size - start), _MADV_HUGEPAGE)
        libc.free(ctypes.c_void_p(heap))


def quiet_libraries() -> None:
    """Leaves the terminal to our own lines: third parties report errors only."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for name in ("jax", "orbax", "tensorflow_datasets", "grain"):
        logging.getLogger(name).setLevel(logging.ERROR)
    absl.logging.set_verbosity(absl.logging.FATAL)  # Orbax reports from its threads, at length, what it also raises
    warnings.filterwarnings("ignore", module=r"(orbax|grain|tensorflow_datasets|etils|flax|tensorstore)(\..*)?")
    warnings.filterwarnings("ignore", message=r".*donated buffers were not usable.*")


def use_cpu_devices(count: int) -> None:
    """Splits the CPU into `count` virtual devices, a stand-in for a pod. Before any JAX computation."""
    if count < 1:
        raise UserError(f"--cpu_devices={count} must be positive")
    # On few cores a device may be minutes late at a collective; XLA's own limit of 40 s would end the process.
    patience = " ".join(f"--xla_cpu_collective_{name}_seconds=3600" for name in ("timeout", "call_terminate_timeout"))
    os.environ["XLA_FLAGS"] = f"{patience} {os.environ.get('XLA_FLAGS', '')}"
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
