"""The first losses of pre-training are what they were: data, tokenizer, batches, weights, model and optimizer."""

import json
import os
import pathlib
from dataclasses import replace

import pytest

from llmjax.config import load_experiment
from llmjax.runs.pipeline import open_context
from llmjax.training.metrics import MetricsLog

QUICKSTART = pathlib.Path(__file__).parents[2] / "experiments" / "quickstart.py"
GOLDEN = pathlib.Path(__file__).parent / "first_losses"
UPDATE = "LLMJAX_UPDATE_GOLDEN"
STEPS = 3
TOLERANCE = 1e-3  # nats per token


class Enough(Exception):
    """The first steps are done."""


class FirstLosses(MetricsLog):
    """Keeps the training losses in memory and stops the run after STEPS of them."""

    def __init__(self):
        super().__init__("", enabled=False)
        self.losses = []

    def write(self, stage, step, kind, values):
        assert (stage, step, kind) == ("pretrain", len(self.losses) + 1, "train")
        self.losses.append(values["loss"])
        if len(self.losses) == STEPS:
            raise Enough


def first_losses(arg: str, workdir: str) -> list[float]:
    experiment = load_experiment(f"{QUICKSTART}:{arg}")
    # The first update has rate 0 and the second the peak: the third loss sees the optimizer.
    optimizer = replace(experiment.stages["pretrain"].optimizer, warmup_steps=1)
    experiment = experiment.with_stage("pretrain", optimizer=optimizer)
    log = FirstLosses()
    context = open_context(experiment, workdir, log, verbose=False).for_stage("pretrain")
    with pytest.raises(Enough):
        experiment.stages["pretrain"].run(context)
    return log.losses


@pytest.mark.parametrize("arg", ["test", "test_moe"])
def test_first_losses_are_what_they_were(arg, tmp_path):
    golden, losses = GOLDEN / f"quickstart-{arg}.json", first_losses(arg, str(tmp_path))
    if os.environ.get(UPDATE):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(json.dumps([round(loss, 5) for loss in losses]) + "\n", encoding="utf-8")
    known = json.loads(golden.read_text(encoding="utf-8")) if golden.exists() else []
    assert losses == pytest.approx(known, abs=TOLERANCE), f"if this is meant: {UPDATE}=1 pytest tests/golden"
