"""What several folders of tests share."""

import os

import pytest


@pytest.fixture(scope="session")
def executed(tmp_path_factory):
    """All notebooks, executed once for all processes that pytest-xdist runs tests in."""
    from tests.templates import execute_once

    base = tmp_path_factory.getbasetemp()
    return execute_once(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)


LONG = ("book/test_book.py", "book/test_rerun.py", "cli/test_run.py")


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that no processor waits for one at the end."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONG))
