"""Files and TensorFlow Datasets -> raw records with their places, one at a time.

Nothing here needs TensorFlow or a network, but for TFDS names that are not yet on this machine.
"""

import codecs
import contextlib
import csv
import glob
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from llmjax.config import did_you_mean
from llmjax.data.formats import SURROGATE
from llmjax.errors import UserError

TEXT_SUFFIXES, RECORD_SUFFIXES = (".txt", ".md"), (".jsonl", ".json", ".csv", ".parquet")
VALIDATION_SPLITS = ("validation", "valid", "val", "dev")
_BLOCK = 2**20  # bytes of a text file read at a time

Placed = tuple[str, dict[str, Any] | UserError]
"""Where a record stands ("chats.jsonl:7"), and its fields, or what is wrong with it."""


def expand(patterns: str, field: str, suffixes: tuple[str, ...] = (*TEXT_SUFFIXES, *RECORD_SUFFIXES)) -> list[str]:
    """The files of globs that are separated by commas, sorted. A comma belongs to a name where that is what makes it match.
    Raises UserError for a glob that matches none, and for a suffix that is not among `suffixes`."""
    parts, paths = patterns.split(","), set()
    while parts:
        for count in range(1, len(parts) + 1):
            if files := _matches(",".join(parts[:count]).strip()):
                break
        else:
            _check_blank(parts[0].strip(), field)
            count = 1
        paths.update(files)
        del parts[:count]
    for path in sorted(paths):
        if _kind(path) not in suffixes:
            raise UserError(f"{path}: unknown suffix; files are read as {', '.join(suffixes)}, also .gz and .zst")
    return sorted(paths)


def _matches(pattern: str) -> list[str]:
    path = os.path.expanduser(pattern)
    return [path] if os.path.isfile(path) else [found for found in glob.glob(path, recursive=True) if os.path.isfile(found)]


def _check_blank(pattern: str, field: str) -> None:
    """Raises UserError for a pattern that matches no file, if it is one."""
    if not pattern:
        return
    if glob.glob(os.path.expanduser(pattern), recursive=True):
        raise UserError(f"{field}={pattern} is a folder; name its files, such as {os.path.join(pattern, '*.jsonl')}")
    folder = os.path.dirname(pattern) or "."
    near = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    hint = did_you_mean(os.path.basename(pattern), near[:50]) if near else f"there is no folder {folder}"
    raise UserError(f"{field}={pattern} matches no file; {hint}")


def _kind(path: str) -> str:
    """The suffix of a file, without that of its compression."""
    name, suffix = os.path.splitext(path.lower())
    inner = os.path.splitext(name)[1]
    return inner if suffix in (".gz", ".zst") and inner != ".parquet" else suffix


def is_text(path: str) -> bool:
    """Whether a file holds plain text, and not records."""
    return _kind(path) in TEXT_SUFFIXES


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file ({error}); compress or download it anew") from error
    except OSError as error:
        if error.errno is None and path.lower().endswith(".zst"):
            raise UserError(f"{path}: not a whole zst file ({error}); compress or download it anew") from error
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error


def _open(path: str) -> io.BufferedIOBase:
    if path.lower().endswith(".zst"):
        import pyarrow  # takes a second

        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"), _BLOCK)
    return gzip.open(path, "rb") if path.lower().endswith(".gz") else open(path, "rb")


def text_blocks(path: str) -> Iterator[str]:
    """The characters of a UTF-8 text file, in blocks, without a byte-order mark."""
    decoder, done, first = codecs.getincrementaldecoder("utf-8")(), 0, True
    with _readable(path), _open(path) as file:
        while True:
            data = file.read(_BLOCK)
            waiting = len(decoder.getstate()[0])
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: not UTF-8 (byte {done - waiting + error.start}); convert it to UTF-8") from error
            done += len(data)
            if first and text:
                text, first = text.removeprefix("\ufeff"), False
            if text:
                yield text
            if not data:
                return


def read_records(path: str, column: str | None = None) -> Iterator[Placed]:
    """The records of a file with their places, as its suffix says. column: of a parquet file, all that is wanted of it.

    A record that is wrong is a UserError that names file and line (or row). Raises UserError for a file that is wrong.
    """
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
    yield from _read_parquet(path, column) if (kind := _kind(path)) == ".parquet" else readers[kind](path)


def _read_jsonl(path: str, hint: str = "mend or remove the line") -> Iterator[Placed]:
    with _readable(path), _open(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                yield _checked(where, json.loads(line.decode("utf-8").removeprefix("\ufeff")))
            except UnicodeDecodeError as error:
                yield where, UserError(f"{where}: not UTF-8 (byte {error.start} of the line); convert it")
            except (ValueError, RecursionError) as error:
                yield where, UserError(f"{where}: not JSON ({getattr(error, 'msg', error)}); {hint}")


def _checked(where: str, record: Any) -> Placed:
    if not isinstance(record, dict):
        return where, UserError(f'{where}: a {type(record).__name__}, not an object; write {{"field": ...}}')
    return where, record


def _read_json(path: str) -> Iterator[Placed]:
    """A list of records, which is read whole, or one record a line."""
    with _readable(path), _open(path) as file:
        begin = file.read(_BLOCK)
        if not begin.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            yield from _read_jsonl(path, "write a list of records, or one object a line")
            return
        text = begin + file.read()
    try:
        records = json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}); convert it to UTF-8") from error
    except (ValueError, RecursionError) as error:
        line, reason = getattr(error, "lineno", 1), getattr(error, "msg", error)
        raise UserError(f"{path}:{line}: not JSON ({reason}); mend the file") from error
    for number, record in enumerate(records, start=1):
        yield _checked(f"{path} record {number}", record)


