"""The dense training step on CPU against transformers (eager PyTorch, fused AdamW): same shape, weights and first loss.

    pip install -e ".[bench]" && python benchmarks/train_step.py --check

Each side lives in a process of its own and works only when told to, in turn, so that neither times the other's threads.
Printed per shape: median milliseconds of a step, the ratio, page faults of a step, the difference of the first loss; and our
sparse step (8 experts, top-2) beside our dense step of equal active FLOPs. `--check` exits with 1 when a bar is missed.
Run it on a quiet machine: PyTorch's threads spin, and under load it looks slower than it is.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import tempfile

from absl import app, flags
from workers import Worker, report, serve

BARS = {"A": 1.2, "B": 1.1}
MAX_PAGE_FAULTS = 1000
SHAPES = {
    "A": dict(embed_dim=256, num_layers=8, num_heads=8, num_kv_heads=4, head_dim=32, mlp_dim=688, vocab_size=4096,
              batch=16, length=256),
    "B": dict(embed_dim=128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32, mlp_dim=344, vocab_size=1024,
              batch=32, length=128),
}  # fmt: skip
LEARNING_RATE, B1, B2, EPS, WEIGHT_DECAY = 3e-4, 0.9, 0.95, 1e-8, 0.1

_CHECK = flags.DEFINE_bool("check", False, "exit with 1 when a bar is missed")
_SHAPES = flags.DEFINE_list("shapes", ["A", "B"], "which of A (10 M parameters) and B (1 M) to time")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "turns of each side")
_SECONDS = flags.DEFINE_float("seconds", 3.0, "length of one turn")
_WORKER = flags.DEFINE_string("worker", "", "internal: torch, dense or sparse")
_FOLDER = flags.DEFINE_string("folder", "", "internal: where the weights are exchanged")


def make_tokens(shape: dict) -> list:
    import numpy as np

    return np.random.default_rng(0).integers(0, shape["vocab_size"], (shape["batch"], shape["length"]))


def torch_worker(shape: dict, folder: str):
    import numpy as np
    import torch
    import transformers

    torch.manual_seed(0)
    cfg = transformers.LlamaConfig(
        vocab_size=shape["vocab_size"], hidden_size=shape["embed_dim"], num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"], num_key_value_heads=shape["num_kv_heads"], head_dim=shape["head_dim"],
        intermediate_size=shape["mlp_dim"], tie_word_embeddings=False, rms_norm_eps=1e-6, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(cfg).float().train()
    np.savez(os.path.join(folder, "weights.npz"), **{k: v.detach().numpy() for k, v in model.named_parameters()})
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(B1, B2), eps=EPS, weight_decay=WEIGHT_DECAY, fused=True
    )
    tokens = torch.from_numpy(make_tokens(shape))

    def step() -> float:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def our_worker(shape: dict, folder: str, sparse: bool):
    from llmjax import runtime

    runtime.keep_freed_memory()
    runtime.quiet_libraries()
    import jax
    import jax.numpy as jnp
    import numpy as np

    from llmjax.models.config import ModelConfig, MoEConfig
    from llmjax.models.spec import init_params
    from llmjax.models.stats import train_flops_per_token
    from llmjax.models.transformer import transformer_spec
    from llmjax.objectives.lm import lm_loss
    from llmjax.training.optimizer import OptimizerConfig
    from llmjax.training.program import language_batch, train_program

    fields = {k: v for k, v in shape.items() if k not in ("batch", "length")}
    cfg = ModelConfig(**fields, tie_embeddings=False)
    if sparse:
        cfg = dataclasses.replace(cfg, moe=MoEConfig(num_experts=8, top_k=2, mlp_dim=cfg.mlp_dim // 2))
    specs, rows, length = transformer_spec(cfg), shape["batch"], shape["length"]
    params = init_params(specs, jax.random.key(0)) if sparse else load_weights(cfg, folder)
    optimizer = OptimizerConfig(
        learning_rate=LEARNING_RATE, warmup_steps=0, schedule="constant", b1=B1, b2=B2, eps=EPS,
        weight_decay=WEIGHT_DECAY, grad_clip=0.0,
    )  # fmt: skip
    program = train_program(
        lambda params, batch, key: lm_loss(params, batch, key, cfg), specs, optimizer, 1_000_000,
        language_batch(rows, length, None), None,
        tokens=rows * length, flops_per_token=train_flops_per_token(cfg, length),
    )  # fmt: skip
    state = program.init(params)
    tokens = make_tokens(shape).astype(np.int32)
    mask = np.ones_like(tokens)
    mask[:, -1] = 0
    batch = {
        "inputs": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape),
        "segment_ids": np.ones_like(tokens),
        "loss_mask": mask,
    }
    batch = {k: jnp.asarray(v) for k, v in batch.items()}
    key = jax.random.key(0)

    def step() -> float:
        nonlocal state
        state, metrics = program.fn(state, batch, key)
        return float(metrics["loss"])

    return step


def load_weights(cfg, folder: str):
    """The peer's weights in our layout: [in, heads, width] for projections, stacked over layers."""
    import jax.numpy as jnp
    import numpy as np

    from llmjax.models.attention import Attention
    from llmjax.models.layers import Mlp
    from llmjax.models.transformer import Block, Params

    with np.load(os.path.join(folder, "weights.npz")) as archive:
        weights = {name: archive[name] for name in archive.files}
    d, h = cfg.embed_dim, cfg.head_dim

    def stack(name, form=lambda w: w):
        return jnp.stack([form(weights[f"model.layers.{i}.{name}.weight"]) for i in range(cfg.num_layers)])

    return Params(
        embed=jnp.asarray(weights["model.embed_tokens.weight"]),
        blocks=Block(
            attention_norm=stack("input_layernorm"),
            attention=Attention(
                q=stack("self_attn.q_proj", lambda w: w.T.reshape(d, cfg.num_heads, h)),
                k=stack("self_attn.k_proj", lambda w: w.T.reshape(d, cfg.num_kv_heads, h)),
                v=stack("self_attn.v_proj", lambda w: w.T.reshape(d, cfg.num_kv_heads, h)),
                o=stack("self_attn.o_proj", lambda w: w.T.reshape(cfg.num_heads, h, d)),
            ),
            mlp_norm=stack("post_attention_layernorm"),
            mlp=Mlp(
                gate=stack("mlp.gate_proj", lambda w: w.T),
                up=stack("mlp.up_proj", lambda w: w.T),
                down=stack("mlp.down_proj", lambda w: w.T),
            ),
        ),
        final_norm=jnp.asarray(weights["model.norm.weight"]),
        head=jnp.asarray(weights["lm_head.weight"]),
    )


