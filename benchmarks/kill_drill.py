"""Ends small runs by SIGTERM at random moments and starts them again, until so many signals were sent.

    python benchmarks/kill_drill.py --count=50

A run of all four stages (experiments/quickstart.py:test) is made undisturbed. Then the same command is started, told to end
after a random time, and started again, until it is complete; then another run, until --count signals were sent. A process that
was told to end must say so with exit status 75, unless it had come to its end, and each run must be, bit for bit, the
undisturbed one: parameters, results, rankings and metrics, but for times. Prints what the signals hit; exits with 1 when
anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter

import numpy as np

from llmjax.runtime import quiet_libraries

EXPERIMENT = pathlib.Path(__file__).parents[1] / "experiments" / "quickstart.py"
TIMES = ("seconds", "tokens_per_second", "mfu")  # what differs from run to run
LISTENS_SECONDS = 1.0  # after so long a process has its handlers, where that cannot be looked up


def start(workdir: pathlib.Path, cache: pathlib.Path) -> subprocess.Popen:
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1", "PYTHONFAULTHANDLER": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "llmjax", f"--config={EXPERIMENT}:test", f"--workdir={workdir}"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until_it_listens(process: subprocess.Popen) -> None:
    """Until Python has come so far that SIGTERM is handled."""
    status = pathlib.Path(f"/proc/{process.pid}/status")
    if not status.exists():
        time.sleep(LISTENS_SECONDS)
        return
    while process.poll() is None:
        caught = re.search(r"^SigCgt:\s*(\w+)", status.read_text(), re.MULTILINE)
        if caught and int(caught[1], 16) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.01)


def told_to_end(workdir: pathlib.Path, cache: pathlib.Path, seconds: float) -> tuple[int, str, str]:
    """Starts the run and sends SIGTERM so long after it listens. Returns exit status, what was hit, and stderr."""
    process = start(workdir, cache)
    wait_until_it_listens(process)
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate()
    return process.returncode, hit(stdout, stderr, process.returncode), stderr


def hit(stdout: str, stderr: str, status: int) -> str:
    """What a process was at when it ended: "pretrain: a step", "sft: beside the steps", "before the first stage", ..."""
    if status == 0 or "\nreport    " in stdout:
        return "complete"
    step = re.search(r"^(\S+): stopped by SIGTERM and saved after step", stderr, re.MULTILINE)
    if step:
        return f"{step[1]}: a step"
    done = re.findall(r"^(\S+) +complete ", stdout, re.MULTILINE)
    stages = re.search(r": (\S+(?:, \S+)*) on .* in ", stdout)
    if not stages:
        return "before the first stage"
    waiting = [stage for stage in stages[1].split(", ") if stage not in done]
    return f"{waiting[0]}: beside the steps" if waiting else "the report"


def outcome(workdir: pathlib.Path) -> dict[str, bytes | str]:
    """Everything that the config of a run determines: numbers of all parameters, results, rankings, metrics without times."""
    import orbax.checkpoint as ocp

    found: dict[str, bytes | str] = {}
    rows = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found["metrics.jsonl"] = "\n".join(without_times(row) for row in rows)
    for path in sorted(workdir.glob("*/rankings-*.jsonl")):
        found[f"{path.parent.name}/{path.name}"] = path.read_bytes()
    for path in sorted(workdir.glob("*/result.json")):
        stage = path.parent
        found[f"{stage.name}/result.json"] = without_times(path.read_text(encoding="utf-8"))
        if not (stage / "params").exists():
            continue  # it makes no model
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore((stage / "params").absolute())
        for name, array in sorted(leaves(params)):
            found[f"{stage.name}/params/{name}"] = f"{array.dtype}{array.shape}".encode() + array.tobytes()
    return found


def leaves(tree, name: str = "") -> list[tuple[str, np.ndarray]]:
    """(path, array) of all arrays in nested dicts and lists."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else None
    if children is None:
        return [(name, np.asarray(tree))]
    return [leaf for key, child in children for leaf in leaves(child, f"{name}.{key}" if name else str(key))]


def without_times(text: str) -> str:
    """A JSON object without the fields that say how fast it was."""
    return json.dumps({name: value for name, value in json.loads(text).items() if name not in TIMES})


def differences(got: dict[str, bytes | str], expected: dict[str, bytes | str]) -> list[str]:
    """Names of what is not the same in two outcomes."""
    return sorted(name for name in got | expected if got.get(name) != expected.get(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50, help="signals to send")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    quiet_libraries()
    rng, hits, faults, runs, sent = random.Random(args.seed), Counter(), [], 0, 0
    with tempfile.TemporaryDirectory(prefix="kill-drill-") as name:
        folder = pathlib.Path(name)
        for whole in ("first", "whole"):  # the first one fills the cache of compiled programs
            began = time.monotonic()
            process = start(folder / whole, folder / "cache")
            _, stderr = process.communicate()
            if process.returncode:
                sys.exit(f"the undisturbed run failed:\n{stderr}")
            seconds = time.monotonic() - began
        expected = outcome(folder / "whole")
        faults += [f"two undisturbed runs: {one}" for one in differences(outcome(folder / "first"), expected)]
        print(f"undisturbed: {seconds:.0f} s, {len(expected)} things to compare", flush=True)
        while sent < args.count:
            runs += 1
            workdir, signals, where = folder / f"run-{runs}", 0, ""
            while where != "complete":
                began = time.monotonic()
                status, where, stderr = told_to_end(workdir, folder / "cache", rng.uniform(0, seconds / 2))
                if where == "complete" and not signals:  # it was quicker: on a machine that is less busy now
                    seconds = min(seconds, time.monotonic() - began)
                hits[where], signals = hits[where] + 1, signals + (where != "complete")
                if where != "complete" and status != os.EX_TEMPFAIL:
                    faults.append(f"run {runs}, signal {signals} ({where}): exit status {status}\n{stderr[-2000:]}")
                    break
            sent += signals
            wrong = differences(outcome(workdir), expected) if where == "complete" else []
            faults += [f"run {runs} after {signals} signals: {one} differs" for one in wrong]
            print(f"run {runs}: {signals} signals, {sent} in all; {len(wrong)} of {len(expected)} differ", flush=True)
        for where, number in sorted(hits.items()):
            print(f"{number:>5}  {where}")
    print("\n".join(faults) or f"{sent} signals in {runs} runs: every run ended as the undisturbed one, bit for bit")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
