"""One line that says where a run is: stage, step, loss, tokens/s, MFU, time left. Live on a terminal, sparse in a log."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.live import Live
from rich.text import Text

LOG_SECONDS = 10.0


class Progress:
    """Shows the newest step of one stage. Outside a terminal it prints a line every LOG_SECONDS and the last one."""

    def __init__(self, stage: str, start: int, num_steps: int, enabled: bool = True):
        self._stage, self._start, self._num_steps = stage, start, num_steps
        self._enabled = enabled
        self._began = time.monotonic()
        self._steady: tuple[int, float] | None = None
        self._shown = 0.0
        self._live = None
        if enabled and start:
            print(f"{stage:<9} goes on after step {start}", flush=True)
        if enabled and sys.stdout.isatty():
            self._live = Live(console=Console(), refresh_per_second=8, transient=False)
            self._live.start()

    def update(self, step: int, values: dict[str, float]) -> None:
        """values: what to show beside the step, already computed on the host; see `describe`."""
        if not self._enabled:
            return
        now = time.monotonic()
        if self._steady is None:  # the first step includes compilation and says nothing about the time left
            self._steady = (step, now)
        line = f"{self._stage:<9} step {step:>5}/{self._num_steps}  {describe(values)}  {self._left(step, now)}"
        if self._live is not None:
            self._live.update(Text(line))
        elif now - self._shown >= LOG_SECONDS or step == self._num_steps:
            self._shown = now
            print(line, flush=True)

    def _left(self, step: int, now: float) -> str:
        first, since = self._steady
        if step == self._num_steps:
            return f"done in {clock(now - self._began)}"
        if step == first:
            return "time left --:--"
        return f"time left {clock((now - since) / (step - first) * (self._num_steps - step))}"

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()


def clock(seconds: float) -> str:
    """75.2 -> "1:15"."""
    minutes, rest = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def describe(values: dict[str, float]) -> str:
    """The numbers of a progress line, each with its unit."""
    parts = []
    for name, form in (
        ("loss", "loss {:.3f}"),
        ("accuracy", "accuracy {:.1%}"),
        ("reward", "reward {:+.2f}"),
        ("gold", "gold {:.3f}"),
        ("kl", "KL {:.2f} nats"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
        ("mfu", "MFU {:.0%}"),
    ):
        if name in values:
            parts.append(form.format(values[name]))
    return "  ".join(parts)
