"""The drills, in short: what they count is so, and they notice what is wrong."""

import json
import shutil
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from benchmarks import checkpoint_drill, kill_drill
from llmjax.models.spec import ParamSpec, abstract_params
from llmjax.training.checkpoint import Checkpoints, save_params
from llmjax.training.state import abstract_state, init_state

SPECS = {"matrix": ParamSpec((4, 8), ("embed", "mlp"), std=1.0), "scale": ParamSpec((8,), (None,), constant=1.0)}

ORBAX_NOTES = {"_CHECKPOINT_METADATA", "commit_success.txt"}  # beside what is sealed; times and versions


@pytest.fixture(scope="module", name="saved")
def make_saved(tmp_path_factory):
    """Two checkpoints and a folder of parameters, as the drill sees them."""
    folder, tx = tmp_path_factory.mktemp("saved"), optax.adam(0.1)
    abstract = abstract_state(SPECS, tx, None)
    checkpoints = Checkpoints(str(folder / "checkpoints"))
    for step in (3, 7):
        checkpoints.save(step, init_state(tiny.draw(SPECS, step), tx, abstract).replace(step=jnp.int32(step)))
    checkpoints.close()
    save_params(str(folder / "params"), tiny.draw(SPECS))
    return [
        checkpoint_drill.checkpoint_target("some checkpoint", folder / "checkpoints", abstract),
        checkpoint_drill.params_target("some parameters", folder / "params", abstract_params(SPECS)),
    ]


def test_what_the_checkpoint_drill_compares_with(saved):
    checkpoint, params = saved
    assert (int(checkpoint.whole.step), int(checkpoint.instead.step), params.instead) == (7, 3, None)
    tiny.assert_trees_equal(params.whole, tiny.draw(SPECS))


def test_no_damage_is_silent(saved):
    counts, silent, harmless = checkpoint_drill.drill(saved, 12, seed=1)
    assert not silent and harmless <= ORBAX_NOTES | {"sha256.json"} and sum(counts.values()) == 12
    assert sum(number for (*_, result), number in counts.items() if result == "found") >= 6
    assert checkpoint_drill.table(saved, counts).count("\n") == 2


def test_the_checkpoint_drill_notices_a_number_that_is_not_what_was_saved(saved):
    changed = jax.tree.map(lambda x: np.nextafter(x, np.float32(9)), saved[1].whole)
    blind = types.SimpleNamespace(**vars(saved[1]) | {"read": lambda copy: (changed, "")})
    counts, silent, _ = checkpoint_drill.drill([blind], 3, seed=0)
    assert len(silent) == 3 and {result for *_, result in counts} == {"silent"}


@pytest.fixture(name="finished")
def make_finished(tmp_path):
    """What a run leaves that the kill drill compares."""
    folder = tmp_path / "run"
    save_params(str(folder / "sft" / "params"), tiny.draw(SPECS))
    rows = [{"stage": "sft", "step": step, "kind": "train", "loss": 1.0 / step, "mfu": 0.5 * step} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sft" / "result.json").write_text(json.dumps({"stage": "sft", "seconds": 1.5, "metrics": {"loss": 0.5}}))
    (folder / "sft" / "rankings-train.jsonl").write_text('{"ranks": [0, 1]}\n')
    return folder


def test_the_kill_drill_sees_every_difference_but_times(finished, tmp_path):
    whole = kill_drill.outcome(finished)
    files = {"metrics.jsonl", "sft/result.json", "sft/rankings-train.jsonl"}
    assert set(whole) == files | {"sft/params/matrix", "sft/params/scale"}

    def changed(name: str, old: str, new: str) -> list[str]:
        other = tmp_path / "other"
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(finished, other)
        text = (other / name).read_text()
        assert old in text
        (other / name).write_text(text.replace(old, new))
        return kill_drill.differences(kill_drill.outcome(other), whole)

    assert changed("metrics.jsonl", '"mfu": 1.0', '"mfu": 0.1') == changed("sft/result.json", "1.5", "2.5") == []
    assert changed("metrics.jsonl", '"loss": 0.5', '"loss": 0.50001') == ["metrics.jsonl"]
    assert changed("sft/result.json", "0.5", "0.6") == ["sft/result.json"]
    assert changed("sft/rankings-train.jsonl", "0, 1", "1, 0") == ["sft/rankings-train.jsonl"]
    other = tmp_path / "other"
    params = tiny.draw(SPECS)
    save_params(str(other / "sft" / "params"), params | {"scale": params["scale"].at[0].multiply(1 + 1e-6)})
    assert "sft/params/scale" in kill_drill.differences(kill_drill.outcome(other), whole)


BEGUN = "quickstart-test: pretrain, sft, reward, ppo on one device in /tmp/run\npretrain  complete in 3 s\n"


@pytest.mark.parametrize(("status", "stdout", "stderr", "where"), [
    (75, "", "stopped by SIGTERM; the same command goes on\n", "before the first stage"),
    (75, BEGUN, "sft: stopped by SIGTERM and saved after step 2; the same command goes on\n", "sft: a step"),
    (75, BEGUN.replace("in 3 s", "already"), "stopped by SIGTERM; the same command goes on\n", "sft: beside the steps"),
    (0, BEGUN, "", "complete"),
    (-signal.SIGTERM, BEGUN + "\nreport    /tmp/run/report.html\n", "", "complete"),
])  # fmt: skip
def test_where_a_signal_came(status, stdout, stderr, where):
    assert kill_drill.hit(stdout, stderr, status) == where
