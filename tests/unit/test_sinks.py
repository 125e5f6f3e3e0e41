"""TensorBoard and W&B are given each point once, also by a run that goes on."""

import struct
import sys
import types

import pytest

from llmjax.errors import UserError
from llmjax.training.metrics import MetricsLog
from llmjax.training.sinks import check_sinks, open_sinks


def train(workdir, name, steps, start: int = 0, stage: str = "sft", close: bool = True) -> None:
    """What a process does that goes on behind step `start`; every second step has an evaluation."""
    log = MetricsLog(str(workdir / "metrics.jsonl"), sinks=open_sinks([name], str(workdir)))
    log.rewind(stage, start)
    for step in range(start + 1, steps + 1):
        log.write(stage, step, "train", {"loss": 10.0 * step, "mfu": 0.5})
        if step % 2 == 0:
            log.write(stage, step, "eval", {"loss": float(step)})
    if close:
        log.close()


POINTS = sorted(
    [("train/loss", step, 10.0 * step) for step in range(1, 6)] + [("train/mfu", step, 0.5) for step in range(1, 6)]
    + [("eval/loss", step, float(step)) for step in (2, 4)]
)  # fmt: skip


def events(folder) -> list[tuple[str, int, float]]:
    """(tag, step, value) of all scalars in the event files of a folder: records are length, checksum, bytes, checksum."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = []
    for path in folder.glob("events.*"):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            at += size + 16
    return sorted(found)


@pytest.mark.parametrize("cut_at", [3, 4, 5])
def test_tensorboard_has_each_point_once(tmp_path, cut_at):
    pytest.importorskip("tensorboardX")
    train(tmp_path, "tensorboard", cut_at, close=False)  # and is killed
    train(tmp_path, "tensorboard", 5, start=2)
    assert events(tmp_path / "tensorboard" / "sft") == POINTS


def test_tensorboard_can_be_asked_for_later_and_stages_are_apart(tmp_path):
    pytest.importorskip("tensorboardX")
    log = MetricsLog(str(tmp_path / "metrics.jsonl"))
    log.write("pretrain", 1, "train", {"loss": 3.0})
    log.close()
    train(tmp_path, "tensorboard", 5)
    assert events(tmp_path / "tensorboard" / "pretrain") == [("train/loss", 1, 3.0)]
    assert events(tmp_path / "tensorboard" / "sft") == POINTS


@pytest.fixture(name="wandb")
def make_wandb(monkeypatch):
    """A stand-in for the module in offline mode: by id what each run was sent."""
    module: types.Any = types.ModuleType("wandb")
    module.runs, module.Error = {}, type("Error", (Exception,), {})

    class Run:
        def __init__(self, sent):
            self.log, self.metrics = sent.append, {}

        def define_metric(self, name, step_metric):
            assert name == "sft/*" and step_metric == "sft/step"

        def finish(self):
            self.log = None

    def init(id, resume, name, dir):
        assert resume == "allow" and dir.endswith(name)
        return Run(module.runs.setdefault(id, []))

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def sent(wandb) -> list[tuple[str, int, float]]:
    (logs,) = wandb.runs.values()
    return sorted(
        (key.removeprefix("sft/"), log["sft/step"], value) for log in logs for key, value in log.items() if key != "sft/step"
    )


@pytest.mark.parametrize("cut_at", [3, 4, 5])
def test_wandb_is_sent_each_point_once_in_one_run(tmp_path, wandb, cut_at):
    train(tmp_path, "wandb", cut_at, close=False)
    train(tmp_path, "wandb", 5, start=2)
    assert sent(wandb) == POINTS


def test_wandb_can_be_asked_for_later(tmp_path, wandb):
    log = MetricsLog(str(tmp_path / "metrics.jsonl"))
    log.write("sft", 1, "train", {"loss": 10.0, "mfu": 0.5})
    log.close()
    train(tmp_path, "wandb", 5, start=1)
    assert sent(wandb) == POINTS


def test_wandb_that_refuses_is_one_line(tmp_path, wandb):
    def refuse(**settings):
        raise wandb.Error("no account\nlog in")

    wandb.init = refuse
    with pytest.raises(UserError, match="^--log_to=wandb: no account log in; WANDB_MODE=offline needs no account$"):
        open_sinks(["wandb"], str(tmp_path))


def test_what_is_not_there_is_one_line(monkeypatch):
    with pytest.raises(UserError, match="--log_to=tensorbord: no such place; did you mean 'tensorboard'?"):
        check_sinks(["tensorbord"])
    for name, module in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        monkeypatch.setitem(sys.modules, module, None)  # as where it is not installed
        with pytest.raises(UserError, match=rf"--log_to={name}: {module} is not installed; pip install 'llmjax\[{name}\]'"):
            check_sinks([name])
