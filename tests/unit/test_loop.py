"""THE loop: exact resume, metrics one step late but all there, hooks on time, and no silent NaN."""

import os
import signal
import types

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from llmjax.errors import Stopped, UserError
from llmjax.models.transformer import transformer_spec
from llmjax.objectives.lm import lm_loss
from llmjax.training import loop as loop_module
from llmjax.training import stopping
from llmjax.training.checkpoint import Checkpoints
from llmjax.training.loop import Hook, Loop, train
from llmjax.training.metrics import MetricsLog, read_rows
from llmjax.training.optimizer import OptimizerConfig, make_optimizer
from llmjax.training.state import TrainState, abstract_state, init_state, make_train_step

NUM_STEPS = 7


class PowerCut(Exception):
    """A stand-in for a power cut."""


def batches(make, stop_at: int | None = None):
    """Batch `step` is make(step); reading batch `stop_at` fails."""

    def read(step):
        if step == stop_at:
            raise PowerCut
        return make(int(step))

    return grain.MapDataset.range(1000).map(read)


def run(folder, start, abstract, step_fn, source, **fields):
    """`train` in `folder`, as a fresh process would. start: makes the first state."""
    metrics = MetricsLog(os.path.join(folder, "metrics.jsonl"))
    checkpoints = Checkpoints(os.path.join(folder, fields.get("stage", ""), "checkpoints"))
    loop = Loop(
        key=jax.random.key(7), mesh=None, metrics=metrics, checkpoints=checkpoints, verbose=False,
        **dict(stage="sft", num_steps=NUM_STEPS, checkpoint_seconds=0.0) | fields,
    )  # fmt: skip
    try:
        return train(loop, start, abstract, step_fn, source)
    finally:
        checkpoints.close()
        metrics.close()


def rows_of(folder):
    return read_rows(os.path.join(folder, "metrics.jsonl"))


# A real model


@pytest.fixture(scope="module")
def real():
    """A sparse model with the key of a step in its loss, so that a wrong key is noticed."""
    cfg = tiny.dataclasses.replace(tiny.SPARSE, num_layers=1)
    specs = transformer_spec(cfg)
    tx = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=3), NUM_STEPS, specs)
    abstract = abstract_state(specs, tx, None)

    def loss(params, batch, key):
        value, metrics = lm_loss(params, batch, key, cfg)
        return value * (1 + 0.1 * jax.random.uniform(key)), metrics

    def start():
        return init_state(tiny.language_model(cfg), tx, abstract)

    return start, abstract, make_train_step(loss, tx, abstract), lambda step: tiny.lm_batch(cfg, 4, 8, seed=step)


@pytest.mark.parametrize("stop_at", [1, 4, NUM_STEPS - 1])
def test_a_run_that_was_cut_off_ends_bit_for_bit_like_one_that_was_not(real, tmp_path, stop_at):
    start, abstract, step_fn, make = real
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    os.mkdir(whole), os.mkdir(cut)
    expected = run(whole, start, abstract, step_fn, batches(make), checkpoint_seconds=1e9)
    with pytest.raises(PowerCut):
        run(cut, start, abstract, step_fn, batches(make, stop_at))
    restarted = []

    def counted(state, *args):
        restarted.append(int(state.step))
        return step_fn(state, *args)

    got = run(cut, start, abstract, counted, batches(make))
    assert restarted == list(range(stop_at, NUM_STEPS))
    tiny.assert_trees_equal(got, expected)
    assert rows_of(cut) == rows_of(whole)
    assert [row["step"] for row in rows_of(cut)] == list(range(1, NUM_STEPS + 1))


def test_a_metric_that_a_step_does_not_define_is_left_out_of_its_row(real, tmp_path):
    start, abstract, step_fn, make = real

    def sometimes(state, *args):
        state, metrics = step_fn(state, *args)
        return state, metrics | {"accuracy": jnp.nan if int(state.step) == 2 else 0.5}

    run(str(tmp_path), start, abstract, sometimes, batches(make), checkpoint_seconds=1e9)
    assert [row.get("accuracy") for row in rows_of(tmp_path)][:3] == [0.5, None, 0.5]


