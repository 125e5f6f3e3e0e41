"""One line that says where a run is: stage, step, loss, tokens/s, MFU, time left. Live on a terminal, sparse in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.text import Text

LOG_SECONDS = 10.0
SPEED = (("tokens_per_second", "{:,.0f} tokens/s"), ("mfu", "MFU {:.0%}"))


class Progress:
    """Shows the newest step of one stage. Outside a terminal it prints a line every LOG_SECONDS and the last one."""

    def __init__(
        self, stage: str, start: int, num_steps: int, shown: Sequence[tuple[str, str]] = (), enabled: bool = True
    ):
        """shown: (metric, how it is written) of what stands between the loss and the speed."""
        self._stage, self._num_steps = stage, num_steps
        self._forms = (("loss", "loss {:.3f}"), *shown, *SPEED)
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
            self._live.update(Text(f"{stage:<9} compiling the first step"))

    def update(self, step: int, values: dict[str, float]) -> None:
        """values: what to show beside the step, already computed on the host."""
        if not self._enabled:
            return
        now = time.monotonic()
        self._steady = self._steady or (step, now)  # the first step includes compilation and says nothing of the time left
        left = self._left(step, now, *self._steady)
        line = f"{self._stage:<9} step {step:>5}/{self._num_steps}  {self._describe(values)}  {left}"
        if self._live is not None:
            self._live.update(Text(line))
        elif now - self._shown >= LOG_SECONDS or step == self._num_steps:
            self._shown = now
            print(line, flush=True)

    def _describe(self, values: dict[str, float]) -> str:
        return "  ".join(form.format(values[name]) for name, form in self._forms if name in values)

    def _left(self, step: int, now: float, first: int, since: float) -> str:
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
