"""Sides of a comparison, each in a process of its own, that work only when told to: neither times the other's threads."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

WARM_UP = 6.0  # seconds; an allocator that keeps what is freed faults for the first twenty steps or so


def serve(step: Callable[[], float]) -> None:
    """A worker's life: a line on stdin is a number of seconds to work; the answer is what each step took, and page faults."""
    first, until = step(), time.perf_counter() + WARM_UP
    while time.perf_counter() < until:
        step()
    print(json.dumps({"first": first}), flush=True)
    for line in sys.stdin:
        wall, cpu, until = [], [], time.perf_counter() + float(line)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        while time.perf_counter() < until:
            start, start_cpu = time.perf_counter(), time.process_time()
            step()
            wall.append(time.perf_counter() - start)
            cpu.append(time.process_time() - start_cpu)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        print(json.dumps({"wall": wall, "cpu": cpu, "faults": faults / len(wall)}), flush=True)


class Worker:
    """The other end. first: what its first step returned; wall, cpu: seconds of each step so far."""

    def __init__(self, *command: str):
        self._process = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.first = self._read()["first"]
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.faults: list[float] = []

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a worker died; run it by hand with --worker to see why")
        return json.loads(line)

    def turn(self, seconds: float) -> None:
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        answer = self._read()
        self.wall += answer["wall"]
        self.cpu += answer["cpu"]
        self.faults.append(answer["faults"])
        time.sleep(0.5)  # spinning threads go to sleep

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    @property
    def milliseconds(self) -> float:
        """Median wall time of a step."""
        return 1e3 * statistics.median(self.wall)

    @property
    def cpu_milliseconds(self) -> float:
        """Median CPU time of a step, all threads together."""
        return 1e3 * statistics.median(self.cpu)


def report(bars: list[tuple[str, bool]], check: bool) -> None:
    """Prints each bar; with `check` a missed one makes the program fail."""
    for text, met in bars:
        print(("met    " if met else "MISSED ") + text)
    if check and not all(met for _, met in bars):
        sys.exit(1)
