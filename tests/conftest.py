"""Every test runs on CPU split into 8 virtual devices; what does not ask for a mesh uses the first of them.

Programs are compiled with little optimisation: they are tiny, and most of the time goes into compiling them.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), QUICK, "--xla_force_host_platform_device_count=8"])

from llmjax import runtime  # noqa: E402

runtime.quiet_libraries()
