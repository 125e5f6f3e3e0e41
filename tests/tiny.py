"""Models, batches and compiled functions small enough for a unit test."""

import contextlib
import dataclasses
import itertools
import resource
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.models import transformer
from llmjax.models.config import ModelConfig, MoEConfig
from llmjax.models.heads import scalar_model_spec
from llmjax.models.lora import LoRAConfig, lora_spec
from llmjax.models.spec import is_spec
from llmjax.models.transformer import transformer_spec
from llmjax.objectives.policy import actor_critic_spec
from llmjax.training.program import Program

DENSE = ModelConfig(
    vocab_size=32, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24,
    tie_embeddings=False, layer_loop="unroll",
)  # fmt: skip
SPARSE = dataclasses.replace(DENSE, moe=MoEConfig(num_experts=4, top_k=2, mlp_dim=12))
MODELS = {"dense": DENSE, "moe": SPARSE}

apply = jax.jit(transformer.apply, static_argnames="cfg")


def crossed(quick, *axes):
    """Every combination of `axes` as parameters of a test; those not in `quick` are left to `-m slow`: they only repeat
    together what others show one at a time."""
    combinations = list(itertools.product(*axes))
    assert set(quick) <= set(combinations), set(quick) - set(combinations)
    names = ["-".join(map(str, jax.tree.leaves(one))) for one in combinations]
    marks = [() if one in quick else pytest.mark.slow for one in combinations]
    return [pytest.param(*one, id=name, marks=mark) for one, name, mark in zip(combinations, names, marks)]


def logits(params, tokens, cfg, *, segments=None, positions=None) -> np.ndarray:
    """Logits [B, T, V] of the full forward pass; by default one segment without padding."""
    segments = np.ones_like(tokens) if segments is None else np.asarray(segments, np.int32)
    if positions is None:
        positions = np.maximum(np.cumsum(segments > 0, axis=1) - 1, 0)
    positions = np.asarray(positions, np.int32)
    return np.asarray(apply(params, jnp.asarray(tokens), cfg=cfg, positions_BT=positions, segment_ids_BT=segments)[0])


@contextlib.contextmanager
def no_room(most: int):
    """Within it no file can be written beyond its first `most` bytes, as on a disk that is full; no test output either."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def draw(specs, seed: int = 0):
    """Parameters of these specs from NumPy, which compiles nothing; scales and biases vary too."""
    rng = np.random.default_rng(seed)

    def one(spec):
        normal = rng.normal(size=spec.shape)
        value = spec.std * normal if spec.constant is None else spec.constant + 0.2 * normal
        return jnp.asarray(value, spec.dtype)

    return jax.tree.map(one, specs, is_leaf=is_spec)


def language_model(cfg: ModelConfig, seed: int = 0):
    return draw(transformer_spec(cfg), seed)


def updates(cfg: ModelConfig, lora: LoRAConfig, seed: int = 5):
    """Low-rank updates with both factors away from zero."""
    specs = jax.tree.map(lambda spec: dataclasses.replace(spec, std=0.2), lora_spec(cfg, lora), is_leaf=is_spec)
    return draw(specs, seed)


def scalar_model(cfg: ModelConfig, seed: int = 0):
    return draw(scalar_model_spec(cfg), seed)


def actor_critic(cfg: ModelConfig, seed: int = 0, critic: bool = True):
    return draw(actor_critic_spec(cfg, critic), seed)


def compiled(program: Program) -> Program:
    """The program compiled for the very arguments that it plans with, and for no others."""
    return dataclasses.replace(program, fn=program.lower().compile())


def tokens(cfg: ModelConfig, *shape: int, seed: int = 0) -> np.ndarray:
    """Uniform token ids, int32."""
    return np.random.default_rng(seed).integers(0, cfg.vocab_size, shape, dtype=np.int32)


def lm_batch(cfg: ModelConfig, rows: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Two packed documents a row and some padding at its end; loss on two thirds of the real tokens."""
    rng = np.random.default_rng(seed)
    first, padding = length // 2 - 1, 2
    segments = np.concatenate([np.full(first, 1), np.full(length - first - padding, 2), np.zeros(padding)])
    places = np.concatenate([np.arange(first), np.arange(length - first - padding), np.zeros(padding)])
    text = rng.integers(0, cfg.vocab_size, (rows, length + 1))
    batch = {
        "inputs": text[:, :-1],
        "targets": text[:, 1:],
        "positions": np.broadcast_to(places, (rows, length)),
        "segment_ids": np.broadcast_to(segments, (rows, length)),
        "loss_mask": (rng.random((rows, length)) < 0.67) * (segments > 0),
    }
    return {name: np.ascontiguousarray(value, dtype=np.int32) for name, value in batch.items()}


def rankings(cfg: ModelConfig, rows: int, k: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Answers of different lengths, padded on the right, with a random strict ranking."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, length + 1, (rows, k))
    return {
        "tokens": tokens(cfg, rows, k, length, seed=seed),
        "segment_ids": (np.arange(length) < lengths[..., None]).astype(np.int32),
        "ranks": np.argsort(rng.random((rows, k)), axis=1).astype(np.int32),
    }


def experience(cfg: ModelConfig, rows: int, prompt: int, response: int, seed: int = 0) -> dict[str, np.ndarray]:
    """What `policy_loss` takes, with made-up numbers: prompts padded on the left, responses of different lengths."""
    rng = np.random.default_rng(seed)
    pads, lengths = rng.integers(0, prompt, (rows, 1)), rng.integers(1, response + 1, (rows, 1))
    mask = (np.arange(response) < lengths).astype(np.float32)
    segments = np.concatenate([np.arange(prompt) >= pads, mask > 0], axis=1).astype(np.int32)

    def normal(scale):
        return (rng.normal(size=mask.shape) * scale * mask).astype(np.float32)

    return {
        "tokens": tokens(cfg, rows, prompt + response, seed=seed),
        "segment_ids": segments,
        "positions": np.maximum(np.cumsum(segments, axis=1) - 1, 0).astype(np.int32),
        "mask": mask,
        "old_log_probs": normal(0.3) - np.float32(np.log(cfg.vocab_size)) * mask,
        "advantages": normal(1.0),
        "returns": normal(1.0),
        "old_values": normal(0.5),
        "ref_log_probs": normal(0.3) - np.float32(np.log(cfg.vocab_size)) * mask,
    }


def value_and_grads(fn, *args):
    """Compiled value and gradients with respect to every argument."""
    return jax.jit(jax.value_and_grad(fn, argnums=tuple(range(len(args)))))(*args)


def assert_trees_close(actual, expected, tolerance: float):
    """Each leaf within `tolerance` of the largest entry of its counterpart."""
    paths, _ = jax.tree_util.tree_flatten_with_path(expected)
    leaves = jax.tree.leaves(actual)
    assert len(paths) == len(leaves)
    for (path, want), got in zip(paths, leaves):
        want, got = np.asarray(want), np.asarray(got)
        scale = max(float(np.max(np.abs(want), initial=0.0)), 1e-12)
        worst = float(np.max(np.abs(got - want), initial=0.0)) / scale
        assert worst <= tolerance, f"{jax.tree_util.keystr(path)}: {worst:.2e} of the largest entry {scale:.2e}"


def assert_trees_equal(actual, expected):
    """Bit for bit."""
    jax.tree.map(partial(np.testing.assert_array_equal, strict=True), *map(jax.device_get, (actual, expected)))
