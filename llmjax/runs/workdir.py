"""The folder of a run: whether it can be used, and by this config."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax

from llmjax.config import diff, to_dict
from llmjax.errors import UserError
from llmjax.files import check_name, locked, read_json
from llmjax.stages.experiment import Experiment

CONFIG, TOKENIZER, SOURCE = "config.json", "tokenizer", "source"


def in_use(workdir: str) -> AbstractContextManager[None]:
    """Keeps other runs out of `workdir`; the first process of a run has the lock. Raises UserError where one is in."""
    return locked(workdir) if jax.process_index() == 0 else nullcontext()


def check_workdir(experiment: Experiment, workdir: str) -> None:
    """Raises UserError if `workdir` is not, and cannot become, a folder to write to, or was made by another config."""
    check_name(workdir)
    place = os.path.abspath(workdir)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise UserError(f"--workdir={workdir}: {place} is a file, not a folder; choose a folder you may write to")
    if not os.access(place, os.R_OK | os.W_OK | os.X_OK):
        raise UserError(f"--workdir={workdir}: {place} cannot be written to; choose a folder you may write to")
    path = os.path.join(workdir, CONFIG)
    if os.path.exists(path):
        _check_same_config(experiment, read_json(path), workdir)


def _check_same_config(experiment: Experiment, saved: Any, workdir: str) -> None:
    """Compares as JSON, for the classes of a saved config may be gone. What it does not have yet must have its default."""
    not_default = {_path(line) for line in diff(saved, to_dict(experiment, defaults=False))}
    lines = [line for line in diff(saved, to_dict(experiment)) if not _may_differ(_path(line), workdir)]
    changes = [line.removeprefix("stages.") for line in lines if ": absent -> " not in line or _path(line) in not_default]
    if changes:
        raise UserError(
            f"--workdir={workdir} was made by another config ({'; '.join(changes[:3])}"
            f"{' ...' if len(changes) > 3 else ''}); use another --workdir, or delete this one to start again"
        )


def _path(change: str) -> str:
    return change.partition(":")[0]


def _may_differ(path: str, workdir: str) -> bool:
    """The mesh, the cadence of checkpoints and the stages that have not begun may differ from one start to the next."""
    section, _, rest = path.partition(".")
    if section == "stages" and rest:
        return not os.path.exists(os.path.join(workdir, rest.partition(".")[0]))
    return section in ("mesh", "checkpoint_seconds", "checkpoint_digests")
