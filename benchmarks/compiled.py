"""Train steps of published models compiled for accelerators that are not here: what they hold, what they send, which kernels.

    pip install -e . libtpu
    python benchmarks/compiled.py                                           the rows for TPUs
    pip install -e . jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12 nvidia-cudnn-cu12
    python benchmarks/compiled.py --backend=cuda --gpu_target=h100.txt      the rows for H100s
    python benchmarks/compiled.py --rows=v5e,v5p-1b --check                 exit status 1 if a bar is missed

Each row is compiled by itself in a process of its own, from shapes alone: nothing is allocated. Printed are, for one device,
the peak of its memory, the bytes that a step sends (by the ring formulas, times the trips of the loops they stand in) by kind
and dtype, the kernels that are called, and the seconds of compiling. --gpu_target: XLA's description of a card
(`stream_executor.GpuTargetConfigProto` as text), by which programs are compiled where no card is.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator

from absl import app, flags

GIB = 2.0**30

BACKEND = flags.DEFINE_enum("backend", "tpu", ["tpu", "cuda"], "what the rows are compiled for")
ROWS = flags.DEFINE_list("rows", [], "names of rows, or beginnings of names; none for all of the backend")
GPU_TARGET = flags.DEFINE_string("gpu_target", "", "file with the description of the card")
CHECK = flags.DEFINE_bool("check", False, "exit with 1 when a bar is missed")
TEXT = flags.DEFINE_string("text", "", "folder in which the compiled programs are kept as text")
SET = flags.DEFINE_multi_string("set", [], "fields of ModelConfig to change, such as --set=remat=false")
_ONE = flags.DEFINE_string("one", "", "internal: the row that this process compiles")


@dataclasses.dataclass(frozen=True)
class Row:
    """A train step, or with `new` tokens the answers to prompts of `length`. topology: of the devices (cuda: hosts x 1 x
    cards). mesh: sizes of axes, the others are 1. rows: sequences in a part of the batch. peak, sent: bars, GiB; in_loops: what
    may be sent in the loops of decoding, for each token."""

    name: str
    backend: str
    topology: str
    mesh: dict[str, int]
    model: str
    rows: int
    length: int
    peak: float
    sent: float = 0.0
    new: int = 0
    in_loops: float = 0.0


TABLE = [
    Row("llama3-8b", "cuda", "1x1x8", dict(fsdp=8), "llama3-8b", 1, 8192, 24, 40),
    Row("llama3.2-1b-4k", "cuda", "1x1x8", dict(fsdp=8), "llama3.2-1b", 2, 4096, 16),
    Row("llama3.2-1b-8k", "cuda", "1x1x8", dict(fsdp=8), "llama3.2-1b", 1, 8192, 16),
    Row("qwen3-30b", "cuda", "8x1x8", dict(fsdp=8, expert=8), "qwen3-30b-a3b", 1, 4096, 16, 50),
    Row("decode-8b", "cuda", "1x1x8", dict(tensor=8), "llama3-8b", 64, 7680, 20, new=512, in_loops=0.1),
    Row("decode-1b-fsdp", "cuda", "1x1x8", dict(fsdp=8), "llama3.2-1b", 8, 1024, 20, new=256, in_loops=0.001),
    Row("v5e-1b-8k", "tpu", "v5e:2x2", dict(fsdp=4), "llama3.2-1b", 1, 8192, 15.75),
    Row("v5p-1b-32k", "tpu", "v5p:2x2x2", dict(fsdp=8), "llama3.2-1b", 1, 32768, 95.7),
    Row("v5p-qwen3-30b", "tpu", "v5p:4x4x4", dict(fsdp=4, expert=16), "qwen3-30b-a3b", 1, 4096, 17),
]


# ---- reading a compiled program ---------------------------------------------------------------------------------

DTYPE_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
               "u64": 8, "f64": 8}  # fmt: skip
_COLLECTIVE = re.compile(
    r" = (?P<shape>\S.*?) (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute)"
    r"(?P<start>-start)?\("
)
_SHAPE = re.compile(r"\b(pred|bf16|f16|f32|f64|[su](?:8|16|32|64))\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|body|condition|to_apply|called_computations)=\{?%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation of an HLO module by name, and the name of the entry."""
    found: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.-]+) (\(.*)?.*\{$", line)
        if head and not line.startswith(" ") and " = " not in line:
            lines = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith(" "):
            lines.append(line)
    return found, entry


def walk(text: str) -> Iterator[tuple[str, int, bool]]:
    """(line, how often it runs, whether that is a turn of a loop whose trips depend on data) of all that the entry calls."""
    found, entry = computations(text)

    def trips(line: str) -> int:  # 0: they depend on data
        if known := _TRIPS.search(line):
            return int(known[1])
        condition = re.search(r"condition=%?([\w.-]+)", line)
        lines = found.get(condition[1], []) if condition else []
        bounds = re.findall(r" constant\((\d+)\)", "\n".join(lines))
        return int(bounds[0]) if len(bounds) == 1 else 0

    def visit(name: str, times: int, turn: bool) -> Iterator[tuple[str, int, bool]]:
        for line in found.get(name, []):
            yield line, times, turn
            more = trips(line) if " while(" in line else 1
            called = _CALLED.findall(line) + [one.strip(" %") for group in _BRANCHES.findall(line) for one in group.split(",")]
            for callee in called:
                yield from visit(callee, times * max(more, 1), turn or not more)

    yield from visit(entry, 1, False)


def group_size(line: str) -> int:
    """Devices that a collective talks between."""
    if found := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return found[1].count(",") + 1
    return 2  # a permutation


def sent(text: str) -> Counter[tuple[str, str]]:
    """Bytes that one device sends in a step, by (kind, dtype): ring formulas, times the trips of the loops; what stands in
    loops whose trips depend on data has (kind, dtype + " a turn")."""
    total: Counter[tuple[str, str]] = Counter()
    pieces = set()
    for line, times, turn in walk(text):
        found = _COLLECTIVE.search(line)
        if not found:
            continue
        # A TPU's asynchronous collective stands in its start, its steps and its end: pieces of one channel, on a parameter.
        channel = re.search(r"channel_id=(\d+)", line)
        if channel and "(%param" in line:
            piece = channel[1], found["kind"], re.sub(r"\{.*?\}|\S\(1\)", "", found["shape"]), times
            if piece in pieces:
                continue
            pieces.add(piece)
        kind, n, shapes = found["kind"], group_size(line), _SHAPE.findall(found["shape"])
        if found["start"] and kind != "all-reduce":  # (operands..., results...): take the results
            shapes = shapes[len(shapes) // 2 :]
        if n == 1:
            continue
        for dtype, sizes in shapes:
            count = 1
            for size in filter(None, sizes.split(",")):
                count *= int(size)
            whole = {"reduce-scatter": n, "all-reduce": 2, "collective-permute": n / (n - 1)}.get(kind, 1)
            total[kind, f"{dtype} a turn" if turn else dtype] += times * count * DTYPE_BYTES[dtype] * whole * (n - 1) / n
    return total


def kernels(text: str) -> Counter[str]:
    """Custom calls by target, as often as they stand in the program."""
    return Counter(re.findall(r'custom_call_target="([\w$.-]+)"', text))


# ---- making one -------------------------------------------------------------------------------------------------


def devices_of(row: Row):
    """The devices of a topology that is not here."""
    from jax.experimental import topologies

    if row.backend == "tpu":
        return topologies.get_topology_desc(row.topology, "tpu").devices
    with open(GPU_TARGET.value, encoding="utf-8") as file:
        target = file.read()
    return topologies.get_topology_desc(platform="cuda", target_config=target, topology=row.topology).devices


def train_step(row: Row, cfg, mesh, shards: int):
    """The update of pre-training."""
    from llmjax.models.stats import train_flops_per_token
    from llmjax.models.transformer import transformer_spec
    from llmjax.objectives.lm import lm_loss
    from llmjax.training.optimizer import OptimizerConfig
    from llmjax.training.program import language_batch, train_program

    return train_program(
        lambda params, batch, key: lm_loss(params, batch, key, cfg), transformer_spec(cfg), OptimizerConfig(), 1000,
        language_batch(row.rows * shards, row.length, mesh), mesh, tokens=row.rows * shards * row.length,
        flops_per_token=train_flops_per_token(cfg, row.length),
    )  # fmt: skip


def answers(row: Row, cfg, mesh, shards: int):
    """The answers of a rollout."""
    from llmjax.generation.sampling import SamplingConfig
    from llmjax.rl.algorithms import GRPO
    from llmjax.rl.learner import Learner
    from llmjax.training.optimizer import OptimizerConfig

    learner = Learner(
        cfg, mesh, GRPO(group_size=8), OptimizerConfig(), SamplingConfig(row.new), steps=1, batch_size=row.rows * shards,
        epochs=1, minibatches=1, prompt_length=row.length, stop_ids=(0,), pad_id=0,
    )  # fmt: skip
    return learner.programs().sample


def compile_row(row: Row) -> dict:
    """Compiles a row; what is known of it."""
    import numpy as np
    from jax.sharding import AxisType, Mesh

    from llmjax import sharding
    from llmjax.config import apply_overrides
    from llmjax.models.presets import preset

    cfg = dataclasses.replace(preset(row.model), remat=True)
    cfg = apply_overrides(cfg, [tuple(change.split("=", 1)) for change in SET.value])
    shape = [row.mesh.get(axis, 1) for axis in sharding.MESH_AXES]
    devices = np.array(devices_of(row))[: math.prod(shape)].reshape(shape)
    mesh = Mesh(devices, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))
    shards = math.prod(row.mesh.get(axis, 1) for axis in sharding.BATCH_AXES)
    program = answers(row, cfg, mesh, shards) if row.new else train_step(row, cfg, mesh, shards)
    with sharding.use_mesh(mesh):
        began = time.monotonic()
        compiled = program.lower().compile()
        seconds = time.monotonic() - began
    text, memory = compiled.as_text(), compiled.memory_analysis()
    if TEXT.value:
        os.makedirs(TEXT.value, exist_ok=True)
        with open(os.path.join(TEXT.value, f"{row.name}.hlo"), "w", encoding="utf-8") as file:
            file.write(text)
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    bytes_sent = sent(text)
    return {
        "peak": peak / GIB, "arguments": memory.argument_size_in_bytes / GIB, "temporary": memory.temp_size_in_bytes / GIB,
        "sent": sum(bytes_sent.values()) / GIB, "kinds": {" ".join(key): n / GIB for key, n in bytes_sent.most_common()},
        "kernels": dict(kernels(text)), "seconds": seconds,
    }  # fmt: skip


def environment(row: Row) -> dict[str, str]:
    """For a compiler that looks for no device."""
    own = {"JAX_PLATFORMS": "cpu"}
    if row.backend == "tpu":
        return own | {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    return own | {
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "CUDA_VISIBLE_DEVICES": "-1", "XLA_FLAGS": "--xla_gpu_autotune_level=0",
    }  # fmt: skip


def in_its_own_process(row: Row) -> dict:
    """`compile_row`; {"error": ...} where the compiler refuses."""
    command = [sys.executable, *sys.argv, f"--one={row.name}"]
    done = subprocess.run(command, env=os.environ | environment(row), capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        told = next((line for line in lines if "RESOURCE_EXHAUSTED" in line or "Error" in line), lines[-1] if lines else "?")
        return {"error": told.strip()[:300]}
    return json.loads(done.stdout.splitlines()[-1])


def told(row: Row, found: dict) -> list[str]:
    """A row in words, and its bars that are missed, each beginning with MISSED."""
    where = " x ".join(f"{axis}={n}" for axis, n in row.mesh.items())
    lines = [f"{row.name}: {row.model}, {row.rows} x {row.length:,} tokens a device, {where} on {row.topology} {row.backend}"]
    if "error" in found:
        return [*lines, f"  MISSED: not compiled: {found['error']}"]
    lines.append(
        f"  peak {found['peak']:.1f} GiB (arguments {found['arguments']:.1f}, temporary {found['temporary']:.1f}); "
        f"sent {found['sent']:.1f} GiB; compiled in {found['seconds']:.0f} s"
    )
    lines += [f"  {kind}: {n:.2f} GiB" for kind, n in found["kinds"].items() if n >= 0.005]
    if found["kernels"]:
        lines.append("  kernels: " + ", ".join(f"{name} x {n}" for name, n in sorted(found["kernels"].items())))
    found["in_loops"] = sum(n for kind, n in found["kinds"].items() if kind.endswith("a turn"))
    for name, bar in (("peak", row.peak), ("sent", row.sent), ("in_loops", row.in_loops)):
        if bar and found[name] > bar:
            lines.append(f"  MISSED: {name} {found[name]:.3g} of at most {bar:g} GiB")
    return lines


def main(argv: list[str]) -> None:
    del argv
    if _ONE.value:
        print(json.dumps(compile_row(next(row for row in TABLE if row.name == _ONE.value))))
        return
    chosen = [row for row in TABLE if row.backend == BACKEND.value]
    if ROWS.value:
        chosen = [row for row in chosen if any(row.name.startswith(name) for name in ROWS.value)]
    if BACKEND.value == "cuda" and not GPU_TARGET.value:
        sys.exit("--gpu_target=FILE: the description of the card to compile for is needed")
    missed = False
    for row in chosen:
        lines = told(row, in_its_own_process(row))
        missed |= any("MISSED" in line for line in lines)
        print("\n".join(lines), flush=True)
    if CHECK.value and missed:
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