def make_step(kind: str, shape: dict, folder: str):
    return torch_worker(shape, folder) if kind == "torch" else our_worker(shape, folder, kind == "sparse")


def compare(name: str) -> list[tuple[str, bool]]:
    """Times one shape, prints it, and returns its bars as (text, met)."""
    with tempfile.TemporaryDirectory() as folder:
        workers = {
            kind: Worker(__file__, f"--worker={kind}", f"--shapes={name}", f"--folder={folder}")
            for kind in ("torch", "dense", "sparse")
        }
        for _ in range(_ROUNDS.value):
            for worker in workers.values():
                worker.turn(_SECONDS.value)
        for worker in workers.values():
            worker.close()
    torch, dense, sparse = (workers[kind] for kind in ("torch", "dense", "sparse"))
    ratio = torch.milliseconds / dense.milliseconds
    faults = statistics.median(dense.faults)
    gap = abs(torch.first - dense.first)
    tokens = SHAPES[name]["batch"] * SHAPES[name]["length"]
    print(f"shape {name}: fp32, {tokens} tokens a step, medians of {len(dense.wall)} interleaved steps")
    for title, worker in (("transformers eager", torch), ("llmjax dense", dense), ("llmjax 8 experts top-2", sparse)):
        rate = tokens / worker.milliseconds * 1e3
        print(f"  {title:<24}{worker.milliseconds:9.1f} ms  {rate:9,.0f} tokens/s  first loss {worker.first:.5f}")
    print(f"  sparse step / dense step of equal active FLOPs: {sparse.milliseconds / dense.milliseconds:.2f}")
    return [
        (f"shape {name}: {ratio:.2f}x the speed of transformers (bar {BARS[name]}x)", ratio >= BARS[name]),
        (f"shape {name}: {faults:.0f} page faults a step (bar {MAX_PAGE_FAULTS})", faults < MAX_PAGE_FAULTS),
        (f"shape {name}: first losses differ by {gap:.1e} nats (bar 1e-4)", gap < 1e-4),
    ]


def main(argv: list[str]) -> None:
    del argv
    if _WORKER.value:
        serve(make_step(_WORKER.value, SHAPES[_SHAPES.value[0]], _FOLDER.value))
        return
    report([bar for name in _SHAPES.value for bar in compare(name)], _CHECK.value)


if __name__ == "__main__":
    app.run(main)
