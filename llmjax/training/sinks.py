"""Where the rows of metrics.jsonl are shown beside it, for those who ask for it: TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib
import os
import shutil
import uuid
from collections.abc import Sequence
from typing import Any

from llmjax.config import did_you_mean
from llmjax.errors import UserError
from llmjax.files import read_json, write_json_atomic
from llmjax.results import ROW
from llmjax.training.metrics import Row, Sink


class TensorBoard:
    """WORKDIR/tensorboard/STAGE, for `tensorboard --logdir`: made anew from the rows that hold, where these change, so that no
    point is there twice."""

    module, extra = "tensorboardX", "tensorboard"

    def __init__(self, tensorboard_x: Any, workdir: str):
        self._make = tensorboard_x.SummaryWriter
        self._folder = os.path.join(workdir, "tensorboard")
        self._writers: dict[str, Any] = {}

    def begin(self, rows: Sequence[Row]) -> None:
        self.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        for row in rows:
            self._add(row)

    def write(self, row: Row) -> None:
        self._add(row).flush()

    def _add(self, row: Row) -> Any:
        stage = row["stage"]
        if stage not in self._writers:  # purge_step: a server that has read points of a file that is gone forgets them
            self._writers[stage] = self._make(os.path.join(self._folder, stage), purge_step=0)
        for name, value in _numbers(row).items():
            self._writers[stage].add_scalar(f"{row['kind']}/{name}", value, row["step"])
        return self._writers[stage]

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers = {}


class WandB:
    """One run of Weights & Biases for a workdir, whose id is in wandb.json. Each row is sent once: what a run that goes on does
    again is what it was. Project, account and offline mode are those of W&B's own settings (WANDB_PROJECT, WANDB_MODE)."""

    module, extra = "wandb", "wandb"

    def __init__(self, wandb: Any, workdir: str):
        path, name = os.path.join(workdir, "wandb.json"), os.path.basename(os.path.abspath(workdir))
        self._known = os.path.exists(path)
        about = read_json(path) if self._known else {"id": uuid.uuid4().hex}
        try:
            self._run = wandb.init(**about, resume="allow", name=name, dir=workdir)
        except wandb.Error as error:
            raise UserError(f"--log_to=wandb: {' '.join(str(error).split())}; WANDB_MODE=offline needs no account") from error
        write_json_atomic(path, about)
        self._sent: set[tuple[Any, ...]] = set()

    def begin(self, rows: Sequence[Row]) -> None:
        if self._known:
            self._sent |= {_key(row) for row in rows}
        self._known = False
        for row in rows:
            self.write(row)

    def write(self, row: Row) -> None:
        if _key(row) in self._sent:
            return
        self._sent.add(_key(row))
        stage, step = row["stage"], f"{row['stage']}/step"
        self._run.define_metric(f"{stage}/*", step_metric=step)
        self._run.log({f"{stage}/{row['kind']}/{name}": value for name, value in _numbers(row).items()} | {step: row["step"]})

    def close(self) -> None:
        self._run.finish()


SINKS = {"tensorboard": TensorBoard, "wandb": WandB}


def check_sinks(names: Sequence[str]) -> None:
    """Raises UserError for a name that is none, and for one whose library is not installed."""
    for name in names:
        if name not in SINKS:
            raise UserError(f"--log_to={name}: no such place; {did_you_mean(name, SINKS)}")
        _library(name)


def open_sinks(names: Sequence[str], workdir: str) -> list[Sink]:
    """Those of these names, for the rows of one run."""
    return [SINKS[name](_library(name), workdir) for name in dict.fromkeys(names)]


def _library(name: str) -> Any:
    sink = SINKS[name]
    try:
        return importlib.import_module(sink.module)
    except ImportError as error:
        words = f"{sink.module} is not installed; pip install 'llmjax[{sink.extra}]'"
        raise UserError(f"--log_to={name}: {words}") from error


def _numbers(row: Row) -> dict[str, float]:
    return {name: value for name, value in row.items() if name not in ROW}


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ROW)
