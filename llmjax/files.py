"""Files and folders, written whole or not at all, sealed against damage, and read with one-line errors."""

import collections.abc
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import socket
from collections.abc import Mapping
from typing import Any, TextIO

from llmjax.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DISK_ERRORS = (*_FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
"""What a disk says that is full, or may not be written to, or fails: nothing that a program did wrong."""


def cannot_write(path: str | os.PathLike, error: OSError) -> UserError:
    """What to raise where `path` cannot be written: what the system says, the free space if that is wanting, what to do."""
    reason, then = error.strerror or str(error), "the same command goes on"
    if error.errno not in _FULL:
        return UserError(f"{path}: cannot be written ({reason}); see that it can, and {then}, or choose another place")
    place = os.path.abspath(path)
    while not os.path.isdir(place):
        place = os.path.dirname(place)
    free = shutil.disk_usage(place).free / 1e6
    return UserError(f"{path}: cannot be written ({reason}, {free:,.1f} MB are free there); make room, and {then}")


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> collections.abc.Iterator[None]:
    """Raises `cannot_write` for what the system says within the block, in which nothing is read."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error


def write_text_atomic(path: str | os.PathLike, text: str) -> None:
    """Writes `text` (UTF-8) to `path`; a reader, or a crash at any moment, sees the old file or the new one.

    Missing parent folders are made. Raises UserError if the place cannot be written.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json_atomic(path: str | os.PathLike, obj: Any) -> None:
    """Writes `obj` as indented JSON with a final newline; see `write_text_atomic`."""
    write_text_atomic(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_text(path: str | os.PathLike) -> str:
    """The UTF-8 text of `path`. Raises UserError if it is missing, unreadable or not UTF-8."""
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; check the path") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); convert it to UTF-8") from error


def read_json(path: str | os.PathLike) -> Any:
    """The JSON value in `path`. Raises UserError with file and line if it is missing, unreadable or not JSON."""
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg}); restore the file or remove it") from error


def read_json_lines(path: str | os.PathLike, fields: Mapping[str, type]) -> tuple[list[dict[str, Any]], list[str]]:
    """The objects of a file of JSON lines that have these fields, of these types, and a line "PATH:NUMBER: ..." for each line
    that holds none. What stands behind the last newline, where whoever wrote it was cut off, is left out; no file is no lines.

    Raises UserError if it cannot be read.
    """
    try:
        lines = pathlib.Path(path).read_bytes().split(b"\n")[:-1] if os.path.exists(path) else []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error
    found, broken = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict) and all(type(value.get(name)) is kind for name, kind in fields.items()):
            found.append(value)
        else:
            broken.append(f"{path}:{number}: not a JSON object with {', '.join(fields)}; the line is left out")
    return found, broken


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike) -> collections.abc.Iterator[pathlib.Path]:
    """Yields an empty temporary folder that becomes `path` when the block ends well, and vanishes when it does not.

    An earlier folder at `path` is replaced; the moment between is two renames long, and a crash in it leaves no folder.
    Missing parents are made.

    Raises:
        UserError: the place cannot be written, or `path` holds files that the new folder does not have (they would be
            lost).
    """
    path = pathlib.Path(path)
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        try:
            yield new
            _flush(new)
            if path.exists():
                _refuse_to_lose(path, new)
                path.rename(old)
            new.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def _flush(folder: pathlib.Path) -> None:
    # A rename may reach the disk before the data does; without this a power cut could leave a folder of empty files.
    for file in filter(pathlib.Path.is_file, folder.rglob("*")):
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())


def _refuse_to_lose(path: pathlib.Path, new: pathlib.Path) -> None:
    if not path.is_dir():
        raise UserError(f"{path}: is a file, not a folder; remove it or choose another place")
    lost = sorted(set(os.listdir(path)) - set(os.listdir(new)))
    if lost:
        raise UserError(f"{path}: holds other files ({', '.join(lost[:3])}) that would be lost; choose an empty folder")


@contextlib.contextmanager
def locked(folder: str | os.PathLike) -> collections.abc.Iterator[None]:
    """Within it no other process can lock `folder`, which is made. The lock of a process that has died does not hold.

    Raises UserError where another process has it, or the place cannot be locked.
    """
    path = pathlib.Path(folder) / ".lock"
    try:
        os.makedirs(folder, exist_ok=True)
        file = _lock(path)
    except BlockingIOError as error:
        holder = read_text(path) or "another process"
        raise UserError(f"{folder}: in use by {holder}; wait for it, or use another") from error
    except OSError as error:
        raise UserError(f"{folder}: cannot be locked ({error.strerror or error}); choose a place that can") from error
    with file:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _lock(path: pathlib.Path) -> TextIO:
    """The file at `path`, locked; it says by whom. BlockingIOError: another process has it."""
    while True:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open(path, "a+", encoding="utf-8"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not (path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(path))):
                continue  # its last holder has just removed it
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            stack.pop_all()
            return file


def check_name(folder: str | os.PathLike) -> None:
    """Raises UserError if the path of `folder` reads as a pattern: Orbax finds its files by patterns, and would lose them."""
    path = os.path.abspath(folder)
    if any(character in path for character in "*?["):
        raise UserError(f"{path}: the path holds one of * ? [, which checkpoints cannot be kept under; choose another name")


SEAL = "sha256.json"


def seal(folder: str | os.PathLike, digests: bool = True) -> None:
    """Writes down size and SHA-256 of every file in `folder`, for `damage` to find out what has changed since.

    digests: False writes the sizes only, which costs nothing and shows files that are missing or cut.
    """
    folder = pathlib.Path(folder)
    files = {name: [size, _digest(folder / name) if digests else None] for name, size in _sizes(folder)}
    write_json_atomic(folder / SEAL, files)


def damage(folder: str | os.PathLike) -> str:
    """What is wrong with a sealed folder, in words; "" if it is as it was when it was sealed."""
    folder = pathlib.Path(folder)
    try:
        expected = {name: (int(size), digest) for name, (size, digest) in read_json(folder / SEAL).items()}
    except (UserError, AttributeError, TypeError, ValueError):
        return f"{SEAL} is missing or cannot be read"
    sizes = dict(_sizes(folder))
    for name, (size, digest) in expected.items():
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != size:
            return f"{name} has {sizes[name]} bytes instead of {size}"
        try:
            if digest is not None and _digest(folder / name) != digest:
                return f"{name} has changed"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
    unknown = sorted(set(sizes) - set(expected))
    return f"{unknown[0]} does not belong there" if unknown else ""


def _sizes(folder: pathlib.Path) -> list[tuple[str, int]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / SEAL)
    return [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files]


def _digest(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
