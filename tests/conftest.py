"""Every test runs on CPU split into 8 virtual devices; what does not ask for a mesh uses the first of them."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

from llmjax import runtime  # noqa: E402

runtime.quiet_libraries()