def _read_csv(path: str) -> Iterator[Placed]:
    """Rows below a header, which names the fields; all values are text."""
    csv.field_size_limit(2**31 - 1)
    with _readable(path), _open(path) as file:
        rows = csv.reader((line.decode("utf-8", "surrogateescape") for line in file), strict=True)
        header: list[str] | None = None
        while True:
            where = f"{path}:{rows.line_num + 1}"
            try:
                row = next(rows, None)
            except csv.Error as error:
                wrong = UserError(f"{where}: not CSV ({error}); mend the quotes")
                if header is None or "end of data" in str(error):  # the rest of the file may be within the quotes
                    raise wrong from error
                yield where, wrong
                continue
            if row is None:
                return
            if not row:
                continue
            if header is None:
                header = _header(row, where)
            elif any(SURROGATE.search(value) for value in row):
                yield where, UserError(f"{where}: not UTF-8; convert it")
            elif len(row) != len(header):
                yield where, UserError(f"{where}: {len(row)} values for the {len(header)} columns of the header; mend the row")
            else:
                yield where, dict(zip(header, row))


def _header(row: list[str], where: str) -> list[str]:
    names = [name.removeprefix("\ufeff").strip() for name in row]
    wrong = next((name for name in names if not name or names.count(name) > 1 or SURROGATE.search(name)), None)
    if wrong is not None:
        raise UserError(f"{where}: the first row must name each column once, in UTF-8; {wrong!r} does not")
    return names


def _read_parquet(path: str, column: str | None) -> Iterator[Placed]:
    import pyarrow
    import pyarrow.parquet

    try:
        with _readable(path), pyarrow.parquet.ParquetFile(path) as file:
            row = 0
            columns = [column] if column in file.schema_arrow.names else None
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for record in batch.to_pylist():
                    row += 1
                    yield f"{path} row {row}", record
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a whole parquet file ({reason}); write or download it anew") from error


def text_of(record: Mapping[str, Any], key: str, where: str) -> str:
    """The text field of a record. Raises UserError, with the name that may have been meant, if it has none."""
    if key not in record:
        near = did_you_mean(key, record)
        has = f"it has {', '.join(list(record)[:8]) or 'none'}"
        raise UserError(f"{where}: no field '{key}'; {f'{near} ({has})' if near.startswith('did') else f'{has}; set text_key'}")
    text = record[key]
    if not isinstance(text, str):
        raise UserError(f"{where}: '{key}' is a {type(text).__name__}, not text; set text_key or mend it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: '{key}' has a lone surrogate at character {error.start}; mend it") from error
    return text


class TFDSRecords:
    """The records of one split of a TFDS data set, in order: iteration gives `Placed`, bytes as text."""

    def __init__(self, source: Any, where: str):
        self._source, self._where = source, where

    def __len__(self) -> int:
        return len(self._source)

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for number in range(len(self)):
            where = f"{self._where} {number}"
            try:
                record = self._source[number]
            except (RuntimeError, OSError) as error:  # array_record's, of a file that is not there or not whole
                raise UserError(f"{where}: cannot be read ({str(error).splitlines()[0]}); prepare it again") from error
            yield where, _decoded(record, where)


def _decoded(value: Any, where: str) -> Any:
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 (byte {error.start}); mend the data set") from error
    if isinstance(value, Mapping):
        return {name: _decoded(item, where) for name, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_decoded(item, where) for item in value] if isinstance(value, (list, tuple)) else value


def open_tfds(name: str, path: str) -> dict[str, TFDSRecords]:
    """"train", and "validation" where there is such a split, of a TFDS data set; downloads what is not there.

    name: "pg19", "wikipedia/20230601.simple". path: folder of its data sets, or without a name the folder of one.
    """
    where = f"name={name}" if name else f"path={path}"
    builder = _builder(name, path, where)
    splits = list(builder.info.splits)
    if "train" not in splits:
        raise UserError(f"{where}: no split 'train', it has {', '.join(splits)}; choose another data set")
    held_out = next((split for split in VALIDATION_SPLITS if split in splits), None)
    found = {"train": "train"} | ({"validation": held_out} if held_out else {})
    try:
        return {ours: TFDSRecords(builder.as_data_source(own), f"{where} {own}") for ours, own in found.items()}
    except NotImplementedError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{where}: not prepared for random access ({reason}); remove {builder.data_path}") from error


def _builder(name: str, path: str, where: str) -> Any:
    """The builder, its data on disk as array_record; downloads what is not there."""
    import tensorflow_datasets as tfds
    from google.protobuf.json_format import ParseError

    if name.startswith("huggingface:"):
        raise UserError(f"{where}: Hugging Face data sets are not read by name; download one, give its files as path")
    try:
        if not name:
            return tfds.builder_from_directory(path)
        builder = tfds.builder(name, data_dir=path or None, file_format="array_record")
        builder.download_and_prepare()
        return builder
    except tfds.core.registered.DatasetNotFoundError as error:
        known: Iterable[str] = tfds.list_builders(with_community_datasets=False)
        near = did_you_mean(re.split("[/:]", name)[0], known)
        near = near if near.startswith("did") else "see tensorflow.org/datasets/catalog"
        raise UserError(f"{where}: TFDS has no such data set, or not that config or version; {near}") from error
    except ImportError as error:
        raise UserError(
            f"{where}: TFDS needs the package {error.name or error} for it, which is not installed; install that, "
            "choose another data set, or export this one to jsonl and give path"
        ) from error
    except (OSError, ValueError, AssertionError, ParseError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{where}: cannot be prepared ({reason}); check name, folder and network") from error
