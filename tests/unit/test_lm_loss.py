"""The language-model loss against its definition in NumPy and in plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from llmjax.generation.score import token_log_probs
from llmjax.models.moe import router_loss
from llmjax.objectives import lm
from llmjax.objectives.lm import cross_entropy_sum, fused_cross_entropy, lm_loss

M, D, V = 24, 6, 11
both = pytest.mark.parametrize("cfg", tiny.MODELS.values(), ids=tiny.MODELS.keys())


def tokens_to_predict():
    rng = np.random.default_rng(0)
    x, table = rng.normal(size=(M, D)).astype(np.float32), rng.normal(size=(V, D)).astype(np.float32)
    weights = (rng.random(M) * (rng.random(M) < 0.7)).astype(np.float32)
    return x, table, rng.integers(0, V, M).astype(np.int32), weights


def plain(x, table, targets, weights):
    log_probs = jax.nn.log_softmax(x @ table.T, axis=-1)
    return -jnp.sum(weights * jnp.take_along_axis(log_probs, targets[:, None], axis=-1)[:, 0])


def log_softmax(logits):
    logits = logits.astype(np.float64)
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.sum(np.exp(logits - top), axis=-1, keepdims=True))


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 7, 24])
def test_fused_cross_entropy_is_plain_cross_entropy(num_chunks):
    x, table, targets, weights = tokens_to_predict()
    scale = 1.7  # the cotangent is not 1
    expected = tiny.value_and_grads(lambda x, t: scale * plain(x, t, targets, weights), x, table)
    got = tiny.value_and_grads(
        lambda x, t: scale * fused_cross_entropy(x, t, targets, weights, num_chunks), x, table
    )
    tiny.assert_trees_close(got, expected, 1e-5)
    value = jax.jit(fused_cross_entropy, static_argnums=4)(x, table, targets, weights, num_chunks)
    np.testing.assert_allclose(scale * value, expected[0], rtol=1e-6)


def test_fused_cross_entropy_of_huge_logits_is_finite():
    x, table, targets, weights = tokens_to_predict()
    loss, grads = tiny.value_and_grads(
        lambda x, t: fused_cross_entropy(x, t, targets, weights, 2), 1e3 * x, table
    )
    expected = -np.sum(weights * log_softmax(1e3 * x @ table.T)[np.arange(M), targets])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert all(np.all(np.isfinite(g)) for g in grads)


def test_cross_entropy_sum_splits_the_tokens_into_chunks_that_fit(monkeypatch):
    x, table, targets, weights = tokens_to_predict()
    monkeypatch.setattr(lm, "CHUNK_ROWS", 2)
    monkeypatch.setattr(lm, "CHUNK_LOGITS", 5 * V)
    assert lm._num_chunks(M, V) == 5  # of 5 rows each, one of which is empty
    got = cross_entropy_sum(x.reshape(4, 6, D), table, targets.reshape(4, 6), weights.reshape(4, 6))
    np.testing.assert_allclose(got, plain(x, table, targets, weights), rtol=1e-5)
    monkeypatch.setattr(lm, "CHUNK_LOGITS", 1)
    assert lm._num_chunks(M, V) == M / 2  # no fewer rows than this, or every chunk waits for the table
    assert lm._num_chunks(23, V) == 12  # a prime number of rows is not cut into rows


def lowered_loss(rows: int, vocab: int, width: int = 16):
    """Value and gradients of the loss of so many rows, lowered for shapes alone."""

    def loss(x, table, targets, weights):
        return cross_entropy_sum(x, table, targets, weights)

    shapes = [((1, rows, width), jnp.float32), ((vocab, width), jnp.float32), ((1, rows), jnp.int32), ((1, rows), jnp.float32)]
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))


def test_a_large_vocabulary_neither_unrolls_the_loop_nor_holds_more_than_a_chunk():
    """Text and temporaries of 4 chunks and of 32; a table of 128k rows was 1,024 copies of the loop's body."""
    vocab = 2**15
    few, many = (lowered_loss(rows, vocab) for rows in (4 * lm.CHUNK_ROWS, 32 * lm.CHUNK_ROWS))
    assert len(many.as_text()) < 1.01 * len(few.as_text())
    assert len(lowered_loss(997, vocab).as_text()) < 1.2 * len(few.as_text())
    few_bytes, many_bytes = (one.compile().memory_analysis().temp_size_in_bytes for one in (few, many))
    chunk, hidden_states = 4 * vocab * lm.CHUNK_ROWS, 4 * 32 * lm.CHUNK_ROWS * 16
    assert many_bytes < few_bytes + 2 * hidden_states and many_bytes < 3 * chunk


