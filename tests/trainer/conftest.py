"""Tiny runs shared by the tests of this room."""

import pytest

from tests.storage.conftest import s3_endpoint, s3_url  # noqa: F401 - fixtures
from tests.trainer.tiny import TinyRun, make_run


@pytest.fixture(scope="session")
def hybrid_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Packed windows with hybrid targets."""
    return make_run(tmp_path_factory.mktemp("hybrid"))


@pytest.fixture(scope="session")
def hidden_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Top-k targets and two kept hidden states."""
    return make_run(tmp_path_factory.mktemp("hidden"), kind="topk", hidden=("final", "model.layers.1"))
