"""Text corpora: the built-in world, files, or a TensorFlow Datasets name; each as two sequences of documents.

Nothing here needs TensorFlow or a network, but for TFDS names that are not yet on this machine.
"""

import glob
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from llmjax.annotations import did_you_mean
from llmjax.errors import UserError

_SUFFIXES = (".txt", ".jsonl", ".parquet", ".txt.gz", ".jsonl.gz")
_VALIDATION_SPLITS = ("validation", "valid", "val", "dev")


@dataclass(frozen=True)
class CorpusConfig:
    """Where text comes from. `path` or `name` alone is enough: see `source`.

    Attributes:
        kind: "world" (built in), "files" or "tfds".
        path: files: one or several globs, separated by commas. tfds: folder of its data sets, or without `name` the
            folder of one prepared data set (default: TFDS's own).
        name: TFDS data set, "pg19" or "wikipedia/20230601.simple".
        text_key: field of a jsonl line, column of a parquet file, or feature of a TFDS data set that holds the text.
        validation_fraction: share that is held out. Plain text: the last characters of the last files. jsonl, parquet
            and TFDS: whole documents, evenly spread; not used where TFDS has a validation split.
        validation_path: files: globs of held-out files; nothing is then held out of `path`.
        document_separator: what is a document in a plain-text file: the "file", each of its "lines", or what stands
            between "blank_lines".
        num_documents, num_dialogues, seed: of the world.
    """

    kind: Literal["world", "files", "tfds"] = "world"
    path: str = ""
    name: str = ""
    text_key: str = "text"
    validation_fraction: float = 0.1
    validation_path: str = ""
    document_separator: Literal["file", "lines", "blank_lines"] = "file"
    num_documents: int = 45_000
    num_dialogues: int = 8_000
    seed: int = 0

    @property
    def source(self) -> Literal["world", "files", "tfds"]:
        """`kind`, but when that is left at its default "tfds" if there is a `name`, "files" if there is a `path`."""
        if self.kind != "world":
            return self.kind
        return "tfds" if self.name else "files" if self.path else "world"

    def validate(self) -> None:
        """Raises UserError for values out of range or fields that do not go together."""
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"validation_fraction={self.validation_fraction} must be between 0 and 1; 0.1 is usual")
        for name in ("num_documents", "num_dialogues"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be positive")
        if self.source == "files" and not self.path:
            raise UserError("path is empty with kind=files; give --config.data.path=GLOB (text, jsonl or parquet files)")
        if self.source == "files" and self.name:
            raise UserError(f"name={self.name} is of TFDS but kind=files; leave out one of them")
        if self.source == "tfds" and not (self.name or self.path):
            raise UserError("name is empty with kind=tfds; give the name of a TFDS data set, or its folder as path")
        if self.validation_path and self.source != "files":
            raise UserError(f"validation_path={self.validation_path} goes with files only; give path too")
        if not self.text_key:
            raise UserError("text_key is empty; name the field that holds the text")


@dataclass(frozen=True)
class Corpus:
    """Documents by index, none empty. What is not text files may be read anew at each access."""

    train: Sequence[str]
    validation: Sequence[str]


def open_corpus(cfg: CorpusConfig, data_dir: str | os.PathLike) -> Corpus:
    """The corpus of `cfg`. data_dir: where the world is built, and found when it is already there.

    Raises:
        UserError: one line that names the file and the line, row or byte, the field or the data set that is wrong.
    """
    cfg.validate()
    corpus = {"world": _read_world, "files": _read_files, "tfds": _read_tfds}[cfg.source](cfg, data_dir)
    for split in ("train", "validation"):
        if not len(getattr(corpus, split)):
            raise UserError(f"{cfg.name or cfg.path or cfg.source}: the corpus has no {split} text; give more text")
    return corpus


class TextView(Sequence[str]):
    """The text field of records of a random-access source, decoded at each access. rows: which records, default all."""

    def __init__(self, records: Any, key: str, rows: range | np.ndarray | None = None, where: str = "record"):
        self._records, self._key, self._where = records, key, where
        self._rows = range(len(records)) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return TextView(self._records, self._key, self._rows[index], self._where)
        row = int(self._rows[index])
        text = self._records[row][self._key]
        if not isinstance(text, bytes):
            return text
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{self._where} {row}: not UTF-8 (byte {error.start}); mend the data set") from error


def _hold_out(size: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices below `size` for train and validation: every 1/fraction-th is held out, at least one."""
    held_out = max(1, int(size * fraction))
    edges = np.arange(size + 1) * held_out // size
    is_held_out = np.diff(edges) > 0
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


# ---- the world ---------------------------------------------------------------------------------------------------


def _read_world(cfg: CorpusConfig, data_dir: str | os.PathLike) -> Corpus:
    from llmjax.data.builder import open_world, prepare_world

    folder = prepare_world(data_dir, seed=cfg.seed, num_documents=cfg.num_documents, num_dialogues=cfg.num_dialogues)
    return Corpus(open_world(folder, "documents", "train"), open_world(folder, "documents", "validation"))


# ---- files -------------------------------------------------------------------------------------------------------


def _read_files(cfg: CorpusConfig, data_dir: str | os.PathLike) -> Corpus:
    del data_dir
    texts, records = _read_globs(cfg.path, "path", cfg)
    if cfg.validation_path:
        held_texts, held_records = _read_globs(cfg.validation_path, "validation_path", cfg)
        held_out = [*_documents(held_texts, cfg.document_separator), *held_records]
        return Corpus([*_documents(texts, cfg.document_separator), *records], held_out)
    documents = _documents(texts, cfg.document_separator)
    if not documents and not records:
        raise UserError(f"path={cfg.path}: the corpus is empty, there is no text in its files; check them")
    train, validation = [], []
    if documents:
        train, validation = _cut_by_characters(documents, cfg.validation_fraction, cfg.document_separator == "file")
    if len(records) == 1:
        raise UserError(f"path={cfg.path}: one document cannot be split; give more, or a validation_path")
    if records:
        indices = _hold_out(len(records), cfg.validation_fraction)
        train, validation = ([*part, *(records[i] for i in rows)] for part, rows in zip((train, validation), indices))
    return Corpus(train, validation)


def _read_globs(patterns: str, field: str, cfg: CorpusConfig) -> tuple[list[str], list[str]]:
    """Texts of the plain-text files, and documents of the others, in the order of the sorted file names."""
    texts, records = [], []
    for path in _expand(patterns, field):
        suffix = next((suffix for suffix in sorted(_SUFFIXES, key=len) if path.lower().endswith(suffix)), None)
        if suffix is None:
            raise UserError(f"{path}: unknown suffix; files are read as {', '.join(_SUFFIXES)}")
        try:
            if suffix.startswith(".txt"):
                texts.append(_read_text(path))
            elif suffix.startswith(".jsonl"):
                records += _read_jsonl(path, cfg.text_key)
            else:
                records += _read_parquet(path, cfg.text_key)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{path}: not a whole gzip file ({error}); compress or download it anew") from error
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error
    return texts, [text for text in records if text.strip()]


def _expand(patterns: str, field: str) -> list[str]:
    paths = set()
    for pattern in filter(None, (pattern.strip() for pattern in patterns.split(","))):
        found = glob.glob(os.path.expanduser(pattern), recursive=True)
        files = [path for path in found if os.path.isfile(path)]
        if not files and found:
            raise UserError(f"{field}={pattern} is a folder; name its files, such as {os.path.join(pattern, '*.txt')}")
        if not files:
            folder = os.path.dirname(pattern) or "."
            near = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
            hint = did_you_mean(os.path.basename(pattern), near[:50]) if near else f"there is no folder {folder}"
            raise UserError(f"{field}={pattern} matches no file; {hint}")
        paths.update(files)
    return sorted(paths)


def _open(path: str):
    return gzip.open(path, "rb") if path.lower().endswith(".gz") else open(path, "rb")


def _read_text(path: str) -> str:
    with _open(path) as file:
        data = file.read()
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}); convert it to UTF-8") from error


def _read_jsonl(path: str, key: str) -> Iterator[str]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8").removeprefix("\ufeff"))
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number}: not UTF-8 (byte {error.start} of the line); convert it") from error
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", error)
                raise UserError(f"{path}:{number}: not JSON ({reason}); mend or remove the line") from error
            if not isinstance(record, dict):
                raise UserError(f"{path}:{number}: a {type(record).__name__}, not an object; write {{\"{key}\": ...}}")
            if key not in record:
                raise UserError(f"{path}:{number}: no field '{key}'; {_other_key(key, record)}")
            yield _checked(record[key], f"{path}:{number}", key)


def _read_parquet(path: str, key: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if key not in file.schema_arrow.names:
                raise UserError(f"{path}: no column '{key}'; {_other_key(key, file.schema_arrow.names)}")
            row = 0
            for batch in file.iter_batches(columns=[key]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield _checked(value, f"{path} row {row}", key)
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a whole parquet file ({reason}); write or download it anew") from error


def _other_key(key: str, there: Iterable[str]) -> str:
    there = list(there)
    near = did_you_mean(key, there)
    has = f"it has {', '.join(there[:8]) or 'none'}"
    return f"{near} ({has})" if near.startswith("did") else f"{has}; set text_key"


def _checked(text: Any, where: str, key: str) -> str:
    if not isinstance(text, str):
        raise UserError(f"{where}: '{key}' is a {type(text).__name__}, not text; set text_key or mend it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: '{key}' has a lone surrogate at character {error.start}; mend it") from error
    return text


def _documents(texts: Iterable[str], separator: str) -> list[str]:
    if separator == "lines":
        texts = (line.rstrip("\r") for text in texts for line in text.split("\n"))
    elif separator == "blank_lines":
        texts = (part.strip("\r\n") for text in texts for part in re.split(r"\n[ \t\r]*\n", text))
    return [text for text in texts if text.strip()]


def _cut_by_characters(documents: list[str], fraction: float, inside: bool) -> tuple[list[str], list[str]]:
    """The last `fraction` of the characters is validation. inside: cut within a document; else it begins with the next.

    With one document for the whole of a file this is the split of nanoGPT, text[: int(0.9 * len(text))].
    """
    cut = int(sum(map(len, documents)) * (1 - fraction))
    train, validation, start = [], [], 0
    for document in documents:
        head = max(0, min(len(document), cut - start))
        start += len(document)
        if not inside and head:
            head = len(document)
        train += [document[:head]] if head else []
        validation += [document[head:]] if head < len(document) else []
    if not validation and len(train) > 1:
        validation = [train.pop()]
    return train, validation


# ---- TensorFlow Datasets -----------------------------------------------------------------------------------------


def _read_tfds(cfg: CorpusConfig, data_dir: str | os.PathLike) -> Corpus:
    del data_dir
    where = f"name={cfg.name}" if cfg.name else f"path={cfg.path}"
    builder = _tfds_builder(cfg, where)
    if cfg.text_key not in builder.info.features:
        raise UserError(f"{where}: no feature '{cfg.text_key}'; {_other_key(cfg.text_key, builder.info.features)}")
    splits = list(builder.info.splits)
    if "train" not in splits:
        raise UserError(f"{where}: no split 'train', it has {', '.join(splits)}; choose another data set")
    held_out = next((split for split in _VALIDATION_SPLITS if split in splits), None)
    try:
        train = builder.as_data_source("train")
        if held_out is not None:
            return Corpus(
                TextView(train, cfg.text_key, where=f"{where} train"),
                TextView(builder.as_data_source(held_out), cfg.text_key, where=f"{where} {held_out}"),
            )
    except NotImplementedError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{where}: not prepared for random access ({reason}); remove {builder.data_path}") from error
    rows = _hold_out(len(train), cfg.validation_fraction)
    return Corpus(*(TextView(train, cfg.text_key, part, f"{where} train") for part in rows))


def _tfds_builder(cfg: CorpusConfig, where: str):
    """The builder, its data on disk as array_record; downloads what is not there."""
    import tensorflow_datasets as tfds

    if cfg.name.startswith("huggingface:"):
        raise UserError(f"{where}: Hugging Face data sets are not read by name; download one, give its files as path")
    try:
        if not cfg.name:
            return tfds.builder_from_directory(cfg.path)
        builder = tfds.builder(cfg.name, data_dir=cfg.path or None, file_format="array_record")
        builder.download_and_prepare()
        return builder
    except tfds.core.registered.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        near = did_you_mean(re.split("[/:]", cfg.name)[0], known)
        near = near if near.startswith("did") else "see tensorflow.org/datasets/catalog"
        raise UserError(f"{where}: TFDS has no such data set, or not that config or version; {near}") from error
    except ImportError as error:
        raise UserError(
            f"{where}: TFDS needs the package {error.name or error} for it, which is not installed; install that, "
            "choose another data set, or export this one to jsonl and give path"
        ) from error
    except (OSError, ValueError, AssertionError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{where}: cannot be prepared ({reason}); check name, folder and network") from error
