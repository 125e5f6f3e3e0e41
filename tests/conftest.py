"""Every test runs on CPU split into 8 virtual devices; what does not ask for a mesh uses the first of them.

Programs are compiled with little optimisation: they are tiny, and most of the time goes into compiling them.
"""

import os
from importlib import metadata

os.environ["JAX_PLATFORMS"] = "cpu"
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if metadata.version("jaxlib").startswith("0.10."):
    # Twice as fast to compile; later versions have only the emitters that these turn off, and refuse the option.
    QUICK += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), QUICK, "--xla_force_host_platform_device_count=8"])

from llmjax import runtime  # noqa: E402

runtime.quiet_libraries()
