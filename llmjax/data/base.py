"""What every source of data is: a config that, when asked, reads records of one kind in splits."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from llmjax.config import PositiveFloat, PositiveInt, fingerprint
from llmjax.errors import UserError


class Place(Protocol):
    """What a source may use of the run that asks it: a folder to keep things in, the seed, and a line to the terminal."""

    @property
    def seed(self) -> int: ...

    def data_path(self, *parts: str) -> str: ...

    def say(self, text: str) -> None: ...


@dataclass(frozen=True)
class Splits:
    """Records, each part to be iterated as often as one likes.

    train: to learn from. held_out: by name, never learnt from; the first is what headlines are about. note: what was
    found, in words.
    """

    train: Iterable[Any]
    held_out: Mapping[str, Iterable[Any]]
    note: str = ""


class Data:
    """Where records come from. Subclasses are frozen dataclasses; their fields are config.

    kind: the class of the records: `str` (documents), `Dialogue`, `Prompt` or `Ranking`. from_model: whether a model of the
    experiment makes them, so that they can only be read when its stage is complete.
    """

    kind: ClassVar[type]
    from_model: ClassVar[bool] = False

    def read(self, place: Place) -> Splits:
        """Reads and checks everything once, and returns the splits. Raises UserError with file and line for a bad record.

        Nothing of the run may be changed by it but what lies below `place.data_path`.
        """
        raise TypeError(f"{type(self).__name__} has no read(place)")

    def prepare(self, context: Any) -> None:
        """For data `from_model`: raises UserError for what cannot be made of them, before any stage trains."""

    def parts(self) -> Mapping[str, tuple[Data, float]]:
        """The sources that this one is mixed of, by name, with their weights; itself alone if it is not mixed."""
        return {"": (self, 1.0)}

    def asked(self) -> Data:
        """The data whose held-out prompts a model is asked to show what it has learnt from these."""
        return self

    def inputs(self) -> tuple[Any, ...]:
        """The stages whose models it needs (`llmjax.stages.base.Input`)."""
        return ()


def read_once(data: Data, place: Place, opened: dict[str, Splits]) -> Splits:
    """The splits of a source, read and checked if they are not in `opened`, by the fingerprint of its config."""
    config = fingerprint(data)
    if config not in opened:
        opened[config] = data.read(place)
    return opened[config]


def plural(kind: type) -> str:
    """What records of a kind are called."""
    return "documents" if kind is str else f"{kind.__name__.lower()}s"


def check_kind(where: str, data: Data, kind: type) -> None:
    """Raises UserError unless `data`, which the config calls `where`, are of a kind."""
    if data.kind is not kind:
        raise UserError(f"{where} is {type(data).__name__}, of {plural(data.kind)}; {plural(kind)} are needed")


@dataclass(frozen=True)
class Mixture(Data):
    """Several sources of one kind, mixed: of the training rows, and so of the tokens, each gives the share of its weight, and a
    small source is repeated while a large one lasts.

    sources: by name. weights: of each name; those that are left out weigh 1.
    """

    sources: dict[str, Data]
    weights: dict[str, PositiveFloat] | None = None

    @property
    def kind(self) -> type:  # pyrefly: ignore[bad-override]
        """That of its sources."""
        return next(iter(self.sources.values())).kind

    def parts(self) -> Mapping[str, tuple[Data, float]]:
        weights = self.weights or {}
        return {name: (source, weights.get(name, 1.0)) for name, source in self.sources.items()}

    def validate(self) -> None:
        if not self.sources:
            raise UserError("a mixture of no sources; give at least one")
        kinds = {source.kind for source in self.sources.values()}
        if len(kinds) > 1:
            raise UserError(f"a mixture of {' and '.join(sorted(map(plural, kinds)))}; mix sources of one kind")
        for name in self.weights or {}:
            if name not in self.sources:
                raise UserError(f"weights: {name!r} is no source; there is {', '.join(self.sources)}")


@dataclass(frozen=True)
class First(Data):
    """The first `count` records of each split of `source`, for a look at them."""

    source: Data
    count: PositiveInt

    @property
    def kind(self) -> type:  # pyrefly: ignore[bad-override]
        """That of its source."""
        return self.source.kind

    def parts(self) -> Mapping[str, tuple[Data, float]]:
        return {name: (First(part, self.count), weight) for name, (part, weight) in self.source.parts().items()}

    def read(self, place: Place) -> Splits:
        splits = self.source.read(place)
        held_out = {name: _Head(part, self.count) for name, part in splits.held_out.items()}
        return Splits(_Head(splits.train, self.count), held_out, splits.note)


@dataclass(frozen=True)
class _Head:
    records: Iterable[Any]
    count: int

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.records, self.count)
