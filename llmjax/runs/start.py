"""How a run was started, for its report: when, by which command, from which commit, on what, with which versions."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
from importlib import metadata

import jax

import llmjax
from llmjax.results import Start

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


def this_start(command: str, config: str = "") -> Start:
    """The start that is under way. command: as typed. config: the experiment's file, with or without an argument."""
    versions = {"llmjax": llmjax.__version__, "python": platform.python_version()}
    versions |= {name: metadata.version(name) for name in PACKAGES}
    folder = os.path.dirname(os.path.abspath(config.partition(".py:")[0])) if config else ""
    now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    return Start(now, command, commit_of(folder) if folder else "", _device(), versions)


def commit_of(folder: str) -> str:
    """The commit that is checked out where `folder` lies, with "-dirty" if its files have changed; "" outside of git."""
    git = shutil.which("git")
    if git is None:
        return ""
    words = [git, "--no-optional-locks", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip()


def _device() -> str:
    devices = jax.devices()
    cores = f", {platform.machine()}, {os.cpu_count()} cores" if devices[0].platform == "cpu" else ""
    hosts = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{len(devices)} × {devices[0].device_kind}{cores}{hosts}"
