"""Signals that ask a run to end: what has been trained is saved first.

SIGTERM (a scheduler wants the machine back), SIGHUP (the terminal is gone) and Ctrl-C. During training they are noted, and THE
loop saves after the step that is under way; elsewhere they end the run at once, and it goes on from its last checkpoint. One
that the process was started to ignore stays ignored (nohup does that to SIGHUP, a shell to Ctrl-C of what runs behind it).
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llmjax.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Request:
    """signal: the name of the one that asked for an end, "" for none."""

    signal = ""


_deferred: Request | None = None


@contextlib.contextmanager
def heeded(say: Callable[[str], None]) -> Iterator[None]:
    """Within it the signals raise `Stopped` (Ctrl-C: KeyboardInterrupt), or are noted by `deferred`. In the main thread only:
    elsewhere signals cannot be handled, and nothing changes. say: gets a line when Ctrl-C has been noted."""
    with _handled(SIGNALS, functools.partial(_handle, say)):
        yield


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP end the process where it is, as `llmjax.commands.base.call` does for `Stopped`: while
    libraries are loaded, an exception may crash them or be lost in them, and there is nothing to save. Where as in `heeded`."""
    with _handled((signal.SIGTERM, signal.SIGHUP), _end):
        yield


def _end(number: int, frame: object) -> None:
    os.write(sys.stderr.fileno(), f"stopped by {signal.Signals(number).name}; the same command goes on\n".encode())
    os._exit(os.EX_TEMPFAIL)


@contextlib.contextmanager
def _handled(signals: Sequence[signal.Signals], handler: Callable[[int, Any], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [one for one in signals if signal.getsignal(one) != signal.SIG_IGN]
    before = {one: signal.signal(one, handler) for one in heard}
    try:
        yield
    finally:
        for one, earlier in before.items():
            signal.signal(one, earlier)


@contextlib.contextmanager
def deferred() -> Iterator[Request]:
    """Within it the first signal is noted in the request and not raised; a second Ctrl-C is."""
    global _deferred
    _deferred = Request()
    try:
        yield _deferred
    finally:
        _deferred = None


def _handle(say: Callable[[str], None], number: int, frame: object) -> None:
    name = signal.Signals(number).name
    if number == signal.SIGINT and (_deferred is None or _deferred.signal):
        raise KeyboardInterrupt
    if _deferred is None:
        raise Stopped(f"stopped by {name}", name)
    _deferred.signal = _deferred.signal or name
    if number == signal.SIGINT:
        say("saving after this step; Ctrl-C again ends at once")
