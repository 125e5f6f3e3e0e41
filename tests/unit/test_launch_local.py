"""The commands that launch/local.py makes; nothing is run."""

import sys

from launch.local import commands, run


def test_one_command_per_seed_with_overrides_handed_on():
    made = commands("e.py:moe", ["0", "7"], "runs/x", [("ppo.algorithm.kl_coef", "0.1")])
    assert made == [
        [sys.executable, "-m", "llmjax", "--config=e.py:moe", "--config.ppo.algorithm.kl_coef=0.1",
         f"--config.seed={seed}", f"--workdir=runs/x/seed-{seed}"]
        for seed in (0, 7)
    ]  # fmt: skip


def test_dry_run_prints_and_runs_nothing(capsys, tmp_path):
    run(["local", "--config=missing.py", "--seeds=1,2", f"--workdir={tmp_path}/runs", "--dry_run"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "--config.seed=2" in lines[1]
    assert not list(tmp_path.iterdir())
