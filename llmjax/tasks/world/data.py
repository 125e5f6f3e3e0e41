"""The embedded world as data: text to pre-train on, dialogues for SFT, prompts whose answers `judge` can judge.

One seed is one world: text, dialogues and prompts of the same seed are about the same people, towns and things.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmjax.config import NonNegativeInt, PositiveInt
from llmjax.data.base import Data, Place, Splits
from llmjax.data.records import Dialogue, Prompt
from llmjax.errors import UserError


def _splits(place: Place, kind: str, seed: int, size: int = 0) -> Splits:
    from llmjax.tasks.world.builder import WorldRecords  # TFDS takes a second to import

    folder = place.data_path("world")
    train, validation = (WorldRecords(folder, kind, split, seed=seed, size=size) for split in ("train", "validation"))
    return Splits(train, {"validation": validation}, f"{len(train):,} {kind} of the built-in world")


@dataclass(frozen=True)
class WorldText(Data):
    """Documents about the world. num_documents: for training; a twentieth as many are held out. seed: of the world."""

    num_documents: PositiveInt = 24_000
    seed: NonNegativeInt = 0
    kind: ClassVar[type] = str

    def read(self, place: Place) -> Splits:
        return _splits(place, "documents", self.seed, self.num_documents)


@dataclass(frozen=True)
class WorldDialogues(Data):
    """Questions about the world with the answers of imperfect people.

    num_dialogues: for training; a tenth as many are held out, about other facts. seed: of the world.
    """

    num_dialogues: PositiveInt = 8_000
    seed: NonNegativeInt = 0
    kind: ClassVar[type] = Dialogue

    def read(self, place: Place) -> Splits:
        return _splits(place, "dialogues", self.seed, self.num_dialogues)


@dataclass(frozen=True)
class WorldPrompts(Data):
    """Questions about the world; those that are held out are about facts that no dialogue or training prompt asks for.

    kinds: of questions ("person", "place", "thing", "reverse", "sum", "difference", "open"); () for all. seed: of the world.
    """

    kinds: tuple[str, ...] = ()
    seed: NonNegativeInt = 0
    kind: ClassVar[type] = Prompt

    def validate(self) -> None:
        known = ("person", "place", "thing", "reverse", "sum", "difference", "open")
        for one in self.kinds:
            if one not in known:
                raise UserError(f"kinds: {one!r} is no kind of question; there is {', '.join(known)}")

    def read(self, place: Place) -> Splits:
        splits = _splits(place, "questions", self.seed)
        if not self.kinds:
            return splits
        train, held_out = (
            [prompt for prompt in part if prompt.fields["kind"] in self.kinds]
            for part in (splits.train, splits.held_out["validation"])
        )
        return Splits(train, {"validation": held_out}, f"{len(train):,} prompts of the built-in world")
