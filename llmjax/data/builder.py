"""The embedded world on disk: a TFDS builder (array_record, no TensorFlow) and random access to what it wrote."""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds
from absl import logging
from tensorflow_datasets.core.utils import tqdm_utils

from llmjax.data.dialogues import Question, demonstrations, questions
from llmjax.data.world import VALIDATION_FRACTION, documents, make_world
from llmjax.errors import UserError

KINDS = ("documents", "dialogues", "questions")
SPLITS = ("train", "validation")
_VERSION = "1.0.0"
_FEW = 20


class WorldText(tfds.core.GeneratorBasedBuilder):
    """The world of one seed as three TFDS configs: "documents", "dialogues" and "questions", each train and validation.

    Every example has one feature: "text" of a document, "messages" of a dialogue (JSON: list of role and content) or
    "question" (JSON of the fields of `dialogues.Question`). The sizes are those of train; validation has 1/20 as many
    documents and 1/10 as many dialogues, at least 20 of each.
    """

    VERSION = tfds.core.Version(_VERSION)
    RELEASE_NOTES = {_VERSION: "Initial release."}
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=kind, description=f"The {kind} of the world.") for kind in KINDS]

    # No checksum or README files lie beside this module. To look for them TFDS would import importlib_resources, which
    # it uses without requiring it.
    code_path = None

    def __init__(self, *, seed: int = 0, num_documents: int = 25_000, num_dialogues: int = 4_000, **kwargs):
        self._seed, self._num_documents, self._num_dialogues = seed, num_documents, num_dialogues
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
        world = make_world(self._seed)
        validation = split == "validation"
        if self.builder_config.name == "documents":
            num = max(_FEW, round(self._num_documents * VALIDATION_FRACTION)) if validation else self._num_documents
            texts = ({"text": text} for text in documents(world, num, int(validation), split))
        elif self.builder_config.name == "dialogues":
            num = max(_FEW, self._num_dialogues // 10) if validation else self._num_dialogues
            texts = ({"messages": json.dumps(d.messages)} for d in demonstrations(world, split, num, 0))
        else:
            texts = ({"question": json.dumps(dataclasses.asdict(q))} for q in questions(world, split))
        yield from enumerate(texts)


@dataclasses.dataclass(frozen=True)
class WorldSource:
    """Random access to one kind and split: `len(source)`, `source[i]`, `source[start:stop]` and iteration.

    Examples are plain Python: str for "documents", {"messages": [{"role", "content"}, ...]} for "dialogues", Question
    for "questions". The order on disk is a fixed shuffle. Serves as a source of `grain.MapDataset.source`.
    """

    kind: str
    records: Any

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.__getitems__(range(*index.indices(len(self))))
        position = index.__index__()
        if not -len(self) <= position < len(self):
            raise IndexError(f"index {position} of {len(self)} {self.kind}")
        return self._decode(self.records[position % len(self)])

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """The examples at `indices`, read in one go."""
        return [self._decode(record) for record in self.records.__getitems__(list(indices))]

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self), 1024):
            yield from self[start : start + 1024]

    def _decode(self, record: dict[str, bytes]) -> Any:
        ((name, value),) = record.items()
        text = value.decode("utf-8")
        if name == "text":
            return text
        fields = json.loads(text)
        if name == "messages":
            return {"messages": fields}
        return Question(**{key: tuple(item) if isinstance(item, list) else item for key, item in fields.items()})


def prepare_world(data_dir: str | os.PathLike, *, seed: int, num_documents: int, num_dialogues: int) -> str:
    """Builds the world under `data_dir`, complete or not at all, and returns its folder, for `open_world`.

    The folder's name holds seed, sizes and version: the same call again finds it done, another builds beside it. Prints
    nothing. Raises UserError if a size is not positive or the folder cannot be written.
    """
    for name, size in (("num_documents", num_documents), ("num_dialogues", num_dialogues)):
        if size < 1:
            raise UserError(f"{name}={size}: the world needs at least one; choose a positive number")
    folder = pathlib.Path(data_dir) / f"world-seed{seed}-documents{num_documents}-dialogues{num_dialogues}-{_VERSION}"
    if folder.is_dir():
        return str(folder)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        try:
            with _quiet():
                for kind in KINDS:
                    builder = WorldText(
                        config=kind,
                        data_dir=str(unfinished),
                        file_format="array_record",
                        seed=seed,
                        num_documents=num_documents,
                        num_dialogues=num_dialogues,
                    )
                    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
            shutil.rmtree(
                unfinished / "downloads", ignore_errors=True
            )  # Made by TFDS, and empty: nothing is downloaded.
            if not folder.is_dir():
                os.replace(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        if not folder.is_dir():  # Another process may have finished the same world first.
            reason = error.strerror or error
            raise UserError(
                f"data_dir={data_dir}: the world cannot be written ({reason}); choose another folder"
            ) from error
    return str(folder)


def open_world(data_dir: str | os.PathLike, kind: str, split: str) -> WorldSource:
    """The "documents", "dialogues" or "questions" of a split ("train" or "validation").

    `data_dir` is what `prepare_world` returned, or a folder in which it has built exactly one world. Raises UserError
    for another kind or split, and if there is no such world.
    """
    for name, value, known in (("kind", kind, KINDS), ("split", split, SPLITS)):
        if value not in known:
            raise UserError(f"{name}={value!r}: not in the world; take one of {', '.join(known)}")
    folder = _world_folder(pathlib.Path(data_dir)) / "world_text" / kind / _VERSION
    with _quiet():
        return WorldSource(kind, tfds.builder_from_directory(str(folder)).as_data_source(split))


def _world_folder(data_dir: pathlib.Path) -> pathlib.Path:
    if (data_dir / "world_text").is_dir():
        return data_dir
    found = sorted(path for path in data_dir.glob("world-seed*") if path.is_dir())
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"data_dir={data_dir}: no world has been built there; call prepare_world first")
    raise UserError(f"data_dir={data_dir}: holds {len(found)} worlds; give one of them, as {found[0].name}")


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