@pytest.fixture(name="heard")
def make_heard():
    """Signals as in a program at a terminal: what started the tests may have had them ignored."""
    usual = {one: signal.SIG_DFL for one in stopping.SIGNALS} | {signal.SIGINT: signal.default_int_handler}
    before = {one: signal.signal(one, handler) for one, handler in usual.items()}
    yield
    for one, handler in before.items():
        signal.signal(one, handler)


def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored(heard):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with stopping.heeded(print), stopping.deferred() as request:
        signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and not request.signal


@pytest.mark.parametrize("name, at", [("SIGTERM", 3), ("SIGHUP", 1), ("SIGINT", 5), ("SIGTERM", NUM_STEPS)])
def test_a_signal_saves_the_step_under_way_and_the_run_goes_on_from_there(real, heard, tmp_path, name, at):
    start, abstract, step_fn, make = real
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    os.mkdir(whole), os.mkdir(cut)
    expected = run(whole, start, abstract, step_fn, batches(make), checkpoint_seconds=1e9)

    def signalled(state, *args):
        if int(state.step) == at - 1:
            signal.raise_signal(getattr(signal, name))
        return step_fn(state, *args)

    with stopping.heeded(print), pytest.raises(Stopped, match=f"^sft: stopped by {name} and saved after step {at}$") as stopped:
        run(cut, start, abstract, signalled, batches(make), checkpoint_seconds=1e9)
    assert stopped.value.signal == name and os.listdir(os.path.join(cut, "checkpoints")) == [str(at)]
    restarted = []

    def counted(state, *args):
        restarted.append(int(state.step))
        return step_fn(state, *args)

    tiny.assert_trees_equal(run(cut, start, abstract, counted, batches(make), checkpoint_seconds=1e9), expected)
    assert restarted == list(range(at, NUM_STEPS)) and rows_of(cut) == rows_of(whole)


def test_a_second_ctrl_c_ends_at_once(heard, tmp_path):
    start, abstract, step_fn, _ = counter()

    def signalled(state, *args):
        if int(state.step) == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return step_fn(state, *args)

    with stopping.heeded(print), pytest.raises(KeyboardInterrupt):
        run(tmp_path, start, abstract, signalled, batches(numbers), checkpoint_seconds=1e9)
    assert os.listdir(tmp_path / "checkpoints") == []


@pytest.mark.parametrize("name, error", [("SIGTERM", Stopped), ("SIGHUP", Stopped), ("SIGINT", KeyboardInterrupt)])
def test_where_nothing_would_be_lost_a_signal_ends_the_run_at_once(heard, name, error):
    before = [signal.getsignal(one) for one in stopping.SIGNALS]
    with pytest.raises(error), stopping.heeded(print):
        signal.raise_signal(getattr(signal, name))
        pytest.fail("the signal went by")
    assert [signal.getsignal(one) for one in stopping.SIGNALS] == before


def test_a_complete_run_that_is_started_again_does_nothing_wrong(real, tmp_path):
    start, abstract, step_fn, make = real
    expected = run(tmp_path, start, abstract, step_fn, batches(make))
    rows = rows_of(tmp_path)
    tiny.assert_trees_equal(run(tmp_path, start, abstract, step_fn, batches(make)), expected)
    assert rows_of(tmp_path) == rows


# A counter instead of a model


def counter(losses=None, poison_at: int | None = None):
    """(start, abstract, step_fn, seen): a step adds 1 to the only parameter; its loss is losses[step], or the step."""
    state = TrainState(jnp.int32(0), {"w": jnp.zeros(2)}, ())
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state)
    seen = []

    def step_fn(state, batch, key):
        step = int(state.step)
        seen.append((batch["x"].tolist(), jax.random.key_data(key).tolist()))
        w = state.params["w"] + (np.nan if step == poison_at else 1)
        metrics = {"loss": jnp.float32(step if losses is None else losses[step])}
        return TrainState(state.step + 1, {"w": w}, ()), metrics | {"grad_norm": jnp.sum(w)}

    return lambda: state, abstract, step_fn, seen


def numbers(step):
    return {"x": np.array([step], np.int32)}


