"""The embedded world on disk: a TFDS builder (array_record, no TensorFlow) and random access to what it wrote."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds
from absl import logging
from tensorflow_datasets.core.utils import tqdm_utils

from llmjax.data.records import Dialogue, Message, Prompt, user
from llmjax.errors import UserError
from llmjax.tasks.world.dialogues import demonstrations, questions
from llmjax.tasks.world.documents import VALIDATION_FRACTION, documents
from llmjax.tasks.world.facts import make_world

KINDS = ("documents", "dialogues", "questions")
SPLITS = ("train", "validation")
_VERSION = "2.0.0"
_FEW = 20


class EmbeddedWorld(tfds.core.GeneratorBasedBuilder):
    """The world of one seed as three TFDS configs: "documents", "dialogues" and "questions", each train and validation.

    Every example has one feature: "text" of a document, "messages" of a dialogue (JSON: list of role and content) or
    "question" (JSON of the fields of `dialogues.Question`). size: documents or dialogues in train; validation has 1/20 as
    many documents and 1/10 as many dialogues, at least 20 of each.
    """

    VERSION = tfds.core.Version(_VERSION)
    RELEASE_NOTES = {_VERSION: "Quizzes among the documents; more facts held out."}
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=kind, description=f"The {kind} of the world.") for kind in KINDS]

    # No checksum or README files lie beside this module. To look for them TFDS would import importlib_resources, which
    # it uses without requiring it.
    code_path = None

    def __init__(self, *, seed: int = 0, size: int = 0, **kwargs):
        self._seed, self._size = seed, size
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        feature = {"documents": "text", "dialogues": "messages", "questions": "question"}[self.builder_config.name]
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.builder_config.description,
            features=tfds.features.FeaturesDict({feature: tfds.features.Text()}),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, str]]]:
        world, kind = make_world(self._seed), self.builder_config.name
        num = split_size(kind, split, self._seed, self._size)
        if kind == "documents":
            texts = ({"text": text} for text in documents(world, num, int(split == "validation"), split))
        elif kind == "dialogues":
            texts = ({"messages": json.dumps(d.messages)} for d in demonstrations(world, split, num, 0))
        else:
            texts = ({"question": json.dumps(dataclasses.asdict(q))} for q in questions(world, split))
        yield from enumerate(texts)


def split_size(kind: str, split: str, seed: int, size: int) -> int:
    """Number of examples of a split, from the arguments of the builder."""
    if kind == "questions":
        return len(questions(make_world(seed), split))
    if split == "train":
        return size
    return max(_FEW, round(size * VALIDATION_FRACTION) if kind == "documents" else size // 10)


class WorldRecords(Sequence):
    """Random access to one kind and split, built under `folder` when the first record is wanted.

    Records are `str` for "documents", `Dialogue` for "dialogues", `Prompt` for "questions". The order is a fixed shuffle.
    """

    def __init__(self, folder: str | os.PathLike, kind: str, split: str, *, seed: int, size: int = 0):
        """Raises UserError for another kind or split."""
        for name, value, known in (("kind", kind, KINDS), ("split", split, SPLITS)):
            if value not in known:
                raise UserError(f"{name}={value!r}: not in the world; take one of {', '.join(known)}")
        self._open: Callable[[], Any] = functools.partial(_open_world, folder, kind, split, seed, size)
        self._decode = {"documents": _decode_document, "dialogues": _decode_dialogue, "questions": _decode_question}[kind]
        self._size = split_size(kind, split, seed, size)

    @functools.cached_property
    def _records(self) -> Any:
        return self._open()

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.__getitems__(range(*index.indices(len(self))))
        position = index.__index__()
        if not -len(self) <= position < len(self):
            raise IndexError(f"index {position} of {len(self)}")
        return self._decode(self._records[position % len(self)])

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """The examples at `indices`, read in one go."""
        return [self._decode(record) for record in self._records.__getitems__(list(indices))]

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self), 1024):
            yield from self[start : start + 1024]


def _decode_document(record: dict[str, bytes]) -> str:
    return record["text"].decode("utf-8")


def _decode_dialogue(record: dict[str, bytes]) -> Dialogue:
    return Dialogue(tuple(Message(message["role"], message["content"]) for message in json.loads(record["messages"])))


def _decode_question(record: dict[str, bytes]) -> Prompt:
    fields = json.loads(record["question"])
    return Prompt(fields.pop("id"), user(fields.pop("text")), fields)


def _open_world(folder: str | os.PathLike, kind: str, split: str, seed: int, size: int) -> Any:
    place = pathlib.Path(prepare_world(folder, kind, seed=seed, size=size))
    with _quiet():
        builder: Any = tfds.builder_from_directory
        return builder(str(place / "embedded_world" / kind / _VERSION)).as_data_source(split)


def prepare_world(folder: str | os.PathLike, kind: str, *, seed: int, size: int = 0) -> str:
    """Builds one kind of the world under `folder`, complete or not at all, and returns where it is.

    Its name holds kind, seed, size and version: the same call again finds it done, another builds beside it. Prints
    nothing. Raises UserError if the size is not positive or the folder cannot be written.
    """
    if size < 1 and kind != "questions":
        raise UserError(f"num_{kind}={size}: the world needs at least one; choose a positive number")
    counted = "" if kind == "questions" else str(size)
    place = pathlib.Path(folder) / f"world-{kind}{counted}-seed{seed}-{_VERSION}"
    if place.is_dir():
        return str(place)
    unfinished = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        try:
            with _quiet():
                builder = EmbeddedWorld(
                    config=kind, data_dir=str(unfinished), file_format="array_record", seed=seed, size=size
                )
                builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
            shutil.rmtree(unfinished / "downloads", ignore_errors=True)  # made by TFDS, and empty: nothing is downloaded
            if not place.is_dir():
                os.replace(unfinished, place)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        if not place.is_dir():  # another process may have finished the same world first
            reason = error.strerror or error
            raise UserError(f"{folder}: the world cannot be written there ({reason}); choose another folder") from error
    return str(place)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences TFDS within the block: its prints, its progress bars and its log lines. Errors are raised as ever."""
    bars, verbosity = tqdm_utils._active, logging.get_verbosity()
    tfds.display_progress_bar(False)
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.display_progress_bar(bars)
        logging.set_verbosity(verbosity)
