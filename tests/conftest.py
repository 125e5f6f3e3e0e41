"""Every test runs on CPU split into 8 virtual devices; what does not ask for a mesh uses the first of them.

Programs are compiled with little optimisation: they are tiny, and most of the time goes into compiling them.
"""

import atexit
import os
import shutil
import tempfile
from importlib import metadata

os.environ["JAX_PLATFORMS"] = "cpu"
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if metadata.version("jaxlib").startswith("0.10."):
    # Twice as fast to compile; later versions have only the emitters that these turn off, and refuse the option.
    QUICK += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), QUICK, "--xla_force_host_platform_device_count=8"])

# Programs that a test starts as a user would share what they compile, for as long as the tests run; workers inherit the place.
CACHE = "LLMJAX_TEST_CACHE"
if CACHE not in os.environ:
    os.environ[CACHE] = tempfile.mkdtemp(prefix="llmjax-test-cache-")
    atexit.register(shutil.rmtree, os.environ[CACHE], ignore_errors=True)

from llmjax import runtime  # noqa: E402

runtime.quiet_libraries()