def test_step_s_sees_batch_s_and_the_key_folded_with_s(tmp_path):
    start, abstract, step_fn, seen = counter()
    run(tmp_path, start, abstract, step_fn, batches(numbers))
    key = jax.random.key(7)
    assert seen == [([s], jax.random.key_data(jax.random.fold_in(key, s)).tolist()) for s in range(NUM_STEPS)]


def test_rows_are_written_every_log_every_steps_and_after_the_last(tmp_path):
    start, abstract, step_fn, _ = counter()
    run(tmp_path, start, abstract, step_fn, batches(numbers), log_every=3)
    assert [(row["step"], row["kind"], row["loss"]) for row in rows_of(tmp_path)] == [
        (3, "train", 2.0), (6, "train", 5.0), (7, "train", 6.0)
    ]  # fmt: skip


@pytest.mark.parametrize(("long_step", "behind"), [(0.0, 0), (1e9, 1)])
def test_long_steps_on_cpu_are_waited_for_one_by_one(tmp_path, monkeypatch, long_step, behind):
    """Each one that has been dispatched holds its temporaries; short ones are dispatched ahead."""
    monkeypatch.setattr(loop_module, "LONG_STEP_SECONDS", long_step)
    start, abstract, step_fn, _ = counter()
    written = []

    def watched(state, batch, key):
        written.append(len(rows_of(tmp_path)))
        return step_fn(state, batch, key)

    run(tmp_path, start, abstract, watched, batches(numbers), checkpoint_seconds=1e9)
    assert written[3:] == [step - behind for step in range(3, NUM_STEPS)]


def test_hooks_come_on_time_and_see_the_state_after_the_step(tmp_path):
    start, abstract, step_fn, _ = counter()
    called = []

    def hook(step, state):
        called.append((step, int(state.step), float(state.params["w"][0])))
        return {"held_out": 2.0 * step} if step != 6 else None

    run(tmp_path, start, abstract, step_fn, batches(numbers), hooks=[Hook(3, hook)])
    assert called == [(3, 3, 3.0), (6, 6, 6.0), (7, 7, 7.0)]
    rows = [(row["step"], row["kind"]) for row in rows_of(tmp_path)]
    assert rows == [(1, "train"), (2, "train"), (3, "train"), (3, "eval"), (4, "train"), (5, "train"), (6, "train"),
                    (7, "train"), (7, "eval")]  # fmt: skip


def test_the_first_state_is_made_only_where_there_is_no_checkpoint(tmp_path):
    """A resumed run needs no weights to start from."""
    start, abstract, step_fn, _ = counter()
    with pytest.raises(PowerCut):
        run(tmp_path, start, abstract, step_fn, batches(numbers, stop_at=4))

    def made():
        pytest.fail("a state was made although there is a checkpoint")

    state = run(tmp_path, made, abstract, step_fn, batches(numbers))
    assert int(state.step) == NUM_STEPS and state.params["w"].tolist() == [NUM_STEPS] * 2


def test_arrays_are_logged_at_evaluations_and_at_the_last_step_alone(tmp_path):
    start, abstract, step_fn, _ = counter()

    def with_loads(state, batch, key):
        state, metrics = step_fn(state, batch, key)
        return state, metrics | {"load": 10 * state.step + jnp.arange(4).reshape(2, 2)}

    run(tmp_path, start, abstract, with_loads, batches(numbers), hooks=[Hook(3, lambda step, state: None)])
    found = {row["step"]: [row[f"load/{i}/{j}"] for i in (0, 1) for j in (0, 1)]
             for row in rows_of(tmp_path) if "load/0/0" in row}  # fmt: skip
    assert found == {step: [10.0 * step + i for i in range(4)] for step in (3, 6, NUM_STEPS)}
    assert all("load" not in row and "loss" in row for row in rows_of(tmp_path))


def test_throughput_is_logged_only_when_asked_for(tmp_path):
    start, abstract, step_fn, _ = counter()
    for name, fields in (("without", {}), ("with", dict(tokens_per_step=100))):
        (tmp_path / name).mkdir()
        run(tmp_path / name, start, abstract, step_fn, batches(numbers), **fields)
        rates = [row.get("tokens_per_second") for row in rows_of(tmp_path / name)]
        assert rates[0] is None  # mostly compilation
        assert all((rate is not None and rate > 0) == bool(fields) for rate in rates[1:])


