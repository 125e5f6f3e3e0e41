"""The sparse layer on CPU, forward and backward, against a dense layer of equal active FLOPs and transformers' Mixtral block.

    pip install -e ".[bench]" && python benchmarks/moe_layer.py --check

d = 512, 1,024 hidden units an expert, 4,096 tokens, float32, value and gradients of input, router and experts. Printed for
each number of experts and choices: CPU time as a multiple of one dense SwiGLU layer of hidden width top_k * 1,024 (the floor),
and median wall milliseconds; for the dropless layer, the one with a capacity (factor 1.25), `lax.ragged_dot` (8 experts only:
it does the work of all of them), and the peer's block in its two implementations. The sides work in turn, each turn in a
process of its own, since where a process lies in memory moves its times by up to a tenth: a side's figure is the median of
its turns' medians. Run it on a quiet machine: PyTorch's threads spin, and under load it looks slower than it is.
"""

from __future__ import annotations

import statistics

from absl import app, flags
from workers import Worker, report, serve

D, F, TOKENS, LENGTH = 512, 1024, 4096, 512
# (experts, choices) -> largest CPU time of the dropless layer over the floor, and smallest speed-up over grouped_mm.
BARS = {(8, 2): (1.15, 1.0), (32, 8): (1.12, 1.0), (64, 8): (1.20, 1.2), (32, 2): (1.45, 1.0), (64, 2): (1.65, 1.0)}

_CHECK = flags.DEFINE_bool("check", False, "exit with 1 when a bar is missed")
_SHAPES = flags.DEFINE_list("shapes", [f"{e}x{k}" for e, k in BARS], "which to time, as EXPERTSxCHOICES")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "turns of each side")
_SECONDS = flags.DEFINE_float("seconds", 4.0, "length of one turn")
_PEERS = flags.DEFINE_bool("peers", True, "time transformers too")
_WORKER = flags.DEFINE_string("worker", "", "internal: which side")
flags.register_validator(
    "shapes", lambda shapes: all(shape in _SHAPES.default for shape in shapes), f"choose from {','.join(_SHAPES.default)}"
)


def our_step(kind: str, experts: int, choices: int):
    from llmjax import runtime

    runtime.keep_freed_memory()
    runtime.quiet_libraries()
    import jax
    import jax.numpy as jnp

    from llmjax.models.config import ModelConfig, MoEConfig
    from llmjax.models.dispatch import expert_ffn_ragged
    from llmjax.models.layers import activation, gated_mlp, mlp_spec
    from llmjax.models.moe import moe_layer, moe_spec
    from llmjax.models.routers import route
    from llmjax.models.spec import init_params

    moe = MoEConfig(experts, choices, F, capacity_factor=1.25 if kind == "capacity" else 0.0)
    cfg = ModelConfig(embed_dim=D, moe=moe)
    act = activation("silu", 0.0)
    shape = (TOKENS // LENGTH, LENGTH, D)
    x, out = (jax.random.normal(jax.random.key(i), shape) for i in range(2))
    ones = jnp.ones(shape[:2], jnp.int32)
    w = init_params(mlp_spec(cfg, choices * F) if kind == "dense" else moe_spec(cfg), jax.random.key(2))

    def ragged(w, x):
        routing = route(x @ w.router, moe)
        flat = (a.reshape(TOKENS, -1) for a in (x, routing.ids, routing.weights))
        return expert_ffn_ragged(*flat, w.gate, w.up, w.down).reshape(shape)

    layer = {
        "dense": lambda w, x: gated_mlp(w, x, act),
        "dropless": lambda w, x: moe_layer(w, x, ones, cfg)[0],
        "capacity": lambda w, x: moe_layer(w, x, ones, cfg)[0],
        "ragged_dot": ragged,
    }[kind]
    # With the value: else XLA would leave out the last product of the forward pass, which PyTorch does.
    step_of = jax.jit(jax.value_and_grad(lambda w, x: jnp.sum(layer(w, x) * out), argnums=(0, 1)))

    def step() -> float:
        jax.block_until_ready(step_of(w, x))
        return 0.0

    return step


def torch_step(kind: str, experts: int, choices: int):
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    torch.manual_seed(0)
    cfg = MixtralConfig(
        hidden_size=D, intermediate_size=F, num_local_experts=experts, num_experts_per_tok=choices,
        experts_implementation=kind,
    )  # fmt: skip
    block = MixtralSparseMoeBlock(cfg).float().train()
    with torch.no_grad():
        for weight in block.parameters():
            weight.normal_(std=weight.shape[-1] ** -0.5)
    x = torch.randn(TOKENS // LENGTH, LENGTH, D, requires_grad=True)
    out = torch.randn_like(x)

    def step() -> float:
        y = block(x)
        (y[0] if isinstance(y, tuple) else y).mul(out).sum().backward()
        block.zero_grad(set_to_none=True)
        x.grad = None
        return 0.0

    return step


def compare(experts: int, choices: int) -> list[tuple[str, bool]]:
    """Times one shape, prints it, and returns its bars as (text, met)."""
    shape = f"{experts}x{choices}"
    sides = ["dense", "dropless", "capacity"] + (["ragged_dot"] if experts == 8 else [])
    peers = (["grouped_mm"] if experts > 8 else ["grouped_mm", "eager"]) if _PEERS.value else []
    turns = {side: [] for side in sides + peers}
    for _ in range(_ROUNDS.value):
        for side, done in turns.items():
            worker = Worker(__file__, f"--worker={side}", f"--shapes={shape}")
            worker.turn(_SECONDS.value)
            worker.close()
            done.append(worker)
    wall = {side: statistics.median(w.milliseconds for w in done) for side, done in turns.items()}
    cpu = {side: [w.cpu_milliseconds for w in done] for side, done in turns.items()}
    floor = statistics.median(cpu["dense"])
    print(f"{experts} experts, top-{choices}")
    for side, each in cpu.items():
        name = f"transformers {side}" if side in peers else side
        low, ratio, high = (f(each) / floor for f in (min, statistics.median, max))
        print(f"  {name:<26}{wall[side]:9.0f} ms wall {ratio:8.2f}x the CPU time of dense  ({low:.2f} to {high:.2f})")
    most, least = BARS[experts, choices]
    ratio = statistics.median(cpu["dropless"]) / floor
    bars = [(f"{shape}: dropless {ratio:.2f}x the CPU time of dense (bar {most}x)", ratio <= most)]
    if peers:
        faster = wall["grouped_mm"] / wall["dropless"]
        bars.append((f"{shape}: {faster:.2f}x the speed of transformers' grouped_mm (bar {least}x)", faster >= least))
    return bars


def main(argv: list[str]) -> None:
    del argv
    shapes = [tuple(map(int, shape.split("x"))) for shape in _SHAPES.value]
    if _WORKER.value:
        make = torch_step if _WORKER.value in ("eager", "grouped_mm") else our_step
        serve(make(_WORKER.value, *shapes[0]))
        return
    report([bar for shape in shapes for bar in compare(*shape)], _CHECK.value)


if __name__ == "__main__":
    app.run(main)
