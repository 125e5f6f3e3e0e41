"""A run that is killed in every stage and started again ends as one that was left alone, bit for bit."""

import signal
import subprocess
import sys

import program
import pytest

pytestmark = pytest.mark.slow

EVERY_STEP = "--config.checkpoint_seconds=0.001"


def test_killed_in_every_stage(finished, tmp_path):
    workdir = tmp_path / "killed"
    for stage in program.STAGES:
        program.kill_in(stage, finished.kind, workdir, EVERY_STEP)
        assert program.rows(workdir, stage, "train") and not (workdir / stage / "result.json").exists()
    again = program.run(finished.kind, workdir, EVERY_STEP)
    skipped = [line.split()[0] for line in again.stdout.splitlines() if "complete already" in line]
    assert skipped == list(program.STAGES[:-1])
    for stage in program.STAGES:
        # The first step of a process has no speed: so each stage went on from a later step than its first.
        assert [r["step"] for r in program.rows(workdir, stage, "train") if "tokens_per_second" not in r][-1] > 1, stage
    killed, whole = program.outcome(workdir), program.outcome(finished.workdir)
    assert killed["results"] == whole["results"]
    assert killed["rows"] == whole["rows"]


def test_told_to_end_in_every_stage(finished, tmp_path):
    """By a scheduler that wants its machine back."""
    workdir = tmp_path / "told"
    for stage in program.STAGES:
        status, stderr = program.kill_in(stage, finished.kind, workdir, EVERY_STEP, by=signal.SIGTERM)
        assert status == 75 and "stopped by SIGTERM" in stderr and stderr.endswith("; the same command goes on\n")
        assert stderr.count("\n") == 1 and not (workdir / ".lock").exists()
    program.run(finished.kind, workdir)
    told, whole = program.outcome(workdir), program.outcome(finished.workdir)
    assert told["results"] == whole["results"] and told["rows"] == whole["rows"]


def test_told_to_end_at_random_moments():
    """The drill, in short; it also ends processes between stages and before the first."""
    command = [sys.executable, str(program.REPOSITORY / "benchmarks" / "kill_drill.py"), "--count=3"]
    done = subprocess.run(command, env=program.environment(), capture_output=True, text=True, timeout=program.TIMEOUT)
    assert done.returncode == 0 and "every run ended as the undisturbed one" in done.stdout, done.stdout + done.stderr