def test_one_chunk_is_one_product_without_a_loop():
    assert lm._num_chunks(8 * 128, 1000) == 1
    assert "while" not in lowered_loss(8 * 128, 1000).as_text()


@both
def test_the_loss_is_the_mean_over_loss_tokens_of_the_negative_log_likelihood(cfg):
    params, batch = tiny.language_model(cfg), tiny.lm_batch(cfg, 3, 8)
    loss, metrics = jax.jit(lambda p: lm_loss(p, batch, None, cfg))(params)
    logits = tiny.logits(params, batch["inputs"], cfg, segments=batch["segment_ids"], positions=batch["positions"])
    nll = -np.take_along_axis(log_softmax(logits), batch["targets"][..., None], axis=-1)[..., 0]
    mask = batch["loss_mask"]
    assert 0 < mask.sum() < mask.size and metrics["loss_tokens"] == mask.sum()
    np.testing.assert_allclose(metrics["loss"], np.sum(nll * mask) / mask.sum(), rtol=1e-5)
    if cfg.moe is None:
        assert loss == metrics["loss"]
    else:
        _, _, stats = tiny.apply(
            params, batch["inputs"], cfg=cfg, segment_ids_BT=batch["segment_ids"], positions_BT=batch["positions"]
        )
        np.testing.assert_allclose(loss, metrics["loss"] + router_loss(stats, cfg.moe), rtol=1e-6)


@both
def test_targets_outside_the_loss_mask_do_not_matter(cfg):
    params, batch = tiny.language_model(cfg), tiny.lm_batch(cfg, 2, 8)
    other = batch | {"targets": np.where(batch["loss_mask"] > 0, batch["targets"], 5)}
    assert np.any(other["targets"] != batch["targets"])
    step = jax.jit(jax.value_and_grad(lambda p, b: lm_loss(p, b, None, cfg)[0]))
    tiny.assert_trees_equal(step(params, other), step(params, batch))


def test_hidden_states_outside_the_loss_mask_get_no_gradient():
    x, table, targets, weights = tokens_to_predict()
    _, (grad, _) = tiny.value_and_grads(lambda x, t: fused_cross_entropy(x, t, targets, weights, 2), x, table)
    assert np.all(grad[weights == 0] == 0) and np.all(np.any(grad[weights > 0] != 0, axis=-1))


def test_padding_does_not_dilute_the_mean():
    cfg, batch = tiny.DENSE, tiny.lm_batch(tiny.DENSE, 2, 8)
    params = tiny.language_model(cfg)
    more = {k: np.concatenate([v, np.zeros_like(v)]) for k, v in batch.items()}
    loss = jax.jit(lambda p, b: lm_loss(p, b, None, cfg)[0])
    np.testing.assert_allclose(loss(params, more), loss(params, batch), rtol=1e-6)
    nothing = batch | {"loss_mask": np.zeros_like(batch["loss_mask"])}
    assert loss(params, nothing) == 0


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_token_log_probs_and_entropy(temperature):
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(2, 3, V)).astype(np.float32) * 3, rng.integers(0, V, (2, 3))
    expected = log_softmax(logits / temperature)
    got, entropy = jax.jit(token_log_probs, static_argnums=2)(logits, targets, temperature)
    np.testing.assert_allclose(got, np.take_along_axis(expected, targets[..., None], axis=-1)[..., 0], atol=1e-5)
    np.testing.assert_allclose(entropy, -np.sum(np.exp(expected) * expected, axis=-1), atol=1e-5)


def test_the_entropy_of_equal_logits_is_that_of_the_vocabulary():
    _, entropy = token_log_probs(jnp.full((1, 1, V), 3.0), jnp.zeros((1, 1), jnp.int32))
    np.testing.assert_allclose(entropy, np.log(V), rtol=1e-6)
