"""The import of a large folder needs little memory beside the model itself."""

import json
import os
import re
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from llmjax.interop.hf_config import hf_config
from llmjax.interop.hf_tensors import disk_shape, leaves, tensor_map
from llmjax.models.config import ModelConfig
from llmjax.models.stats import total_params

CFG = ModelConfig(
    vocab_size=32_000, num_layers=20, embed_dim=2048, num_heads=16, num_kv_heads=8, head_dim=128, mlp_dim=5632,
    tie_embeddings=True, dtype="bfloat16",
)  # fmt: skip
SHARD_BYTES = 400 * 2**20
# Prints the most that the process has held at once, in bytes, above what the libraries alone take.
PROGRAM = r"""
import re, sys
import jax, orbax.checkpoint, safetensors.numpy, llmjax.interop.hf_folder, llmjax.training.checkpoint
jax.block_until_ready(jax.numpy.zeros(8) + 1)
from llmjax.commands import convert

def peak():  # of this program alone; getrusage's figure would begin with that of the process that started it
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read()).group(1)) * 1024

before = peak()
convert.run(["llmjax-convert", *sys.argv[1:]])
print("peak", peak() - before)
"""


def write_folder(folder: str) -> int:
    """A bfloat16 checkpoint in shards, made without holding more than one of them; returns its bytes."""
    os.makedirs(folder)
    specs, places = leaves(CFG), tensor_map(CFG, "llama")
    shard, filled, number, weight_map, total = {}, 0, 1, {}, 0
    names = list(places)
    for name in names:
        shard[name] = np.zeros(disk_shape(places[name], specs), ml_dtypes.bfloat16)
        filled += shard[name].nbytes
        total += shard[name].nbytes
        if filled >= SHARD_BYTES or name == names[-1]:
            file = f"model-{number:05d}.safetensors"
            save_file(shard, f"{folder}/{file}")
            weight_map |= dict.fromkeys(shard, file)
            shard, filled, number = {}, 0, number + 1
    with open(f"{folder}/model.safetensors.index.json", "w") as file:
        json.dump({"weight_map": weight_map}, file)
    with open(f"{folder}/config.json", "w") as file:
        json.dump(hf_config(CFG, "llama"), file)
    return total


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_peak_memory_of_an_import(tmp_path):
    size = write_folder(str(tmp_path / "hf"))
    assert size == 2 * total_params(CFG) > 2e9
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, f"--source={tmp_path}/hf", f"--target={tmp_path}/ours"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    peak = int(re.search(r"peak (\d+)", done.stdout).group(1))
    layer = 2 * (total_params(CFG) - CFG.vocab_size * CFG.embed_dim) / CFG.num_layers
    print(f"model {size / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB above the libraries")
    assert size <= peak <= size + SHARD_BYTES + layer
