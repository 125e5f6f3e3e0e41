"""The folder of a run: whether it can be used, and by this config."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax

from llmjax.config import apply_overrides, children, diff, to_dict
from llmjax.data.base import Data
from llmjax.errors import UserError
from llmjax.files import check_name, locked, read_json, read_json_lines, write_text_atomic
from llmjax.results import CHANGE, CHANGES_FILE, RESULT_FILE
from llmjax.stages.experiment import Experiment
from llmjax.training.checkpoint import newest_step

CONFIG, TOKENIZER, SOURCE = "config.json", "tokenizer", "source"
FLAG = "--allow_config_change"

# Sections and fields that change nothing of what is computed, and names of fields of stages that do not either.
FREE = ("name", "mesh", "checkpoint_seconds", "checkpoint_digests", "evaluation.num_samples")
FREE_OF_STAGES = ("eval_every",)
PLACES = ("path", "validation_path")  # of data: where they lay when they were prepared


def in_use(workdir: str) -> AbstractContextManager[None]:
    """Keeps other runs out of `workdir`; the first process of a run has the lock. Raises UserError where one is in."""
    return locked(workdir) if jax.process_index() == 0 else nullcontext()


def check_workdir(experiment: Experiment, workdir: str, allow_change: bool = False) -> None:
    """Raises UserError if `workdir` is not, and cannot become, a folder to write to, or was made by a config that computes
    something else. allow_change: that is allowed, but for stages that are complete."""
    check_name(workdir)
    place = os.path.abspath(workdir)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise UserError(f"--workdir={workdir}: {place} is a file, not a folder; choose a folder you may write to")
    if not os.access(place, os.R_OK | os.W_OK | os.X_OK):
        raise UserError(f"--workdir={workdir}: {place} cannot be written to; choose a folder you may write to")
    refused = [line for line in _changes(experiment, workdir) if not _may_differ(line, experiment, workdir)]
    complete = [line for line in refused if _is_of_complete_stage(line, workdir)]
    if allow_change and complete:
        raise UserError(
            f"--workdir={workdir}: {_said(complete[0])}, but that stage is complete and is not run again; use another "
            "--workdir, or a further stage that starts from it"
        )
    if refused and not allow_change:
        shown = f"{'; '.join(map(_said, refused[:3]))}{' ...' if len(refused) > 3 else ''}"
        words = f"was made by another config ({shown}); use another --workdir, or delete this one to start again"
        flag = "" if complete else f", or add {FLAG} to go on with the new one, which is written down"
        raise UserError(f"--workdir={workdir} {words}{flag}")


def config_changes(experiment: Experiment, workdir: str) -> list[str]:
    """What differs from the config that `workdir` was made by, "sft.steps: 4 -> 9" a line; nothing in a new one."""
    return [_said(line) for line in _changes(experiment, workdir)]


def with_prepared_data(experiment: Experiment, workdir: str) -> Experiment:
    """The experiment as it prepared its data, if they have been moved since: it goes on with what was prepared from them."""
    for change in _changes(experiment, workdir):
        if _is_moved_data(change, experiment, workdir):
            path = _path(change)
            experiment = apply_overrides(experiment, [(path, _at(_saved(workdir), path.split(".")))])
    return experiment


def record_changes(experiment: Experiment, workdir: str, changes: Sequence[str]) -> None:
    """Adds a line to the history of the config: before which step of which stage it was changed, and how."""
    if not changes:
        return
    path = os.path.join(workdir, CHANGES_FILE)
    stage = next((name for name in experiment.stages if not _has(workdir, name, RESULT_FILE)), list(experiment.stages)[-1])
    row = {"stage": stage, "step": newest_step(os.path.join(workdir, stage, "checkpoints")), "changes": list(changes)}
    rows, _ = read_json_lines(path, CHANGE)
    write_text_atomic(path, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in (*rows, row)))


def _saved(workdir: str) -> Any:
    """The config that `workdir` was made by, as JSON values; None in a new one."""
    path = os.path.join(workdir, CONFIG)
    return read_json(path) if os.path.exists(path) else None


def _changes(experiment: Experiment, workdir: str) -> list[str]:
    """As `config_changes`, with "stages." before what is below them.

    Compared as JSON, for the classes of a saved config may be gone. What it does not have yet must have its default.
    """
    saved = _saved(workdir)
    if saved is None:
        return []
    not_default = {_path(line) for line in diff(saved, to_dict(experiment, defaults=False))}
    lines = diff(saved, to_dict(experiment))
    return [line for line in lines if ": absent -> " not in line or _path(line) in not_default]


def _said(change: str) -> str:
    return change.removeprefix("stages.")


def _path(change: str) -> str:
    return change.partition(":")[0]


def _stage(change: str) -> tuple[str, str]:
    """The stage that a change is of and the path of the field below it, "" for all of it; ("", "") where it is of none."""
    section, _, rest = _path(change).partition(".")
    stage, _, field = rest.partition(".")
    return (stage, field) if section == "stages" else ("", "")


def _has(workdir: str, *parts: str) -> bool:
    return os.path.exists(os.path.join(workdir, *parts))


def _may_differ(change: str, experiment: Experiment, workdir: str) -> bool:
    """Whether a change leaves all that was computed what it is: see FREE; stages that have not begun, or are taken out; and the
    place of data that are prepared."""
    stage, field = _stage(change)
    if stage and (not _has(workdir, stage) or field in FREE_OF_STAGES or (not field and change.endswith(" -> absent"))):
        return True
    free = any(_path(change) == one or _path(change).startswith(f"{one}.") for one in FREE)
    return free or _is_moved_data(change, experiment, workdir)


def _is_of_complete_stage(change: str, workdir: str) -> bool:
    stage, _ = _stage(change)
    return bool(stage) and ": absent -> " not in change and _has(workdir, stage, RESULT_FILE)


def _is_moved_data(change: str, experiment: Experiment, workdir: str) -> bool:
    """Whether only the place differs of data that this workdir holds prepared: once a stage has begun, those of all do."""
    names, (stage, _) = _path(change).split("."), _stage(change)
    if names[-1] not in PLACES or not any(_has(workdir, one) for one in ([stage] if stage else experiment.stages)):
        return False
    old, new = _at(_saved(workdir), names), _at(experiment, names)
    return isinstance(_at(experiment, names[:-1]), Data) and all(isinstance(one, str) and one for one in (old, new))


def _at(node: Any, names: Sequence[str]) -> Any:
    """What lies at a path below a config or JSON values; None if nothing does."""
    for name in names:
        node = dict(children(node)).get(name)
    return node
