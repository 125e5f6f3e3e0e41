"""Checkpoints through Orbax: asynchronous, atomic, restored onto any mesh. The only module that knows Orbax."""

from __future__ import annotations

import os
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp

from llmjax.errors import UserError

PyTree = Any


class Checkpoints:
    """The checkpoints of one stage, `directory/<step>/`. A step is there whole or not at all: Orbax writes it under a
    temporary name and renames it when it is complete."""

    def __init__(self, directory: str, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(os.path.abspath(directory), options=options)
        self.directory = directory

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: PyTree) -> None:
        """Starts to save; the arrays are copied before it returns, so the state may be donated to the next step."""
        self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, abstract: PyTree) -> PyTree:
        """The newest state, onto the shardings of `abstract`."""
        step = self.latest_step()
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except ValueError as error:
            raise UserError(_unreadable(os.path.join(self.directory, str(step)), error)) from error

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def save_params(directory: str, params: PyTree) -> None:
    """Writes parameters to `directory`, replacing what is there; whole or not at all."""
    directory = os.path.abspath(directory)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory, params, force=True)


def load_params(directory: str, abstract: PyTree) -> PyTree:
    """Reads parameters onto the shardings of `abstract`."""
    directory = os.path.abspath(directory)
    if not os.path.isdir(directory):
        raise UserError(f"{directory}: no parameters there; run the stage that makes them first")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(directory, abstract)
    except ValueError as error:
        raise UserError(_unreadable(directory, error)) from error


def delete(directory: str) -> None:
    """Removes a folder of checkpoints that a completed stage no longer needs."""
    shutil.rmtree(directory, ignore_errors=True)


def _unreadable(path: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    return f"{path}: this checkpoint cannot be read ({reason}); delete the folder to go on from an earlier one"


def to_host(tree: PyTree) -> PyTree:
    """Device scalars and arrays -> numpy, in one transfer."""
    return jax.device_get(tree)
