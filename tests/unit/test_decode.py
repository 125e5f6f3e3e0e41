"""Decoding with a cache is the full forward pass, token by token."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from llmjax.generation import decode
from llmjax.generation.decode import decode_step, generate, prefill, stream
from llmjax.generation.sampling import SamplingConfig
from llmjax.models import transformer
from llmjax.models.transformer import unstacked

both = pytest.mark.parametrize("cfg", tiny.MODELS.values(), ids=tiny.MODELS.keys())
PROMPT, NEW, PAD = 6, 8, 0
LENGTHS = (6, 2, 4)
SAMPLING = SamplingConfig(max_new_tokens=NEW, temperature=0.6)
GREEDY = SamplingConfig(max_new_tokens=NEW, temperature=0.0)
NEVER = (-1,)
# `generate` itself, compiled once for all ids that stop.
generate_any_end = jax.jit(generate.__wrapped__, static_argnames=("cfg", "sampling"))


def prompts(cfg, seed: int = 0):
    """Prompts of different lengths, padded on the left with a token that is not special."""
    segments = np.array([[0] * (PROMPT - n) + [1] * n for n in LENGTHS], np.int32)
    return np.where(segments > 0, tiny.tokens(cfg, len(LENGTHS), PROMPT, seed=seed), 9), segments


def likeliest_end(cfg, params) -> int:
    """A token that ends some rows early: the most frequent one of an endless generation."""
    free = run(params, cfg)
    return int(np.bincount(np.asarray(free.tokens).ravel()).argmax())


def run(params, cfg, stop_ids=NEVER, sampling=SAMPLING, rows=slice(None), seed: int = 0):
    tokens, segments = prompts(cfg)
    keys = jax.random.split(jax.random.key(seed), len(LENGTHS))[rows]
    inputs = jnp.asarray(tokens[rows]), jnp.asarray(segments[rows]), keys
    stop_ids = tuple(map(jnp.int32, stop_ids))
    return generate_any_end(params, *inputs, cfg=cfg, sampling=sampling, stop_ids=stop_ids, pad_id=PAD)


def full_logits(params, cfg, generation):
    """Logits [B, R, V] for each response token, from one pass without a cache."""
    tokens, segments = prompts(cfg)
    whole = np.concatenate([tokens, generation.tokens], axis=1)
    ones = np.ones_like(generation.tokens)
    return tiny.logits(params, whole, cfg, segments=np.concatenate([segments, ones], axis=1))[:, PROMPT - 1 : -1]


@both
def test_invariant_12_every_cached_step_equals_the_full_forward_pass(cfg):
    params, (tokens, segments) = tiny.language_model(cfg), prompts(cfg)
    text = tiny.tokens(cfg, len(LENGTHS), 5, seed=7)
    state = jax.jit(partial(prefill, cfg=cfg, size=PROMPT + 5))(params, jnp.asarray(tokens), jnp.asarray(segments))
    step = jax.jit(partial(decode_step, cfg=cfg))
    whole = np.concatenate([tokens, text], axis=1)
    full = tiny.logits(params, whole, cfg, segments=np.concatenate([segments, np.ones_like(text)], axis=1))
    for t in range(5):
        np.testing.assert_allclose(state.logits, full[:, PROMPT - 1 + t], atol=1e-5)
        np.testing.assert_array_equal(state.position, np.array(LENGTHS) + t)
        state = step(params, state, jnp.asarray(text[:, t]))
    np.testing.assert_allclose(state.logits, full[:, -1], atol=1e-5)


@both
def test_greedy_is_the_argmax_of_repeated_full_forward_passes(cfg):
    params, (tokens, segments) = tiny.language_model(cfg), prompts(cfg)
    got = run(params, cfg, sampling=GREEDY)
    width = PROMPT + NEW
    text = np.pad(tokens, ((0, 0), (0, NEW)))
    for t in range(PROMPT, width):
        real = np.pad(np.concatenate([segments, np.ones((len(LENGTHS), t - PROMPT))], axis=1), ((0, 0), (0, width - t)))
        text[:, t] = tiny.logits(params, text, cfg, segments=real)[:, t - 1].argmax(axis=-1)
    np.testing.assert_array_equal(got.tokens, text[:, PROMPT:])
    assert not np.any(got.ended) and np.all(got.mask == 1)


@both
def test_log_probs_are_those_of_the_full_forward_pass_at_the_temperature(cfg):
    params = tiny.language_model(cfg)
    got = run(params, cfg, stop_ids=(likeliest_end(cfg, params),))
    log_probs = np.asarray(jax.nn.log_softmax(full_logits(params, cfg, got) / SAMPLING.temperature, axis=-1))
    expected = np.take_along_axis(log_probs, np.asarray(got.tokens)[..., None], axis=-1)[..., 0] * got.mask
    np.testing.assert_allclose(got.log_probs, expected, atol=1e-5)


@both
def test_a_row_depends_on_its_own_prompt_and_key_only(cfg):
    params = tiny.language_model(cfg)
    together = run(params, cfg)
    for row in range(len(LENGTHS)):
        alone = run(params, cfg, rows=slice(row, row + 1))
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
        np.testing.assert_allclose(alone.log_probs[0], together.log_probs[row], atol=1e-5)
    other_keys = run(params, cfg, seed=1)
    assert np.any(other_keys.tokens != together.tokens, axis=1).all()


@both
def test_a_row_stops_at_its_end_of_turn(cfg):
    params = tiny.language_model(cfg)
    end_id = likeliest_end(cfg, params)
    free, got = run(params, cfg), run(params, cfg, stop_ids=(end_id,))
    assert np.sum(got.ended) > 0
    for row in range(len(LENGTHS)):
        places = np.flatnonzero(np.asarray(free.tokens[row]) == end_id)
        length = places[0] + 1 if len(places) else NEW
        assert bool(got.ended[row]) == (len(places) > 0)
        np.testing.assert_array_equal(got.mask[row], np.arange(NEW) < length)
        np.testing.assert_array_equal(got.tokens[row, :length], free.tokens[row, :length])
        np.testing.assert_array_equal(got.tokens[row, length:], PAD)
        np.testing.assert_array_equal(got.log_probs[row, length:], 0)


def own_ids(free) -> list[int]:
    """For each row a token that it says, not at once, and no other row does."""
    rows = [list(map(int, row)) for row in np.asarray(free.tokens)]
    others = [{token for other in rows if other is not row for token in other} for row in rows]
    return [next(token for token in row[1:] if token not in said | {row[0]}) for row, said in zip(rows, others)]


def test_any_of_several_ids_ends_a_row():
    cfg = tiny.DENSE
    params = tiny.language_model(cfg)
    free = run(params, cfg)
    ids = own_ids(free)
    for stop_ids in (ids, ids[::-1], [cfg.vocab_size, *ids], ids[:2]):
        got = run(params, cfg, stop_ids)
        np.testing.assert_array_equal(got.ended, [one in stop_ids for one in ids])
        for row, own in enumerate(ids):
            length = np.flatnonzero(free.tokens[row] == own)[0] + 1 if own in stop_ids else NEW
            np.testing.assert_array_equal(got.mask[row], np.arange(NEW) < length)
            np.testing.assert_array_equal(got.tokens[row], np.where(np.arange(NEW) < length, free.tokens[row], PAD))


def test_stream_is_generate():
    cfg = tiny.SPARSE
    params, (tokens, segments) = tiny.language_model(cfg), prompts(cfg)
    greedy = run(params, cfg, sampling=GREEDY)
    end_id = int(greedy.tokens[0, 3])  # the first row may end even earlier
    expected = run(params, cfg, stop_ids=(end_id,), sampling=GREEDY)
    for row in (0, 1):
        prompt = [int(token) for token, real in zip(tokens[row], segments[row]) if real]
        got = list(stream(params, prompt, jax.random.key(0), cfg=cfg, sampling=GREEDY, stop_ids=(end_id,)))
        length = int(expected.mask[row].sum()) - int(expected.ended[row])
        assert got == expected.tokens[row, :length].tolist()


def test_generate_as_it_is_compiled_gives_the_same():
    cfg = tiny.DENSE
    params, (tokens, segments) = tiny.language_model(cfg), prompts(cfg)
    stop_ids = tuple(own_ids(run(params, cfg))[:2])
    expected = run(params, cfg, stop_ids)
    keys = jax.random.split(jax.random.key(0), len(LENGTHS))
    got = generate(params, tokens, segments, keys, cfg=cfg, sampling=SAMPLING, stop_ids=stop_ids, pad_id=PAD)
    assert np.sum(got.ended) == 2
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_allclose(got.log_probs, expected.log_probs, atol=1e-5)


def test_stream_draws_what_generate_draws_from_the_same_key():
    cfg = tiny.DENSE
    params, (tokens, _) = tiny.language_model(cfg), prompts(cfg)
    expected = run(params, cfg)
    key = jax.random.split(jax.random.key(0), len(LENGTHS))[0]
    say = partial(stream, params, tokens[0].tolist(), key, cfg=cfg, sampling=SAMPLING)
    said = expected.tokens[0].tolist()
    assert list(say(stop_ids=())) == said
    late, early = said[5], said[2]  # whichever comes first ends it, and is not said
    assert list(say(stop_ids=(late, early))) == said[: min(said.index(late), said.index(early))]


# How weights are laid out


def test_layers_are_unstacked_in_order_and_once():
    moe = dataclasses.replace(tiny.SPARSE.moe, every=2, first_k_dense=1)
    cfg = dataclasses.replace(tiny.SPARSE, num_layers=4, moe=moe)  # dense, dense, sparse, dense
    params = tiny.language_model(cfg)
    laid_out = unstacked(params, cfg)
    assert laid_out.dense_blocks is None and unstacked(laid_out, cfg) is laid_out
    stacks = [("dense_blocks", 0), ("dense_blocks", 1), ("blocks", 0), ("dense_blocks", 2)]
    for layer, (stack, row) in zip(laid_out.blocks, stacks, strict=True):
        tiny.assert_trees_equal(layer, jax.tree.map(lambda leaf: leaf[row], getattr(params, stack)))
    say = partial(stream, prompt=[3, 1, 4], key=jax.random.key(0), cfg=cfg, sampling=GREEDY, stop_ids=())
    assert list(say(laid_out)) == list(say(params))


def test_a_dialogue_compiles_one_layer_for_the_prompt_and_one_for_its_tokens():
    cfg = dataclasses.replace(tiny.DENSE, num_layers=5, mlp_dim=20)
    before = transformer._compiled_layer._cache_size()
    said = stream(tiny.language_model(cfg), [3, 1, 4], jax.random.key(0), cfg=cfg, sampling=GREEDY, stop_ids=())
    assert len(list(said)) == NEW
    assert transformer._compiled_layer._cache_size() == before + 2


def test_the_loop_of_generation_reads_no_stacked_weight():
    """Else each token would copy every weight out of its stack."""
    cfg = tiny.DENSE
    params, keys = tiny.language_model(cfg), jax.random.split(jax.random.key(0), len(LENGTHS))
    options = dict(cfg=cfg, sampling=SAMPLING, stop_ids=NEVER, pad_id=PAD)
    traced = jax.make_jaxpr(partial(generate.__wrapped__, **options))(params, *prompts(cfg), keys)
    (loop,) = (eqn for eqn in traced.eqns if eqn.primitive.name == "while")
    shapes = {var.aval.shape for var in loop.invars}
    assert params.blocks.mlp.gate.shape[1:] in shapes and not shapes & {leaf.shape for leaf in jax.tree.leaves(params.blocks)}


def test_long_prompts_are_read_in_pieces(monkeypatch):
    """Whole pieces, a piece that takes what does not divide, padding in front: the same logits, cache and answers."""
    cfg = tiny.DENSE
    params, text = tiny.language_model(cfg), tiny.tokens(cfg, 2, 22)
    segments = np.array([[1] * 22, [0] * 9 + [1] * 13])
    whole = jax.jit(lambda *prompt: prefill(params, *prompt, cfg, 24))(text, segments)
    monkeypatch.setattr(decode, "PREFILL_TOKENS", 8)
    pieces = jax.jit(lambda *prompt: prefill(params, *prompt, cfg, 24))(text, segments)
    tiny.assert_trees_close(pieces, whole, 2e-5)
    assert int(pieces.cache[0].length) == 22
