"""Damages checkpoints and parameter folders at random and reads them back: every damage must be seen before a number is used.

    python benchmarks/checkpoint_drill.py --count=200

A run of all four stages (experiments/quickstart.py:test) is made. Then, so many times, the newest checkpoint or the parameters
of a stage are copied, a single bit of one of the files is flipped, or it is cut, or deleted, and they are restored as a run
does it. Of a checkpoint the one before must be taken, bit for bit, and a line must say why; parameters must be refused. Prints
the counts by stage and kind of damage; exits with 1 if any damage was silent.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import pathlib
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

from llmjax.errors import UserError
from llmjax.runtime import quiet_libraries

EXPERIMENT = pathlib.Path(__file__).parents[1] / "experiments" / "quickstart.py"


def flip(path: pathlib.Path, rng: random.Random) -> None:
    """Changes one bit of a file."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path: pathlib.Path, rng: random.Random) -> None:
    """Takes some of its end from a file."""
    os.truncate(path, rng.randrange(path.stat().st_size))


def delete(path: pathlib.Path, rng: random.Random) -> None:
    """Removes a file."""
    path.unlink()


DAMAGES: Mapping[str, Callable[[pathlib.Path, random.Random], None]] = {"bit": flip, "cut": cut, "deleted": delete}


@dataclass(frozen=True)
class Target:
    """What is damaged. name: "pretrain checkpoint". folder: of the checkpoints of a stage, or of parameters. damaged: below it
    what is. read: folder -> (arrays or None where they are refused, what was said). whole: the arrays as they were saved.
    instead: what must be there after a damage; None: they must be refused."""

    name: str
    folder: pathlib.Path
    damaged: str
    read: Callable[[pathlib.Path], tuple[Any, str]]
    whole: Any
    instead: Any


def trial(target: Target, kind: str, rng: random.Random, scratch: pathlib.Path) -> tuple[str, str]:
    """Damages a copy and reads it. Returns what came of it, and the file.

    "found": as it must be. "harmless": it was of a file that holds none of the numbers, and they are as they were saved.
    "silent": anything else.
    """
    copy = scratch / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(target.folder, copy)
    path = rng.choice(sorted(p for p in (copy / target.damaged).rglob("*") if p.is_file() and p.stat().st_size))
    DAMAGES[kind](path, rng)
    got, said = target.read(copy)
    where = str(path.relative_to(copy))
    if said and same(got, target.instead):
        return "found", where
    return "harmless" if not said and same(got, target.whole) else "silent", where


def same(a: Any, b: Any) -> bool:
    """Whether two trees of arrays, or None, are the same bit for bit."""
    import jax
    import numpy as np

    (leaves, shape), (others, other) = jax.tree.flatten(a), jax.tree.flatten(b)
    return shape == other and all(
        (x := np.asarray(one)).dtype == (y := np.asarray(two)).dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
        for one, two in zip(leaves, others, strict=True)
    )


def checkpoint_target(name: str, folder: pathlib.Path, abstract: Any) -> Target:
    """The newest of at least two checkpoints in a folder of them."""
    import jax

    from llmjax.training.checkpoint import Checkpoints

    def read(copy: pathlib.Path) -> tuple[Any, str]:
        said: list[str] = []
        checkpoints = Checkpoints(str(copy), say=said.append)
        state = jax.device_get(checkpoints.restore(abstract))
        checkpoints.close()
        return state, " ".join(said)

    steps = sorted((path.name for path in folder.iterdir() if path.name.isdigit()), key=int)
    with tempfile.TemporaryDirectory() as before:
        shutil.copytree(folder / steps[-2], pathlib.Path(before) / steps[-2])
        instead = read(pathlib.Path(before))[0]
    return Target(name, folder, steps[-1], read, read(folder)[0], instead)


def params_target(name: str, folder: pathlib.Path, abstract: Any) -> Target:
    """The parameters that a stage has handed on."""
    import jax

    from llmjax.training.checkpoint import load_params

    def read(copy: pathlib.Path) -> tuple[Any, str]:
        try:
            return jax.device_get(load_params(str(copy), abstract)), ""
        except UserError as error:
            return None, str(error)

    return Target(name, folder, ".", read, read(folder)[0], None)


def targets(folder: pathlib.Path) -> list[Target]:
    """Makes the run, and keeps the checkpoints that a completed stage deletes."""
    from llmjax.config import load_experiment
    from llmjax.models.heads import scalar_model_spec
    from llmjax.models.spec import abstract_params
    from llmjax.models.transformer import transformer_spec
    from llmjax.runs import pipeline
    from llmjax.training.metrics import MetricsLog

    workdir, kept = folder / "run", folder / "kept"
    experiment = load_experiment(f"{EXPERIMENT}:test")
    experiment = dataclasses.replace(experiment, checkpoint_seconds=0.001)

    def keep(directory: str) -> None:
        shutil.move(directory, kept / pathlib.Path(directory).parent.name)

    kept.mkdir()
    with mock.patch.object(pipeline.checkpoint, "delete", keep):
        pipeline.run_experiment(experiment, str(workdir), "")
    context = pipeline.open_context(experiment, str(workdir), MetricsLog("", enabled=False), verbose=False)
    found = []
    for name, stage in experiment.stages.items():
        state = stage.programs(context.for_stage(name))["update"].state
        specs = transformer_spec(context.model) if stage.makes == "language" else scalar_model_spec(context.model)
        found.append(checkpoint_target(f"{name} checkpoint", kept / name, state))
        found.append(params_target(f"{name} parameters", workdir / name / "params", abstract_params(specs)))
    return found


def drill(all_targets: list[Target], count: int, seed: int) -> tuple[Counter, list[str], set[str]]:
    """Damages `count` times, targets and kinds in turn. Returns counts by (target, kind, what came of it), the silent ones, and
    the names of the files whose damage was harmless."""
    rng, counts, silent, harmless = random.Random(seed), Counter(), [], set()
    cases = [(target, kind) for target in all_targets for kind in DAMAGES]
    with tempfile.TemporaryDirectory(prefix="checkpoint-drill-") as scratch:
        for number in range(count):
            target, kind = cases[number % len(cases)]
            result, where = trial(target, kind, rng, pathlib.Path(scratch))
            counts[target.name, kind, result] += 1
            silent += [f"{target.name}: {where} {kind}"] if result == "silent" else []
            harmless |= {pathlib.Path(where).name} if result == "harmless" else set()
    return counts, silent, harmless


def table(all_targets: list[Target], counts: Counter) -> str:
    """found / harmless / silent, by target and kind."""
    lines = [f"{'found / harmless / silent':<26}" + "".join(f"{kind:>14}" for kind in DAMAGES)]
    for target in all_targets:
        cells = (" / ".join(str(counts[target.name, kind, one]) for one in ("found", "harmless", "silent")) for kind in DAMAGES)
        lines.append(f"{target.name:<26}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="damages to make")
    parser.add_argument("--seed", type=int, default=0, help="of what is damaged, and how")
    args = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="checkpoint-drill-") as name:
        with contextlib.redirect_stdout(sys.stderr):
            found = targets(pathlib.Path(name))
        counts, silent, harmless = drill(found, args.count, args.seed)
        print(table(found, counts))
    total = Counter()
    for (_target, _kind, result), number in counts.items():
        total[result] += number
    print(f"{args.count} damages: {total['found']} found, {total['harmless']} harmless, {total['silent']} silent")
    lines = [f"harmless, for no number is in them: {', '.join(sorted(harmless))}"] if harmless else []
    for line in lines + silent:
        print(line)
    sys.exit(bool(silent))


if __name__ == "__main__":
    main()
