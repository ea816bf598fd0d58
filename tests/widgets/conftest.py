"""The model that the tests of the explorer share."""

import pytest


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    from tests.tiny import planted_model

    return planted_model(tmp_path_factory.mktemp("planted") / "planted")