def test_passes_over_the_data_are_logged(tmp_path):
    start, abstract, step_fn, _ = counter()
    run(tmp_path, start, abstract, step_fn, batches(numbers), passes={"": 0.5})
    assert [row["epoch"] for row in rows_of(tmp_path)] == [0.5 * step for step in range(1, NUM_STEPS + 1)]
    run(tmp_path, start, abstract, step_fn, batches(numbers), stage="mixed", passes={"web": 0.25, "code": 2.0})
    last = rows_of(tmp_path)[-1]
    assert (last["epoch/web"], last["epoch/code"]) == (0.25 * NUM_STEPS, 2.0 * NUM_STEPS) and "epoch" not in last


def test_a_report_has_its_pause_after_evaluations_and_saves_with_all_rows_written(tmp_path):
    start, abstract, step_fn, _ = counter()
    seen = []

    def pause():
        seen.append([(row["step"], row["kind"]) for row in rows_of(tmp_path)][-2:])

    run(tmp_path, start, abstract, step_fn, batches(numbers), checkpoint_seconds=1e9, pause=pause,
        hooks=[Hook(3, lambda step, state: {"held_out": 1.0})])  # fmt: skip
    assert seen == [[(step, "train"), (step, "eval")] for step in (3, 6)]  # after the last step the stage is soon complete
    seen.clear()
    (tmp_path / "metrics.jsonl").unlink()
    run(tmp_path, start, abstract, step_fn, batches(numbers), stage="other", pause=pause)
    assert [rows[-1] for rows in seen] == [(step, "train") for step in range(1, NUM_STEPS)]


def test_the_peak_of_memory_is_logged_at_evaluations_where_devices_tell(tmp_path, monkeypatch):
    start, abstract, step_fn, _ = counter()
    hooks = [Hook(3, lambda step, state: None)]
    run(tmp_path, start, abstract, step_fn, batches(numbers), hooks=hooks)
    assert all("peak_memory" not in row for row in rows_of(tmp_path))  # a CPU does not
    devices = [types.SimpleNamespace(memory_stats=lambda peak=peak: {"peak_bytes_in_use": peak}) for peak in (7, 9, 8)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    run(tmp_path, start, abstract, step_fn, batches(numbers), stage="gpu", hooks=hooks)
    assert {row["step"]: row.get("peak_memory") for row in rows_of(tmp_path) if row["stage"] == "gpu"} == {
        step: 9.0 if step in (3, 6, NUM_STEPS) else None for step in range(1, NUM_STEPS + 1)
    }


@pytest.mark.parametrize("loss", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, loss):
    start, abstract, step_fn, _ = counter(losses=[1.0, 2.0, loss, 3.0, 4.0, 5.0, 6.0])
    words = rf"the loss is {loss} at step 3; start in another --workdir with a lower --config\.sft\.optimizer\.learning_rate$"
    with pytest.raises(UserError, match=words) as error:
        run(tmp_path, start, abstract, step_fn, batches(numbers))
    assert "\n" not in str(error.value)
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2]
    checkpoints = Checkpoints(str(tmp_path / "checkpoints"))
    assert checkpoints.restore(abstract).step == 2
    checkpoints.close()


def test_the_checkpoint_that_is_kept_after_a_gradient_that_is_not_finite_is_a_good_one(tmp_path):
    """The loss of step 4 is finite, its gradient is not; only the loss of step 5 shows it."""
    start, abstract, step_fn, _ = counter(losses=[1.0, 1.0, 1.0, 1.0, np.nan, np.nan, np.nan], poison_at=3)
    with pytest.raises(UserError):
        run(tmp_path, start, abstract, step_fn, batches(numbers))
    checkpoints = Checkpoints(str(tmp_path / "checkpoints"))
    kept = checkpoints.restore(abstract)
    checkpoints.close()
    assert np.all(np.isfinite(kept.params["w"])), f"the checkpoint of step {int(kept.step)} holds NaN"
