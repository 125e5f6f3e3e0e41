"""Your own data: text, dialogues, prompts and rankings from files or a TensorFlow Datasets name."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np

from llmjax.config import Range
from llmjax.data import formats, reading
from llmjax.data.base import Data, Place, Splits, plural
from llmjax.data.records import Dialogue, Prompt, Ranking
from llmjax.errors import UserError

PIECE = 2**17
"""Characters of a document that are tokenised at once, at least."""
MOST_BAD = 0.1
"""Of the records of a source may be skipped."""


class View:
    """An iterable that begins anew each time: `make()` is one pass."""

    def __init__(self, make: Callable[[], Iterator[Any]]):
        self._make = make

    def __iter__(self) -> Iterator[Any]:
        return self._make()


@dataclass
class Tally:
    """How many records of a pass were good and how many bad, and what was wrong with the first of these."""

    good: int = 0
    bad: int = 0
    first: str = ""

    def told(self, where: str) -> str:
        """What was skipped, in words. Raises UserError if that is too much; where: how messages name the source."""
        if self.bad > MOST_BAD * (self.good + self.bad):
            share = f"{self.bad:,} of {self.good + self.bad:,} records are bad"
            raise UserError(f"{where}: {share}, more than the {MOST_BAD:.0%} that are skipped; the first is {self.first}")
        return f"{self.bad:,} bad record{'s' if self.bad > 1 else ''} skipped, the first is {self.first}" if self.bad else ""


def sound(
    records: Iterable[reading.Placed], read: Callable[[str, dict[str, Any]], Any], tally: Tally | None
) -> Iterator[Any]:
    """read(place, record) of each record. tally: counts the bad ones, which are skipped; without one the first is raised."""
    for where, record in records:
        try:
            if isinstance(record, UserError):
                raise record
            item = read(where, record)
        except UserError as error:
            if tally is None:
                raise
            tally.bad, tally.first = tally.bad + 1, tally.first or str(error)
            continue
        if tally is not None:
            tally.good += 1
        yield item


@dataclass(frozen=True)
class Source(Data):
    """What all kinds of records are read from.

    path: one or several globs, separated by commas; with `name`, the folder of TFDS's data sets; or the folder of one such.
    name: a TensorFlow Datasets name, "pg19" or "wikipedia/20230601.simple". validation_fraction: share that is held out,
    where neither `validation_path` (globs) nor a validation split of TFDS says what is. skip_bad: leave out records of files
    that are wrong and say how many, up to a tenth; else the first wrong one is an error.
    """

    path: str = ""
    name: str = ""
    validation_path: str = ""
    validation_fraction: Annotated[float, Range(above=0, below=1)] = 0.1
    skip_bad: bool = False

    def validate(self) -> None:
        if not (self.path or self.name):
            raise UserError("path is empty; give the path of your files, a glob, or the name of a TFDS data set")
        if self.validation_path and self.is_tfds:
            raise UserError(f"validation_path={self.validation_path} goes with files only; TFDS has splits of its own")
        if self.skip_bad and self.is_tfds:
            raise UserError("skip_bad goes with files only; leave it out")

    def tally(self) -> Tally | None:
        """For one pass over the records; None where nothing is skipped."""
        return Tally() if self.skip_bad else None

    @property
    def is_tfds(self) -> bool:
        """Whether TFDS reads it: by name, or from the folder of a prepared data set."""
        return bool(self.name) or os.path.exists(os.path.join(os.path.expanduser(self.path), "dataset_info.json"))

    @property
    def where(self) -> str:
        """How messages name it."""
        return f"name={self.name}" if self.name else f"path={self.path}"


# ---- text ---------------------------------------------------------------------------------------------------------


class Piece(str):
    """A part of a document that goes on with the next text of the stream."""


@dataclass(frozen=True)
class Text(Source):
    """Documents to pre-train on, from .txt, .md, .jsonl, .json, .csv and .parquet files (.gz and .zst of them too) or TFDS.

    path, name, validation_path, skip_bad: as in `Source`. validation_fraction: of plain text the last characters of the last
    files; of records whole documents, evenly spread. text_key: field of a record that holds the text. document_separator: what
    is a document in a plain-text file: the "file", each of its "lines", or what stands between "blank_lines".
    """

    text_key: str = "text"
    document_separator: Literal["file", "lines", "blank_lines"] = "file"
    kind: ClassVar[type] = str

    def validate(self) -> None:
        super().validate()
        if not self.text_key:
            raise UserError("text_key is empty; name the field that holds the text")

    def read(self, place: Place) -> Splits:
        """The documents, after one pass over them that finds what is wrong with any and where the held-out part begins."""
        del place
        if self.is_tfds:
            splits = self._read_tfds()
        else:
            plain, records = self._files(self.path, "path")
            if self.validation_path:
                held = self._files(self.validation_path, "validation_path")
                (train, note), (validation, more) = self._all(plain, records), self._all(*held)
                splits = Splits(train, {"validation": validation}, "; ".join(filter(None, (note, more))))
            else:
                splits = self._split(plain, records)
        for name, part in (("train", splits.train), *splits.held_out.items()):
            if next(iter(part), None) is None:
                raise UserError(f"{self.where}: the corpus has no {name} text; give more text")
        return splits

    def _files(self, patterns: str, field: str) -> tuple[list[str], list[str]]:
        paths = reading.expand(patterns, field)
        return [path for path in paths if reading.is_text(path)], [path for path in paths if not reading.is_text(path)]

    def _all(self, plain: Sequence[str], records: Sequence[str]) -> tuple[View, str]:
        """Every document, after one pass that finds what is wrong with any, and what was skipped."""
        for _ in documents(plain, self.document_separator):
            pass
        _, note = self._count(records)
        return View(lambda: itertools.chain(documents(plain, self.document_separator), self._texts(records))), note

    def _count(self, records: Sequence[str]) -> tuple[int, str]:
        """The number of texts in files of records, and what was skipped."""
        tally = self.tally()
        count = sum(1 for _ in self._texts(records, tally))
        return count, "" if tally is None else tally.told(self.where)

    def _texts(self, paths: Sequence[str], tally: Tally | None = None) -> Iterator[str]:
        """Those of the records; tally: counts them in a first pass."""
        placed = (one for path in paths for one in reading.read_records(path, self.text_key))
        texts = sound(placed, lambda where, record: reading.text_of(record, self.text_key, where), tally or self.tally())
        return (text for text in texts if text.strip())

    def _split(self, plain: Sequence[str], records: Sequence[str]) -> Splits:
        sizes, last, goes_on = 0, 0, False
        for text in documents(plain, self.document_separator):
            last = last if goes_on else sizes
            sizes, goes_on = sizes + len(text), isinstance(text, Piece)
        count, note = self._count(records)
        if not sizes and not count:
            raise UserError(f"{self.where}: the corpus is empty, there is no text in its files; check them")
        if count == 1:
            raise UserError(f"{self.where}: one document cannot be split; give more, or a validation_path")
        inside = self.document_separator == "file"
        cut = int(sizes * (1 - self.validation_fraction))
        cut = cut if inside else min(cut, last)
        held = hold_out(count, self.validation_fraction) if count else np.zeros(0, bool)

        def part(validation: bool) -> Iterator[str]:
            yield from _cut_by_characters(documents(plain, self.document_separator), cut, inside, validation)
            yield from (text for text, out in zip(self._texts(records), held) if out == validation)

        return Splits(View(lambda: part(False)), {"validation": View(lambda: part(True))}, note)

    def _read_tfds(self) -> Splits:
        splits = reading.open_tfds(self.name, self.path)

        def texts(records: reading.TFDSRecords) -> Iterator[str]:
            return (text for where, r in records if (text := reading.text_of(r, self.text_key, where)).strip())

        first = next(iter(splits["train"]), None)
        if first is not None:
            reading.text_of(first[1], self.text_key, self.where)
        if "validation" in splits:
            train, validation = (View(lambda split=split: texts(splits[split])) for split in ("train", "validation"))
            return Splits(train, {"validation": validation})
        held = hold_out(len(splits["train"]), self.validation_fraction)

        def part(validation: bool) -> Iterator[str]:
            chosen = (record for record, out in zip(splits["train"], held) if out == validation)
            return (text for where, r in chosen if (text := reading.text_of(r, self.text_key, where)).strip())

        return Splits(View(lambda: part(False)), {"validation": View(lambda: part(True))})


def hold_out(size: int, fraction: float) -> np.ndarray:
    """Which of `size` records are held out, bool [size]: every 1/fraction-th, at least one."""
    edges = np.arange(size + 1) * max(1, int(size * fraction)) // max(1, size)
    return np.diff(edges) > 0


def documents(paths: Sequence[str], separator: str) -> Iterator[str]:
    """The documents of plain-text files that are not blank; a long one in pieces."""
    for path in paths:
        if separator == "file":
            yield from _joined(reading.text_blocks(path), blank="")
        elif separator == "lines":
            for line in _lines(path):
                if line.strip():
                    yield from cut_pieces(line.removesuffix("\r"))
        else:
            for blank, group in itertools.groupby(_lines(path), key=lambda line: not line.strip(" \t\r")):
                if not blank:
                    yield from _joined(group, blank="\n")


def _lines(path: str) -> Iterator[str]:
    waiting: list[str] = []
    for block in reading.text_blocks(path):
        first, *rest = block.split("\n")
        waiting.append(first)
        if rest:
            yield "".join(waiting)
            yield from rest[:-1]
            waiting = [rest[-1]]
    yield "".join(waiting)


def _joined(parts: Iterable[str], blank: str) -> Iterator[str]:
    """One document of parts with `blank` between them, in pieces as it comes; nothing if it is blank."""
    text, begun = "", False
    for number, part in enumerate(parts):
        text = f"{text}{blank if number else ''}{part}"
        while len(text) > 2 * PIECE:
            at = cut_point(text, PIECE)
            piece = text[:at]
            yield Piece(piece if begun or not blank else piece.lstrip("\r\n"))
            text, begun = text[at:], True
    if blank:
        text = text.rstrip("\r\n") if begun else text.strip("\r\n")
    if begun or text.strip():
        yield text


def cut_pieces(text: str) -> Iterator[str]:
    """A document in pieces of at most 2 * PIECE characters; itself if it is no longer than that."""
    start = 0
    while len(text) - start > 2 * PIECE:
        end = cut_point(text, start + PIECE)
        yield Piece(text[start:end])
        start = end
    yield text[start:] if start else text


def cut_point(text: str, at: int) -> int:
    """Where a text may be cut near `at` so that its parts have the tokens of the whole: before a space between letters, for a
    word is never joined with what stands before its space. `at` itself if there is none in the 4,096 characters before."""
    for place in range(at, max(1, at - 4096), -1):
        if text[place] == " " and text[place - 1].isalpha() and text[place + 1 : place + 2].isalpha():
            return place
    return at


def _cut_by_characters(texts: Iterable[str], cut: int, inside: bool, validation: bool) -> Iterator[str]:
    """What stands before the `cut`-th character of all texts together, or behind it. inside: a document may be cut there, as
    nanoGPT does with text[: int(0.9 * len(text))]; else it belongs to the side where it begins."""
    start, side = 0, False
    begins = True
    for text in texts:
        head = max(0, min(len(text), cut - start))
        start += len(text)
        if not inside:
            side = (head == 0) if begins else side
            head = 0 if side else len(text)
        begins = not isinstance(text, Piece)
        part = text[head:] if validation else text[:head]
        if part:
            goes_on = isinstance(text, Piece) and (validation or not inside or start < cut)
            yield Piece(part) if goes_on else part


# ---- dialogues, prompts, rankings ---------------------------------------------------------------------------------


Reader = Callable[[dict[str, Any]], Any]
"""A record -> a `Dialogue`, `Prompt` or `Ranking`, or None to leave it out."""


@dataclass(frozen=True)
class Records(Source):
    """Records of .jsonl, .json, .csv and .parquet files (.gz and .zst of them too), or TFDS, in a format that is recognised by
    their fields.

    format: "auto", the name of a known format, or a function from a record (a dict) to what it means.
    """

    format: str | Reader = "auto"
    known: ClassVar[tuple[formats.Format, ...]] = ()

    def validate(self) -> None:
        super().validate()
        names = [one.name for one in self.known]
        if isinstance(self.format, str) and self.format not in ("auto", *names):
            raise UserError(f"format={self.format!r} is none of auto, {', '.join(names)}, nor a function")

    def read(self, place: Place) -> Splits:
        """The records as `kind`, after one pass over them that finds what is wrong with any and which prompts are held out."""
        del place
        if self.is_tfds:
            found = reading.open_tfds(self.name, self.path)
            train, held = found["train"], found.get("validation")
        else:
            train = self._files(self.path, "path")
            held = self._files(self.validation_path, "validation_path") if self.validation_path else None
        convert, name = self._converter(train)
        items, groups, left_out, skipped = self._scan(train, convert)
        if not items:
            raise UserError(f"{self.where}: no record to learn from; check the files")
        note = f"{items:,} {plural(self.kind)} of {self.name or self.path}, format {name}"
        note += f", {left_out:,} left out" if left_out else ""
        note += f", {skipped}" if skipped else ""
        if held is not None:
            count, _, _, skipped = self._scan(held, convert)
            if not count:
                raise UserError(f"{self.where}: no validation record; give some, or leave out validation_path")
            note += f"; validation: {skipped}" if skipped else ""
            parts = [View(lambda part=part: self._every(part, convert)) for part in (train, held)]
            return Splits(parts[0], {"validation": parts[1]}, note)
        if len(set(groups)) < 2:
            raise UserError(f"{self.where}: all records have one prompt, so none can be held out; give a validation_path")
        chosen = _held_out_groups(groups, self.validation_fraction)
        train_view, held_view = (View(lambda out=out: self._side(train, convert, chosen, out)) for out in (False, True))
        return Splits(train_view, {"validation": held_view}, note)

    def _scan(self, records: Iterable[reading.Placed], convert) -> tuple[int, np.ndarray, int, str]:
        """Number of items, the group of each, the number of records left out, and what was skipped; finds what is wrong."""
        groups, left_out, tally = [], 0, self.tally()
        for item in sound(records, convert, tally):
            if item is None:
                left_out += 1
            else:
                groups.append(group_of(item))
        return len(groups), np.array(groups, np.uint64), left_out, "" if tally is None else tally.told(self.where)

    def _every(self, records: Iterable[reading.Placed], convert) -> Iterator[Any]:
        return (item for item in sound(records, convert, self.tally()) if item is not None)

    def _side(self, records: Iterable[reading.Placed], convert, held_out: frozenset[int], validation: bool) -> Iterator[Any]:
        return (item for item in self._every(records, convert) if (group_of(item) in held_out) == validation)

    def _files(self, patterns: str, field: str) -> View:
        paths = reading.expand(patterns, field, reading.RECORD_SUFFIXES)
        return View(lambda: (placed for path in paths for placed in reading.read_records(path)))

    def _converter(self, records: Iterable[reading.Placed]) -> tuple[Callable[[str, dict[str, Any]], Any], str]:
        """(place, record) -> what it means, and the name of the format."""
        if callable(self.format):
            reader, name = self.format, getattr(self.format, "__name__", type(self.format).__name__)
            return lambda where, record: _call(reader, where, record, self.kind, name), name
        one = next((one for one in self.known if one.name == self.format), None) or self._recognised(records)

        def read(record: dict[str, Any]) -> Any:
            if not one.fits(record):
                raise UserError(f"not of format {one.name}, {one.shape}; it has {', '.join(record) or 'no field'}")
            return one.read(record)

        return lambda where, record: _call(read, where, record, self.kind, one.name), one.name

    def _recognised(self, records: Iterable[reading.Placed]) -> formats.Format:
        """The format of the first record; of the first that has one, where bad ones are skipped."""

        def fitting(where: str, record: dict[str, Any]) -> formats.Format:
            try:
                return formats.recognise(self.known, record)
            except UserError as error:
                raise UserError(f"{where}: {error}") from error

        tally = self.tally()
        found = next(sound(records, fitting, tally), None)
        if found is None:
            raise UserError(tally.first if tally and tally.first else f"{self.where}: holds no record; check the files")
        return found


@dataclass(frozen=True)
class Dialogues(Records):
    """Dialogues for SFT: messages, prompt and completion, Alpaca, ShareGPT, HH-RLHF (docs/data.md has each). Split by the first
    message of the user."""

    kind: ClassVar[type] = Dialogue
    known: ClassVar[tuple[formats.Format, ...]] = formats.DIALOGUE_FORMATS


@dataclass(frozen=True)
class Prompts(Records):
    """Prompts for RL and evaluation, text or messages, with any further fields for rewards to look at. Split by prompt."""

    kind: ClassVar[type] = Prompt
    known: ClassVar[tuple[formats.Format, ...]] = formats.PROMPT_FORMATS


@dataclass(frozen=True)
class Rankings(Records):
    """Ranked answers for reward models and DPO: ranks or scores of K answers, chosen and rejected, groups of equals. Split by
    prompt, never by pair."""

    kind: ClassVar[type] = Ranking
    known: ClassVar[tuple[formats.Format, ...]] = formats.RANKING_FORMATS


def _call(reader: Reader, where: str, record: dict[str, Any], kind: type, name: str) -> Any:
    """What a record means, with its place in errors and as the id of a prompt that has none."""
    try:
        item = reader(record)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{where}: format {name} fails ({reason}); mend the record or the format") from error
    if item is None:
        return None
    if not isinstance(item, kind):
        raise UserError(f"{where}: format {name} returned a {type(item).__name__}; it must return a {kind.__name__} or None")
    for text in _texts_of(item):
        if not text.isascii() and formats.SURROGATE.search(text):
            raise UserError(f"{where}: {text[:20]!r} holds a lone surrogate, which is no valid Unicode; mend the record")
    if isinstance(item, Dialogue) and not item.id:
        return replace(item, id=where)
    if isinstance(item, Prompt) and not item.id:
        return replace(item, id=os.path.basename(where))
    if isinstance(item, Ranking) and not item.prompt.id:
        return replace(item, prompt=replace(item.prompt, id=os.path.basename(where)))
    return item


def _texts_of(item: Dialogue | Prompt | Ranking) -> Iterator[str]:
    """What is going to be tokenised."""
    messages = item.prompt.messages if isinstance(item, Ranking) else item.messages
    yield from (message.content for message in messages if message.content)
    if isinstance(item, Ranking):
        yield from (completion.text for completion in item.completions)


def group_of(item: Dialogue | Prompt | Ranking) -> int:
    """A number of 64 bits for what is held out together: equal prompts, dialogues that begin alike."""
    if isinstance(item, Dialogue):
        begun = itertools.takewhile(lambda message: message.role != "assistant", item.messages)
    else:
        begun = iter((item.prompt if isinstance(item, Ranking) else item).messages)
    text = "\0".join(f"{message.role}:{message.content}" for message in begun)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _held_out_groups(groups: np.ndarray, fraction: float) -> frozenset[int]:
    """As many groups, by their numbers, as hold `fraction` of the items; at least one, and not all. The order of the records
    does not matter, and a record that is added later moves few others."""
    unique, counts = np.unique(groups, return_counts=True)
    size = int(np.searchsorted(np.cumsum(counts), fraction * len(groups), side="right"))
    return frozenset(int(group) for group in unique[: min(max(1, size), len(unique) - 1)])
