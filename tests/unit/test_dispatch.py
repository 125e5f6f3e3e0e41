"""Every form of the experts equals a loop over them, in value and in all gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from llmjax.models.dispatch import block_form, expert_ffn, expert_ffn_blocks, expert_ffn_loop, expert_ffn_ragged

T, D, F = 24, 6, 10


def inputs(num_experts: int, choices: int, seed: int = 0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    experts = normal(num_experts, D, F), normal(num_experts, D, F), normal(num_experts, F, D)
    return normal(T, D), rng.random((T, choices)).astype(np.float32), *experts, normal(T, D)


def routings(num_experts: int, choices: int) -> dict[str, np.ndarray]:
    """Expert ids [T, C] that a router could give, and some that it hardly would."""
    rng = np.random.default_rng(num_experts * 10 + choices)
    any_of = rng.integers(0, num_experts, (T, choices))
    phantom = np.where(rng.random((T, 1)) < 0.3, num_experts, any_of)
    return {
        "uneven": (num_experts * rng.random((T, choices)) ** 3).astype(int),
        "distinct": np.argsort(rng.random((T, num_experts)), axis=1)[:, :choices],
        "all to the first": np.zeros((T, choices), int),
        "all to the last": np.full((T, choices), num_experts - 1),
        "even ones empty": np.minimum(any_of | 1, num_experts - 1),
        "some nowhere": phantom,
        "single choices nowhere": np.where(rng.random((T, choices)) < 0.4, num_experts, any_of),
        "all nowhere": np.full((T, choices), num_experts),
    }


def value_and_grads(form):
    """Outputs, and the gradients of a sum that meets every output with its own weight."""

    def loss(x, weights, gate, up, down, ids, out):
        y = form(x, ids, weights, gate, up, down)
        return jnp.sum(out * y), y

    return jax.grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True)


def blocks(lead, *sizes):
    """The first `lead` rows of every expert at once, the rest in blocks of these sizes."""

    def form(x, ids, weights, gate, up, down):
        return expert_ffn_blocks(x, ids, weights, gate, up, down, lead, sizes)

    return form


def scanned_loop(x, ids, weights, gate, up, down):
    """`expert_ffn_loop`, one expert a turn, which compiles sooner when there are many."""

    def turn(y, expert):
        e, *w = expert
        return y + expert_ffn_loop(x, ids - e, weights, *(a[None] for a in w)), None

    return jax.lax.scan(turn, jnp.zeros_like(x), (jnp.arange(gate.shape[0]), gate, up, down))[0]


def assert_equal_to_the_loop(forms, num_experts: int, choices: int, names=None):
    *args, out = (jnp.asarray(a) for a in inputs(num_experts, choices))
    loop = jax.jit(value_and_grads(expert_ffn_loop if num_experts <= 8 else scanned_loop))
    compiled = [jax.jit(value_and_grads(form)) for form in forms]
    every = routings(num_experts, choices)
    for name in names or every:
        ids = jnp.asarray(every[name], jnp.int32)
        expected, y = loop(*args, ids, out)
        for form in compiled:
            actual, got_y = form(*args, ids, out)
            for leaf, want, got in zip(("x", "weights", "gate", "up", "down", "y"), (*expected, y), (*actual, got_y)):
                scale = 1 + np.max(np.abs(want))
                np.testing.assert_allclose(got / scale, want / scale, atol=3e-6, err_msg=f"{name}: {leaf}")


SIZES = ((1, 1), (2, 1), (2, 2), (8, 1), (8, 2), (8, 8))


@pytest.mark.parametrize("size", tiny.crossed([((1, 1),), ((8, 2),)], SIZES))
def test_invariant_10_the_form_of_this_backend_and_ragged_equal_the_loop(size):
    assert_equal_to_the_loop([expert_ffn, expert_ffn_ragged], *size)


@pytest.mark.parametrize("choices", tiny.crossed([(1,), (8,)], (1, 2, 8)))
def test_invariant_10_many_experts_for_few_tokens(choices):
    names = ("distinct", "all to the last", "single choices nowhere")
    assert_equal_to_the_loop([expert_ffn, expert_ffn_ragged], 64, choices, names)


@pytest.mark.parametrize("sizes", [(1,), (3,), (512,), (5, 2), (64, 16, 4), (512, 128, 32)])
def test_blocks_of_any_sizes_equal_the_loop(sizes):
    assert_equal_to_the_loop([blocks(0, *sizes)], 8, 2)


@pytest.mark.parametrize("lead", tiny.crossed([(7,), (100,)], (1, 4, 6, 7, 100)))
def test_any_number_of_leading_rows_equals_the_loop(lead):
    assert_equal_to_the_loop([blocks(lead, 5, 2), blocks(lead, 64)], 8, 2)


def test_blocks_without_gradients_give_the_same_values():
    x, weights, *experts, _ = inputs(8, 2)
    ids = jnp.asarray(routings(8, 2)["uneven"], jnp.int32)
    expected = expert_ffn_loop(x, ids, weights, *experts)
    np.testing.assert_allclose(jax.jit(blocks(4, 16, 4))(x, ids, weights, *experts), expected, atol=2e-5)


@pytest.mark.parametrize("form", [expert_ffn, expert_ffn_ragged])
def test_invariant_10_a_choice_that_goes_nowhere_contributes_nothing_whatever_its_weight(form):
    assert_equal_to_the_loop([form], 8, 2, ("some nowhere", "single choices nowhere", "all nowhere"))


def test_an_expert_that_serves_nobody_gets_no_gradient():
    *args, out = inputs(8, 2)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 4, (T, 2)), jnp.int32)
    grads, _ = jax.jit(value_and_grads(expert_ffn))(*args, ids, out)
    for grad in grads[2:]:
        assert np.all(grad[4:] == 0) and np.all(np.any(grad[:4] != 0, axis=(1, 2)))


def test_default_forms_cover_an_even_load_and_nothing_for_few_rows():
    for rows in (0, 1, 63, 64, 512, 1023, 1024, 100_000):
        for num_experts in (1, 8, 64):
            lead, sizes = block_form(rows, num_experts)
            assert list(sizes) == sorted(set(sizes), reverse=True) and sizes[-1] >= 1
            assert lead == 0 if rows < 8 * num_experts else 1 <= lead * num_experts / rows <= 3
