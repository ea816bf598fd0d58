"""What several folders of tests share."""

import os

import pytest


@pytest.fixture(scope="session")
def executed(tmp_path_factory):
    """All templates, executed once for all processes that pytest-xdist runs tests in."""
    from tests.templates import execute_once

    base = tmp_path_factory.getbasetemp()
    return execute_once(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)
