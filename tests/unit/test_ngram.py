"""llmjax.evals.ngram against a dictionary version of the same equations, and as a distribution."""

import math
import os
import pathlib
from collections import Counter, defaultdict

import numpy as np
import pytest

from llmjax.evals.ngram import fit_ngram, ngram_nats

V = 7


def random_streams(seed, sizes):
    """Streams of a random Markov chain, so that contexts matter."""
    rng = np.random.default_rng(seed)
    transitions = rng.dirichlet(np.full(V, 0.3), size=V)
    streams = []
    for size in sizes:
        stream = [int(rng.integers(V))]
        while len(stream) < size:
            stream.append(int(rng.choice(V, p=transitions[stream[-1]])))
        streams.append(stream[:size])
    return streams


class DictionaryKneserNey:
    """The textbook recursion over tuples and Counters; begin symbol "^"."""

    def __init__(self, streams, order):
        self.order = order
        grams = [Counter() for _ in range(order + 1)]
        for stream in streams:
            padded = ["^"] * (order - 1) + list(stream)
            for end in range(order - 1, len(padded)):
                for n in range(1, order + 1):
                    grams[n][tuple(padded[end - n + 1 : end + 1])] += 1
        self.counts = [None] * (order + 1)
        self.counts[order] = grams[order]
        for n in range(1, order):
            left = defaultdict(set)
            for gram in grams[n + 1]:
                left[gram[1:]].add(gram[0])
            self.counts[n] = Counter({gram: len(seen) for gram, seen in left.items()})

    def discount(self, n, count):
        kinds = Counter(self.counts[n].values())
        if count == 0:
            return 0.0
        fallback = [0.5, 1.0, 1.5]
        if not all(kinds[i] for i in (1, 2, 3, 4)):
            return fallback[min(count, 3) - 1]
        y = kinds[1] / (kinds[1] + 2 * kinds[2])
        values = [i - (i + 1) * y * kinds[i + 1] / kinds[i] for i in (1, 2, 3)]
        if not all(0 <= value <= i for i, value in enumerate(values, start=1)):
            values = fallback
        return values[min(count, 3) - 1]

    def prob(self, context, token):
        lower = 1 / V if len(context) == 0 else self.prob(context[1:], token)
        n = len(context) + 1
        followers = {gram: count for gram, count in self.counts[n].items() if gram[:-1] == tuple(context)}
        if not followers:
            return lower
        total = sum(followers.values())
        freed = sum(self.discount(n, count) for count in followers.values())
        count = followers.get((*context, token), 0)
        return (count - self.discount(n, count)) / total + freed / total * lower


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_equals_the_dictionary_version(order):
    train = random_streams(0, [150, 3, 1, 90])
    validation = random_streams(1, [12, 1, 9])
    oracle = DictionaryKneserNey(train, order)
    expected = 0.0
    for stream in validation:
        padded = ["^"] * (order - 1) + stream
        for end in range(order - 1, len(padded)):
            expected -= math.log(oracle.prob(padded[end - order + 1 : end], padded[end]))
    nats, count = ngram_nats(train, validation, vocab_size=V, order=order)
    assert count == 22
    assert nats == pytest.approx(expected, rel=1e-12)


def test_probabilities_sum_to_one_for_any_context():
    model = fit_ngram(random_streams(2, [400, 30]), vocab_size=V, order=4)
    rng = np.random.default_rng(3)
    contexts = [list(rng.integers(V, size=3)) for _ in range(40)] + [[V, V, V], [V, V, 2], [V, 1, 0]]
    for context in contexts:
        probs = model.probs(np.tile(context, (V, 1)), np.arange(V))
        assert probs.min() > 0
        assert probs.sum() == pytest.approx(1.0, abs=1e-12)


def test_contexts_never_cross_streams():
    """Both orders of the two streams give the same model: nothing depends on what stands before a stream."""
    a, b, c = random_streams(4, [50, 60, 40])
    one, other = ngram_nats([a, b], [c], vocab_size=V), ngram_nats([b, a], [c], vocab_size=V)
    assert one == pytest.approx(other, rel=1e-13)
    model = fit_ngram([a, b], vocab_size=V)
    assert model.nats([a, c])[0] == pytest.approx(model.nats([a])[0] + model.nats([c])[0], rel=1e-12)
    assert model.nats([a + c])[0] != pytest.approx(model.nats([a, c])[0], rel=1e-6)


def test_keys_do_not_overflow_with_a_large_vocabulary():
    vocab_size = 200_000
    stream = np.random.default_rng(5).integers(vocab_size, size=500).tolist() * 2
    model = fit_ngram([stream], vocab_size=vocab_size)
    contexts = np.array([stream[10:14]] * 2)
    seen, unseen = model.probs(contexts, np.array([stream[14], (stream[14] + 1) % vocab_size]))
    assert seen > 0.2
    assert 0 < unseen < 1e-3


def test_bad_input():
    with pytest.raises(ValueError, match="vocab_size=7"):
        fit_ngram([[0, 7]], vocab_size=7)
    with pytest.raises(ValueError, match="no token"):
        fit_ngram([[]], vocab_size=7)
    with pytest.raises(ValueError, match="order=0"):
        fit_ngram([[1]], vocab_size=7, order=0)
    assert fit_ngram([[1]], vocab_size=7).nats([[]]) == (0.0, 0)


def test_tinyshakespeare_bytes():
    root = os.environ.get("LLMJAX_TEST_DATA")
    path = pathlib.Path(root or "", "tinyshakespeare", "input.txt")
    if not root or not path.is_file():
        pytest.skip("set LLMJAX_TEST_DATA to a folder with tinyshakespeare/input.txt")
    text = np.frombuffer(path.read_bytes(), np.uint8)
    cut = int(len(text) * 0.9)
    nats, count = ngram_nats([text[:cut]], [text[cut:]], vocab_size=256)
    assert count == 111_540
    assert nats / count == pytest.approx(1.5617, abs=5e-4)  # Witten-Bell smoothing of the same counts gives 1.669
