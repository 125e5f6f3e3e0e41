"""Folders of files that belong together, written whole or not at all."""

import collections.abc
import contextlib
import os
import pathlib
import shutil

from llmjax.errors import UserError


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
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); choose a place that can") from error


def _flush(folder: pathlib.Path) -> None:
    # A rename may reach the disk before the data does; without this a power cut could leave a folder of empty files.
    for file in folder.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())


def _refuse_to_lose(path: pathlib.Path, new: pathlib.Path) -> None:
    if not path.is_dir():
        raise UserError(f"{path}: is a file, not a folder; remove it or choose another place")
    lost = sorted(set(os.listdir(path)) - set(os.listdir(new)))
    if lost:
        raise UserError(f"{path}: holds other files ({', '.join(lost[:3])}) that would be lost; choose an empty folder")
