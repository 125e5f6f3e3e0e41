"""A count-based baseline: interpolated modified Kneser-Ney (Chen & Goodman 1998, TR-10-98, section 3), in numpy.

An n-gram is held as one integer, (id of its first n - 1 tokens) * symbols + (its last token), where an id is the rank
in the sorted table of the order below: no key overflows whatever the order and the vocabulary, and a lookup is one
binary search per order. Every stream is preceded by order - 1 copies of a begin symbol: contexts never cross streams.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

Streams = Iterable[Sequence[int] | np.ndarray]


@dataclass(frozen=True)
class _Order:
    """The n-grams of one n. C: contexts, that is (n - 1)-grams; G: n-grams.

    keys [G] int64, sorted; discounted [G]: (c - D(c)) / c(context), float64, 0 if the n-gram only ends in the begin
    symbol; backoff [C]: weight of the order below, 1 for a context never continued.
    """

    keys: np.ndarray
    discounted: np.ndarray
    backoff: np.ndarray


@dataclass(frozen=True)
class NgramModel:
    """Made by `fit_ngram`. vocab_size: ids are 0 ... vocab_size - 1; vocab_size itself is the begin symbol."""

    vocab_size: int
    orders: tuple[_Order, ...]

    @property
    def order(self) -> int:
        """n of the longest n-grams."""
        return len(self.orders)

    def probs(self, contexts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """p(token | context), [M] float64.

        Args:
            contexts: [M, order - 1] ids, the nearest last; vocab_size stands for "before the beginning".
            tokens: [M] ids.
        """
        windows = np.concatenate([contexts, tokens[:, None]], axis=1)
        return self._probs(windows.reshape(-1).astype(np.int64)).reshape(windows.shape)[:, -1]

    def nats(self, streams: Streams) -> tuple[float, int]:
        """Sum of -ln p over all tokens of all streams, and their number."""
        flat = _flatten(streams, self.order, self.vocab_size)
        real = flat != self.vocab_size
        return float(-np.log(self._probs(flat)[real]).sum()), int(real.sum())

    def _probs(self, flat: np.ndarray) -> np.ndarray:
        """p of each symbol given the order - 1 before it in `flat`; meaningless where there are fewer."""
        probs = np.full(flat.size, 1.0 / self.vocab_size)
        ids = np.zeros(flat.size, np.int64)
        for n, table in enumerate(self.orders, start=1):
            context = _shift(ids) if n > 1 else ids
            ids, found = _lookup(table.keys, context, flat, self.vocab_size + 1)
            known = context >= 0
            backoff = np.where(known, table.backoff[context], 1.0)
            probs = np.where(found, table.discounted[ids], 0.0) + backoff * probs
            ids = np.where(found, ids, -1)
        return probs


def fit_ngram(streams: Streams, *, vocab_size: int, order: int = 5) -> NgramModel:
    """Counts and discounts of `streams`.

    The longest n-grams have their counts; a shorter one has the number of different symbols seen before it (the begin
    symbol is one). Each order is interpolated with the one below, the lowest with 1 / vocab_size.

    Raises:
        ValueError: order is below 1, there is no token, or an id is not below vocab_size.
    """
    if order < 1:
        raise ValueError(f"order={order} must be positive")
    flat = _flatten(streams, order, vocab_size)
    real = flat != vocab_size
    if not real.any():
        raise ValueError("no token to count")
    tables, ids = [], [np.zeros(flat.size, np.int64)]
    for n in range(1, order + 1):
        context = _shift(ids[-1]) if n > 1 else ids[-1]
        keys, inverse = np.unique(context * (vocab_size + 1) + flat, return_inverse=True)
        tables.append(keys)
        ids.append(inverse)
    orders, counts = [], np.bincount(ids[order][real], minlength=tables[-1].size)
    for n in range(order, 0, -1):
        num_contexts = tables[n - 2].size if n > 1 else 1
        orders.append(_discount(tables[n - 1], counts, vocab_size + 1, num_contexts))
        if n > 1:
            # One place in the text for each kind of n-gram that ends in a token: its last n - 1 symbols gain one.
            place = np.full(tables[n - 1].size, -1)
            place[ids[n][real]] = np.flatnonzero(real)
            counts = np.bincount(ids[n - 1][place[place >= 0]], minlength=num_contexts)
    return NgramModel(vocab_size, tuple(reversed(orders)))


def ngram_nats(
    train: Streams, validation: Streams, *, vocab_size: int, order: int = 5
) -> tuple[float, int]:
    """Total nats of the validation streams under an n-gram model of the training streams, and their number of tokens.

    A language model on packed documents also predicts the end of each: append <|endoftext|> to every stream to compare.
    """
    return fit_ngram(train, vocab_size=vocab_size, order=order).nats(validation)


def _flatten(streams: Streams, order: int, vocab_size: int) -> np.ndarray:
    begin = np.full(order - 1, vocab_size, np.int64)
    parts = [part for stream in streams for part in (begin, np.asarray(stream, np.int64))]
    flat = np.concatenate(parts) if parts else begin
    tokens = np.concatenate(parts[1::2]) if parts else begin[:0]
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise ValueError(f"ids from {tokens.min()} to {tokens.max()} do not fit vocab_size={vocab_size}")
    return flat


def _shift(ids: np.ndarray) -> np.ndarray:
    """What stood one place before; at the first place there is nothing, any valid id will do."""
    return np.concatenate([ids[:1], ids[:-1]])


def _lookup(keys: np.ndarray, context: np.ndarray, last: np.ndarray, symbols: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids [M] of the n-grams (context, last) in `keys`, and whether they are there (context -1: never)."""
    wanted = context * symbols + last
    ids = np.minimum(np.searchsorted(keys, wanted), keys.size - 1)
    return ids, (keys[ids] == wanted) & (context >= 0)


def _discount(keys: np.ndarray, counts: np.ndarray, symbols: int, num_contexts: int) -> _Order:
    """Chen & Goodman's equation for p_KN, taken apart into what each n-gram and each context contributes."""
    context = keys // symbols
    discounts = _discounts(counts)
    kind = np.minimum(counts, 3)
    totals = np.bincount(context, counts, num_contexts)
    freed = np.bincount(context, discounts[kind], num_contexts)
    continued = totals > 0
    backoff = np.divide(freed, totals, out=np.ones(num_contexts), where=continued)
    mass = counts - discounts[kind]
    discounted = np.divide(mass, totals[context], out=np.zeros(keys.size), where=continued[context])
    return _Order(keys, discounted, backoff)


def _discounts(counts: np.ndarray) -> np.ndarray:
    """[0, D1, D2, D3+] with D_i = i - (i + 1) Y n_{i+1} / n_i and Y = n_1 / (n_1 + 2 n_2), n_i kinds of count i.

    Where the formula does not apply (a small vocabulary leaves some n_i at 0, or gives a D_i outside 0 to i) it is
    0.5, 1, 1.5, as in KenLM (Heafield 2013).
    """
    kinds = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].astype(np.float64)
    i = np.arange(1, 4)
    if (kinds > 0).all():
        discounts = i - (i + 1) * kinds[0] / (kinds[0] + 2 * kinds[1]) * kinds[1:] / kinds[:3]
        if ((discounts >= 0) & (discounts <= i)).all():
            return np.concatenate([[0.0], discounts])
    return np.array([0.0, 0.5, 1.0, 1.5])
