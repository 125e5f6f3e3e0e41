"""One whole run of each kind, made once for all tests that look at it."""

import program
import pytest


@pytest.fixture(
    scope="session", params=[pytest.param(kind, marks=pytest.mark.xdist_group(kind)) for kind in program.KINDS]
)
def finished(request, tmp_path_factory) -> program.Finished:
    """The test-sized quickstart from nothing to its report, dense and sparse. Not to be written to."""
    return program.run(request.param, tmp_path_factory.mktemp("runs") / request.param)
