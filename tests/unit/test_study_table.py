"""Sparse beside dense: loss at equal FLOPs, efficiency leverage and balance, on curves with answers in closed form."""

import pathlib

import pytest
import tiny

from llmjax.report import efficiency, sections, tables
from llmjax.report.read import Run
from llmjax.results import Curve, Figure, Metric, Panel, Summary
from llmjax.stages.tuning import expert_figures

ROWS = ("Training FLOPs", "Loss at equal FLOPs (nats/token)", "Efficiency leverage (x dense)",
        "Busiest expert (load, x uniform)", "Router entropy (nats)", "Choices dropped", "Dead experts")  # fmt: skip
STAGE = "text"  # whatever an experiment calls it
LOSS = Figure("Held-out loss", (Panel("nats per token", (Curve("loss", "eval"),)),))


def make_run(name, losses, flops_per_step=1e6, active=100, train=(), every=100, figures=(LOSS,)):
    """A stage with a held-out loss every `every` steps, and training rows for the router."""
    evals = [{"step": every * (i + 1), "loss": loss} for i, loss in enumerate(losses)]
    steps = every * len(losses)
    metrics = (
        Metric("num_params", 100, "Parameters", "parameters"), Metric("num_active_params", active),
        Metric("train_flops", steps * flops_per_step, "Training FLOPs", "FLOPs"), Metric("loss", losses[-1]),
    )  # fmt: skip
    summary = Summary(STAGE, steps=steps, metrics=metrics, figures=figures)
    return Run(
        name, pathlib.Path(name), {(STAGE, "eval"): evals, (STAGE, "train"): list(train)}, {STAGE: summary}, None
    )  # fmt: skip


def router(step, loads, **values):
    named = {f"moe/load/{i}/{j}": load for i, row in enumerate(loads) for j, load in enumerate(row)}
    return {"step": step} | named | {f"moe/{name}": value for name, value in values.items()}


DENSE = make_run("dense", [4.0, 3.0, 2.5, 2.0])  # evaluated at 1, 2, 3, 4 x 1e8 FLOPs
SPARSE = make_run("moe", [3.5, 2.0, 1.5], 1e6, active=60, train=[
    *(router(step, [[0.5, 0.5], [0.5, 0.5]], entropy=0.6, dropped=0.0, dead_experts=0, max_load=1.0) for step in range(1, 19)),
    router(19, [[0.75, 0.25], [0.5, 0.5]], entropy=0.5, dropped=0.1, dead_experts=1, max_load=1.5),
    router(20, [[0.25, 0.75], [0.9, 0.1]], entropy=0.4, dropped=0.05, dead_experts=2, max_load=1.8),
], figures=(LOSS, *expert_figures(tiny.SPARSE)))  # fmt: skip


def test_curve_against_flops():
    assert efficiency.flops_curve(DENSE, STAGE) == ([1e8, 2e8, 3e8, 4e8], [4.0, 3.0, 2.5, 2.0])
    assert efficiency.flops_curve(DENSE, "another") == ([], [])
    assert efficiency.flops_curve(Run("new", pathlib.Path(), {}, {}, None), STAGE) == ([], [])


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
    assert efficiency.leverages([DENSE, SPARSE], STAGE) == [1.0, pytest.approx(4e8 / 2e8)]  # both get to 2.0
    worse = make_run("worse", [4.0, 3.0], active=60)
    assert efficiency.leverages([worse, DENSE], STAGE) == [pytest.approx(1.0), 1.0]
    dear = make_run("dear", [4.0, 2.5], 3e6, active=60)  # 2.5 at 6e8; dense at 3e8
    assert efficiency.leverages([DENSE, dear], STAGE)[1] == pytest.approx(0.5)
    assert efficiency.leverages([DENSE, make_run("easy", [1.9, 1.8], active=60)], STAGE)[1] is None
    assert efficiency.leverages([SPARSE], STAGE) == [None]


def test_equal_flops_are_those_of_the_shortest_run():
    assert efficiency.losses_at_equal_flops([DENSE, SPARSE], STAGE) == [2.5, 1.5]  # at 3e8
    assert efficiency.losses_at_equal_flops([], STAGE) == []


def test_rows_of_the_table():
    grid = tables.study_grid([DENSE, SPARSE])
    cells = {row[0]: row[1:] for _, row in grid.rows}
    assert [cells[name] for name in ROWS] == [
        ("400 M", "300 M"), ("2.50", "1.50"), ("1.00", "2.00"), ("–", "1.80"), ("–", "0.400"), ("–", "5.0 %"), ("–", "2"),
    ]  # fmt: skip
    assert cells["Parameters"] == ("100", "100") and "num_active_params" not in cells


def test_dense_runs_alone_have_none_of_them():
    labels = {row[0] for _, row in tables.study_grid([DENSE, DENSE]).rows}
    assert labels & set(ROWS) == {"Training FLOPs"}


def pictures(sections_of):
    return {figure.title: figure for figure in sections_of[0].figures}


def test_figures():
    study = pictures(sections.study_sections([DENSE, SPARSE]))
    assert list(study)[0] == "Held-out loss" and list(study)[-1] == "Held-out loss by training FLOPs"
    assert "Expert load" not in study  # of one run only
    own = pictures(sections.run_sections(SPARSE))
    assert {"Expert load", "Busiest expert", "Router entropy", "Choices dropped"} <= set(own) and "Routing change" not in own
    evals = [{"step": 200, "loss": 2.0, "moe/routing_change": 0.2}]
    kept = Run("kept", pathlib.Path(), SPARSE.metrics | {(STAGE, "eval"): evals}, SPARSE.summaries, None)
    assert "Routing change" in pictures(sections.run_sections(kept))


def test_the_busiest_expert_is_drawn_in_the_unit_that_it_is_logged_in():
    """A load of 1.8 is no share of anything."""
    svg = pictures(sections.run_sections(SPARSE))["Busiest expert"].svg
    assert "uniform" in svg and "share" not in svg


def test_what_no_token_was_dropped_of_has_no_figure():
    calm = make_run("calm", [3.0, 2.0], active=60, train=[router(1, [[0.5, 0.5]], dropped=0.0, entropy=0.6)],
                    figures=expert_figures(tiny.SPARSE))  # fmt: skip
    assert "Choices dropped" not in pictures(sections.run_sections(calm))
    assert "Choices dropped" not in pictures(sections.study_sections([DENSE, calm]))
