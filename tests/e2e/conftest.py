"""One whole run of each kind, made once for all tests that look at it, in whichever worker they run."""

import os

import program
import pytest


@pytest.fixture(scope="session", params=["dense", pytest.param("moe", marks=pytest.mark.slow)])
def finished(request, tmp_path_factory) -> program.Finished:
    """The test-sized quickstart from nothing to its report, dense (and sparse, with -m slow). Not to be written to."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    return program.whole_run(request.param, folder / "runs")
