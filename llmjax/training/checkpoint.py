"""Checkpoints through Orbax: asynchronous, atomic, restored onto any mesh. The only module that knows Orbax."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp

from llmjax.errors import UserError
from llmjax.files import DISK_ERRORS, cannot_write, check_name, damage, seal

PyTree = Any
_ITEM = "default"  # what Orbax calls the one thing in a checkpoint


class Checkpoints:
    """The checkpoints of one stage, `directory/<step>/`. A step is there whole or not at all: Orbax writes it under a
    temporary name and renames it when it is complete. It is sealed before that, so what happens to it later is seen."""

    def __init__(self, directory: str, keep: int = 2, digests: bool = True, say: Callable[[str], None] = print):
        """keep: that many of the newest. digests: as in `files.seal`. say: gets a line where a checkpoint is damaged."""
        check_name(directory)
        self.directory = os.path.abspath(directory)
        self._digests, self._say, self._saving = digests, say, 0
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            ),
        )  # fmt: skip

    def save(self, step: int, state: PyTree) -> None:
        """Starts to save; the arrays are copied before it returns, so the state may be donated to the next step.

        Raises UserError if this one, or the one before, cannot be written; those that are whole stay.
        """
        self.wait()
        self._saving = step
        with _writing(self.directory):
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def _seal(self) -> None:
        """Called when all is written and the folder still has its temporary name."""
        (folder,) = glob.glob(f"{self._saving}.orbax-checkpoint-tmp*", root_dir=self.directory)
        seal(os.path.join(self.directory, folder, _ITEM), self._digests)

    def restore(self, abstract: PyTree) -> PyTree | None:
        """The newest state that is undamaged, onto the shardings of `abstract`; None where there is none.

        A damaged one is set aside under another name, and that is said.
        """
        steps = sorted(self._manager.all_steps())
        while steps:
            step = steps.pop()
            folder = os.path.join(self.directory, str(step))
            reason = damage(os.path.join(folder, _ITEM))
            if not reason:
                return self._read(step, abstract)
            aside = os.path.join(self.directory, f"damaged-{step}")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(folder, aside)
            self._manager.reload()
            then = f"going on from that of step {steps[-1]}" if steps else "there is none before it, so the stage begins anew"
            self._say(f"the checkpoint of step {step} is damaged ({reason}) and set aside as {aside}; {then}")
        return None

    def _read(self, step: int, abstract: PyTree) -> PyTree:
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except ValueError as error:
            raise UserError(_unreadable(os.path.join(self.directory, str(step)), error)) from error

    def wait(self) -> None:
        """Until everything is on disk. Raises UserError if it cannot be written."""
        with _writing(self.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        self.wait()
        self._manager.close()


def newest_step(directory: str) -> int:
    """The step of the newest checkpoint in a folder of them; 0 where there is none."""
    there = os.listdir(directory) if os.path.isdir(directory) else []
    return max((int(name) for name in there if name.isdigit()), default=0)


def save_params(directory: str, params: PyTree, digests: bool = True) -> None:
    """Writes parameters to `directory`, replacing what is there; whole or not at all. digests: as in `files.seal`."""
    check_name(directory)
    directory = os.path.abspath(directory)
    with _writing(directory), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory, params, force=True)
    seal(directory, digests)


def load_params(directory: str, abstract: PyTree) -> PyTree:
    """Reads parameters onto the shardings of `abstract`. Raises UserError if they are missing, damaged, or others."""
    directory = os.path.abspath(directory)
    if not os.path.isdir(directory):
        raise UserError(f"{directory}: no parameters there; run the stage that makes them first")
    reason = damage(directory)
    if reason:
        stage = os.path.dirname(directory)
        raise UserError(f"{directory}: damaged ({reason}); restore it from a copy, or delete {stage} and run the stage again")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(directory, abstract)
    except ValueError as error:
        raise UserError(_unreadable(directory, error)) from error


@contextlib.contextmanager
def _writing(directory: str) -> Iterator[None]:
    """Turns what Orbax raises where the system refuses to write into a UserError.

    Tensorstore raises ValueError whatever the reason, with the number of the system's error at the end of its words.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        number = getattr(error, "errno", None) or next(iter(re.findall(r"os_error_code='(\d+)'", str(error))), None)
        if number is None or int(number) not in DISK_ERRORS:
            raise
        raise cannot_write(directory, OSError(int(number), os.strerror(int(number)))) from error


def delete(directory: str) -> None:
    """Removes a folder of checkpoints that a completed stage no longer needs."""
    shutil.rmtree(directory, ignore_errors=True)


def _unreadable(path: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    return f"{path}: this checkpoint cannot be read ({reason}); delete the folder to go on from an earlier one"


def to_host(tree: PyTree) -> PyTree:
    """Device scalars and arrays -> numpy, in one transfer."""
    return jax.device_get(tree)
