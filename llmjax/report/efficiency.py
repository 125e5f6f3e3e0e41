"""Sparse against dense by training FLOPs: held-out loss at equal FLOPs, and efficiency leverage, from what runs left.

The losses before the end of a run are those of a learning rate that has not decayed yet, so a run that is read off before its
end shows worse than one that was planned to end there.
"""

import math
from collections.abc import Sequence

from llmjax.report.read import Run

Curve = tuple[list[float], list[float]]  # training FLOPs, ascending; held-out loss in nats per token


def flops_curve(run: Run, stage: str) -> Curve:
    """Held-out loss of the evaluations of a stage over its training FLOPs until then; empty if these are unknown."""
    summary = run.summaries.get(stage)
    total = summary.metric("train_flops") if summary else None
    if summary is None or not total or not summary.steps:
        return [], []
    steps, losses = run.curve(stage, "eval", "loss")
    points = [(step / summary.steps * total, loss) for step, loss in zip(steps, losses, strict=True) if step > 0]
    return [flops for flops, _ in points], [loss for _, loss in points]


def loss_at(curve: Curve, budget: float) -> float | None:
    """Loss (nats/token) at `budget` FLOPs, linear in log FLOPs between evaluations; None outside of them."""
    points = list(zip(*curve, strict=True))
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x0 <= budget <= x1:
            return y0 + (y1 - y0) * math.log(budget / x0) / math.log(x1 / x0)
    return points[0][1] if points and points[0][0] == budget else None


def flops_for(curve: Curve, loss: float) -> float | None:
    """FLOPs after which the loss (nats/token) stays at `loss` or below, log FLOPs linear in loss between evaluations.

    None if the curve does not get there, was there at its first evaluation already, or rises above it again.
    """
    there = [value <= loss for value in curve[1]]
    first = there.index(True) if True in there else 0
    if not there or not all(there[first:]):
        return None
    if first == 0:
        return curve[0][0] if curve[1][0] == loss else None
    (x0, x1), (y0, y1) = (values[first - 1 : first + 1] for values in curve)
    return x0 * (x1 / x0) ** ((y0 - loss) / (y0 - y1))


def losses_at_equal_flops(runs: Sequence[Run], stage: str) -> list[float | None]:
    """Loss (nats/token) of each run at the training FLOPs of the run that has the fewest of them."""
    curves = [flops_curve(run, stage) for run in runs]
    budget = min((curve[0][-1] for curve in curves if curve[0]), default=0.0)
    return [loss_at(curve, budget) for curve in curves]


def leverages(runs: Sequence[Run], stage: str) -> list[float | None]:
    """Efficiency leverage of each run over the first one without experts (Tian et al. 2025, arXiv:2507.17702): FLOPs that the
    dense run needs for a loss, divided by those that this one needs for it. The loss is the worse of the two at their ends.
    1 for the dense run itself; None where a curve cannot be inverted there, and for all if every run has experts.
    """
    reference = next((run for run in runs if run.is_sparse(stage) is False), None)
    if reference is None:
        return [None] * len(runs)
    dense = flops_curve(reference, stage)
    return [1.0 if run is reference else _leverage(flops_curve(run, stage), dense) for run in runs]


def _leverage(curve: Curve, dense: Curve) -> float | None:
    if not curve[0] or not dense[0]:
        return None
    loss = max(curve[1][-1], dense[1][-1])
    needed, needed_dense = flops_for(curve, loss), flops_for(dense, loss)
    return needed_dense / needed if needed and needed_dense else None
