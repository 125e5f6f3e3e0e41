"""The allocator's settings, in a process of its own: they cannot be taken back."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes
from llmjax import runtime
done = runtime.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
where = libc.malloc(ctypes.c_size_t(2**26))
inside = False
for line in open("/proc/self/smaps"):
    first, *rest = line.split()
    if "-" in first and ":" not in first:
        start, end = (int(a, 16) for a in first.split("-"))
        inside = start <= where + 2**25 < end
    elif first == "VmFlags:" and inside:
        print(done, "hg" in rest)
"""


def heap(**environment) -> str:
    """Whether it was done, and whether a large allocation then lies where huge pages are asked for."""
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True).stdout.strip()


def test_virtual_devices_may_be_late():
    start = "import os; from llmjax import runtime; runtime.use_cpu_devices(3); import jax"
    command = [sys.executable, "-c", start + "; print(len(jax.devices()), os.environ)"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.startswith("3 ") and "--xla_cpu_collective_call_terminate_timeout_seconds=3600" in printed


@pytest.mark.skipif(not os.path.exists("/sys/kernel/mm/transparent_hugepage"), reason="a kernel without huge pages")
@pytest.mark.skipif(
    not hasattr(os, "sysconf") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") < 2**33, reason="needs 8 GB"
)
def test_freed_memory_is_kept_in_huge_pages_unless_that_is_turned_off():
    assert heap(LLMJAX_KEEP_MEMORY="1") == "True True"
    assert heap(LLMJAX_KEEP_MEMORY="0") == "False False"


GIVEN_BACK = """
import ctypes
from llmjax import runtime
runtime.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def work():
    blocks = [libc.malloc(ctypes.c_size_t(2**26)) for _ in range(8)]
    for block in blocks:
        ctypes.memset(block, 1, 2**26)
    for block in blocks:
        libc.free(ctypes.c_void_p(block))
before = runtime._resident()
work()
kept = runtime._resident() - before
far_from_full = runtime.give_back_memory()
runtime._memory = lambda: 2**29  # as if the machine were small
given = runtime.give_back_memory()
work()
print(kept > 2**28, far_from_full, given, runtime._resident() - before < 2**27)
"""


@pytest.mark.skipif(
    not hasattr(os, "sysconf") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") < 2**33, reason="needs 8 GB"
)
def test_kept_memory_is_given_back_once_it_is_a_third_of_the_machine():
    done = subprocess.run(
        [sys.executable, "-c", GIVEN_BACK], env=os.environ | {"LLMJAX_KEEP_MEMORY": "1"}, capture_output=True, text=True,
        check=True,
    )
    assert done.stdout.split() == ["True", "False", "True", "True"]
