"""THE training loop. A stage gives it a step and batches; resume, metrics, checkpoints and progress come with it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llmjax.data.loader import BatchSource, iterate
from llmjax.errors import Stopped, UserError
from llmjax.runtime import give_back_memory
from llmjax.sharding import put_batch
from llmjax.training import stopping
from llmjax.training.checkpoint import Checkpoints, to_host
from llmjax.training.hardware import peak_flops, peak_memory
from llmjax.training.metrics import MetricsLog
from llmjax.training.progress import Progress
from llmjax.training.state import TrainState

LONG_STEP_SECONDS = 1.0
StepFn = Callable[[TrainState, Any, jax.Array], tuple[TrainState, Mapping[str, Any]]]


@dataclass(frozen=True)
class Hook:
    """Called with (step, state) after every `every` steps and after the last; returns held-out metrics to log, or None."""

    every: int
    call: Callable[[int, TrainState], Mapping[str, float] | None]


@dataclass(frozen=True)
class Loop:
    """What does not change between steps.

    tokens_per_step and flops_per_token give tokens/s and MFU (0: not shown). checkpoint_seconds: between two saves.
    log_every: steps between two rows of metrics.jsonl. hooks: at an evaluation the arrays among the metrics of the step are
    logged too, and at the last step; at other steps only the scalars are. shown: what the progress line says beside the
    loss, (metric, how it is written) as in ("kl", "KL {:.2f} nats"). passes: of the data in a step, as `Batches` has them;
    logged as epoch, and epoch/NAME in a mixture. pause: called after evaluations and saves, when all rows are written.
    """

    stage: str
    num_steps: int
    key: jax.Array
    mesh: Mesh | None
    metrics: MetricsLog
    checkpoints: Checkpoints
    checkpoint_seconds: float = 30.0
    log_every: int = 1
    tokens_per_step: int = 0
    flops_per_token: float = 0.0
    hooks: Sequence[Hook] = ()
    shown: Sequence[tuple[str, str]] = ()
    verbose: bool = True
    passes: Mapping[str, float] = field(default_factory=dict)
    pause: Callable[[], None] | None = None

    def evaluates(self, step: int) -> bool:
        """Whether a hook is due after `step` steps, or they are the last."""
        return step == self.num_steps or any(step % hook.every == 0 for hook in self.hooks)


def train(
    loop: Loop, start_state: Callable[[], TrainState], abstract: TrainState, step_fn: StepFn, batches: BatchSource
) -> TrainState:
    """Runs from the newest checkpoint, or else from `start_state()`, to `loop.num_steps`; returns the last state.

    Step s uses batch s and the key folded with s, so an interrupted run, continued, makes the very same updates. The
    metrics of a step are fetched when the next one has been dispatched, so the device never waits for the host; but for long
    steps on CPU, where every step that has been dispatched holds its temporaries.

    Raises:
        UserError: the loss is not finite; the last checkpoint is kept.
        Stopped: a signal has asked for it (see `stopping`); the step that was under way is saved.
    """
    restored = loop.checkpoints.restore(abstract)
    state = start_state() if restored is None else restored
    start = int(state.step)
    loop.metrics.rewind(loop.stage, start)
    report = _Reporter(loop, start)
    saved_at = time.monotonic()
    with stopping.deferred() as request, contextlib.closing(report):
        for step, batch in enumerate(iterate(batches, start, loop.num_steps), start):
            if report.long_steps:
                report.flush()
                give_back_memory()
            state, metrics = step_fn(state, put_batch(batch, loop.mesh), jax.random.fold_in(loop.key, step))
            report.step(step + 1, metrics)
            for hook in loop.hooks:
                if (step + 1) % hook.every == 0 or step + 1 == loop.num_steps:
                    report.flush()
                    report.held_out(step + 1, hook.call(step + 1, state))
            due = time.monotonic() - saved_at > loop.checkpoint_seconds and step + 1 < loop.num_steps
            if due or request.signal:
                report.flush()
                loop.checkpoints.save(step + 1, state)
                saved_at = time.monotonic()
            if (due or loop.evaluates(step + 1)) and step + 1 < loop.num_steps and not request.signal:
                report.pause()
            if request.signal:
                loop.checkpoints.wait()
                words = f"{loop.stage}: stopped by {request.signal} and saved after step {step + 1}"
                raise Stopped(words, request.signal)
        report.flush()
    return state


def flat_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Scalars as they are; entry [i, j] of an array as name/i/j."""
    values = {}
    for name, value in metrics.items():
        for index in np.ndindex(np.shape(value)):
            values["/".join([name, *map(str, index)])] = float(np.asarray(value)[index])
    return values


class _Reporter:
    """Turns the device metrics of each step into rows and progress, one step late."""

    def __init__(self, loop: Loop, start: int):
        self._loop = loop
        self._pending: tuple[int, Mapping[str, Any]] | None = None
        self._progress = Progress(loop.stage, start, loop.num_steps, loop.shown, loop.verbose)
        self._peak = 0.0
        if loop.flops_per_token:
            self._peak = peak_flops(1 if loop.mesh is None else loop.mesh.size)
        self._last = time.monotonic()
        self._seconds: float | None = None
        self._on_cpu = jax.default_backend() == "cpu"

    @property
    def long_steps(self) -> bool:
        """Whether waiting for each step costs next to nothing and saves a step's memory."""
        return self._on_cpu and (not self._seconds or self._seconds > LONG_STEP_SECONDS)

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        wanted = metrics if self._loop.evaluates(step) else {k: v for k, v in metrics.items() if np.ndim(v) == 0}
        values = flat_metrics(to_host(dict(wanted)))
        bad = [name for name in ("loss", "grad_norm") if not np.isfinite(values.get(name, 0.0))]
        if bad:
            raise UserError(
                f"{self._loop.stage}: the {bad[0]} is {values[bad[0]]} at step {step}; start in another --workdir with a lower "
                f"--config.{self._loop.stage}.optimizer.learning_rate"
            )
        values = {name: value for name, value in values.items() if not np.isnan(value)}  # not defined for this batch
        values |= self._throughput()
        values |= {f"epoch/{name}".rstrip("/"): step * share for name, share in self._loop.passes.items()}
        if self._loop.evaluates(step) and (peak := peak_memory()):
            values["peak_memory"] = peak
        if step % self._loop.log_every == 0 or step == self._loop.num_steps:
            self._loop.metrics.write(self._loop.stage, step, "train", values)
        self._progress.update(step, values)

    def _throughput(self) -> dict[str, float]:
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        if not self._loop.tokens_per_step or self._seconds is None:
            self._seconds = 0.0 if self._seconds is None else seconds  # the first step is mostly compilation
            return {}
        self._seconds = seconds if self._seconds == 0.0 else 0.9 * self._seconds + 0.1 * seconds
        rate = self._loop.tokens_per_step / self._seconds
        if not self._peak:
            return {"tokens_per_second": rate}
        return {"tokens_per_second": rate, "mfu": rate * self._loop.flops_per_token / self._peak}

    def held_out(self, step: int, values: Mapping[str, float] | None) -> None:
        if values:
            self._loop.metrics.write(self._loop.stage, step, "eval", values)
        self._last = time.monotonic()

    def pause(self) -> None:
        if self._loop.pause is not None:
            self._loop.pause()
            self._last = time.monotonic()

    def close(self) -> None:
        self._progress.close()
