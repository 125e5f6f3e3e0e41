"""Sparse beside dense: loss at equal FLOPs, efficiency leverage and balance, on curves with answers in closed form."""

import pathlib

import pytest

from llmjax.analysis import efficiency, report, runs, tables

ROWS = ("Training FLOPs", "Loss at equal FLOPs (nats/token)", "Efficiency leverage (x dense)",
        "Busiest expert (load, x uniform)", "Router entropy (nats)", "Choices dropped", "Dead experts")  # fmt: skip


def make_run(name, losses, flops_per_step=1e6, active=100, train=(), every=100):
    """Pre-training with a held-out loss every `every` steps, and training rows for the router."""
    evals = [{"step": every * (i + 1), "loss": loss} for i, loss in enumerate(losses)]
    steps = every * len(losses)
    metrics = {"num_params": 100, "num_active_params": active, "train_flops": steps * flops_per_step, "loss": losses[-1]}
    return runs.Run(
        name, pathlib.Path(name), {("pretrain", "eval"): evals, ("pretrain", "train"): list(train)},
        {"pretrain": {"steps": steps, "metrics": metrics}}, None,
    )  # fmt: skip


def router(step, loads, **values):
    named = {f"moe/load/{i}/{j}": load for i, row in enumerate(loads) for j, load in enumerate(row)}
    return {"step": step} | named | {f"moe/{name}": value for name, value in values.items()}


DENSE = make_run("dense", [4.0, 3.0, 2.5, 2.0])  # evaluated at 1, 2, 3, 4 x 1e8 FLOPs
SPARSE = make_run("moe", [3.5, 2.0, 1.5], 1e6, active=60, train=[
    *(router(step, [[0.5, 0.5], [0.5, 0.5]], entropy=0.6, dropped=0.0, dead_experts=0) for step in range(1, 19)),
    router(19, [[0.75, 0.25], [0.5, 0.5]], entropy=0.5, dropped=0.1, dead_experts=1),
    router(20, [[0.25, 0.75], [0.9, 0.1]], entropy=0.4, dropped=0.05, dead_experts=2),
])  # fmt: skip


def test_curve_against_flops():
    assert efficiency.flops_curve(DENSE) == ([1e8, 2e8, 3e8, 4e8], [4.0, 3.0, 2.5, 2.0])
    assert efficiency.flops_curve(runs.Run("new", pathlib.Path(), {}, {}, None)) == ([], [])


def test_loss_between_evaluations_is_linear_in_log_flops():
    curve = [1e8, 4e8], [4.0, 2.0]
    assert efficiency.loss_at(curve, 2e8) == pytest.approx(3.0)
    assert [efficiency.loss_at(curve, x) for x in (1e8, 4e8)] == [4.0, 2.0]
    assert efficiency.loss_at(curve, 5e8) is None and efficiency.loss_at(curve, 5e7) is None
    assert efficiency.loss_at(([1e8], [4.0]), 1e8) == 4.0 and efficiency.loss_at(([], []), 1e8) is None


def test_flops_for_a_loss_invert_the_curve():
    curve = [1e8, 4e8], [4.0, 2.0]
    assert efficiency.flops_for(curve, 3.0) == pytest.approx(2e8)
    assert [efficiency.flops_for(curve, loss) for loss in (4.0, 2.0)] == [1e8, pytest.approx(4e8)]
    assert efficiency.flops_for(curve, 1.9) is None  # not reached
    assert efficiency.flops_for(curve, 4.1) is None  # before the first evaluation
    wave = [1e8, 2e8, 3e8, 4e8], [4.0, 2.0, 3.0, 1.0]
    assert efficiency.flops_for(wave, 2.5) is None and efficiency.flops_for(wave, 1.0) == pytest.approx(4e8)
    assert efficiency.flops_for(([], []), 1.0) is None


def test_leverage_is_the_factor_of_flops_at_the_worse_final_loss():
    assert efficiency.leverages([DENSE, SPARSE]) == [1.0, pytest.approx(4e8 / 2e8)]  # both get to 2.0
    worse = make_run("worse", [4.0, 3.0], active=60)
    assert efficiency.leverages([worse, DENSE]) == [pytest.approx(1.0), 1.0]
    dear = make_run("dear", [4.0, 2.5], 3e6, active=60)  # 2.5 at 6e8; dense at 3e8
    assert efficiency.leverages([DENSE, dear])[1] == pytest.approx(0.5)
    assert efficiency.leverages([DENSE, make_run("easy", [1.9, 1.8], active=60)])[1] is None
    assert efficiency.leverages([SPARSE]) == [None]


def test_equal_flops_are_those_of_the_shortest_run():
    assert efficiency.losses_at_equal_flops([DENSE, SPARSE]) == [2.5, 1.5]  # at 3e8
    assert efficiency.losses_at_equal_flops([]) == []


def test_rows_of_the_table():
    grid = tables.study_grid([DENSE, SPARSE])
    cells = {row[0]: row[1:] for _, row in grid.rows}
    # Last tenth of 20 steps: loads 0.5, 0.5 and 0.7, 0.3 of 2 experts.
    assert [cells[name] for name in ROWS] == [
        ("400 M", "300 M"), ("2.50", "1.50"), ("1.00", "2.00"), ("–", "1.40"), ("–", "0.400"), ("–", "5.0 %"), ("–", "2"),
    ]  # fmt: skip


def test_dense_runs_alone_have_none_of_them():
    labels = {row[0] for _, row in tables.study_grid([DENSE, DENSE]).rows}
    assert labels & set(ROWS) == {"Training FLOPs"}


def test_figures(tmp_path):
    pages = report.sections
    assert "Held-out loss by training FLOPs" in [f.title for f in pages.study_sections([DENSE, SPARSE])[0].figures]
    assert tables.busiest_load(DENSE) is None
    titles = [figure.title for figure in pages.run_sections(SPARSE)[0].figures]
    assert "Choices dropped" in titles and "Routing change" not in titles
    change = {("pretrain", "eval"): [{"step": 200, "loss": 2.0, "moe/routing_change": 0.2}]}
    kept = runs.Run("kept", tmp_path, SPARSE.metrics | change, SPARSE.results, None)
    assert "Routing change" in [figure.title for figure in pages.run_sections(kept)[0].figures]
