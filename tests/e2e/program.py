"""The program as a user starts it: a process of its own, on one CPU device unless its flags say otherwise."""

import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

REPOSITORY = pathlib.Path(__file__).parents[2]
QUICKSTART = REPOSITORY / "experiments" / "quickstart.py"
STUDY = REPOSITORY / "experiments" / "dense_vs_moe.py"
KINDS = {"dense": "test", "moe": "test_moe"}
STAGES = ("pretrain", "sft", "reward", "ppo")  # those that train; the last one asks them all
ALL_STAGES = (*STAGES, "table")
TIMEOUT = 1200  # seconds; a run takes one or two minutes on two quiet cores
SPEED = ("tokens_per_second", "mfu")
IN_MEMORY = ("moe/routing_change",)  # the first evaluation after a resume has none


@dataclass(frozen=True)
class Finished:
    """A run that has come to a good end: of which kind, where, and what it printed."""

    kind: str
    workdir: pathlib.Path
    stdout: str
    stderr: str


def command(kind: str, workdir: pathlib.Path, *flags: str) -> list[str]:
    """kind: of KINDS, or "study" for both in one run."""
    spec = f"{STUDY}:test" if kind == "study" else f"{QUICKSTART}:{KINDS[kind]}"
    return [sys.executable, "-m", "llmjax", f"--config={spec}", f"--workdir={workdir}", *flags]


def environment() -> dict[str, str]:
    """Without the virtual devices that tests/conftest.py asks for, with its cache of compiled programs; where the package is,
    whether installed or not."""
    flags = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)
    cache = {"JAX_COMPILATION_CACHE_DIR": os.environ["LLMJAX_TEST_CACHE"], "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    return dict(os.environ) | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(REPOSITORY)} | cache


def start(kind: str, workdir: pathlib.Path, *flags: str) -> subprocess.Popen:
    return subprocess.Popen(
        command(kind, workdir, *flags), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(kind: str, workdir: pathlib.Path, *flags: str) -> Finished:
    """Runs to the end, which must be a good one."""
    process = start(kind, workdir, *flags)
    try:
        stdout, stderr = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    assert process.returncode == 0, f"exit status {process.returncode}\n{stdout[-2000:]}\n{stderr[-4000:]}"
    return Finished(kind, workdir, stdout, stderr)


def whole_run(kind: str, folder: pathlib.Path) -> Finished:
    """A whole run of `kind` in `folder`/<kind>, made by the first process that asks."""
    folder.mkdir(exist_ok=True)
    kept = folder / f"{kind}.json"
    with open(folder / f"{kind}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            done = run(kind, folder / kind)
            kept.write_text(json.dumps([done.stdout, done.stderr]), encoding="utf-8")
    return Finished(kind, folder / kind, *json.loads(kept.read_text(encoding="utf-8")))


def kill_in(stage: str, kind: str, workdir: pathlib.Path, *flags: str, by: signal.Signals = signal.SIGKILL) -> tuple[int, str]:
    """Starts the run and kills it as soon as `stage` has a checkpoint. Returns exit status and stderr."""
    process = start(kind, workdir, *flags)
    deadline = time.monotonic() + TIMEOUT
    try:
        while not committed_steps(workdir, stage):
            assert process.poll() is None, f"over before {stage}:\n{''.join(process.communicate())[-4000:]}"
            assert time.monotonic() < deadline, f"no checkpoint of {stage} after {TIMEOUT} s"
            time.sleep(0.002)
        process.send_signal(by)
        _, stderr = process.communicate(timeout=TIMEOUT)
        return process.returncode, stderr
    finally:
        process.kill()
        process.communicate()


def committed_steps(workdir: pathlib.Path, stage: str) -> list[int]:
    """Steps that have a whole checkpoint."""
    return sorted(int(path.name) for path in (workdir / stage / "checkpoints").glob("*") if path.name.isdigit())


def result(workdir: pathlib.Path, stage: str) -> dict:
    return json.loads((workdir / stage / "result.json").read_text(encoding="utf-8"))


def rows(workdir: pathlib.Path, stage: str | None = None, kind: str | None = None) -> list[dict]:
    """Rows of metrics.jsonl, of one stage and kind if given."""
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return [row for row in found if stage in (None, row["stage"]) and kind in (None, row["kind"])]


def outcome(workdir: pathlib.Path) -> dict:
    """Everything of a run that its config determines: not how fast it was, nor what a resumed process does not know."""
    results = {stage: result(workdir, stage) for stage in STAGES}
    return {
        "results": {
            stage: {name: value for name, value in found.items() if name != "seconds"} for stage, found in results.items()
        },
        "rows": [{name: value for name, value in row.items() if name not in SPEED + IN_MEMORY} for row in rows(workdir)],
    }
