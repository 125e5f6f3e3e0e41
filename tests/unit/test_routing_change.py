"""How much of the routing of held-out text moves between two evaluations."""

import dataclasses

import numpy as np
import pytest
import tiny

from llmjax.evals.language import RoutingChange, changed_routes


def test_changed_routes_by_hand():
    before = np.array([[[[0, 1], [2, 3], [0, 1]]], [[[0, 1], [2, 3], [0, 1]]]])  # 2 layers, 1 row, 3 tokens, 2 choices
    after = np.array([[[[1, 0], [2, 0], [2, 3]]], [[[0, 1], [0, 1], [2, 3]]]])
    segments = np.array([[1, 2, 0]])
    # Order does not matter; the third token is padding: 0, 1/2 of the choices in the first layer, 0, 1 in the second.
    assert float(changed_routes(before, after, segments)) == pytest.approx((0 + 0.5 + 0 + 1) / 4)
    assert float(changed_routes(before, before[..., ::-1], segments)) == 0.0
    assert float(changed_routes(before, after, 0 * segments)) == 0.0


def test_from_one_evaluation_to_the_next():
    cfg = tiny.SPARSE
    batch, first, second = tiny.lm_batch(cfg, 2, 8), tiny.language_model(cfg, 0), tiny.language_model(cfg, 1)
    watch = RoutingChange(cfg, None)
    assert watch(first, batch) == {}
    assert watch(first, batch) == {"moe/routing_change": 0.0}
    there = watch(second, batch)["moe/routing_change"]
    assert 0.0 < there < 1.0
    assert watch(first, batch)["moe/routing_change"] == pytest.approx(there)  # each token has as many choices as before


@pytest.mark.parametrize("router", [None, "expert_choice", "hash"])
def test_no_choice_to_watch(router):
    moe = router and dataclasses.replace(tiny.SPARSE.moe, router=router)
    watch = RoutingChange(dataclasses.replace(tiny.SPARSE, moe=moe), None)
    assert watch(None, {}) == watch(None, {}) == {}
