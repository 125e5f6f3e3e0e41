"""What importing costs, and what it must not bring along."""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
UNWANTED = ("tensorflow", "torch", "transformers", "wandb", "google.cloud")

# Prints which of them are loaded: a module with a file, for `google.cloud` alone is an empty folder of Protobuf's.
REPORT = f"""
import sys
print([name for name, module in sorted(sys.modules.items()) if getattr(module, "__file__", None)
       and any(name == root or name.startswith(root + ".") for root in {UNWANTED!r})])
"""


def run(code: str) -> str:
    """Standard output of `code` in a fresh interpreter, in the root of the project."""
    made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-3000:]
    return made.stdout


def test_every_module_imports_and_brings_no_other_framework():
    """All modules of the library and all experiments, in one process."""
    paths = [p for folder in ("llmjax", "experiments") for p in sorted((ROOT / folder).rglob("*.py"))]
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in paths]
    assert "llmjax.models.transformer" in names
    out = run(
        "import importlib, sys, traceback\n"
        f"for name in {names!r}:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except Exception:\n"
        "        print(f'{name} does not import: {traceback.format_exc(limit=-1)}')\n"
        + REPORT
    )
    assert out.strip() == "[]", out


def test_importing_llmjax_is_quick_and_light():
    start = time.perf_counter()
    loaded = set(run("import llmjax, sys; print(' '.join(sys.modules))").split())
    assert time.perf_counter() - start < 3.0
    assert not loaded & set(UNWANTED)


def test_the_pipeline_brings_no_other_framework():
    out = run("import llmjax, llmjax.runs.pipeline, llmjax.stages.rl\n" + REPORT)
    assert out.strip() == "[]", out


def test_help_and_config_errors_need_no_jax():
    """The command line answers a wrong flag at once: jax comes when the work begins."""
    modules = "llmjax.commands.train, llmjax.commands.chat, llmjax.config, sys"
    loaded = set(run(f"import {modules}; print(' '.join(sys.modules))").split())
    assert not loaded & {"jax", "flax", "grain", *UNWANTED}
