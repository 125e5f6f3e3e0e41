"""The same program on 8 virtual devices: the same losses, to float tolerance."""

import program
import pytest

from experiments.quickstart import get_config

pytestmark = pytest.mark.slow

EIGHT = ("--cpu_devices=8", "--config.mesh.fsdp=4", "--config.mesh.data=2")
PRETRAIN_ONLY = ("--config.sft=none", "--config.reward=none", "--config.ppo=none", "--config.table=none")
TOLERANCE = 1e-4  # nats per token


def losses(workdir, stage: str) -> dict:
    curve = {(row["kind"], row["step"]): row["loss"] for row in program.rows(workdir, stage)}
    return curve | {"final": program.result(workdir, stage)["metrics"]["loss"]}


def test_all_stages_on_a_mesh(finished, tmp_path):
    # One minibatch of 8 rows: half of it could not be split over 8 devices. What is sampled may differ where two
    # tokens are almost equally likely, so the later stages only have to run.
    run = program.run(finished.kind, tmp_path / "mesh", *EIGHT, "--config.ppo.minibatches=1")
    for stage in ("pretrain", "sft"):
        assert losses(run.workdir, stage) == pytest.approx(losses(finished.workdir, stage), abs=TOLERANCE)
    (table,) = program.result(run.workdir, "table")["tables"]
    assert [row["name"] for row in table["rows"]] == list(get_config("test").stages["table"].rows)
    assert run.stderr == ""


def test_explicit_axes(finished, tmp_path):
    if finished.kind == "moe":
        pytest.skip("the dense run shows it, and tests/multidevice has the experts")
    run = program.run(finished.kind, tmp_path / "mesh", *EIGHT, "--config.mesh.mode=explicit", *PRETRAIN_ONLY)
    assert losses(run.workdir, "pretrain") == pytest.approx(losses(finished.workdir, "pretrain"), abs=TOLERANCE)


def test_resumes_on_another_mesh(finished, tmp_path):
    if finished.kind == "moe":
        pytest.skip("the dense run shows it, and tests/multidevice has the experts")
    workdir = tmp_path / "mesh"
    program.kill_in("pretrain", finished.kind, workdir, *PRETRAIN_ONLY, "--config.checkpoint_seconds=0.001")
    program.run(finished.kind, workdir, *EIGHT, *PRETRAIN_ONLY)
    assert losses(workdir, "pretrain") == pytest.approx(losses(finished.workdir, "pretrain"), abs=TOLERANCE)
